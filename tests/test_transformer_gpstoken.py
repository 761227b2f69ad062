"""GPSTokenTransformerModel against the reference's generator, and as a diffusers model."""

from __future__ import annotations

import pytest
import torch
from conftest import golden
from model_zoo import load_golden

from gpstoken_diffusers import GPSTokenTransformerModel

SMALL_CONFIG = {
    "texture_channels": 16,
    "num_tokens": 128,
    "num_classes": 10,
    "hidden_size": 96,
    "num_layers": 3,
    "num_attention_heads": 4,
    "learn_sigma": True,
    "position_table": True,
}


@pytest.fixture(scope="module")
def small():
    path = golden("sit_small_weights.safetensors")
    return GPSTokenTransformerModel.from_single_file(path, config=SMALL_CONFIG)


def channels_last(latents):
    """The reference's (B, C, N, 1) as ours, (B, N, C)."""
    return latents[..., 0].transpose(1, 2)


@torch.no_grad()
def test_forward_agrees_with_the_reference(small):
    reference = load_golden("sit_small_forward.safetensors")
    latents, layout = channels_last(reference["fwd.x"]), reference["fwd.cond"]
    arguments = (latents, reference["fwd.t"], reference["fwd.y"])
    torch.testing.assert_close(
        small(*arguments, layout).sample, channels_last(reference["fwd.out"]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        small(*arguments).sample, channels_last(reference["fwd.out_no_cond"]), atol=1e-5, rtol=0
    )
