"""The evaluation script as a whole: every kind of autoencoder, every baseline, and the mistakes that it names."""

from __future__ import annotations

import csv
import json
import re

import evaluate_reconstruction
import numpy as np
import pytest
from PIL import Image
from reconstruction.judges import Judges
from reconstruction_zoo import MeanColours, MeanDifference, autoencoder_folders, tiny_autoencoders, write_pictures

TIMED = ("encoded per s", "decoded per s", "memory, MB")
OURS = "AutoencoderGPSToken"
OTHERS = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny", "VQModel")


def place(name: str) -> str:
    return str(autoencoder_folders() / name)


def evaluate(folder, *arguments, judges: Judges | None = None) -> int:
    command = [*map(str, (folder, *arguments)), "--device", "cpu", "--perceptual", "none", "--features", "none"]
    return evaluate_reconstruction.main(command, judges)


def table(folder) -> dict[tuple[str, str], dict[str, str]]:
    """Rows by resolution and method, in order."""
    with open(folder / "results.csv", encoding="utf-8", newline="") as file:
        return {(row["resolution"], row["method"]): row for row in csv.DictReader(file)}


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("photographs"), [(70, 50)] * 3 + [(40, 34)])


@pytest.fixture(scope="session")
def train(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("train"), [(90, 80)] * 2, seed=1)


@pytest.fixture(scope="session")
def whole_run(photographs, train, tmp_path_factory):
    """Every class of autoencoder and every baseline at two resolutions: the folder of the results."""
    out = tmp_path_factory.mktemp("results")
    arguments = ["--models", f"{place(OURS)}@4,16", *map(place, OTHERS), "--resolutions", 32, 48, "--cases", 1]
    arguments += ["--baselines", "shuffled", "initial", "regions", "pca", "jpeg", "webp", "jpeg:80"]
    arguments += ["--train_dir", train, "--pca_crops", 8, "--output", out]
    assert evaluate(photographs, *arguments, judges=Judges(MeanDifference(), MeanColours())) == 0
    return out


def test_all_autoencoders_are_measured_side_by_side(whole_run):
    rows = table(whole_run)
    ours = place(OURS)
    expected = []
    for tokens, patches in ((4, "16x16"), (16, "8x8")):
        baselines = [f"{ours}@{tokens}, {name}" for name in ("textures shuffled", "initial Gaussians", "region means")]
        pca = f"PCA of {patches} patches, 9 numbers"
        expected += [f"{ours}@{tokens}", *baselines, pca, f"WebP, bytes of {ours}@{tokens}"]
    for name, numbers in zip(OTHERS, (3, 4, 2, 1), strict=True):
        expected += [place(name), f"PCA of 2x2 patches, {numbers} numbers", f"WebP, bytes of {place(name)}"]
    small = [method for resolution, method in rows if resolution == "32"]
    # A JPEG file has some 600 bytes at least, and most of these codes take fewer.
    assert [method for method in small if not method.startswith("JPEG, bytes of")] == [*expected, "JPEG, quality 80"]
    for (resolution, method), row in rows.items():
        assert int(row["pictures"]) == (4 if resolution == "32" else 3)
        for name in ("PSNR, dB", "SSIM", "mean difference", "Frechet distance, mean colours", "bytes, coded"):
            assert np.isfinite(float(row[name])), (method, name)
        if name := re.match("(?:WebP|JPEG), bytes of (.*)", method):
            assert float(row["bytes, coded"]) <= float(rows[resolution, name[1]]["bytes, coded"])
            assert row["tokens"] == row["numbers"] == ""
    vq = rows["32", place("VQModel")]
    assert (vq["tokens"], vq["numbers"], vq["bytes, coded"], vq["bytes, float32"]) == ("256", "256", "160.0", "")
    assert rows["48", f"{ours}@16"]["tokens"] == "64"  # 2 x 2 tiles of 32 px


def test_the_report_says_what_was_measured(whole_run):
    text = (whole_run / "results.md").read_text()
    assert "- 32 px: centre squares of 4 photographs; 0 of the folder are smaller and left out." in text
    assert "- 48 px: centre squares of 3 photographs; 1 of the folder are smaller and left out." in text
    assert f"- Left out at 32 px: JPEG, bytes of {place(OURS)}@16: no JPEG file has only" in text
    report = json.loads((whole_run / "results.json").read_text())
    assert report["settings"]["resolutions"] == [32, 48]
    assert list(report["rows"][0]["PSNR of each picture, dB"]) == [f"{index}.png" for index in range(4)]
    sheets = sorted(whole_run.glob("cases_*.png"))
    assert len(sheets) == 2 * 6  # models only
    assert Image.open(sheets[0]).height == 26 + 2 * 32 + 6 + 26


def test_a_second_run_gives_the_same_figures_with_every_baseline_by_default(whole_run, photographs, train, tmp_path):
    for extra in ([], ["--train_dir", train, "--pca_crops", 8]):
        places = [f"{place(OURS)}@16", place("AutoencoderKL")]
        settings = ["--resolutions", 32, "--output", tmp_path, *extra]
        judges = Judges(MeanDifference(), MeanColours())
        assert evaluate(photographs, "--models", *places, *settings, judges=judges) == 0
        first, second = table(whole_run), table(tmp_path)
        methods = [method for _, method in second]
        assert [method.removeprefix(f"{places[0]}, ") for method in methods[:4]] == [
            places[0], "textures shuffled", "initial Gaussians", "region means",
        ]  # fmt: skip
        assert f"WebP, bytes of {places[1]}" in methods
        assert any(method.startswith("PCA") for method in methods) == bool(extra)
        for key, row in second.items():
            same = {name: value for name, value in row.items() if name not in TIMED}
            assert same == {name: first[key][name] for name in same}


def test_the_most_pictures_are_spread_and_damaged_ones_named(tmp_path, capsys):
    photographs = write_pictures(tmp_path / "photographs", [(70, 50)] * 5)
    whole = (photographs / "2.png").read_bytes()
    (photographs / "2.png").write_bytes(whole[: len(whole) // 2])
    (photographs / "5.png").write_bytes(b"nothing")
    arguments = ["--models", place("AutoencoderTiny"), "--baselines", "--resolutions", 32, "--output", tmp_path / "out"]
    assert evaluate(photographs, *arguments) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "out" / "results.md").read_text() + "\n"
    assert "centre squares of 4 photographs" in text
    for index in (2, 5):
        assert f"Damaged and skipped: {photographs / f'{index}.png'} (" in text
    (photographs / "2.png").write_bytes(whole)
    assert evaluate(photographs, *arguments, "--max_images", 2) == 0
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(report["rows"][0]["PSNR of each picture, dB"]) == ["0.png", "2.png"]


def test_a_grid_that_does_not_fit_is_noted(photographs, capsys):
    arguments = ["--models", f"{place(OURS)}@7", "--baselines", "pca", "--train_dir", photographs, "--resolutions", 32]
    assert evaluate(photographs, *arguments) == 0
    expected = f"No PCA beside {place(OURS)}@7: a square of 32 px cannot be cut into 7 equal patches of 9 to 6144"
    assert expected in capsys.readouterr().out


def test_what_was_measured_is_there_when_a_later_model_fails(photographs, tmp_path, capsys):
    broken = tmp_path / "broken"
    tiny_autoencoders()["AutoencoderTiny"].save_pretrained(broken)
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    places = [place("AutoencoderKL"), broken]
    settings = ["--baselines", "--resolutions", 32, "--output", tmp_path / "out"]
    assert evaluate(photographs, "--models", *places, *settings) == 1
    assert capsys.readouterr().err.count("error: ") == 1
    assert [method for _, method in table(tmp_path / "out")] == [places[0]]


def test_mistakes_are_named(photographs, tmp_path, capsys):
    ours = place(OURS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    cases = [
        ([tmp_path / "empty"], "holds no image"),
        ([tmp_path / "nowhere"], "is not a folder of images"),
        ([photographs, "--models", tmp_path / "empty"], "is a folder without a model: it has no config.json"),
        ([photographs, "--models", ours, tmp_path / "other"], "holds a model of class UNet2DModel; known are"),
        ([photographs, "--resolutions", 51], "has no picture of at least 51 px: the largest has a shorter side of 50"),
        ([photographs, "--models", f"{ours}@17", "--resolutions", 32], "can be divided into 1 to 16 regions"),
        ([photographs, "--models", place("VQModel"), "--resolutions", 33], "take a resolution that is a multiple"),
        ([photographs, "--models", place("AutoencoderDC"), "--resolutions", 33], "pictures of a multiple of 2 px"),
        ([photographs, "--baselines", "gif"], "there is no baseline gif; known are shuffled, initial, regions, pca"),
        ([photographs, "--baselines", "jpeg:101"], "the quality of jpeg must be 1 to 100, not 101"),
        ([photographs, "--baselines", "pca"], "give --train_dir"),
        ([photographs, "--models", f"{ours}@4", "--train_dir", tmp_path / "empty"], "holds no image"),
    ]
    for arguments, message in cases:
        assert evaluate(*arguments) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error, error
    for option in ("--batch_size", "--max_images", "--pca_crops", "--resolutions"):
        with pytest.raises(SystemExit):
            evaluate(photographs, option, 0)
        assert f"{option} must be at least 1" in capsys.readouterr().err
