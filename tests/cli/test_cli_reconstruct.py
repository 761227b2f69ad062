"""The command `gpstoken reconstruct`: pictures of folders, figures in tables, and going on where a run stopped."""

from __future__ import annotations

import csv
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from command_runs import names_in, odd_picture, photo, run, save_tiny_model
from model_zoo import tiny_model
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from gpstoken_diffusers.cli import codec
from gpstoken_diffusers.cli import reconstruct as reconstruction


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def tables(folder: Path) -> tuple[list[dict[str, str]], dict]:
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads((folder / "metrics.json").read_text())


def test_reconstruct_a_folder(model_folder, tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photo(photos / "a.png", seed=1)
    photo(photos / "a.jpg", 33, 31, seed=2)  # the same stem: the outputs must not collide
    photo(photos / "A.BMP", 9, 70, seed=3)  # too small for SSIM
    photo(photos / "deep" / "a.png", seed=4)
    (photos / "notes.txt").write_text("not a picture, and not named like one")
    (photos / "._a.jpg").write_bytes(b"what another system leaves behind")
    assert run("reconstruct", photos, "-o", out, "--model", model_folder) == 0
    assert names_in(out) == {"a.png.png", "a.jpg.png", "A.BMP.png", "metrics.csv", "metrics.json"}

    rows, document = tables(out)
    assert [row["file"] for row in rows] == ["A.BMP", "a.jpg", "a.png", "mean"]
    pictures = {row["file"]: row for row in document["pictures"]}
    for row in rows[:-1]:
        original = np.asarray(Image.open(photos / row["file"]).convert("RGB"))
        result = np.asarray(Image.open(out / f"{row['file']}.png"))
        assert original.shape == result.shape == (int(row["height"]), int(row["width"]), 3)
        # The figures are those of the 8-bit pictures; 1e-6: they pass through float32.
        assert float(row["psnr"]) == pytest.approx(peak_signal_noise_ratio(original, result), abs=1e-6)
        if row["file"] == "A.BMP":
            assert row["ssim"] == "" and pictures["A.BMP"]["ssim"] is None
        else:
            options = {
                "gaussian_weights": True,
                "sigma": 1.5,
                "use_sample_covariance": False,
                "channel_axis": -1,
            }
            expected = structural_similarity(original, result, **options)
            assert float(row["ssim"]) == pytest.approx(expected, abs=1e-6)
        assert pictures[row["file"]]["psnr"] == float(row["psnr"])
        assert float(row["seconds"]) > 0
    assert [int(row["tokens"]) for row in rows[:-1]] == [18, 12, 24]  # 6 for each of 3, 2 and 4 tiles
    mean = sum(float(row["psnr"]) for row in rows[:-1]) / 3
    assert float(rows[-1]["psnr"]) == document["mean"]["psnr"] == pytest.approx(mean)
    assert document["settings"]["model"] == "tiny" and document["settings"]["num_tokens"] == 6
    said = capsys.readouterr()
    assert "3 reconstructed" in said.out and f"PSNR {mean:.2f} dB" in said.out
    assert "3/3" in said.err  # the progress bar


def test_whatever_a_picture_raises_is_its_own_error(model_folder, tmp_path, capsys):
    photos = photo(tmp_path / "photos" / "a.png").parent
    odd_picture(photos / "b.dds")
    photo(photos / "c.png")
    (photos / "d.txt").touch()
    assert run("reconstruct", photos, "-o", tmp_path / "out", "--model", model_folder) == 1
    said = capsys.readouterr()
    assert "error: b.dds: " in said.err and "Unimplemented pixel format" in said.err and "Traceback" not in said.err
    assert "1 left out (another kind of file, by its name): d.txt" in said.err
    assert "2 reconstructed, 1 failed" in said.out


def test_names_and_files_of_every_kind(model_folder, tmp_path, capsys):
    """Names that are long, not in UTF-8, or act on a terminal; and in the output folder what nobody expects there."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    names = ["x" * 246 + ".png", "z" * 250 + ".png", os.fsdecode(b"caf\xe9.png"), "a\x1b[31m.png", "b.png"]
    for name in names:
        photo(photos / name, 32, 32)
    (out / "b.png.png").mkdir(parents=True)
    os.mkfifo(out / "pipe.png")
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in ((b"IHDR", b"\0\1\0\0\0\1\0\0\1\0\0\0\0"), (b"IDAT", b""), (b"IEND", b""))
    )
    (out / "bomb.png").write_bytes(bomb)
    argv = ("reconstruct", photos, "-o", out, "--model", model_folder)
    assert run(*argv) == 1
    said = capsys.readouterr()
    assert "3 reconstructed, 2 failed" in said.out and "\x1b" not in said.err + said.out
    assert said.err.count("gpstoken: error") == 2 and "File name too long" in said.err
    rows, document = tables(out)
    assert [row["file"] for row in rows] == sorted(["a\x1b[31m.png", "caf\\udce9.png", names[0]]) + ["mean"]
    assert {row["file"] for row in document["pictures"]} == {names[0], names[2], names[3]}
    (out / "b.png.png").rmdir()
    assert run(*argv) == 1
    assert "1 reconstructed, 3 done before, 1 failed" in capsys.readouterr().out


def test_tables_hold_what_the_folder_holds(model_folder, tmp_path, monkeypatch):
    """Another run writes a picture, and its tables, while this one writes its own."""
    out = tmp_path / "out"
    photo(tmp_path / "a.png")
    assert run("reconstruct", photo(tmp_path / "b.png", seed=1), "-o", tmp_path / "other", "--model", model_folder) == 0
    write = reconstruction.write_atomically

    def meanwhile(path, data):
        if not (out / "b.png.png").exists():
            (out / "b.png.png").write_bytes((tmp_path / "other" / "b.png.png").read_bytes())
        write(path, data)

    monkeypatch.setattr(reconstruction, "write_atomically", meanwhile)
    assert run("reconstruct", tmp_path / "a.png", "-o", out, "--model", model_folder) == 0
    assert [row["file"] for row in tables(out)[0]] == ["a.png", "b.png", "mean"]


def test_pictures_of_two_folders_are_kept_apart(model_folder, tmp_path, capsys):
    first, second = (photo(tmp_path / name / "1.png", seed=seed) for name, seed in (("100", 1), ("101", 2)))
    argv = ("-o", tmp_path / "out", "--model", model_folder)
    assert run("reconstruct", first, *argv) == 0
    before = (tmp_path / "out" / "1.png.png").read_bytes()
    assert run("reconstruct", second, *argv) == 1
    assert "the same name as another picture, in another folder" in capsys.readouterr().err
    assert (tmp_path / "out" / "1.png.png").read_bytes() == before
    assert run("reconstruct", tmp_path / "100", *argv) == 0  # the folder, and the picture in it
    assert "1 done before" in capsys.readouterr().out


def test_reconstruct_recursive_and_quiet(model_folder, tmp_path, capsys):
    photos = tmp_path / "photos"
    photo(photos / "a.png")
    photo(photos / "deep" / "er" / "a.png", seed=4)
    out = photos / "out"  # results below the pictures are not taken for pictures
    for _ in range(2):
        assert run("reconstruct", photos, "-o", out, "--recursive", "--model", model_folder, "--quiet") == 0
        assert names_in(out) == {"a.png.png", "deep/er/a.png.png", "metrics.csv", "metrics.json"}
    assert capsys.readouterr() == ("", "")


def test_reconstruct_files_one_by_one(model_folder, tmp_path):
    for name in ("a.png", "b.png"):
        assert run("reconstruct", photo(tmp_path / name), "-o", tmp_path / "out", "--model", model_folder) == 0
    rows, _ = tables(tmp_path / "out")
    assert [row["file"] for row in rows] == ["a.png", "b.png", "mean"]


def test_reconstruct_goes_on(model_folder, tmp_path, monkeypatch, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    for seed, name in enumerate(("a", "b", "c", "d")):
        photo(photos / f"{name}.png", 32, 32, seed=seed)
    encoded = []
    encode = codec.Codec.encode
    monkeypatch.setattr(
        codec.Codec,
        "encode",
        lambda self, path, *rest: encoded.append(path.name) or encode(self, path, *rest),
    )
    options = ("reconstruct", photos, "-o", out, "--model", model_folder)
    assert run(*options) == 0
    assert encoded == ["a.png", "b.png", "c.png", "d.png"]
    first = tables(out)

    encoded.clear()
    assert run(*options) == 0
    assert encoded == []
    assert tables(out) == first
    assert "0 reconstructed, 4 done before" in capsys.readouterr().out

    # One lost, one cut off, one whose source has changed, and one untouched; the tables are lost too.
    (out / "a.png.png").unlink()
    whole = (out / "b.png.png").read_bytes()
    (out / "b.png.png").write_bytes(whole[: len(whole) // 2])
    photo(photos / "c.png", 40, 40, seed=9)
    (out / "metrics.csv").unlink()
    (out / "metrics.json").unlink()
    untouched = (out / "d.png.png").stat().st_mtime_ns
    assert run(*options) == 0
    assert encoded == ["a.png", "b.png", "c.png"]
    assert (out / "d.png.png").stat().st_mtime_ns == untouched
    assert Image.open(out / "c.png.png").size == (40, 40)
    rows, _ = tables(out)
    unchanged = [0, 1, 3]
    assert [rows[i]["psnr"] for i in unchanged] == [first[0][i]["psnr"] for i in unchanged]

    # Results of other settings are not mixed with these, and not lost without a word.
    encoded.clear()
    for extra in (("--num-tokens", 4), ("--mode", "merge"), ("--dtype", "bfloat16")):
        assert run(*options, *extra) == 1
    assert "num_tokens 6 there, 4 now" in capsys.readouterr().err
    assert encoded == []
    assert run(*options, "--num-tokens", 4, "--overwrite") == 0
    assert encoded == ["a.png", "b.png", "c.png", "d.png"]
    assert {row["tokens"] for row in tables(out)[0][:-2]} == {"4", "16"}


def test_reconstruct_notices_other_weights(model_folder, tmp_path, capsys):
    other = tmp_path / model_folder.name  # the same name
    tiny_model("map", seed=1).save_pretrained(other)
    image = photo(tmp_path / "a.png")
    assert run("reconstruct", image, "-o", tmp_path / "out", "--model", model_folder) == 0
    assert run("reconstruct", image, "-o", tmp_path / "out", "--model", other) == 1
    assert "weights" in capsys.readouterr().err


def test_reconstruct_writes_valid_json_for_a_perfect_picture(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(codec.Codec, "decode", lambda *args: Image.open(tmp_path / "a.png"))
    photo(tmp_path / "a.png", 32, 32)
    assert run("reconstruct", tmp_path / "a.png", "-o", tmp_path / "out", "--model", model_folder) == 0
    rows, document = tables(tmp_path / "out")
    assert rows[0]["psnr"] == "inf" and document["pictures"][0]["psnr"] is None
    assert "Infinity" not in (tmp_path / "out" / "metrics.json").read_text()
