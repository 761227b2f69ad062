"""Calibration of layouts: the partition nearest to predicted Gaussians.

A generator of layouts predicts Gaussians that overlap and leave gaps, but the encoder and the second stage know only
the Gaussians of real partitions. `calibrate_layout` finds the nearest real partition, for any finite input.
"""

from __future__ import annotations

import functools
import heapq
import operator
from typing import NamedTuple

import numpy as np
import torch

from ..ops.partition import Partition, initial_gaussians, max_tokens

__all__ = ["calibrate_layout", "check_num_tokens", "checked_sides"]

LAYOUTS_AT_ONCE = 16  # their tables take about 0.3 MB each at 256 px
PAIRS_AT_ONCE = 1 << 18  # (region, prediction) pairs: 2 MB of float64, which stays in a processor's cache


class _Cut(NamedTuple):
    """One way to halve all regions of one size: where their halves are found."""

    first_size: int  # index into _Family.sizes
    first_rows: np.ndarray  # (n,) which of that size's regions is the first half of each
    second_size: int
    second_rows: np.ndarray


class _Size(NamedTuple):
    """All regions of one width and height; a square has two ways to be cut, the smallest regions have none."""

    start: int  # the first of these regions in _Family.regions
    count: int
    max_leaves: int
    cuts: tuple[_Cut, ...]


class _Family(NamedTuple):
    """Every region that can occur when an image of one size is halved again and again."""

    sizes: tuple[_Size, ...]  # by rising area, so that halves come before wholes; the last is the image itself
    regions: np.ndarray  # (R, 4) int32 x0, y0, x1, y1, inclusive
    intervals: tuple[np.ndarray, np.ndarray]  # of each axis, (n, 2) the first and last pixel
    interval_of_region: tuple[np.ndarray, np.ndarray]  # of each axis, (R,) index of the region's interval
    gaussians: tuple[np.ndarray, np.ndarray]  # of each axis, (n, 2) float64: sigma and centre of its intervals


@functools.lru_cache(maxsize=16)
def _family(height: int, width: int, min_region_size: int) -> _Family:
    """The regions of all partitions of one image size.

    Few: each axis is always cut at the same places, whatever the other axis does. At 256 px there are 2,729.
    """
    positions = {(width, height): np.array([[0, 0]])}  # by size (w, h): (n, 2) sorted x0, y0
    found: dict[tuple[int, int], list[np.ndarray]] = {}
    waiting = [(-width * height, width, height)]
    halvings: dict[tuple[int, int], list[tuple[tuple[int, int], tuple[int, int], np.ndarray]]] = {}
    while waiting:  # the largest area first: all parents of a size are known when its turn comes
        _, w, h = heapq.heappop(waiting)
        if (w, h) in found:
            positions[w, h] = np.unique(np.concatenate(found[w, h]), axis=0)
        halvings[w, h] = []
        if max(w, h) - 1 <= min_region_size:
            continue
        if h >= w:
            halvings[w, h].append(((w, h // 2), (w, h - h // 2), np.array([0, h // 2])))
        if w >= h:
            halvings[w, h].append(((w // 2, h), (w - w // 2, h), np.array([w // 2, 0])))
        for first, second, shift in halvings[w, h]:
            for size, corners in ((first, positions[w, h]), (second, positions[w, h] + shift)):
                if size not in found:
                    heapq.heappush(waiting, (-size[0] * size[1], *size))
                found.setdefault(size, []).append(corners)

    order = list(halvings)[::-1]
    index = {size: i for i, size in enumerate(order)}
    keys = {size: corners[:, 0] * height + corners[:, 1] for size, corners in positions.items()}

    def rows(size: tuple[int, int], corners: np.ndarray) -> np.ndarray:
        return np.searchsorted(keys[size], corners[:, 0] * height + corners[:, 1])

    sizes, regions = [], []
    for w, h in order:
        corners = positions[w, h]
        cuts = tuple(
            _Cut(index[first], rows(first, corners), index[second], rows(second, corners + shift))
            for first, second, shift in halvings[w, h]
        )
        # Both cuts of a square allow equally many leaves, see max_tokens.
        leaves = sizes[cuts[0].first_size].max_leaves + sizes[cuts[0].second_size].max_leaves if cuts else 1
        sizes.append(_Size(sum(map(len, regions)), len(corners), leaves, cuts))
        regions.append(np.concatenate([corners, corners + [w - 1, h - 1]], axis=1))

    every = np.concatenate(regions).astype(np.int32)
    geometry = initial_gaussians(torch.from_numpy(every), height, width).double().numpy()
    intervals, interval_of_region, gaussians = [], [], []
    for axis in (0, 1):
        unique, first_row, inverse = np.unique(every[:, axis::2], axis=0, return_index=True, return_inverse=True)
        intervals.append(unique)
        interval_of_region.append(inverse.reshape(-1))
        gaussians.append(geometry[first_row][:, [axis, 3 + axis]])
    return _Family(tuple(sizes), every, tuple(intervals), tuple(interval_of_region), tuple(gaussians))


def _bhattacharyya(
    sigma: np.ndarray, center: np.ndarray, other_sigma: np.ndarray, other_center: np.ndarray
) -> np.ndarray:
    """Bhattacharyya distance of one-dimensional Gaussians; exactly 0 if they are equal.

    (m1 - m2)^2 / (4 (s1^2 + s2^2)) + log((s1^2 + s2^2) / (2 s1 s2)) / 2
    """
    offset = (center - other_center) ** 2 / (sigma * sigma + other_sigma * other_sigma)
    return offset / 4 + np.log1p((sigma - other_sigma) ** 2 / (2 * sigma * other_sigma)) / 2


class _Distances:
    """Distances of one layout's predictions to all regions of a family."""

    def __init__(self, family: _Family, geometry: np.ndarray) -> None:
        """geometry: (M, 5) float64, finite."""
        self.family = family
        self.per_axis, self.inside = [], []  # of each axis, (n, M): distance, and is the centre in this interval?
        for axis in (0, 1):
            intervals, (sigma, center) = family.intervals[axis], family.gaussians[axis].T
            predicted_sigma = geometry[:, axis].clip(sigma.min(), sigma.max())
            predicted_center = geometry[:, 3 + axis].clip(-1, 1)
            own = (sigma[:, None], center[:, None])
            self.per_axis.append(_bhattacharyya(*own, predicted_sigma, predicted_center))
            pixel = np.rint((predicted_center + 1) / 2 * intervals.max())
            self.inside.append((intervals[:, :1] <= pixel) & (pixel <= intervals[:, 1:]))

    def of_regions(self, rows: np.ndarray | slice) -> np.ndarray:
        """(K, M): distance of some regions of the family to each prediction."""
        x, y = (of_region[rows] for of_region in self.family.interval_of_region)
        return self.per_axis[0][x] + self.per_axis[1][y]

    def costs(self, num_tokens: int) -> np.ndarray:
        """(R,): what each region of the family costs as a leaf; the first and second sum of calibrate_layout."""
        num_regions, num_predictions = len(self.family.regions), self.per_axis[0].shape[1]
        step = max(1, PAIRS_AT_ONCE // num_predictions)
        nearest = [self.of_regions(slice(i, i + step)).min(axis=1) for i in range(0, num_regions, step)]
        # Sum over the predictions in a region of dx + dy, for all pairs of intervals: two matrix products.
        in_x, in_y = (inside.astype(np.float64) for inside in self.inside)
        within = (in_x * self.per_axis[0]) @ in_y.T + in_x @ (in_y * self.per_axis[1]).T
        x, y = self.family.interval_of_region
        return np.concatenate(nearest) + within[x, y] * (num_tokens / num_predictions)


def _least_costs(family: _Family, costs: np.ndarray, num_tokens: int) -> list[np.ndarray]:
    """The dynamic programme: for each size, (K, B, n), least cost of dividing each region into k = 1..K leaves.

    costs: (B, R) of each region as one leaf. K is what the region holds, at most num_tokens.
    """
    tables: list[np.ndarray] = []
    for size in family.sizes:
        most = min(size.max_leaves, num_tokens)
        table = np.full((most, len(costs), size.count), np.inf)
        table[0] = costs[:, size.start : size.start + size.count]
        for cut in size.cuts:
            first = tables[cut.first_size][:, :, cut.first_rows]
            second = tables[cut.second_size][:, :, cut.second_rows]
            for i in range(min(len(first), most - 1)):  # i + 1 leaves in the first half, 1 and more in the second
                whole = table[i + 1 : i + 1 + len(second)]
                np.minimum(whole, first[i] + second[: len(whole)], out=whole)
        tables.append(table)
    return tables


def _best_leaves(family: _Family, tables: list[np.ndarray], layout: int, num_tokens: int) -> np.ndarray:
    """(num_tokens,) rows of family.regions: the leaves of the tree behind the least cost."""
    leaves = []
    stack = [(len(family.sizes) - 1, 0, num_tokens)]
    while stack:
        size, row, count = stack.pop()
        if count == 1:
            leaves.append(family.sizes[size].start + row)
            continue
        ways = []
        for cut in family.sizes[size].cuts:
            first_row, second_row = int(cut.first_rows[row]), int(cut.second_rows[row])
            first = tables[cut.first_size][:, layout, first_row]
            second = tables[cut.second_size][:, layout, second_row]
            fewest, most = max(1, count - len(second)), min(len(first), count - 1)
            sums = first[fewest - 1 : most] + second[count - most - 1 : count - fewest][::-1]
            best = int(sums.argmin())
            halves = (cut.second_size, second_row, count - fewest - best), (cut.first_size, first_row, fewest + best)
            ways.append((sums[best], halves))
        stack += min(ways, key=operator.itemgetter(0))[1]
    return np.array(leaves)


@torch.compiler.disable
def calibrate_layout(
    geometry: torch.Tensor,
    num_tokens: int | None = None,
    *,
    image_size: tuple[int, int] = (256, 256),
    min_region_size: int = 8,
) -> Partition:
    """The partition nearest to predicted Gaussians: regions that tile the image, and their initial Gaussians.

    Partitions are all that halving can make under the rules of `partition_image`: a region is cut along its longer
    side, a square along either, while its longer side, less 1, exceeds min_region_size. Among those of exactly
    num_tokens regions, this one has the least

        sum over regions of (distance to the nearest prediction)
        + num_tokens / M * sum over predictions of (distance to the region that holds its centre),

    so that neither regions nor predictions are left out. The distance is Bhattacharyya's between a prediction and a
    region's initial Gaussian, added over x and y: it does not depend on scale, and is 0 only between equals. Predicted
    sigmas are first clamped to the range that regions have, and centres to the image. rho is ignored: regions have
    none.

    Both sums add up over the leaves of a tree, and few different regions can occur, so dynamic programming over
    them and their numbers of leaves finds the least cost exactly, for any finite input. Hence a partition's own
    Gaussians, which cost 0, come back bit for bit, also if each centre is off by up to 0.3 of its sigma and each
    sigma by up to a factor of 1.3. The time grows with (num_tokens + M) * (possible regions).

    Args:
        geometry: (B, M, 5) predicted sigma_x, sigma_y, rho, x, y in [-1, 1] image coordinates; any float dtype, any
            finite values, M >= 1.
        num_tokens: regions wanted, from 1 to `max_tokens(height, width, min_region_size)`; None takes M.
        image_size: (height, width) in pixels, at least 2 x 2.
        min_region_size: px, at least 2; as in `partition_image`.

    Returns:
        Partition of B layouts, on the input's device, in the order of each region's nearest prediction (of regions
        with the same one, in the tree's order).

    Raises:
        ValueError: another shape, sizes outside the above, NaN or infinite values (the message names the first).
        TypeError: geometry that is not a tensor of floats, or sizes that are not integers.

    Under `torch.compile` it runs outside the graph.
    """
    if not isinstance(geometry, torch.Tensor) or not geometry.is_floating_point():
        what = geometry.dtype if isinstance(geometry, torch.Tensor) else type(geometry).__name__
        raise TypeError(f"geometry: expected a torch tensor of floats, got {what}.")
    if geometry.ndim != 3 or geometry.shape[-1] != 5 or geometry.shape[1] == 0:
        raise ValueError(f"geometry: expected (B, M, 5) with at least one prediction, got {tuple(geometry.shape)}.")
    predicted = geometry.detach().cpu().double().numpy()
    if not np.isfinite(predicted).all():
        layout, row = np.argwhere(~np.isfinite(predicted))[0, :2].tolist()
        numbers = ", ".join(f"{number:g}" for number in predicted[layout, row])
        raise ValueError(
            f"geometry: expected finite numbers, but in row {row} of layout {layout} "
            f"(sigma_x, sigma_y, rho, x, y) is ({numbers}). Look for the cause in what predicted it."
        )
    height, width = checked_sides(image_size)
    min_region_size = operator.index(min_region_size)
    num_tokens = geometry.shape[1] if num_tokens is None else operator.index(num_tokens)
    check_num_tokens(num_tokens, height, width, min_region_size)

    family = _family(height, width, min(min_region_size, max(height, width)))
    regions = np.empty((len(predicted), num_tokens, 4), np.int32)
    for start in range(0, len(predicted), LAYOUTS_AT_ONCE):
        distances = [_Distances(family, layout) for layout in predicted[start : start + LAYOUTS_AT_ONCE]]
        tables = _least_costs(family, np.stack([layout.costs(num_tokens) for layout in distances]), num_tokens)
        for i, layout in enumerate(distances):
            leaves = _best_leaves(family, tables, i, num_tokens)
            nearest = layout.of_regions(leaves).argmin(axis=1)
            regions[start + i] = family.regions[leaves[np.argsort(nearest, kind="stable")]]
    found = torch.from_numpy(regions)
    return Partition(found.to(geometry.device), initial_gaussians(found, height, width).to(geometry.device))


def checked_sides(image_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) as ints. Raises TypeError for anything else."""
    if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
        raise TypeError(f"image_size: expected two integers (height, width), got {image_size!r}.")
    return operator.index(image_size[0]), operator.index(image_size[1])


def check_num_tokens(num_tokens: int, height: int, width: int, min_region_size: int) -> None:
    """Raises ValueError for a number of tokens that an image of height x width pixels cannot be divided into."""
    largest = max_tokens(height, width, min_region_size)
    if not 1 <= num_tokens <= largest:
        raise ValueError(
            f"num_tokens={num_tokens}: an image of {height} x {width} px can be divided into 1 to {largest} "
            f"tokens with min_region_size={min_region_size}."
        )
