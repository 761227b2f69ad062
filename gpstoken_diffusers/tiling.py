"""Cutting pictures into tiles and putting tiles together; image outermost, then row, then column."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def tile_grid_for(height: int, width: int, tile_size: int) -> tuple[int, int]:
    """(rows, cols) of the `tile_size`-pixel tiles that cover an image of `height` x `width` pixels."""
    return math.ceil(height / tile_size), math.ceil(width / tile_size)


def seen_sizes(batch_size: int, height: int, width: int, tile_size: int) -> list[tuple[int, int]]:
    """(height, width) of what each tile of the pictures shows, the rest being padding."""
    rows, cols = tile_grid_for(height, width, tile_size)
    return [
        (min(tile_size, height - row * tile_size), min(tile_size, width - col * tile_size))
        for row in range(rows)
        for col in range(cols)
    ] * batch_size


def pad_to_tiles(images: Tensor, tile_size: int) -> Tensor:
    """Extends images at the right and bottom to whole tiles by repeating their last column and row.

    A repeated edge is no step at the picture's border, which networks would smear back into it. The partition spends
    no tokens on it that the picture can take, see `seen` of [`partition_image`].

    Shapes: (B, C, H, W) -> (B, C, rows tile_size, cols tile_size).
    """
    height, width = images.shape[-2:]
    rows, cols = tile_grid_for(height, width, tile_size)
    right, bottom = cols * tile_size - width, rows * tile_size - height
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if right or bottom else images


def cut_tiles(canvas: Tensor, tile_grid: tuple[int, int]) -> Tensor:
    """(B, C, rows h, cols w) -> (B rows cols, C, h, w)."""
    rows, cols = tile_grid
    return rearrange(canvas, "b c (rows h) (cols w) -> (b rows cols) c h w", rows=rows, cols=cols)


def take_tiles(images: Tensor, tile_size: int, tiles: slice, dtype: torch.dtype | None = None) -> Tensor:
    """Some of the tiles of images, padded as [`pad_to_tiles`] does; only these tiles are copied.

    Args:
        images: (B, C, H, W).
        tile_size: in pixels.
        tiles: which of the B rows columns tiles, image outermost, then row, then column; start and stop given.
        dtype: of the result; None is that of the images.

    Returns: (n, C, tile_size, tile_size).
    """
    rows, cols = tile_grid_for(*images.shape[-2:], tile_size)
    start, stop = tiles.start, min(tiles.stop, len(images) * rows * cols)
    if start % (rows * cols) == 0 and stop % (rows * cols) == 0:
        first, last = start // (rows * cols), stop // (rows * cols)
        whole = images if last - first == len(images) else images[first:last]
        whole = pad_to_tiles(whole.to(dtype or images.dtype), tile_size)
        return whole if rows * cols == 1 else cut_tiles(whole, (rows, cols))
    parts = []
    while start < stop:
        row, col = divmod(start, cols)  # of all images, one below the other
        count = min(cols - col, stop - start)
        image, row = divmod(row, rows)
        top, left = row * tile_size, col * tile_size
        strip = images[image : image + 1, :, top : top + tile_size, left : left + count * tile_size]
        parts.append(cut_tiles(pad_to_tiles(strip.to(dtype or images.dtype), tile_size), (1, count)))
        start += count
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def join_tiles(tiles: Tensor, tile_grid: tuple[int, int]) -> Tensor:
    """(B rows cols, C, h, w) -> (B, C, rows h, cols w): undoes [`cut_tiles`]."""
    rows, cols = tile_grid
    return rearrange(tiles, "(b rows cols) c h w -> b c (rows h) (cols w)", rows=rows, cols=cols)
