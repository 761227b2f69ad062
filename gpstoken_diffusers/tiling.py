"""Cutting pictures into tiles and putting tiles together; image outermost, then row, then column."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def tile_grid_for(height: int, width: int, tile_size: int) -> tuple[int, int]:
    """(rows, cols) of the `tile_size`-pixel tiles that cover an image of `height` x `width` pixels."""
    return math.ceil(height / tile_size), math.ceil(width / tile_size)


def pad_to_tiles(images: Tensor, tile_size: int) -> Tensor:
    """Extends images at the right and bottom to whole tiles by repeating their last column and row.

    A repeated edge has no detail of its own, so that the partition spends few tokens on it, and no step at the
    image's border, which a decoder would smear back into the picture.

    Shapes: (B, C, H, W) -> (B, C, rows tile_size, cols tile_size).
    """
    height, width = images.shape[-2:]
    rows, cols = tile_grid_for(height, width, tile_size)
    right, bottom = cols * tile_size - width, rows * tile_size - height
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if right or bottom else images


def cut_tiles(canvas: Tensor, tile_grid: tuple[int, int]) -> Tensor:
    """(B, C, rows h, cols w) -> (B rows cols, C, h, w)."""
    rows, cols = tile_grid
    batch_size, channels, height, width = canvas.shape
    tiles = canvas.reshape(batch_size, channels, rows, height // rows, cols, width // cols)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // rows, width // cols)


def join_tiles(tiles: Tensor, tile_grid: tuple[int, int]) -> Tensor:
    """(B rows cols, C, h, w) -> (B, C, rows h, cols w): undoes [`cut_tiles`]."""
    rows, cols = tile_grid
    _, channels, height, width = tiles.shape
    canvas = tiles.reshape(-1, rows, cols, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return canvas.reshape(-1, channels, rows * height, cols * width)
