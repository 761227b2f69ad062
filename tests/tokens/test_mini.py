"""The shipped model on real photographs that it was not trained on."""

from __future__ import annotations

import pytest
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor, GPSTokens
from gpstoken_diffusers.assets import MINI, MINI_PIPELINE
from gpstoken_diffusers.evaluation.metrics import psnr


@pytest.fixture(scope="module")
def mini():
    return AutoencoderGPSToken.from_pretrained(MINI).eval()


@pytest.fixture(scope="module")
def processor():
    return GPSTokenImageProcessor.from_pretrained(MINI)


def photograph(height: int, width: int) -> Image.Image:
    """A window of scikit-image's coffee cup (400 x 600), scaled to the size asked for."""
    return Image.fromarray(skimage.data.coffee()).resize((width, height), Image.Resampling.LANCZOS)


def reconstruct(mini, processor, image: Image.Image, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    features = processor(image, **kwargs)
    with torch.no_grad():
        sample = mini.decode(mini.encode(**features).tokens).sample
    return features["pixel_values"], sample.clamp(-1, 1)


def test_it_is_small_and_says_where_it_comes_from():
    files = {path.name: path.stat().st_size for path in MINI.iterdir()}
    assert files["diffusion_pytorch_model.safetensors"] <= 24e6
    card = (MINI_PIPELINE / "README.md").read_text(encoding="utf-8")
    for part in ("licence", "endless-sky", "PSNR", "examples/train/train_autoencoder.py"):
        assert part in card
    assert "_name_or_path" not in (MINI / "config.json").read_text()


def test_a_photograph_comes_back(mini, processor):
    pixels, sample = reconstruct(mini, processor, photograph(256, 256))
    # A floor well below what the model card says of such pictures, and far above painting regions with their means.
    assert psnr(sample, pixels).item() > 23


def test_more_tokens_are_better(mini, processor):
    scores = []
    for count in (32, 128, 512):
        pixels, sample = reconstruct(mini, processor, photograph(256, 256), num_tokens=count)
        scores.append(psnr(sample, pixels).item())
    assert scores[0] + 1 < scores[1] < scores[2] - 0.5


@torch.no_grad()
def test_texture_and_geometry_matter(mini, processor):
    features = processor(photograph(256, 256))
    output = mini.encode(**features)
    tokens = output.tokens
    shuffled = tokens.texture[:, torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    variants = {
        "whole": tokens,
        "shuffled": GPSTokens(tokens.geometry, shuffled, (256, 256)),
        "frozen": GPSTokens(output.initial_tokens.geometry, tokens.texture, (256, 256)),
    }
    pixels = features["pixel_values"]
    score = {name: psnr(mini.decode(t).sample.clamp(-1, 1), pixels).item() for name, t in variants.items()}
    assert score["shuffled"] < score["whole"] - 5
    assert score["frozen"] < score["whole"]


@pytest.mark.parametrize("size", [(640, 384), (300, 500), (257, 255), (100, 70), (512, 512)])
def test_padding_and_tile_borders_do_not_show(mini, processor, size):
    """The error beside the image's right and bottom edge, and along tile borders, is that of elsewhere."""
    pixels, sample = reconstruct(mini, processor, photograph(*size))
    error = (sample - pixels).square().mean(dim=(0, 1))
    height, width = size
    edge = torch.zeros(size, dtype=torch.bool)
    edge[-6:] = edge[:, -6:] = True  # where the padding begins
    opposite = torch.zeros(size, dtype=torch.bool)
    opposite[:6] = opposite[:, :6] = True  # edges that were not padded
    # Padding shows as an error several times that of an edge without it; the picture's own content differs by less.
    assert error[edge].mean() < 3 * torch.maximum(error[opposite].mean(), error.mean())
    # A seam is a step of the error signal across a tile's border that is larger than steps elsewhere.
    signal = (sample - pixels).mean(dim=(0, 1))
    for axis, length in ((0, height), (1, width)):
        steps = signal.diff(dim=axis).abs().mean(dim=1 - axis)
        for border in range(256, length, 256):
            assert steps[border - 1] < 2.5 * steps.median()


@torch.no_grad()
def test_importance_sharpens_what_it_marks(mini, processor):
    image = photograph(256, 256)
    mask = torch.zeros(256, 256)
    mask[96:160, 96:160] = 1
    inside = []
    for strength in (0.0, 4.0):
        pixels, sample = reconstruct(mini, processor, image, importance=mask, importance_strength=strength)
        error = (sample - pixels)[..., 96:160, 96:160].square().mean()
        inside.append(10 * torch.log10(4 / error).item())
    assert inside[1] > inside[0] + 0.5


@torch.no_grad()
def test_half_precision_costs_little(mini, processor):
    features = processor(photograph(256, 256))
    expected = mini(features["pixel_values"]).sample
    for dtype, floor in ((torch.bfloat16, 36), (torch.float16, 50)):
        model = AutoencoderGPSToken.from_pretrained(MINI, torch_dtype=dtype)
        sample = model(features["pixel_values"].to(dtype)).sample.float()
        # 8 and 11 bits of mantissa: far below the reconstruction error itself (about 26 dB).
        assert psnr(F.hardtanh(sample), F.hardtanh(expected)).item() > floor
