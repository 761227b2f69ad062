"""How far two sets of pictures are apart in the features of a network: kernel distances and nearest neighbours.

The Frechet distance is torchmetrics'. Its kernel distance takes random subsets of equal size; it lacks all pairs, sets
of other sizes, a standard error, and pairs that belong together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

METRICS = ("cosine", "l2")
ROWS_AT_ONCE = 1024
"""Rows of the matrix of all pairs that are in memory together."""


class KernelDistance(NamedTuple):
    """What [`kernel_distance`] returns.

    Attributes:
        value: the squared distance; for sets that are alike, scattered around 0.
        standard_error: of the value, from the scatter of the pictures in both sets.
    """

    value: float
    standard_error: float


class Neighbours(NamedTuple):
    """What [`nearest_neighbours`] returns, nearest first.

    Attributes:
        distances: (A, k) float64.
        indices: (A, k) int64, rows of the references.
    """

    distances: Tensor
    indices: Tensor


def kernel_distance(features_a: Tensor, features_b: Tensor) -> KernelDistance:
    r"""Squared maximum mean discrepancy under the kernel (x.y / d + 1)^3, unbiased: the "KID" of pictures.

    $$\frac{\sum_{i \ne j} k(a_i, a_j)}{m (m - 1)} + \frac{\sum_{i \ne j} k(b_i, b_j)}{n (n - 1)}
      - \frac{2 \sum_{i, j} k(a_i, b_j)}{m n}$$

    Binkowski, Sutherland, Arbel and Gretton (2018), arXiv 1801.01401, equation 4 and section 4. Unlike that of a
    Frechet distance, its expectation does not depend on the number of pictures. The paper averages over random
    subsets; here all pairs count, and the standard error is the jackknife's: the statistic is computed without each
    picture in turn. For sets that are alike, this error is somewhat too large.

    Args:
        features_a: (m, d) floating point, m at least 3, one row per picture.
        features_b: (n, d), n at least 3, on the same device.

    Returns:
        The value and its standard error, in no unit; papers give 1000 times the value.

    Raises:
        ValueError: the shapes are not (m, d) and (n, d), fewer than 3 rows, or NaN or infinity in them.
        TypeError: the features are not floating point numbers.
    """
    a, b = _checked(features_a, features_b, fewest=3)
    m, n = len(a), len(b)
    within_a = _kernel_sums(a, a) - _kernel(a.square().sum(dim=1) / a.shape[1])
    within_b = _kernel_sums(b, b) - _kernel(b.square().sum(dim=1) / b.shape[1])
    across_a, across_b = _kernel_sums(a, b), _kernel_sums(b, a)
    total_a, total_b, total = within_a.sum(), within_b.sum(), across_a.sum()
    mean_a, mean_b = total_a / (m * (m - 1)), total_b / (n * (n - 1))
    value = mean_a + mean_b - 2 * total / (m * n)
    # The same without picture i of one set: its row and its column leave the sums.
    without_a = (total_a - 2 * within_a) / ((m - 1) * (m - 2)) + mean_b - 2 * (total - across_a) / ((m - 1) * n)
    without_b = (total_b - 2 * within_b) / ((n - 1) * (n - 2)) + mean_a - 2 * (total - across_b) / ((n - 1) * m)
    variance = sum(
        (len(values) - 1) / len(values) * (values - values.mean()).square().sum() for values in (without_a, without_b)
    )
    return KernelDistance(value.item(), variance.sqrt().item())


def paired_kernel_distance(features_a: Tensor, features_b: Tensor) -> KernelDistance:
    """[`kernel_distance`] of sets whose rows belong together, such as pictures and their reconstructions.

    Such pairs are more alike than two other pictures of the sets and would pull the value below zero, so the third
    sum leaves them out: it is over i != j. That is unbiased too (Gretton et al. 2012, lemma 6). The jackknife leaves
    out one pair at a time.

    Args:
        features_a: (n, d) floating point, n at least 3.
        features_b: (n, d), on the same device.

    Raises:
        ValueError, TypeError: as [`kernel_distance`]; ValueError if the sets differ in size.
    """
    a, b = _checked(features_a, features_b, fewest=3)
    if len(a) != len(b):
        raise ValueError(f"pairs need sets of one size, not {len(a)} and {len(b)} rows")
    n, d = a.shape
    own = _kernel(a.square().sum(dim=1) / d) + _kernel(b.square().sum(dim=1) / d) - 2 * _kernel((a * b).sum(dim=1) / d)
    rows = _kernel_sums(a, a) + _kernel_sums(b, b) - _kernel_sums(a, b) - _kernel_sums(b, a) - own
    without = (rows.sum() - 2 * rows) / ((n - 1) * (n - 2))
    variance = (n - 1) / n * (without - without.mean()).square().sum()
    return KernelDistance((rows.sum() / (n * (n - 1))).item(), variance.sqrt().item())


def nearest_neighbours(features: Tensor, references: Tensor, k: int = 1, metric: str = "cosine") -> Neighbours:
    """The nearest `references` of each row of `features`.

    Args:
        features: (A, d) floating point.
        references: (B, d), on the same device.
        k: how many, at most B.
        metric: "cosine", 1 - x.y / (|x| |y|), from 0 to 2; or "l2", |x - y|.

    Returns:
        Distances and indices, both (A, k). Of references at one distance any may come first.

    Raises:
        ValueError: the shapes are not (A, d) and (B, d), NaN or infinity in them, an impossible `k`, an unknown metric,
            or a row of zeros, which has no direction, for "cosine".
        TypeError: the features are not floating point numbers.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    a, b = _checked(features, references, fewest=1)
    if not 1 <= k <= len(b):
        raise ValueError(f"k must be between 1 and the number of references, {len(b)}, not {k}")
    if metric == "cosine":
        lengths = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
        if not all(length.all() for length in lengths):
            raise ValueError('a row of zeros has no direction: take metric="l2"')
        a, b = a / lengths[0], b / lengths[1]
    # Of unit vectors, |x - y|^2 = 2 (1 - x.y): one order serves both.
    parts = [torch.cdist(rows, b).topk(k, largest=False) for rows in a.split(ROWS_AT_ONCE)]
    distances = torch.cat([part.values for part in parts])
    indices = torch.cat([part.indices for part in parts])
    return Neighbours(distances.square() / 2 if metric == "cosine" else distances, indices)


def _kernel(mean_product: Tensor) -> Tensor:
    return (mean_product + 1) ** 3


def _kernel_sums(a: Tensor, b: Tensor) -> Tensor:
    """(m,), the kernel of each row of `a` summed over the rows of `b`."""
    return torch.cat([_kernel(rows @ b.T / b.shape[1]).sum(dim=1) for rows in a.split(ROWS_AT_ONCE)])


def _checked(a: Tensor, b: Tensor, fewest: int) -> tuple[Tensor, Tensor]:
    """Both in float64: for sets that are alike, the sums differ in their last digits only."""
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    if not (a.is_floating_point() and b.is_floating_point()):
        raise TypeError(f"features must be floating point numbers, not {a.dtype} and {b.dtype}")
    if not a.ndim == b.ndim == 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must have the shapes (m, d) and (n, d), not {shapes}")
    if min(len(a), len(b)) < fewest:
        raise ValueError(f"each set needs at least {fewest} rows, but the shapes are {shapes}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("the features hold NaN or infinity")
    # MPS has no float64.
    return tuple((rows.cpu() if rows.device.type == "mps" else rows).double() for rows in (a, b))
