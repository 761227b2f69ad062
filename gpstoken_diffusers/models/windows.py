"""Feature maps and windows of them: how a map is divided, and geometry in the coordinates of either."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import CENTER, RHO, SIGMA

Size = tuple[int, int]  # height, width
Grid = tuple[int, int]  # rows, columns of tiles

# Room for rounding of a token's place and reach, as a share of the window's half. A token that just misses a window
# may be kept, because it paints nothing; a token that just touches it must not be lost.
REACH_MARGIN = 1e-4


class Window(NamedTuple):
    """A rectangle of map pixels, `bottom` and `right` excluded."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> Size:
        return self.bottom - self.top, self.right - self.left


class WindowWithHalo(NamedTuple):
    """A window, and the larger one that must be painted so that convolutions give the first."""

    inner: Window
    painted: Window


def windows_of_tiles(tile_grid: Grid, tile_size: Size, side: int, halo: int) -> Iterator[WindowWithHalo]:
    """Windows of `side` x `side` tiles, row by row, each painted with `halo` tiles around it; fewer at the edges.

    tile_size: (height, width) of a tile in map pixels.
    """
    (rows, cols), (height, width) = tile_grid, tile_size
    for top in range(0, rows, side):
        for left in range(0, cols, side):
            bottom, right = min(top + side, rows), min(left + side, cols)
            painted_top, painted_left = max(top - halo, 0), max(left - halo, 0)
            painted_bottom, painted_right = min(bottom + halo, rows), min(right + halo, cols)
            yield WindowWithHalo(
                Window(top * height, left * width, bottom * height, right * width),
                Window(painted_top * height, painted_left * width, painted_bottom * height, painted_right * width),
            )


def cells_along(length: int, longest: int, cell: int) -> list[tuple[int, int, int, int]]:
    """Divides an axis so that every painted stretch begins and ends on a multiple of `cell`, or at the axis's end.

    Half a cell at either side of a stretch is halo: what is kept of it ends in the middle of a cell. The stretches
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


def map_geometry(geometry: Tensor, image_size: Size, map_size: Size) -> Tensor:
    """Carries image coordinates over to those of a coarser map whose pixels cover whole blocks of image pixels.

    [-1, 1] runs between the centres of the first and last *sample*, so it means different places for an image and for
    its map: image pixel p lies at map position (p + 1/2) / f - 1/2, f pixels to a map pixel.

    The map may also be finer than the image, or the image itself a map: only the ratio of the sizes counts.

    Args and returns: geometry (..., 5) float32; sizes as (height, width).
    """
    scale, shift = [], []
    for image, samples in zip(reversed(image_size), reversed(map_size), strict=True):  # x, then y
        factor = image / samples
        # x_map = 2 m / (samples - 1) - 1 with m = ((x + 1) / 2 (image - 1) + 1/2) / factor - 1/2; a single sample
        # lies at 0, and is taken to be 2 wide.
        span = max(samples - 1, 1)
        scale.append((image - 1) / factor / span)
        shift.append(((image - 1) / factor + 1 / factor - 1) / span - (1 if samples > 1 else 0))
    scale_xy, shift_xy = geometry.new_tensor(scale), geometry.new_tensor(shift)
    sigma = geometry[..., SIGMA] * scale_xy
    center = geometry[..., CENTER] * scale_xy + shift_xy
    return torch.cat([sigma, geometry[..., RHO : RHO + 1], center], dim=-1)


def window_geometry(geometry: Tensor, map_size: Size, window: Window) -> Tensor:
    """Carries coordinates of a map over to those of a window of it, whose own first and last pixels are at -1 and 1.

    Args:
        geometry: (..., 5) float32 in coordinates of the map. The single sample of an axis lies at 0, and is 2 wide.
        map_size: (height, width) of the map.
        window: may reach beyond the map.

    Returns: (..., 5) float32. The window's centre is subtracted before anything is multiplied, so what is lost is the
    rounding of that centre alone: 2^-25 of the map's half, 3e-5 pixels of a map of 2048. The pixel centres of the whole
    map are rounded by as much.
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
        sigmas, pixels: half of a token's box is `sigmas` of its own and this many of the window's pixels.
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
