"""Kernel distances and nearest neighbours, against torchmetrics, loops over pairs and known distributions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from gpstoken_diffusers.evaluation import distances
from gpstoken_diffusers.evaluation.distances import kernel_distance, nearest_neighbours, paired_kernel_distance


def normal(count: int, seed: int, mean: float = 0.0, size: int = 4) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).double() + mean


def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x @ y / len(x) + 1) ** 3).item()


def mean_of(values: list[float]) -> float:
    return sum(values) / len(values)


def by_pairs(a: torch.Tensor, b: torch.Tensor, paired: bool = False) -> float:
    """The estimate as its equation says; `paired` leaves out the pairs of one row."""
    within = [mean_of([kernel(x, y) for x, y in itertools.permutations(rows, 2)]) for rows in (a, b)]
    across = [kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i != j or not paired]
    return sum(within) - 2 * mean_of(across)


def jackknife(values: list[float]) -> float:
    """Variance of an estimate by its values without each row."""
    mean = mean_of(values)
    return (len(values) - 1) / len(values) * sum((value - mean) ** 2 for value in values)


def without(rows: torch.Tensor, place: int) -> torch.Tensor:
    return torch.cat([rows[:place], rows[place + 1 :]])


@pytest.mark.parametrize("rows_at_once", [2, 1024])
def test_value_and_error_are_those_of_all_pairs(monkeypatch, rows_at_once):
    monkeypatch.setattr(distances, "ROWS_AT_ONCE", rows_at_once)
    a, b = normal(5, 0), normal(7, 1, mean=0.5)
    # float64 on both sides: rounding alone.
    value, error = kernel_distance(a, b)
    assert value == pytest.approx(by_pairs(a, b), rel=1e-12)
    variance = jackknife([by_pairs(without(a, i), b) for i in range(5)])
    variance += jackknife([by_pairs(a, without(b, i)) for i in range(7)])
    assert error == pytest.approx(math.sqrt(variance), rel=1e-9)
    assert kernel_distance(b, a) == pytest.approx((value, error))
    value, error = paired_kernel_distance(a, b[:5])
    assert value == pytest.approx(by_pairs(a, b[:5], paired=True), rel=1e-12)
    variance = jackknife([by_pairs(without(a, i), without(b[:5], i), paired=True) for i in range(5)])
    assert error == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_of_equally_many_it_is_that_of_torchmetrics():
    a, b = normal(40, 0, size=64), normal(40, 1, mean=0.05, size=64)
    assert kernel_distance(a, b).value == pytest.approx(poly_mmd(a, b).item(), rel=1e-9)  # float64 rounding


def test_cases_by_hand():
    # One feature; kernels of 0 and anything are 1, of 1 and 1 they are 8: 1 + 8 - 2.
    assert kernel_distance(torch.zeros(3, 1), torch.ones(4, 1)) == pytest.approx((7, 0))
    features = normal(8, 0)
    assert paired_kernel_distance(features, features).value == 0
    assert kernel_distance(features, features).value < 0  # what pairs do to the other estimate


def test_halves_of_one_distribution_are_at_zero_whatever_their_number():
    """Unbiased: the mean over many draws is 0 within its error, for few pictures as for many."""
    for count in (5, 40):
        pairs = [(normal(count, 2 * seed), normal(count, 2 * seed + 1)) for seed in range(300)]
        values = torch.tensor([kernel_distance(*pair).value for pair in pairs])
        assert abs(values.mean()) < 3 * values.std() / math.sqrt(300)
        assert (values < 0).any()


def test_shifted_gaussians_have_the_distance_of_the_closed_form():
    """E (x.y / d + 1)^3 in one dimension, with mean m and variance 1, by the moments of a product of independents."""

    def expected(m: float, n: float) -> float:
        first, second, third = (lambda m: m), (lambda m: 1 + m * m), (lambda m: 3 * m + m**3)
        return 1 + 3 * first(m) * first(n) + 3 * second(m) * second(n) + third(m) * third(n)

    truth = expected(0, 0) + expected(1, 1) - 2 * expected(0, 1)
    draws = [kernel_distance(normal(60, 2 * s, size=1), normal(60, 2 * s + 1, mean=1, size=1)) for s in range(200)]
    values = torch.tensor([draw.value for draw in draws])
    spread = values.std().item()
    assert values.mean().item() == pytest.approx(truth, abs=3 * spread / math.sqrt(200))
    # The standard error that one draw claims is the scatter over draws.
    claimed = torch.tensor([draw.standard_error for draw in draws]).square().mean().sqrt().item()
    assert claimed == pytest.approx(spread, rel=0.25)


def test_half_precision_features_are_summed_in_double():
    a, b = normal(30, 0).half(), normal(30, 1, mean=0.2).half()
    assert kernel_distance(a, b) == kernel_distance(a.double(), b.double())


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("rows_at_once", [4, 1024])
def test_neighbours_equal_a_sorted_list(monkeypatch, metric, rows_at_once):
    monkeypatch.setattr(distances, "ROWS_AT_ONCE", rows_at_once)
    a, b = normal(10, 0, size=3), normal(40, 1, size=3)
    found = nearest_neighbours(a, b, k=3, metric=metric)
    assert found.distances.shape == found.indices.shape == (10, 3)
    for row, query in enumerate(a):
        if metric == "cosine":
            away = [1 - torch.dot(query, other).item() / (query.norm() * other.norm()).item() for other in b]
        else:
            away = [(query - other).norm().item() for other in b]
        order = sorted(range(40), key=away.__getitem__)[:3]
        assert found.indices[row].tolist() == order
        # cdist subtracts squares: half of float64's digits.
        assert found.distances[row].tolist() == pytest.approx([away[index] for index in order], abs=1e-6)


ONES = torch.ones(4, 2)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: kernel_distance(ONES, torch.ones(4, 3)), ValueError, r"\(4, 2\) and \(4, 3\)"),
        (lambda: kernel_distance(ONES, ONES[0]), ValueError, "shapes"),
        (lambda: kernel_distance(ONES[:2], ONES), ValueError, "at least 3 rows"),
        (lambda: kernel_distance(ONES, ONES * math.nan), ValueError, "NaN"),
        (lambda: kernel_distance(ONES, ONES.long()), TypeError, "int64"),
        (lambda: paired_kernel_distance(ONES, ONES[:3]), ValueError, "sets of one size, not 4 and 3"),
        (lambda: nearest_neighbours(ONES, ONES, metric="dot"), ValueError, "cosine, l2"),
        (lambda: nearest_neighbours(ONES, ONES, k=5), ValueError, "references, 4, not 5"),
        (lambda: nearest_neighbours(ONES, ONES, k=0), ValueError, "not 0"),
        (lambda: nearest_neighbours(ONES * 0, ONES), ValueError, "zeros"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
