"""Runs of the command `gpstoken` cut short by Ctrl-C or a full disk: no file is half written, a second run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_runs import photo, save_tiny_model
from PIL import Image

from gpstoken_diffusers import cli
from gpstoken_diffusers.cli import reconstruct as reconstruction

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "lattice")


def test_a_full_disk_ends_the_run(model_folder, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "cannot write the file (No space left on device)", str(args[0]))

    monkeypatch.setattr(reconstruction, "write_picture", lambda picture, path, texts: full(path))
    photo(tmp_path / "photos" / "a.png")
    photo(tmp_path / "photos" / "b.png")
    argv = [
        "reconstruct",
        str(tmp_path / "photos"),
        "-o",
        str(tmp_path / "out"),
        "--model",
        str(model_folder),
    ]
    assert cli.main([*argv, "--quiet"]) == 1
    err = capsys.readouterr().err
    assert err.count("gpstoken: error") == 1 and "a.png.png: cannot write the file (No space" in err


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process on Windows")
def test_ctrl_c_in_the_middle_of_a_folder(model_folder, tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    names = [photo(photos / f"{number:02}.png", 96, 96, seed=number).name for number in range(24)]
    argv = ["reconstruct", str(photos), "-o", str(out), "--model", str(model_folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "gpstoken_diffusers", *argv],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background may have been told to ignore SIGINT; children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and len(list(out.glob("[!.]*.png.png"))) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.endswith("gpstoken: interrupted\n") and "Traceback" not in err

    # Finished files are whole, the rest is absent, nothing temporary is left, and the tables fit.
    finished = sorted(path.name.removesuffix(".png") for path in out.glob("*.png"))
    assert 2 <= len(finished) < len(names)
    assert {path.name for path in out.iterdir()} == {
        "metrics.csv", "metrics.json", *(f"{name}.png" for name in finished),
    }  # fmt: skip
    for name in finished:
        assert np.asarray(Image.open(out / f"{name}.png")).shape == (96, 96, 3)
    before = json.loads((out / "metrics.json").read_text())["pictures"]
    assert [row["file"] for row in before] == finished

    # A second run does the rest, and only that.
    times = {name: (out / f"{name}.png").stat().st_mtime_ns for name in finished}
    assert cli.main(argv) == 0
    expected = f"{len(names) - len(finished)} reconstructed, {len(finished)} done before"
    assert expected in capsys.readouterr().out
    assert {name: (out / f"{name}.png").stat().st_mtime_ns for name in finished} == times
    after = json.loads((out / "metrics.json").read_text())["pictures"]
    assert [row["file"] for row in after] == names
    assert after[: len(before)] == before


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt even where the test run was started with SIGINT ignored, as in a background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_no_half_written_file(model_folder, tmp_path, monkeypatch, interruptible):
    image = photo(tmp_path / "photo.png")
    monkeypatch.setattr("gpstoken_diffusers.safe_files.os.fsync", lambda *args: signal.raise_signal(signal.SIGINT))
    argv = [str(image), "-o", str(tmp_path / "out"), "--model", str(model_folder)]
    assert cli.main(["reconstruct", *argv, "--quiet"]) == 130
    assert list((tmp_path / "out").iterdir()) == []
    argv[2] = str(tmp_path / "t.safetensors")
    assert cli.main(["encode", *argv]) == 130
    assert {path.name for path in tmp_path.iterdir()} == {"photo.png", "out"}
