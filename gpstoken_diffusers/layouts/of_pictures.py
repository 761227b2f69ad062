"""The partition of pictures of any size: tile by tile, a few of them at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.partition import Partition, partition_image
from ..tiling import seen_sizes, take_tiles, tile_grid_for

# Enough to keep the threads of a large CPU busy, in a few tens of megabytes.
TILES_AT_ONCE = 16


def partition_tiles(
    pixel_values: Tensor,
    tile_size: int,
    num_tokens: int,
    *,
    importance: Tensor | None = None,
    tiles_at_once: int = TILES_AT_ONCE,
    **settings: float | str,
) -> Partition:
    """Divides each tile of pictures into regions, without a copy of the pictures.

    Args:
        pixel_values: (B, 3, H, W) or (B, 1, H, W) in [-1, 1].
        tile_size: side of a tile, in pixels; pictures are padded to whole tiles, and tokens go to what is picture.
        num_tokens: tokens per tile.
        importance: (B, 1, H, W) in [0, 1], or None.
        tiles_at_once: how many are cut out and divided together; the result does not depend on it.
        settings: further ones of [`partition_image`], whose errors are raised.

    Returns: regions (B tiles, n, 4) and geometry (B tiles, n, 5); image outermost, then row, then column.
    """
    rows, cols = tile_grid_for(*pixel_values.shape[-2:], tile_size)
    seen = seen_sizes(len(pixel_values), *pixel_values.shape[-2:], tile_size)
    found = []
    # Always one call, so that an empty batch gives an empty partition or the right error.
    for start in range(0, max(1, len(pixel_values) * rows * cols), tiles_at_once):
        chosen = slice(start, start + tiles_at_once)
        tiles = take_tiles(pixel_values.detach(), tile_size, chosen, torch.float32)
        weights = None
        if importance is not None:
            weights = take_tiles(importance, tile_size, chosen, torch.float32)[:, 0]
        found.append(partition_image(tiles, num_tokens, importance=weights, seen=seen[chosen], **settings))
    if len(found) == 1:
        return found[0]
    return Partition(*(torch.cat(parts) for parts in zip(*found, strict=True)))
