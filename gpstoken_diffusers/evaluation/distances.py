"""How far two sets of pictures are apart in the features of a network: Frechet, kernel distance, nearest neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

METRICS = ("cosine", "l2")
ROWS_AT_ONCE = 1024
"""Rows of a matrix of all pairs that are in memory together."""


class KernelDistance(NamedTuple):
    """What [`kernel_distance`] gives.

    Attributes:
        value: the squared distance; around 0, and below it as often as above, where both sets are alike.
        standard_error: of the value, from the scatter of the pictures in both sets.
    """

    value: float
    standard_error: float


class FeatureGaussian(NamedTuple):
    """A normal distribution of features.

    Attributes:
        mean: (d,) float64.
        root: (d, r) float64; root times its transpose is the covariance. r is the covariance's rank.
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def from_covariance(cls, mean: Tensor, covariance: Tensor) -> FeatureGaussian:
        """From (d,) and (d, d) floating point; what rounding made of zero eigenvalues is dropped.

        Raises ValueError: shapes that do not fit, or NaN or infinity.
        """
        size = mean.shape[0] if mean.ndim == 1 else -1
        if covariance.shape != (size, size):
            raise ValueError(f"a mean (d,) and a covariance (d, d) are expected, not {mean.shape}, {covariance.shape}")
        mean, covariance = mean.double(), covariance.double()
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("the mean or the covariance holds NaN or infinity")
        values, vectors = torch.linalg.eigh(covariance)
        kept = values > values.abs().max() * size * torch.finfo(torch.float64).eps
        return cls(mean, vectors[:, kept] * values[kept].sqrt())


class Neighbours(NamedTuple):
    """What [`nearest_neighbours`] gives, nearest first.

    Attributes:
        distances: (A, k) float64.
        indices: (A, k) int64, rows of the references.
    """

    distances: Tensor
    indices: Tensor


class FeatureMoments:
    """Mean and covariance of features that come in batches: only sums are kept, in float64 on the CPU.

    Attributes:
        count: rows so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Takes (n, d) floating point; raises ValueError for another d, or NaN or infinity."""
        (rows,) = _checked_rows([features], fewest=0)
        rows = rows.cpu()
        if self._shift is None and len(rows):
            # Sums around a typical row: squares of large means would cost digits.
            self._shift = rows.mean(dim=0)
            self._sum = torch.zeros_like(self._shift)
            self._products = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        if len(rows):
            if rows.shape[1] != len(self._shift):
                raise ValueError(f"features of {len(self._shift)} numbers came before, now of {rows.shape[1]}")
            rows = rows - self._shift
            self._sum += rows.sum(dim=0)
            self._products.addmm_(rows.T, rows)
            self.count += len(rows)

    def gaussian(self) -> FeatureGaussian:
        """The normal distribution with this mean and the unbiased covariance; ValueError for fewer than 2 rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, not {self.count}")
        mean = self._sum / self.count
        covariance = (self._products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return FeatureGaussian.from_covariance(mean + self._shift, covariance)


def frechet_distance(a: FeatureGaussian, b: FeatureGaussian) -> float:
    r"""Squared Frechet distance of two normal distributions: the "FID" of pictures (Heusel et al. 2017, 1706.08500).

    $$|\mu_a - \mu_b|^2 + \mathrm{tr}\,C_a + \mathrm{tr}\,C_b - 2\,\mathrm{tr}\,(C_a C_b)^{1/2}$$

    With C = R R^T the last trace is the sum of the singular values of R_a^T R_b, which needs no root of a matrix and
    is right for covariances of low rank. Of few pictures the covariances are far too small in rank, and the distance
    depends on how many there are: compare only figures of equally many, and see [`kernel_distance`].

    Returns:
        At least 0, where both are the same.

    Raises:
        ValueError: features of different lengths.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"the features have {len(a.mean)} and {len(b.mean)} numbers")
    traces = a.root.square().sum() + b.root.square().sum()
    common = torch.linalg.svdvals(a.root.T @ b.root).sum()
    return max(0.0, ((a.mean - b.mean).square().sum() + traces - 2 * common).item())


def kernel_distance(features_a: Tensor, features_b: Tensor) -> KernelDistance:
    r"""Squared maximum mean discrepancy under the kernel (x.y / d + 1)^3, unbiased: the "KID" of pictures.

    $$\frac{\sum_{i \ne j} k(a_i, a_j)}{m (m - 1)} + \frac{\sum_{i \ne j} k(b_i, b_j)}{n (n - 1)}
      - \frac{2 \sum_{i, j} k(a_i, b_j)}{m n}$$

    Binkowski, Sutherland, Arbel and Gretton (2018), arXiv 1801.01401, equation 4 and section 4. Unlike a Frechet
    distance its expectation does not depend on how many pictures there are. The paper averages it over random
    subsets; here all pairs count, and the standard error is the jackknife's: the statistic is formed anew without
    each picture in turn. That error is somewhat too large where the sets are alike.

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
    """[`kernel_distance`] where row i of both sets belongs together, as a picture and its reconstruction do.

    Such pairs are more alike than two pictures of the sets, and would pull the value below zero: they are left out of
    the third sum, which is then over i != j. That is unbiased too (Gretton et al. 2012, lemma 6). The jackknife leaves
    out a pair at a time.

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
    """Both in float64: the sums differ in their last digits only, where two sets are alike."""
    if a.ndim == b.ndim == 2 and a.shape[1] != b.shape[1]:
        raise ValueError(f"features must have the shapes (m, d) and (n, d), not {tuple(a.shape)} and {tuple(b.shape)}")
    return tuple(_checked_rows([a, b], fewest))


def _checked_rows(sets: list[Tensor], fewest: int) -> list[Tensor]:
    """Sets of features in float64."""
    if not all(features.is_floating_point() for features in sets):
        raise TypeError(f"features must be floating point numbers, not {' and '.join(str(s.dtype) for s in sets)}")
    shapes = " and ".join(str(tuple(features.shape)) for features in sets)
    if any(features.ndim != 2 for features in sets):
        raise ValueError(f"features must have the shapes (m, d) and (n, d), not {shapes}")
    if min(map(len, sets)) < fewest:
        raise ValueError(f"each set needs at least {fewest} rows, but the shapes are {shapes}")
    if not all(features.isfinite().all() for features in sets):
        raise ValueError("the features hold NaN or infinity")
    # MPS has no float64.
    return [(features.cpu() if features.device.type == "mps" else features).double() for features in sets]
