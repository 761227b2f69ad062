"""Polishing: tokens moved through the decoder to where they are decoded to the picture more closely."""

from __future__ import annotations

import pytest
import torch
from model_zoo import noise_images, tiny_model
from torch import Tensor

from gpstoken_diffusers import AutoencoderGPSToken
from gpstoken_diffusers.models import polish

KINDS = ("map", "lattice", "patch")


def errors(model: AutoencoderGPSToken, images: Tensor, **settings: int) -> Tensor:
    """Mean squared error of each picture."""
    tokens = model.encode(images, **settings).tokens
    return (model.decode(tokens).sample - images).square().mean((1, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradients", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_pictures_come_closer(kind, gradients):
    """Of one tile and of several, whether gradients are switched off around the call or not."""
    model = tiny_model(kind)
    with gradients():
        for images in (noise_images(2, 32, 32), noise_images(1, 50, 64)):
            plain, polished = errors(model, images), errors(model, images, polish_steps=10)
            # 3 to 5% are measured: six tokens cannot show noise.
            assert (polished < 0.99 * plain).all(), polished / plain
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_a_tile_is_polished_by_itself():
    model, images = tiny_model("lattice"), noise_images(2, 32, 32)
    both = model.encode(images, polish_steps=3).tokens
    alone = model.encode(images[1:], polish_steps=3).tokens
    # Batched matrix products of the encoder may sum in another order.
    torch.testing.assert_close(both[1].as_tensor(), alone.as_tensor(), rtol=1e-3, atol=1e-4)
    plain = model.encode(images).tokens
    assert (both.geometry != plain.geometry).any() and (both.texture != plain.texture).any()
    both.validate()


def test_no_tile_gets_worse(monkeypatch):
    """Where steps are far too large, the start is kept, tile by tile: the second lies right already."""
    generator = torch.Generator().manual_seed(0)
    geometry = torch.tensor([0.1, 0.2, 0.0, 0.3, -0.4]).expand(3, 4, 5)
    texture = torch.randn(3, 4, 2, generator=generator)
    targets = texture.mean((1, 2)) + torch.tensor([0.1, 0.0, 1e3])

    def decode(geometry: Tensor, texture: Tensor) -> Tensor:
        return (texture.mean((1, 2)) + 0 * geometry.sum((1, 2))).view(3, 1, 1, 1)

    monkeypatch.setattr(polish, "RATES", (50.0, 100.0))
    found = polish.polish_tiles(decode, targets.view(3, 1, 1, 1), geometry, texture, 1, lambda step: None)
    for own, start in zip(found, (geometry, texture), strict=True):
        # Through logits and back: 6e-8 of a number up to 2.
        torch.testing.assert_close(own[:2], start[:2], rtol=0, atol=1e-6)
    assert (found[1][2] != texture[2]).all()


def test_the_dtype_stays():
    model = tiny_model("lattice").bfloat16()
    tokens = model.encode(noise_images(1, 32, 32).bfloat16(), polish_steps=1).tokens
    assert tokens.dtype == torch.bfloat16 and not tokens.texture.requires_grad


def test_progress_counts_steps_and_ends_the_call():
    model, images, shares = tiny_model("lattice"), noise_images(1, 32, 64), []
    model.encode(images, polish_steps=2, progress=shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]

    def cancel(share: float) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        model.encode(images, polish_steps=2, progress=cancel)


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        tiny_model("lattice").encode(noise_images(1, 32, 32), polish_steps=-1)
