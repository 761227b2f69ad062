"""The reference of the partition by error, in plain NumPy; the native library is tested against it.

An image starts as one region. As long as there are fewer regions than tokens wanted, the region with the largest error
that can still be split is cut in half. The error of a region is what is left when each of its 6 x 6 cells is painted in
its mean colour: the sum over pixels and channels of the squared distance to that. Where tokens carry a small picture
of their region, this is where small pictures are too coarse.
"""

from __future__ import annotations

import numpy as np

from .partition_reference import Box, _halves, summed_area_table

CELLS = 6  # along each axis of a region; a shorter axis has a cell for each pixel
HALF_RANGE = np.float32(511.5)  # values are rounded to 1,024 steps of [-1, 1], so that sums are exact


def _cell_means_error(values: np.ndarray) -> float:
    """Sum of squared distances to the mean of each cell: (C, h, w) whole numbers -> in units of [-1, 1]^2."""
    _, height, width = values.shape
    rows, columns = min(CELLS, height), min(CELLS, width)
    total = 0.0
    for row in range(rows):
        for column in range(columns):
            cell = values[
                :,
                row * height // rows : (row + 1) * height // rows,
                column * width // columns : (column + 1) * width // columns,
            ].reshape(len(values), -1)
            pixels = cell.shape[1]
            for plane in cell:
                total += float(pixels * int((plane * plane).sum()) - int(plane.sum()) ** 2) / float(pixels)
    return total / float(HALF_RANGE) ** 2


def region_error(image: np.ndarray, box: Box) -> float:
    """The error of one region of an image (C, H, W) float32 in [-1, 1]; box: inclusive x0, y0, x1, y1."""
    values = np.rint((image + np.float32(1)) * HALF_RANGE).astype(np.int64)
    x0, y0, x1, y1 = box
    return _cell_means_error(values[:, y0 : y1 + 1, x0 : x1 + 1])


def _partition(image: np.ndarray, num_tokens: int, min_region_size: int, bias: np.ndarray | None) -> list[Box]:
    values = np.rint((image + np.float32(1)) * HALF_RANGE).astype(np.int64)
    table = None if bias is None else summed_area_table(bias)

    def error(box: Box) -> float:
        x0, y0, x1, y1 = box
        return _cell_means_error(values[:, y0 : y1 + 1, x0 : x1 + 1])

    def priority(box: Box) -> float:
        x0, y0, x1, y1 = box[0], box[1], box[2] + 1, box[3] + 1
        attraction = 0.0 if table is None else table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0]
        return error(box) + float(attraction)

    def splittable(box: Box) -> bool:
        return max(box[2] - box[0], box[3] - box[1]) > min_region_size

    _, height, width = image.shape
    whole = (0, 0, width - 1, height - 1)
    regions = [(priority(whole), whole)]
    while len(regions) < num_tokens:
        # Of equals the one that was made first.
        chosen = max((i for i, (_, box) in enumerate(regions) if splittable(box)), key=lambda i: (regions[i][0], -i))
        box = regions.pop(chosen)[1]
        extent_x, extent_y = box[2] - box[0], box[3] - box[1]
        halves = _halves(box, along_x=extent_x > extent_y)
        if extent_x == extent_y:
            in_x, in_y = _halves(box, along_x=True), _halves(box, along_x=False)
            halves = in_x if sum(map(error, in_x)) < sum(map(error, in_y)) else in_y
        regions += [(priority(half), half) for half in halves]
    return [box for _, box in regions]


def partition_error_reference(
    images: np.ndarray, num_tokens: int, min_region_size: int = 8, bias: np.ndarray | None = None
) -> np.ndarray:
    """Regions of a batch of images, in the order in which they were made; no checks.

    images: (B, C, H, W) float32 in [-1, 1]. bias: (B, H, W) float32, added up over a region, or None. num_tokens: at
    most what `max_tokens` says. Returns (B, num_tokens, 4) int32: x0, y0, x1, y1 in pixels, the last ones inclusive.
    """
    regions = [
        _partition(image, num_tokens, min_region_size, None if bias is None else bias[i])
        for i, image in enumerate(images)
    ]
    return np.array(regions, dtype=np.int32).reshape(len(images), num_tokens, 4)
