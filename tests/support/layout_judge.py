"""An independent judge of partitions, and pictures and sizes to try, for several test files."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from gpstoken_diffusers.ops.partition import Partition, initial_gaussians

Box = tuple[int, int, int, int]

sides = st.one_of(st.sampled_from((8, 16, 32, 64, 128)), st.integers(2, 150))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """In [-1, 1], equally strong everywhere."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def picture(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """(B, H, W) noise of uneven strength, so that regions of many sizes occur."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand((batch, 1, 6, 6), generator=generator) ** 4
    strength = torch.nn.functional.interpolate(strength, (height, width), mode="bilinear")[:, 0]
    return (torch.rand((batch, height, width), generator=generator) * 2 - 1) * strength


def halves_of(box: Box, min_region_size: int) -> list[tuple[Box, Box]]:
    """All ways in which the partition may cut a region: along the longer side, a square along either."""
    x0, y0, x1, y1 = box
    width, height = x1 - x0 + 1, y1 - y0 + 1
    ways = []
    if max(width, height) - 1 > min_region_size:
        if width >= height:
            ways.append(((x0, y0, x0 + width // 2 - 1, y1), (x0 + width // 2, y0, x1, y1)))
        if height >= width:
            ways.append(((x0, y0, x1, y0 + height // 2 - 1), (x0, y0 + height // 2, x1, y1)))
    return ways


def is_tree(leaves: frozenset[Box], box: Box, min_region_size: int) -> bool:
    """Whether halving `box` again and again can give exactly these leaves."""
    if leaves == {box}:
        return True
    for halves in halves_of(box, min_region_size):
        inside = [
            frozenset(b for b in leaves if h[0] <= b[0] and h[1] <= b[1] and b[2] <= h[2] and b[3] <= h[3])
            for h in halves
        ]
        if sum(map(len, inside)) == len(leaves) and all(
            part and is_tree(part, half, min_region_size) for part, half in zip(inside, halves, strict=True)
        ):
            return True
    return False


def assert_valid(partition: Partition, batch: int, num_tokens: int, height: int, width: int, smallest: int) -> None:
    regions, geometry = partition
    assert regions.shape == (batch, num_tokens, 4) and regions.dtype == torch.int32
    assert geometry.dtype == torch.float32 and torch.equal(geometry, initial_gaussians(regions, height, width))
    assert (geometry[..., :2] > 0).all() and (geometry[..., 2] == 0).all()
    for layout in regions.tolist():
        covered = np.zeros((height, width), np.int32)
        for x0, y0, x1, y1 in layout:
            assert 0 <= x0 <= x1 < width and 0 <= y0 <= y1 < height
            covered[y0 : y1 + 1, x0 : x1 + 1] += 1
        assert (covered == 1).all()
        leaves = frozenset(map(tuple, layout))
        assert len(leaves) == num_tokens and is_tree(leaves, (0, 0, width - 1, height - 1), smallest)
