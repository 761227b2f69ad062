"""The five numbers of a Gaussian: their order, their bounds, and the frames of tiles."""

from __future__ import annotations

import torch
from torch import Tensor

GEOMETRY_CHANNELS = 5
"""Channels of a geometry, always in the order (sigma_x, sigma_y, rho, x, y)."""
SIGMA = slice(0, 2)
"""sigma_x, sigma_y: standard deviations in [-1, 1] coordinates (2 is the whole width or height)."""
RHO = 2
"""rho: correlation of x and y, in (-1, 1); y grows downwards, so rho > 0 falls from left to right."""
CENTER = slice(3, 5)
"""x, y: the centre; -1 and 1 are the centres of the first and last pixel of the canvas."""

MIN_SIGMA = 1e-5
"""Smallest sigma that encoders, editing and generators give: a token with sigma = 0 has no finite weight anywhere."""
MAX_ABS_RHO = 1 - 1e-6
"""Largest |rho| that encoders and editing give, beyond what a trained checkpoint holds."""
GENERATED_MAX_ABS_RHO = 0.99999
"""Largest |rho| that generators give, as in the released code."""


def bounded(geometry: Tensor) -> Tensor:
    """(..., 5) -> (..., 5) with sigma >= 1e-5 and |rho| <= 1 - 1e-6."""
    sigma, rho = geometry[..., SIGMA].clamp(min=MIN_SIGMA), geometry[..., RHO, None]
    return torch.cat([sigma, rho.clamp(-MAX_ABS_RHO, MAX_ABS_RHO), geometry[..., CENTER]], dim=-1)


def _tile_frames(tile_grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Offset (T, 1, 2) and scale (2,) of x and y: canvas coordinate = (tile coordinate + offset) / scale."""
    rows, cols = tile_grid
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    offset = torch.stack([2 * col + 1 - cols, 2 * row + 1 - rows], dim=-1).reshape(-1, 1, 2)
    return offset.to(device, torch.float32), torch.tensor([cols, rows], dtype=torch.float32, device=device)


def merge_tile_geometry(geometry: Tensor, tile_grid: tuple[int, int]) -> Tensor:
    """Geometry of tiles, each in its own coordinates, in those of the whole canvas.

    For the tile in row i and column j: sigma_x / columns, sigma_y / rows, rho as it is,
    x' = -1 + (2 j + x + 1) / columns, y' = -1 + (2 i + y + 1) / rows.

    Shapes: (B T, n, 5) -> (B, T n, 5), T = rows * columns; the image is the outermost index, then row, then column.

    Raises ValueError: the number of tiles is not a multiple of T.
    """
    rows, cols = tile_grid
    if geometry.shape[0] % (rows * cols) != 0:
        raise ValueError(f"{geometry.shape[0]} tiles are not whole images of {rows} x {cols} tiles each")
    offset, scale = _tile_frames(tile_grid, geometry.device)
    tiles = geometry.unflatten(0, (-1, rows * cols))
    # (x + 2 j + 1 - columns) / columns is the formula above, its integers collected: exact for a single tile.
    sigma, center = tiles[..., SIGMA] / scale, (tiles[..., CENTER] + offset) / scale
    return torch.cat([sigma, tiles[..., RHO, None], center], dim=-1).flatten(1, 2)


def split_tile_geometry(geometry: Tensor, tile_grid: tuple[int, int]) -> Tensor:
    """Undoes [`merge_tile_geometry`], up to rounding: (B, T n, 5) -> (B T, n, 5)."""
    offset, scale = _tile_frames(tile_grid, geometry.device)
    merged = geometry.unflatten(1, (offset.shape[0], -1))
    sigma, center = merged[..., SIGMA] * scale, merged[..., CENTER] * scale - offset
    return torch.cat([sigma, merged[..., RHO, None], center], dim=-1).flatten(0, 1)
