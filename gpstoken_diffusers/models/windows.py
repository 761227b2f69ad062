"""Windows of a feature map: how a large map is divided, and geometry as one window of it sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..tokens import CENTER, RHO, SIGMA

Size = tuple[int, int]  # height, width

# Rounding of a token's place and reach, as a share of the window's half: a token that just misses a window may be
# kept, and paints nothing; one that just touches it must not be lost.
REACH_MARGIN = 1e-4


class Window(NamedTuple):
    """A rectangle of map pixels; `bottom` and `right` are no longer part of it."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> Size:
        return self.bottom - self.top, self.right - self.left


class WindowWithHalo(NamedTuple):
    """A window, and the larger one that has to be painted so that convolutions give the first."""

    inner: Window
    painted: Window


def cells_along(length: int, longest: int, cell: int) -> list[tuple[int, int, int, int]]:
    """Divides an axis so that every painted stretch begins and ends on a multiple of `cell`, or at the axis's end.

    Half a cell at either side of a stretch is halo: what is taken from it ends in the middle of a cell. The stretches
    are about equally long.

    Args:
        length: of the axis, in map pixels.
        longest: a painted stretch may have, in map pixels; at least 2 `cell`.
        cell: an even number of map pixels.

    Returns: (start, stop, painted start, painted stop) of each, in order; the first two without gaps or overlaps.
    """
    most = longest // cell - 1  # cells by which a stretch and the next are apart
    if most < 1:
        raise ValueError(f"a painted stretch needs at least two cells of {cell} map pixels, got {longest}.")
    if length <= (most + 1) * cell:
        return [(0, length, 0, length)]
    count = -(-(length - cell) // (most * cell))
    step = -(-(length - cell) // (count * cell)) * cell
    half, found = cell // 2, []
    for painted_start in range(0, length - cell, step):
        start = 0 if painted_start == 0 else painted_start + half
        stop = painted_start + step + half
        painted_stop = painted_start + step + cell
        if painted_stop >= length:
            stop = painted_stop = length
        found.append((start, stop, painted_start, painted_stop))
    return found


def windows_on_cells(map_size: Size, longest: int, cell: int) -> Iterator[list[WindowWithHalo]]:
    """All windows of a map, a row of them at a time, see [`cells_along`]."""
    rows, columns = (cells_along(length, longest, cell) for length in map_size)
    for top, bottom, painted_top, painted_bottom in rows:
        yield [
            WindowWithHalo(
                Window(top, left, bottom, right), Window(painted_top, painted_left, painted_bottom, painted_right)
            )
            for left, right, painted_left, painted_right in columns
        ]


def window_geometry(geometry: Tensor, map_size: Size, window: Window) -> Tensor:
    """Carries coordinates of a map over to those of a window of it, whose own first and last pixels are at -1 and 1.

    Args:
        geometry: (..., 5) float32 in coordinates of the map. An axis of one sample has it at 0, and is 2 wide.
        map_size: (height, width) of the map.
        window: may reach beyond the map.

    Returns: (..., 5) float32. A centre is subtracted before anything is multiplied, so that what is lost is the
    rounding of the window's own centre: 2^-25 of the map's half, 3e-5 pixels of a map of 2048. That is as much as the
    pixel centres of the whole map are rounded by.
    """
    scale, middle = [], []
    starts = (window.left, window.top)
    for length, start, samples in zip(reversed(map_size), starts, reversed(window.size), strict=True):  # x, then y
        # Pixel m lies at 2 m / span - 1, a single one at 0.
        own_span, span = max(length - 1, 1), max(samples - 1, 1)
        own_first, first = (-1 if sides > 1 else 0 for sides in (length, samples))
        scale.append(own_span / span)
        middle.append((2 * start - first * span) / own_span + own_first)
    scale_xy, middle_xy = geometry.new_tensor(scale), geometry.new_tensor(middle)
    sigma = geometry[..., SIGMA] * scale_xy
    center = (geometry[..., CENTER] - middle_xy) * scale_xy
    return torch.cat([sigma, geometry[..., RHO : RHO + 1], center], dim=-1)


def touches(geometry: Tensor, sigmas: float, pixels: float, size: Size) -> Tensor:
    """Which tokens may paint a pixel of a window: their boxes meet it.

    Args:
        geometry: (..., 5) in coordinates of the window.
        sigmas, pixels: half of a token's box is `sigmas` of its own and so many of the window's pixels.
        size: (height, width) of the window.

    Returns: (...) bool; False for tokens that are not finite, which paint nothing.
    """
    inside = None
    for axis, samples in enumerate(reversed(size)):
        reach = sigmas * geometry[..., axis] + pixels * 2 / max(samples - 1, 1)
        edge = 1.0 if samples > 1 else 0.0
        near = geometry[..., CENTER.start + axis].abs() <= (edge + reach) * (1 + REACH_MARGIN) + REACH_MARGIN
        inside = near if inside is None else inside & near
    return inside
