"""Tokens that several test files use."""

from __future__ import annotations

import torch

from gpstoken_diffusers.tokens import SIGMA, GPSTokens

GEOMETRY, TEXTURE = torch.full((1, 6, 5), 0.5), torch.zeros(1, 6, 2)


def make_tokens(batch=2, count=12, channels=3, dtype=torch.float32, **fields) -> GPSTokens:
    generator = torch.Generator().manual_seed(batch * 1000 + count)
    uniform = torch.rand(batch, count, 5, generator=generator)
    geometry = uniform * 1.8 - 0.9
    geometry[..., SIGMA] = 0.01 + 0.5 * uniform[..., SIGMA]
    texture = torch.randn(batch, count, channels, generator=generator).to(dtype)
    return GPSTokens(geometry, texture, **({"image_size": (48, 64)} | fields))


def assert_same(a: GPSTokens, b: GPSTokens) -> None:
    assert torch.equal(a.geometry, b.geometry)
    assert torch.equal(a.texture, b.texture) and a.texture.dtype == b.texture.dtype
    assert (a.image_size, a.tile_grid, a.canvas_size) == (b.image_size, b.tile_grid, b.canvas_size)
