"""The plots of reconstructions: what is measured for them, and that they are drawn."""

from __future__ import annotations

import csv

import plot_reconstruction
import pytest
import torch
from PIL import Image
from reconstruction_zoo import autoencoder_folders, write_pictures


@pytest.fixture
def arguments(tmp_path):
    folder = write_pictures(tmp_path / "pictures", [(110, 100)] * 2 + [(90, 70)])
    settings = ["--num_tokens", 4, 16, "--resolutions", 64, 96, "--strengths", 0, 4, "--perceptual", "none"]
    settings += ["--train_dir", folder, "--pca_crops", 8, "--device", "cpu", "--output", tmp_path / "out"]
    return [str(part) for part in (folder, "--model", autoencoder_folders() / "AutoencoderGPSToken", *settings)]


def read(path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_curves_are_measured_and_drawn(arguments, tmp_path):
    assert plot_reconstruction.main(arguments) == 0
    out = tmp_path / "out"
    for name in ("tokens", "adaptivity", "resolution"):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.width > 500 and picture.convert("L").getextrema() == (0, 255)
    rows = read(out / "tokens.csv")
    # No JPEG file is as small as 16 tokens are.
    assert [row["tokens"] for row in rows] == ["16", "", "16", "64", "", "", "64"]
    for ours, *files, pca in (rows[:3], rows[3:]):
        for file in files:
            assert float(file["bytes, coded"]) <= float(ours["bytes, coded"])
        assert ours["numbers"] == pca["numbers"]
        assert pca["method"].startswith("PCA")
    points = read(out / "adaptivity.csv")
    assert [float(point["importance strength"]) for point in points] == [0, 4]
    assert points[0]["PSNR inside, dB"] != points[1]["PSNR inside, dB"]
    table = read(out / "resolution.csv")
    # The same pictures at both: those that have 96 px.
    sizes = [(row["resolution"], row["pictures"], row["tokens"]) for row in table]
    assert sizes == [("64", "2", "24"), ("96", "2", "54")]
    assert (out / "resolution.md").read_text().count("\n") == 4


def test_the_whole_lies_between_inside_and_outside(arguments):
    args = plot_reconstruction.parse_args(arguments)
    (method,) = plot_reconstruction.load_methods(args.model, [9], "cpu")
    for point in plot_reconstruction.adaptivity_curve(method, args):
        assert min(point.inside, point.outside) <= point.whole <= max(point.inside, point.outside)


def test_the_disc_lies_in_the_middle():
    disc = plot_reconstruction.disc(101)
    assert disc.float().mean().item() == pytest.approx(torch.pi / 16, abs=0.01)
    assert disc[50, 50] and disc[50, 25] and not disc[50, 24] and not disc[20, 20]


def test_mistakes_are_named_before_anything_is_measured(arguments, tmp_path, capsys):
    cases = [
        (["--model", autoencoder_folders() / "AutoencoderTiny"], "is no GPSToken autoencoder"),
        (["--resolutions", 64, 512], "no picture of at least 512 px"),
        (["--num_tokens", 17], "can be divided into 1 to 16 regions"),
        (["--table_tokens", 17], "can be divided into 1 to 16 regions"),
    ]
    for changed, message in cases:
        assert plot_reconstruction.main([*arguments, *map(str, changed)]) == 1
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))
