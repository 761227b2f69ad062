"""The command `gpstoken generate`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_zoo import tiny_pipeline

from gpstoken_diffusers.cli import arguments, main
from gpstoken_diffusers.schedulers.presets import SAMPLER_PRESETS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "pipeline"
    tiny_pipeline().save_pretrained(path)
    return path


def generate(folder, output, *more):
    return main(["generate", "--model", str(folder), "-o", str(output), "--device", "cpu", "-q", *map(str, more)])


def cells(path, size=32, gap=4):
    """The pictures of a grid, row by row."""
    sheet = np.asarray(Image.open(path))
    step = size + gap
    return [
        sheet[gap + row * step :][:size, gap + column * step :][:, :size]
        for row in range(sheet.shape[0] // step)
        for column in range(sheet.shape[1] // step)
    ]


def test_sampler_names_are_those_of_the_presets():
    assert set(arguments.SAMPLERS) == set(SAMPLER_PRESETS)  # spelled out there, to import nothing


def test_a_grid_of_pictures(folder, tmp_path):
    assert generate(folder, tmp_path / "a.png", "--label", "food", "-n", 5, "--steps", 2, "--seed", 3) == 0
    first = cells(tmp_path / "a.png")
    assert len(first) == 6 and np.all(first[5] == 255)  # three columns, and nothing in the sixth place
    assert generate(folder, tmp_path / "b.png", "--label", "1", "-n", 1, "--steps", 2, "--seed", 4) == 0
    # Seed 4 is the second picture of the run that began with 3: the same up to rounding to 8 bits.
    alone = cells(tmp_path / "b.png")[0]
    assert np.abs(alone.astype(int) - first[1].astype(int)).max() <= 1
    assert np.abs(first[0].astype(int) - first[1].astype(int)).max() > 8


def test_layout_of_a_picture_sampler_and_tokens(folder, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)).save(tmp_path / "in.png")
    options = ("--layout", tmp_path / "in.png", "--sampler", "heun", "--steps", 2, "-n", 2, "--num-tokens", 9)
    assert generate(folder, tmp_path / "out.jpg", *options) == 0
    assert Image.open(tmp_path / "out.jpg").size == (2 * 36 + 4, 40)


def test_labels_are_listed(folder, capsys):
    assert main(["generate", "--model", str(folder), "--list-labels"]) == 0
    printed = capsys.readouterr().out
    assert "Food & Drink" in printed and printed.split()[0] == "0"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--label", "Foot"], "There is no class 'Foot'. Did you mean 'Food & Drink'"),
        (["--label", "7"], "from 0 to 2"),
        (["-n", "0"], "make at least 1"),
        (["--steps", "0"], "at least 1"),
        (["--sampler", "euler_a"], "There is no sampler 'euler_a'"),
        (["--guidance", "-2"], "must be at least 0"),
        (["--layout", "nowhere.png"], "nowhere.png"),
        (["--num-tokens", "99"], "16"),
        (["--output", "grid.gif"], "must end in one of"),
        (["--model", "nowhere"], "no pipeline at nowhere"),
    ],
)
def test_mistakes_are_named_and_write_nothing(folder, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    command = ["generate", "--model", str(folder), "-o", "out.png", "--device", "cpu", "-q", *options]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_a_tokenizer_alone_is_not_enough(folder, capsys):
    assert main(["generate", "--model", str(folder / "autoencoder"), "--list-labels"]) == 1
    assert "autoencoder" in capsys.readouterr().err


def test_the_networks_run_in_the_asked_precision(folder, tmp_path, monkeypatch):
    from gpstoken_diffusers.pipelines.pipeline_gpstoken import GPSTokenPipeline

    seen = []
    call = GPSTokenPipeline.__call__
    monkeypatch.setattr(
        GPSTokenPipeline, "__call__", lambda self, *a, **k: seen.append(self.transformer.dtype) or call(self, *a, **k)
    )
    assert generate(folder, tmp_path / "half.png", "--dtype", "bfloat16", "--steps", 1, "-n", 1) == 0
    assert seen == [torch.bfloat16]
