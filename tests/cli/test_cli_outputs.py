"""What a command writes over, and what it refuses before any work."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from command_runs import names_in, photo, run, save_tiny_model
from PIL import Image

from gpstoken_diffusers import GPSTokens
from gpstoken_diffusers.visualization import panel


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "lattice")


@pytest.fixture
def tokens(model_folder, tmp_path) -> Path:
    assert run("encode", photo(tmp_path / "a.png"), "-o", tmp_path / "a.safetensors", "--model", model_folder) == 0
    return tmp_path / "a.safetensors"


def test_weights_are_not_written_over(model_folder, tmp_path, capsys):
    weights = model_folder / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    image = photo(tmp_path / "photos" / "a.png")
    assert run("encode", image, "-o", weights, "--model", model_folder) == 1
    assert "is there and holds no tokens: it is kept" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png.safetensors").write_bytes(before)
    argv = ("encode", image.parent, "-o", tmp_path / "out", "--model", model_folder, "--num-workers", 0)
    assert run(*argv, "--overwrite") == 1
    assert weights.read_bytes() == (tmp_path / "out" / "a.png.safetensors").read_bytes() == before
    assert run("convert", weights, "-o", model_folder, "--overwrite") == 1
    assert "holds the checkpoint itself" in capsys.readouterr().err and weights.read_bytes() == before


def test_files_links_and_other_things_in_the_way(tokens, model_folder, tmp_path, capsys):
    """One that is read-only is kept, what a link leads to is written, and a pipe or device is none of ours."""
    locked, link, real, pipe = (tmp_path / name for name in ("locked.png", "link.png", "real.png", "pipe.png"))
    locked.write_bytes(b"mine")
    locked.chmod(0o444)
    real.write_bytes(b"old")
    link.symlink_to(real)
    os.mkfifo(pipe)
    argv = ("decode", tokens, "--model", model_folder, "-o")
    assert run(*argv, locked) == 1 and locked.read_bytes() == b"mine"
    assert run(*argv, pipe) == 1 and pipe.is_fifo()
    err = capsys.readouterr().err
    assert "locked.png: cannot write the file (it is read-only)" in err and "something else has its name" in err
    assert run(*argv, link) == 0
    assert link.is_symlink() and Image.open(real).size == (56, 40)


@pytest.mark.parametrize("suffix, width", [("jpg", 70_000), ("webp", 20_000)])
def test_limits_of_formats_are_told_before_the_work(tokens, tmp_path, capsys, suffix, width):
    assert run("decode", tokens, "-o", tmp_path / f"x.{suffix}", "--width", width, "--model", "nowhere") == 1
    assert f"would have {width} x" in capsys.readouterr().err  # and not that there is no such model


def test_a_failed_run_leaves_no_folders(tmp_path, capsys):
    image = photo(tmp_path / "a.png")
    assert run("reconstruct", image, "-o", tmp_path / "x" / "y", "--model", "nowhere") == 1
    assert run("encode", image, "-o", tmp_path / "x" / "a.safetensors", "--model", "nowhere") == 1
    (tmp_path / "mine").mkdir()
    assert run("reconstruct", image, "-o", tmp_path / "mine", "--model", "nowhere") == 1
    assert names_in(tmp_path) == {"a.png"} and (tmp_path / "mine").is_dir() and not (tmp_path / "x").exists()


def test_a_pipe_is_an_input(model_folder, tmp_path):
    image = photo(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(image.read_bytes()), daemon=True)
    writer.start()
    assert run("encode", tmp_path / "pipe", "-o", tmp_path / "a.safetensors", "--model", model_folder) == 0
    assert GPSTokens.load(tmp_path / "a.safetensors").image_size == (40, 56)


def test_tokens_of_one_picture_are_the_same_bytes(tokens, model_folder, tmp_path):
    assert run("encode", tmp_path / "a.png", "-o", tmp_path / "b.safetensors", "--model", model_folder) == 0
    loaded = GPSTokens.load(tokens)
    for name in ("c", "d"):
        loaded.save(tmp_path / name, {"model": "é", "b": "2", "c": "3", "a": "1"}, dtype="uint8")
    assert (tmp_path / "c").read_bytes() == (tmp_path / "d").read_bytes()
    assert GPSTokens.read_metadata(tmp_path / "c")["model"] == "é"
    first, second = (path.read_bytes()[:400].split(b'"geometry":')[0] for path in (tokens, tmp_path / "b.safetensors"))
    assert first == second


def test_what_a_file_says_does_not_act_on_the_terminal(tokens, model_folder, tmp_path, capsys):
    GPSTokens.load(tokens).save(tmp_path / "odd.safetensors", {"model": "\x1b[2J\rnone"})
    assert run("decode", tmp_path / "odd.safetensors", "-o", tmp_path / "x.png", "--model", model_folder) == 0
    err = capsys.readouterr().err
    assert "was encoded by \\x1b[2J\\rnone" in err and "\x1b" not in err


def test_several_pages_are_told_and_quiet_is_quiet(model_folder, tmp_path, capsys):
    pages = [Image.effect_noise((40, 40), 50) for _ in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    argv = ("encode", tmp_path / "pages.tif", "-o", tmp_path / "a.safetensors", "--model", model_folder)
    assert run(*argv) == 0
    assert "pages.tif holds 3 pages or frames: the first is taken" in capsys.readouterr().err
    assert run(*argv, "-q") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("options", [("--guidance", "nan"), ("--layout-guidance", "inf"), ("--guidance", "much")])
def test_guidance_is_a_number(tmp_path, capsys, options):
    assert run("generate", *options, "-o", tmp_path / "x.png") == 2
    assert "expected a number" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_wide_panels_are_bounded():
    columns = [("a wide picture", Image.new("RGB", (1024, 2)))] * 4
    assert panel(columns, "PSNR").width < 5000
    assert panel([("small", Image.new("RGB", (8, 8)))]).height > 256  # still enlarged
    assert panel([("large", Image.new("RGB", (3000, 500)))]).width > 3000  # and none is made smaller
