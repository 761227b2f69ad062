"""The reference of the adaptive partition, in NumPy. The native libraries give the same regions to the last one.

An image starts as one region. As long as there are fewer regions than tokens wanted, the most complex region
that can still be split is cut in half; its two halves join the end of the list. Every final region becomes
one token, in list order (the entropy-driven partition of the GPSToken paper).
"""

from __future__ import annotations

import decimal
import math

import numpy as np

SAMPLES = 64  # a region is resampled to SAMPLES x SAMPLES before its gradients are counted
BINS = 512  # histogram bins over [-MAGNITUDE_RANGE, MAGNITUDE_RANGE]; magnitudes fill the upper half only
MAGNITUDE_RANGE = 5.5

_DIGITS = decimal.Context(prec=34)  # twice those of a float64


def _resampling_taps(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the bilinear samples of an axis of `size` pixels lie: lower and upper pixel, weight of the upper.

    Half-pixel centres, clamped at both ends; positions are multiples of 1/128, so nothing is rounded.
    """
    position = (np.arange(SAMPLES) + 0.5) * (size / SAMPLES) - 0.5
    position = np.clip(position, 0, size - 1)
    lower = np.floor(position).astype(np.intp)
    upper = np.minimum(lower + 1, size - 1)
    return lower, upper, (position - lower).astype(np.float32)


def _blend(lower: np.ndarray, upper: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """lower + (upper - lower) * weight of float32 arrays: the difference is rounded, then the whole once.

    That is what a fused multiply-add gives, and bit for bit what OpenCV's resize returns where it has that
    instruction. It matters: a gradient that changes its histogram bin can swap two regions of nearly equal
    complexity.
    """
    step = (upper - lower).astype(np.float64)
    return (lower + step * weight).astype(np.float32)


def _resample(region: np.ndarray) -> np.ndarray:
    """Bilinear `SAMPLES` x `SAMPLES` version of a float32 region (h, w); rows first become SAMPLES wide."""
    top, bottom, weight_y = _resampling_taps(region.shape[0])
    left, right, weight_x = _resampling_taps(region.shape[1])
    rows = _blend(region[:, left], region[:, right], weight_x)
    return _blend(rows[top], rows[bottom], weight_y[:, None])


def gradient_entropy(region: np.ndarray) -> float:
    """Entropy in bits of the Sobel gradient magnitudes of a float32 region (h, w) with values in [0, 1].

    The region is resampled to 64 x 64, its gradients are taken in float64 with a replicated border, their
    magnitudes counted in 512 bins over [-5.5, 5.5].
    """
    padded = np.pad(_resample(region).astype(np.float64), 1, mode="edge")
    difference = padded[:, 2:] - padded[:, :-2]
    smoothed = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    gradient_x = difference[:-2] + 2 * difference[1:-1] + difference[2:]
    gradient_y = smoothed[2:] - smoothed[:-2]
    magnitude = np.sqrt(gradient_x * gradient_x + gradient_y * gradient_y)
    counts, _ = np.histogram(magnitude, bins=BINS, range=(-MAGNITUDE_RANGE, MAGNITUDE_RANGE))
    probabilities = (counts / (counts.sum() + 1e-5)).tolist()
    # math.log2 is the C library's: NumPy's vectorised one rounds differently from one processor to the next.
    return -float(np.sum([p * math.log2(p + 1e-10) for p in probabilities]))


def summed_area_table(bias: np.ndarray) -> np.ndarray:
    """(H + 1, W + 1) float64 table of the sums of `bias` (H, W) above and left of each pixel corner."""
    table = np.zeros((bias.shape[0] + 1, bias.shape[1] + 1))
    table[1:, 1:] = bias.astype(np.float64).cumsum(axis=1).cumsum(axis=0)
    return table


def _power(base: float, exponent: float) -> float:
    """base ** exponent for base > 0, rounded once, so that it is the same everywhere.

    The C library's `pow` misses the nearest number in one case of a thousand, in other cases on other processors.
    In a symmetric picture that can swap two regions, each the other's mirror image.
    """
    logarithm = _DIGITS.multiply(_DIGITS.ln(decimal.Decimal(base)), decimal.Decimal(exponent))
    return float(_DIGITS.exp(logarithm))


Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, inclusive


def _complexity(unit: np.ndarray, box: Box, exponent: float, table: np.ndarray | None) -> float:
    """Complexity of a region of `unit`, grey values in [0, 1]; `table`: the summed-area table of the bias."""
    x0, y0, x1, y1 = box[0], box[1], box[2] + 1, box[3] + 1
    complexity = _power(gradient_entropy(unit[y0:y1, x0:x1]), exponent) * (y1 - y0) * (x1 - x0)
    if table is not None:
        complexity += float(table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0])
    return complexity


def region_complexity(
    grey: np.ndarray, regions: np.ndarray, entropy_exponent: float = 2.5, bias: np.ndarray | None = None
) -> np.ndarray:
    """Complexity of regions of one image: entropy ** entropy_exponent * height * width, plus the bias inside.

    grey: (H, W) float32 in [-1, 1]. regions: (K, 4) integers x0, y0, x1, y1 in pixels, the last ones
    inclusive.
    bias: (H, W), added up over a region, or None. Returns (K,) float64.
    """
    unit = (np.asarray(grey, dtype=np.float32) + np.float32(1)) / np.float32(2)
    table = None if bias is None else summed_area_table(np.asarray(bias))
    boxes = np.asarray(regions).tolist()
    return np.array([_complexity(unit, tuple(box), entropy_exponent, table) for box in boxes])


def _halves(box: Box, along_x: bool) -> tuple[Box, Box]:
    """The first and second half of a region; of an odd length the first half is the shorter one."""
    x0, y0, x1, y1 = box
    if along_x:
        middle = x0 + (x1 - x0 + 1) // 2
        return (x0, y0, middle - 1, y1), (middle, y0, x1, y1)
    middle = y0 + (y1 - y0 + 1) // 2
    return (x0, y0, x1, middle - 1), (x0, middle, x1, y1)


def _partition(
    grey: np.ndarray, num_tokens: int, min_region_size: int, exponent: float, bias: np.ndarray | None
) -> list[Box]:
    height, width = grey.shape
    unit = (grey + np.float32(1)) / np.float32(2)
    table = None if bias is None else summed_area_table(bias)

    def splittable(box: Box) -> bool:
        return max(box[2] - box[0], box[3] - box[1]) > min_region_size

    def measured(boxes: tuple[Box, ...]) -> list[tuple[float, Box]]:
        return [(_complexity(unit, box, exponent, table), box) for box in boxes]

    regions = measured(((0, 0, width - 1, height - 1),))
    while len(regions) < num_tokens:
        regions.sort(key=lambda region: region[0], reverse=True)  # stable: equals keep their order
        chosen = next(i for i, (_, box) in enumerate(regions) if splittable(box))
        box = regions.pop(chosen)[1]
        extent_x, extent_y = box[2] - box[0], box[3] - box[1]
        if extent_x != extent_y:
            regions += measured(_halves(box, along_x=extent_x > extent_y))
            continue
        in_x, in_y = measured(_halves(box, along_x=True)), measured(_halves(box, along_x=False))
        regions += in_x if min(in_x[0][0], in_x[1][0]) < min(in_y[0][0], in_y[1][0]) else in_y
    return [box for _, box in regions]


def partition_image_reference(
    grey: np.ndarray,
    num_tokens: int,
    min_region_size: int = 8,
    entropy_exponent: float = 2.5,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """Regions of a batch of grey images, as `partition_image` finds them; no checks.

    grey: (B, H, W) float32 in [-1, 1]. bias: (B, H, W) float32 or None. num_tokens: at most what `max_tokens`
    says. Returns (B, num_tokens, 4) int32: x0, y0, x1, y1 in pixels, the last ones inclusive.
    """
    regions = [
        _partition(image, num_tokens, min_region_size, entropy_exponent, None if bias is None else bias[i])
        for i, image in enumerate(grey)
    ]
    return np.array(regions, dtype=np.int32).reshape(len(grey), num_tokens, 4)
