"""The evaluation script as a whole: every kind of autoencoder, every baseline, and the mistakes that it names."""

from __future__ import annotations

import csv
import json
import math
import re

import numpy as np
import pytest
from model_zoo import tiny_model
from PIL import Image
from reconstruction_zoo import made_up_judges, tiny_autoencoders, write_pictures  # first: examples become importable

# isort: split
import evaluate_reconstruction

TIMED = ("encoded per s", "decoded per s", "memory, MB")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder per class of autoencoder."""
    root = tmp_path_factory.mktemp("autoencoders")
    for name, model in {**tiny_autoencoders(), "AutoencoderGPSToken": tiny_model("lattice")}.items():
        model.save_pretrained(root / name)
    return root


@pytest.fixture
def photographs(tmp_path):
    return write_pictures(tmp_path / "photographs", [(70, 50)] * 4 + [(40, 34)])


@pytest.fixture
def train(tmp_path):
    return write_pictures(tmp_path / "train", [(90, 80)] * 2, seed=1)


def command(folder, *arguments) -> list[str]:
    return [*map(str, (folder, *arguments)), "--device", "cpu", "--perceptual", "none", "--features", "none"]


def table(folder) -> list[dict[str, str]]:
    with open(folder / "results.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_all_autoencoders_are_measured_side_by_side(models, photographs, train, tmp_path, capsys):
    ours, out = models / "AutoencoderGPSToken", tmp_path / "out"
    others = [models / name for name in ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny", "VQModel")]
    arguments = ["--models", f"{ours}@4,16", *others, "--baselines", "webp", "pca", "jpeg:80", "--output", out]
    settings = ["--resolutions", 32, 48, "--train_dir", train, "--pca_crops", 8, "--cases", 1]
    assert evaluate_reconstruction.main(command(photographs, *arguments, *settings), made_up_judges()) == 0
    rows = table(out)
    at_32 = {row["method"]: row for row in rows if row["resolution"] == "32"}
    assert list(at_32) == [
        f"{ours}@4",
        f"WebP, bytes of {ours}@4",
        "PCA of 16x16 patches, 9 numbers",
        f"{ours}@16",
        f"WebP, bytes of {ours}@16",
        "PCA of 8x8 patches, 9 numbers",
        *(
            method
            for place, patches in zip(others, (3, 4, 2, 1), strict=True)
            for method in (str(place), f"WebP, bytes of {place}", f"PCA of 2x2 patches, {patches} numbers")
        ),
        "JPEG, quality 80",
    ]
    for row in rows:
        assert int(row["pictures"]) == (5 if row["resolution"] == "32" else 4)
        for name in ("PSNR, dB", "SSIM", "mean difference", "Frechet distance, mean colours", "bytes, coded"):
            assert np.isfinite(float(row[name])), (row["method"], name)
        if name := re.match("WebP, bytes of (.*)", row["method"]):
            (own,) = (r for r in rows if r["method"] == name[1] and r["resolution"] == row["resolution"])
            assert float(row["bytes, coded"]) <= float(own["bytes, coded"])
            assert row["tokens"] == row["numbers"] == ""
    vq = at_32[str(models / "VQModel")]
    assert (vq["tokens"], vq["numbers"], vq["bytes, coded"], vq["bytes, float32"]) == ("256", "256", "160.0", "")
    at_48 = {row["method"]: row for row in rows if row["resolution"] == "48"}
    assert at_48[f"{ours}@16"]["tokens"] == "64"  # 2 x 2 tiles of 32 px

    text = (out / "results.md").read_text()
    assert text in capsys.readouterr().out
    assert "- 32 px: centre squares of 5 photographs; 0 of the folder are smaller and left out." in text
    assert "- 48 px: centre squares of 4 photographs; 1 of the folder are smaller and left out." in text
    report = json.loads((out / "results.json").read_text())
    assert report["settings"]["resolutions"] == [32, 48]
    assert list(report["rows"][0]["PSNR of each picture, dB"]) == [f"{index}.png" for index in range(5)]
    sheets = sorted(path.name for path in out.glob("cases_*.png"))
    assert len(sheets) == 2 * 6  # models only
    assert Image.open(out / sheets[0]).height == 26 + 2 * 32 + 6 + 26


def test_every_baseline_stands_beside_ours_by_default(models, photographs, tmp_path, capsys):
    place = str(models / "AutoencoderGPSToken")
    arguments = command(photographs, "--models", f"{place}@16", "--resolutions", 32, "--output", tmp_path / "out")
    assert evaluate_reconstruction.main(arguments) == 0
    assert [row["method"].removeprefix(f"{place}@16, ") for row in table(tmp_path / "out")] == [
        f"{place}@16",
        "textures shuffled",
        "initial Gaussians",
        "region means",
        f"WebP, bytes of {place}@16",
    ]
    # A JPEG file has some 600 bytes at least, and these tokens take fewer.
    assert f"- Left out at 32 px: JPEG, bytes of {place}@16: no JPEG file has only" in capsys.readouterr().out
    args = evaluate_reconstruction.parse_args([*arguments, "--train_dir", str(photographs), "--pca_crops", "8"])
    *_, results = evaluate_reconstruction.Evaluation(args).run()
    methods = [row.method for row in results.rows]
    assert methods[4] == "PCA of 8x8 patches, 9 numbers"
    assert len(methods) == 6


def test_figures_are_the_same_on_every_run(models, photographs, tmp_path):
    tables = []
    for name in ("one", "two"):
        places = [models / "AutoencoderGPSToken", models / "AutoencoderKL"]
        settings = ["--train_dir", photographs, "--pca_crops", 8, "--resolutions", 32, "--output", tmp_path / name]
        assert evaluate_reconstruction.main(command(photographs, "--models", *places, *settings)) == 0
        tables.append([{key: row[key] for key in row if key not in TIMED} for row in table(tmp_path / name)])
    assert tables[0] == tables[1]


def test_the_most_pictures_are_spread_and_damaged_ones_named(models, photographs, tmp_path, capsys):
    whole = (photographs / "2.png").read_bytes()
    (photographs / "2.png").write_bytes(whole[: len(whole) // 2])
    (photographs / "5.png").write_bytes(b"nothing")
    place = models / "AutoencoderTiny"
    arguments = ["--models", place, "--baselines", "--resolutions", 32, "--output", tmp_path / "out"]
    assert evaluate_reconstruction.main(command(photographs, *arguments)) == 0
    assert [row["pictures"] for row in table(tmp_path / "out")] == ["4"]
    text = capsys.readouterr().out
    assert "centre squares of 4 photographs" in text
    for index in (2, 5):
        assert f"Damaged and skipped: {photographs / f'{index}.png'} (" in text
    (photographs / "2.png").write_bytes(whole)
    assert evaluate_reconstruction.main(command(photographs, *arguments, "--max_images", 2)) == 0
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(report["rows"][0]["PSNR of each picture, dB"]) == ["0.png", "2.png"]


def test_a_grid_that_does_not_fit_is_told_of(models, photographs, capsys):
    place = models / "AutoencoderGPSToken"
    arguments = ["--models", f"{place}@7", "--baselines", "pca", "--train_dir", photographs, "--resolutions", 32]
    assert evaluate_reconstruction.main(command(photographs, *arguments)) == 0
    expected = f"No PCA beside {place}@7: a square of 32 px cannot be cut into 7 equal patches of 9 to 6144 numbers."
    assert expected in capsys.readouterr().out


def mistakes(models, photographs, tmp_path):
    ours = models / "AutoencoderGPSToken"
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    return [
        ([tmp_path / "empty"], "holds no image"),
        ([tmp_path / "nowhere"], "is not a folder of images"),
        ([photographs, "--models", tmp_path / "empty"], "is a folder without a model: it has no config.json"),
        ([photographs, "--models", ours, tmp_path / "other"], "holds a model of class UNet2DModel; known are"),
        ([photographs, "--resolutions", 51], "has no picture of at least 51 px: the largest has a shorter side of 50"),
        ([photographs, "--models", f"{ours}@17", "--resolutions", 32], "can be divided into 1 to 16 regions"),
        ([photographs, "--models", models / "VQModel", "--resolutions", 33], "take a resolution that is a multiple"),
        ([photographs, "--models", models / "AutoencoderDC", "--resolutions", 33], "pictures of a multiple of 2 px"),
        ([photographs, "--baselines", "gif"], "there is no baseline gif; known are shuffled, initial, regions, pca"),
        ([photographs, "--baselines", "jpeg:101"], "the quality of jpeg must be 1 to 100, not 101"),
        ([photographs, "--baselines", "pca"], "give --train_dir"),
        (
            [photographs, "--models", f"{ours}@4", "--resolutions", 32, "--train_dir", tmp_path / "empty"],
            "holds no image",
        ),
    ]


def test_what_was_measured_is_there_when_a_later_model_fails(models, photographs, tmp_path, capsys):
    broken = tmp_path / "broken"
    tiny_autoencoders()["AutoencoderTiny"].save_pretrained(broken)
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    places = [models / "AutoencoderKL", broken]
    arguments = ["--models", *places, "--baselines", "--resolutions", 32, "--output", tmp_path / "out"]
    assert evaluate_reconstruction.main(command(photographs, *arguments)) == 1
    assert capsys.readouterr().err.count("error: ") == 1
    assert [row["method"] for row in table(tmp_path / "out")] == [str(places[0])]


def test_mistakes_are_named(models, photographs, tmp_path, capsys):
    for arguments, message in mistakes(models, photographs, tmp_path):
        assert evaluate_reconstruction.main(command(*arguments)) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error, error


@pytest.mark.parametrize("option", ["--batch_size", "--max_images", "--pca_crops", "--resolutions"])
def test_numbers_below_one_are_refused(option, photographs, capsys):
    with pytest.raises(SystemExit):
        evaluate_reconstruction.main(command(photographs, option, 0))
    assert f"{option} must be at least 1" in capsys.readouterr().err


def test_infinite_figures_are_written_as_such(models, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_reconstruction.InitialGaussians, "encode", lambda self, images, places: images)
    monkeypatch.setattr(evaluate_reconstruction.InitialGaussians, "decode", lambda self, code: code)
    cost = evaluate_reconstruction.FileFormat("jpeg", 1).cost
    files = type("Files", (), {"contents": [b""] * 5})
    monkeypatch.setattr(evaluate_reconstruction.InitialGaussians, "cost", lambda self, code: cost(files))
    arguments = ["--models", models / "AutoencoderGPSToken", "--baselines", "initial", "--resolutions", 32]
    settings = ["--batch_size", 5, "--output", tmp_path / "out"]
    assert evaluate_reconstruction.main(command(photographs, *arguments, *settings)) == 0
    assert float(table(tmp_path / "out")[1]["PSNR, dB"]) == math.inf
    assert "| inf | 1.000 |" in (tmp_path / "out" / "results.md").read_text()
    assert '"PSNR, dB": "inf"' in (tmp_path / "out" / "results.json").read_text()
