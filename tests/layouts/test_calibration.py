"""Calibration: valid for any input, the least cost, real partitions unchanged, bad input."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from golden_files import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_judge import Box, assert_valid, halves_of, picture, sides
from safetensors.numpy import load_file

from gpstoken_diffusers.layouts.calibration import calibrate_layout
from gpstoken_diffusers.ops.partition import Partition, initial_gaussians, max_tokens, partition_image

# ---- any input gives a valid partition ----

sigmas = st.sampled_from((1e-9, 10.0, 0.01, 0.1, 0.5, -1.0, 0.0, 1e30))
centers = st.sampled_from((-1.0, 1.0, 0.0, -7.0, 1e30, 0.3, -0.99))


def wild_layout(kind: str, count: int, seed: int, sigma: float, center: float) -> torch.Tensor:
    """(1, M, 5) Gaussians that no partition has."""
    generator = torch.Generator().manual_seed(seed)
    layout = torch.rand((1, count, 5), generator=generator) * 2 - 1
    if kind == "noise":
        layout[..., :2] = layout[..., :2].mul(4).exp() / 20
    elif kind == "corner":
        layout[..., :2], layout[..., 3:] = sigma, center
    elif kind == "duplicates":
        layout[:] = layout[:, :1]
    else:
        layout *= 1000  # "huge"
    return layout


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_input_gives_a_valid_partition(data):
    height, width = data.draw(sides, "height"), data.draw(sides, "width")
    smallest = data.draw(st.sampled_from((2, 3, 7, 8, 8, 8, 20)), "min_region_size")
    largest = max_tokens(height, width, smallest)
    num_tokens = data.draw(st.one_of(st.sampled_from((1, min(largest, 700))), st.integers(1, min(largest, 300))), "N")
    kind = data.draw(st.sampled_from(("noise", "corner", "duplicates", "huge")), "kind")
    count = data.draw(st.one_of(st.just(1), st.integers(1, 200)), "M")
    layout = wild_layout(kind, count, data.draw(st.integers(0, 999)), data.draw(sigmas), data.draw(centers))
    if layout.abs().max() < 1e4:
        layout = layout.to(data.draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.float64))))
    found = calibrate_layout(layout, num_tokens, image_size=(height, width), min_region_size=smallest)
    assert_valid(found, 1, num_tokens, height, width, smallest)


@pytest.mark.parametrize("size", ((256, 256), (255, 257), (100, 403)))
def test_full_size(size):
    layouts = torch.cat([wild_layout(kind, 90, 5, 1e-9, 1.0) for kind in ("noise", "corner", "duplicates", "huge")])
    largest = max_tokens(*size)
    for num_tokens in (1, 2, 128, 256, largest - 1, largest):
        found = calibrate_layout(layouts, num_tokens, image_size=size)
        assert_valid(found, 4, num_tokens, *size, 8)


# ---- it is the nearest ----


def distance(box: Box, prediction: list[float], height: int, width: int) -> float:
    """Bhattacharyya's, by its formula, in float64; sigmas and centres are inside the ranges already."""
    total = 0.0
    for axis, size in enumerate((width, height)):
        s, m = np.float32((box[2 + axis] - box[axis]) / size * 2 / 3), (box[axis] + box[2 + axis]) / (size - 1) - 1
        s, m = float(s), float(np.float32(m))
        t, n = prediction[axis], prediction[3 + axis]
        total += (m - n) ** 2 / (s * s + t * t) / 4 + math.log((s * s + t * t) / (2 * s * t)) / 2
    return total


def cost(leaves: frozenset[Box], distances: dict[Box, list[float]], pixels: list[tuple[int, int]]) -> float:
    """Both sums of calibrate_layout's definition. pixels: the column and row of each prediction's centre."""
    near = sum(min(distances[box]) for box in leaves)
    held = 0.0
    for i, (column, row) in enumerate(pixels):
        held += next(distances[b][i] for b in leaves if b[0] <= column <= b[2] and b[1] <= row <= b[3])
    return near + held * len(leaves) / len(pixels)


@functools.cache
def all_partitions(box: Box, smallest: int) -> frozenset[frozenset[Box]]:
    found = {frozenset({box})}
    for first, second in halves_of(box, smallest):
        found |= {a | b for a in all_partitions(first, smallest) for b in all_partitions(second, smallest)}
    return frozenset(found)


@pytest.mark.parametrize(
    ("height", "width", "smallest", "num_tokens", "num_predictions"),
    (
        (32, 32, 8, 16, 5),
        (32, 32, 8, 13, 13),
        (32, 32, 8, 7, 9),
        (23, 37, 7, 6, 6),
        (12, 40, 6, 5, 3),
        (21, 21, 6, 5, 1),
    ),
)
def test_no_partition_costs_less(height, width, smallest, num_tokens, num_predictions):
    generator = torch.Generator().manual_seed(height + num_tokens)
    candidates = [c for c in all_partitions((0, 0, width - 1, height - 1), smallest) if len(c) == num_tokens]
    for _ in range(3):
        layout = torch.rand((1, num_predictions, 5), generator=generator, dtype=torch.float64) * 1.8 - 0.9
        # within the sigmas of regions, which clamping would bring them to
        layout[..., :2] = torch.rand(layout[..., :2].shape, generator=generator, dtype=torch.float64) * 0.3 + 0.25
        found = calibrate_layout(layout, num_tokens, image_size=(height, width), min_region_size=smallest)
        predictions = layout[0].tolist()
        boxes = frozenset().union(*candidates)
        distances = {box: [distance(box, p, height, width) for p in predictions] for box in boxes}
        pixels = [(round((x + 1) / 2 * (width - 1)), round((y + 1) / 2 * (height - 1))) for *_, x, y in predictions]
        costs = [cost(candidate, distances, pixels) for candidate in candidates]
        got = cost(frozenset(map(tuple, found.regions[0].tolist())), distances, pixels)
        assert got == pytest.approx(min(costs), rel=1e-12)
        assert len(costs) == 1 or got < np.median(costs)


def test_clamping():
    """Outside the ranges of regions, values count as the nearest inside."""
    layout = torch.tensor([[[1e-9, 10.0, 0.9, -7.0, 0.1], [-1.0, 0.1, -3.0, 0.4, 1e30]]])
    smallest, largest = 7 / 256 * 2 / 3, 255 / 256 * 2 / 3
    same = torch.tensor([[[smallest, largest, 0, -1, 0.1], [smallest, 0.1, 0, 0.4, 1]]])
    assert torch.equal(calibrate_layout(layout, 50).regions, calibrate_layout(same, 50).regions)


def test_every_prediction_counts():
    """Each of 16 even regions has a prediction that it equals; those left over are heard all the same."""
    even = initial_gaussians(partition_image(torch.zeros(128, 128), 16).regions, 128, 128)
    assert torch.equal(calibrate_layout(even, image_size=(128, 128)).geometry, even)
    spot = torch.tensor([0.04, 0.04, 0, -0.7, -0.7]).expand(1, 16, 5)
    found = calibrate_layout(torch.cat([even, spot], dim=1), 16, image_size=(128, 128))
    assert (found.geometry[..., 0] < 0.1).sum() >= 2


# ---- real partitions ----


def assert_unchanged(partition: Partition, height: int, width: int, **settings) -> None:
    found = calibrate_layout(partition.geometry, image_size=(height, width), **settings)
    assert torch.equal(found.regions, partition.regions) and torch.equal(found.geometry, partition.geometry)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_partitions_come_back(data):
    height, width = data.draw(sides, "height"), data.draw(sides, "width")
    smallest = data.draw(st.sampled_from((2, 3, 8, 8)), "min_region_size")
    num_tokens = data.draw(st.integers(1, min(max_tokens(height, width, smallest), 300)), "N")
    image = picture(2, height, width, data.draw(st.integers(0, 999), "seed"))
    partition = partition_image(image, num_tokens, min_region_size=smallest)
    assert_unchanged(partition, height, width, min_region_size=smallest)
    half = calibrate_layout(partition.geometry.half(), image_size=(height, width), min_region_size=smallest)
    assert torch.equal(half.regions, partition.regions)
    # the limits that the documentation promises
    noise = torch.rand((2, num_tokens, 4), generator=torch.Generator().manual_seed(num_tokens)) * 2 - 1
    if data.draw(st.booleans(), "at the limits"):
        noise = noise.sign()
    off = partition.geometry.clone()
    off[..., 3:] += 0.299 * noise[..., 2:] * off[..., :2]
    off[..., :2] *= 1.299 ** noise[..., :2]
    found = calibrate_layout(off, image_size=(height, width), min_region_size=smallest)
    assert torch.equal(found.regions, partition.regions) and torch.equal(found.geometry, partition.geometry)


@pytest.mark.parametrize("num_tokens", (64, 128, 256))
@pytest.mark.parametrize("name", ("astronaut", "coffee", "chelsea", "rocket", "camera", "grey", "step"))
def test_golden_partitions_come_back(name, num_tokens):
    goldens = load_file(golden("partition.safetensors"))
    codes = torch.tensor(goldens[f"{name}.n{num_tokens}.gpscodes"], dtype=torch.float32).reshape(1, -1, 5)
    found = calibrate_layout(codes)
    assert_valid(found, 1, num_tokens, 256, 256, 8)
    assert (found.geometry - codes).abs().max() < 1e-7  # the reference's own rounding
    expected = np.rint((goldens[f"{name}.n{num_tokens}.regions"].reshape(-1, 4) + 1) / 2 * 255)
    assert np.array_equal(found.regions[0].numpy(), expected)


def test_order_follows_the_predictions():
    partition = partition_image(picture(1, 256, 256), 100)
    shuffled = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    found = calibrate_layout(partition.geometry[:, shuffled])
    assert torch.equal(found.regions, partition.regions[:, shuffled])


def test_another_number_of_tokens():
    """Fewer or more tokens than predictions: still small regions where the small ones are."""
    image = torch.zeros(256, 256)
    image[:64, :64] = picture(1, 64, 64)[0] + torch.rand((64, 64), generator=torch.Generator().manual_seed(0)) - 0.5
    predicted = partition_image(image, 96).geometry
    for num_tokens in (48, 128):
        found = calibrate_layout(predicted, num_tokens)
        assert_valid(found, 1, num_tokens, 256, 256, 8)
        x0, y0, x1, y1 = found.regions[0].unbind(-1)
        assert ((x1 < 64) & (y1 < 64)).sum() > num_tokens / 4  # a sixteenth of the area


def test_layouts_do_not_affect_each_other_nor_their_input():
    layouts = torch.cat([wild_layout("noise", 40, seed, 0.1, 0.0) for seed in range(35)]).requires_grad_()
    copy = layouts.detach().clone()
    together = calibrate_layout(layouts, 50)
    alone = torch.cat([calibrate_layout(layout[None], 50).regions for layout in layouts])
    assert torch.equal(together.regions, alone)
    assert torch.equal(layouts, copy) and not together.geometry.requires_grad
    empty = calibrate_layout(torch.zeros(0, 7, 5))
    assert empty.regions.shape == (0, 7, 4) and empty.geometry.shape == (0, 7, 5)
    compiled = torch.compile(lambda layout: calibrate_layout(layout * 1.0, 50).geometry + 0.0, backend="eager")
    assert torch.equal(compiled(copy), together.geometry)


@pytest.mark.gpu
def test_gpu_layout():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    layout = wild_layout("noise", 64, 0, 0.1, 0.0)
    found, expected = calibrate_layout(layout.cuda()), calibrate_layout(layout)
    assert found.regions.is_cuda and found.geometry.is_cuda
    assert torch.equal(found.regions.cpu(), expected.regions)


# ---- bad input ----


def with_value(value: float) -> torch.Tensor:
    layout = torch.full((2, 4, 5), 0.1)
    layout[1, 2, 4] = value
    return layout


GOOD = torch.full((1, 4, 5), 0.1)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "words"),
    (
        ((with_value(float("nan")),), {}, ValueError, r"row 2 of layout 1.*\(0.1, 0.1, 0.1, 0.1, nan\)"),
        ((with_value(float("-inf")),), {}, ValueError, "row 2 of layout 1.*-inf"),
        ((GOOD, 0), {}, ValueError, "num_tokens=0.*1 to 1024"),
        ((GOOD, -1), {}, ValueError, "num_tokens=-1"),
        ((GOOD, 1025), {}, ValueError, "num_tokens=1025.*1 to 1024"),
        ((torch.zeros(1, 17, 5),), {"image_size": (32, 32)}, ValueError, "num_tokens=17.*1 to 16"),
        ((GOOD, 2.5), {}, TypeError, "integer"),
        ((torch.zeros(1, 0, 5),), {}, ValueError, "at least one prediction"),
        ((torch.zeros(4, 5),), {}, ValueError, r"\(B, M, 5\).*got \(4, 5\)"),
        ((torch.zeros(1, 4, 21),), {}, ValueError, r"got \(1, 4, 21\)"),
        ((GOOD.int(),), {}, TypeError, "int32"),
        ((GOOD.numpy(),), {}, TypeError, "ndarray"),
        ((GOOD,), {"image_size": 256}, TypeError, "two integers"),
        ((GOOD,), {"image_size": (256.0, 256)}, TypeError, "integer"),
        ((GOOD, 1), {"image_size": (1, 50)}, ValueError, "2 x 2 px"),
        ((GOOD,), {"min_region_size": 1}, ValueError, "at least 2 px"),
    ),
)  # fmt: skip
def test_bad_input(arguments, settings, error, words):
    with pytest.raises(error, match=words):
        calibrate_layout(*arguments, **settings)
