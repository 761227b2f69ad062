"""Tokens that several test files use."""

from __future__ import annotations

import torch

from gpstoken_diffusers.tokens import SIGMA, GPSTokens

SIZE = (48, 80)  # height, width: angles must be right in pictures that are not square
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


def random_tokens(batch=2, count=12, channels=3, seed=0, **fields) -> GPSTokens:
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(batch, count, 5, generator=generator)
    geometry = torch.cat([0.02 + 0.1 * uniform[..., :2], 1.6 * uniform[..., 2:] - 0.8], dim=-1)
    texture = torch.randn(batch, count, channels, generator=generator)
    return GPSTokens(geometry, texture, **({"image_size": SIZE} | fields))


def every(tokens: GPSTokens) -> torch.Tensor:
    return torch.ones(tokens.num_tokens, dtype=torch.bool)


def centers_px(tokens: GPSTokens) -> torch.Tensor:
    height, width = tokens.canvas_size
    return (tokens.geometry[..., 3:] + 1) / 2 * torch.tensor([width - 1, height - 1])


def touched_px(mini, *versions: GPSTokens, changed: torch.Tensor) -> torch.Tensor:
    """(H, W): pixels that the changed tokens can reach, before or after: box, blur, convolutions."""
    upscale, (height, width) = mini.decoder.upscale, versions[0].canvas_size
    size = torch.tensor([width, height])
    reach = torch.zeros(height, width, dtype=torch.bool)
    # A lattice reaches less than 3 sigmas, its blur 3 half pixels of the map; then whole map pixels are convolved.
    margin = (mini.decoder.receptive_px + 3) * upscale
    for tokens in versions:
        for center, sigma in zip(centers_px(tokens)[changed], tokens.geometry[changed][:, :2], strict=True):
            half_box = margin + 3 * sigma * (size - 1) / 2
            corners = torch.stack([center - half_box, center + half_box]).clamp(min=0)
            (x0, y0), (x1, y1) = corners.ceil().int().tolist()
            reach[y0:y1, x0:x1] = True
    return reach[: versions[0].image_size[0], : versions[0].image_size[1]]
