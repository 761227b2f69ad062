"""`--memory-budget` of the commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from command_runs import photo, run, save_tiny_model
from PIL import Image

from gpstoken_diffusers import GPSTokens
from gpstoken_diffusers.models.autoencoder_gpstoken import AutoencoderGPSToken


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "lattice")


def test_encode_and_decode_give_the_same_in_any_budget(model_folder, tmp_path, monkeypatch):
    source = photo(tmp_path / "photo.png", 100, 130)
    budgets, encode = [], AutoencoderGPSToken.encode
    monkeypatch.setattr(
        AutoencoderGPSToken, "encode", lambda self, *a, **k: budgets.append(self.memory_budget) or encode(self, *a, **k)
    )
    small, large = ["--memory-budget", "20MB"], ["--memory-budget", "2GiB"]
    for name, options in (("usual", []), ("small", small), ("large", large)):
        tokens = tmp_path / f"{name}.safetensors"
        assert run("encode", source, "-o", tokens, "--model", model_folder, "-q", *options) == 0
        decoded = tmp_path / f"{name}.png"
        assert run("decode", tokens, "-o", decoded, "--model", model_folder, "-q", *options) == 0
    assert budgets == [None, 20_000_000, 2**31]
    expected = GPSTokens.load(tmp_path / "usual.safetensors").as_tensor()
    picture = np.asarray(Image.open(tmp_path / "usual.png")).astype(int)
    for name in ("small", "large"):
        tokens = GPSTokens.load(tmp_path / f"{name}.safetensors").as_tensor()
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
        # Rounding of sums may move a value over the middle between two of 8 bits.
        assert np.abs(np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) - picture).max() <= 1


def test_reconstruct_takes_a_budget(model_folder, tmp_path):
    source = photo(tmp_path / "photo.png", 60, 70)
    options = ["--model", model_folder, "--memory-budget", "20MB", "-q"]
    assert run("reconstruct", source, "-o", tmp_path / "out", *options) == 0
    assert (tmp_path / "out" / "photo.png.png").is_file()


@pytest.mark.parametrize(
    "budget, message", [("100KB", "A memory budget of 0.1 MB is too small"), ("plenty", "'plenty'"), ("0", "one byte")]
)
def test_a_budget_that_does_not_do_is_refused(budget, message, model_folder, tmp_path, capsys):
    source, target = photo(tmp_path / "photo.png"), tmp_path / "photo.safetensors"
    assert run("encode", source, "-o", target, "--model", model_folder, "--memory-budget", budget) == 1
    error = capsys.readouterr().err
    assert error.startswith("gpstoken: error: ") and message in error
    assert not target.exists()
