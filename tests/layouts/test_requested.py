"""Layouts after boxes and masks: valid partitions, tokens where they were asked for, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_judge import Box, assert_valid, picture, sides

from gpstoken_diffusers import layout_from_boxes, layout_from_mask
from gpstoken_diffusers.ops.partition import Partition, max_tokens, partition_image

# ---- boxes ----


def counts_inside(partition: Partition, box: Box) -> int:
    x, y = (partition.regions[0, :, :2] + partition.regions[0, :, 2:]).div(2).unbind(-1)
    return int(((x >= box[0]) & (x <= box[2]) & (y >= box[1]) & (y <= box[3])).sum())


def test_boxes_of_a_partition():
    partition = partition_image(picture(1, 96, 200), 40)
    found = layout_from_boxes(partition.regions[0], 40, image_size=(96, 200))
    assert torch.equal(found.regions, partition.regions)


@pytest.mark.parametrize("num_tokens", (64, 128, 256))
def test_small_boxes_draw_tokens(num_tokens):
    face, body = (96, 96, 127, 127), (64, 128, 191, 255)
    found = layout_from_boxes([face, body], num_tokens)
    assert_valid(found, 1, num_tokens, 256, 256, 8)
    in_face, in_body = counts_inside(found, face), counts_inside(found, body)
    assert 12 <= in_face <= 16  # 16 fit
    assert in_face / 32**2 > in_body / 128**2 > (num_tokens - in_face - in_body) / (256**2 - 128**2)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_boxes(data):
    height, width = data.draw(sides), data.draw(sides)
    num_tokens = data.draw(st.integers(1, min(max_tokens(height, width), 100)))
    boxes = []
    for _ in range(data.draw(st.integers(1, 12))):
        x = sorted(data.draw(st.tuples(*[st.integers(0, width - 1)] * 2)))
        y = sorted(data.draw(st.tuples(*[st.integers(0, height - 1)] * 2)))
        boxes.append((x[0], y[0], x[1], y[1]))
    assert_valid(layout_from_boxes(boxes, num_tokens, image_size=(height, width)), 1, num_tokens, height, width, 8)


@pytest.mark.parametrize(
    ("boxes", "words"),
    (
        ([], "at least one box"),
        ([1, 2, 3, 4], r"\(K, 4\).*got \(4,\)"),
        ([[1, 2, 3]], r"got \(1, 3\)"),
        ([[0, 0, 9, 9], [0, 0, 256, 9]], "box 1 is .*x1 <= 255"),
        ([[0, -1, 9, 9]], "box 0 is .*-1"),
        ([[9, 0, 5, 9]], "box 0 is"),
        ([[0, 9, 5, 8]], "box 0 is"),
        ([[0, 0, 5, float("nan")]], "nan"),
        ([[0, 0, float("inf"), 5]], "inf"),
    ),
)
def test_bad_boxes(boxes, words):
    with pytest.raises(ValueError, match=words):
        layout_from_boxes(boxes, 64)


# ---- masks ----


def masses(partition: Partition, weight: torch.Tensor) -> torch.Tensor:
    """(N,) sums of weight (H, W) over the regions of one layout."""
    return torch.stack([weight[y0 : y1 + 1, x0 : x1 + 1].sum() for x0, y0, x1, y1 in partition.regions[0].tolist()])


def density_ratio(partition: Partition, mask: torch.Tensor) -> float:
    """Tokens per pixel inside a boolean mask over those outside; a region across the edge counts by its area."""
    x0, y0, x1, y1 = partition.regions[0].unbind(-1)
    inside = masses(partition, mask.double()) / ((x1 - x0 + 1) * (y1 - y0 + 1))
    return float(inside.mean() / mask.double().mean() / ((1 - inside).mean() / (1 - mask.double().mean())))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_mask(data):
    """Valid; and greedy: what weighs most was halved, so no region that could still be halved outweighs the rest."""
    height, width = data.draw(sides, "height"), data.draw(sides, "width")
    smallest = data.draw(st.sampled_from((2, 3, 8, 8)), "min_region_size")
    num_tokens = data.draw(st.integers(1, min(max_tokens(height, width, smallest), 200)), "N")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999), "seed"))
    mask = torch.rand((2, height, width), generator=generator)
    kind = data.draw(st.sampled_from(("noise", "half", "bool", "half precision")), "kind")
    if kind == "half":
        mask[:, :, width // 2 :] = 0
    mask = {"bool": mask > 0.7, "half precision": mask.half()}.get(kind, mask)
    strength = data.draw(st.sampled_from((0.0, 1.0, 8.0, 1e6)), "strength")
    found = layout_from_mask(mask, num_tokens, strength=strength, min_region_size=smallest)
    assert_valid(found, 2, num_tokens, height, width, smallest)
    alone = layout_from_mask(mask[1].numpy(), num_tokens, strength=strength, min_region_size=smallest)
    assert torch.equal(alone.regions[0], found.regions[1])
    # The last two regions in the list are the halves of what was halved last, the heaviest that could be; nothing
    # that can still be halved is heavier. 1e-6: the weights are float32 in the partition.
    if num_tokens > 1:
        mass = masses(alone, 1 + strength * mask[1].double())
        x0, y0, x1, y1 = alone.regions[0].unbind(-1)
        divisible = torch.maximum(x1 - x0, y1 - y0) > smallest
        assert (mass[divisible] <= mass[-2:].sum() * (1 + 1e-6)).all()


@pytest.mark.parametrize("strength", (1.0, 3.0, 8.0))
@pytest.mark.parametrize("num_tokens", (64, 100, 128, 200))
def test_density_follows_the_formula(strength, num_tokens):
    """1 + strength, within the factor of 2 that halving leaves, where the mask's edges are those of regions."""
    mask = torch.zeros(256, 256, dtype=torch.bool)
    mask[:128, 128:] = True
    ratio = density_ratio(layout_from_mask(mask, num_tokens, strength=strength), mask)
    assert (1 + strength) / 2 <= ratio <= 2 * (1 + strength)


@pytest.mark.parametrize("strength", (4.0, 8.0))
def test_finer_inside_a_disc(strength):
    y, x = torch.meshgrid(torch.arange(200), torch.arange(300), indexing="ij")
    mask = (y - 90) ** 2 + (x - 170) ** 2 < 60**2
    found = layout_from_mask(mask, 128, strength=strength)
    assert_valid(found, 1, 128, 200, 300, 8)
    # Regions across the edge belong to both, which lowers the ratio: 3.4 and 6.3 here, an even partition has 1.
    assert density_ratio(found, mask) > 0.5 * (1 + strength)
    assert density_ratio(found, mask) > 2.5 * density_ratio(layout_from_mask(mask, 128, strength=0), mask)


def test_brighter_is_finer():
    """Quarters of 0, 1/3, 2/3 and 1: each as many tokens as 1 + 3 mask = 1, 2, 3, 4 says, within a factor of sqrt 2."""
    mask = torch.zeros(256, 256)
    for i, (rows, cols) in enumerate(((0, 0), (0, 128), (128, 0), (128, 128))):
        mask[rows : rows + 128, cols : cols + 128] = i / 3
    x, y = layout_from_mask(mask, 160, strength=3).geometry[0, :, 3:].unbind(-1)
    counts = [int(((x > 0) == bool(i & 1)).logical_and((y > 0) == bool(i & 2)).sum()) for i in range(4)]
    for i, count in enumerate(counts):
        assert 16 * (i + 1) / 2**0.5 <= count <= 16 * (i + 1) * 2**0.5
    assert counts == sorted(counts)


@pytest.mark.parametrize("value", (0.0, 0.5, 1.0))
def test_a_mask_without_features_gives_an_even_partition(value):
    mask = torch.full((128, 128), value)
    x0, y0, x1, y1 = layout_from_mask(mask, 64).regions[0].unbind(-1)
    assert set((x1 - x0 + 1).tolist()) == set((y1 - y0 + 1).tolist()) == {16}


MASK = torch.zeros(64, 64)


@pytest.mark.parametrize(
    ("mask", "arguments", "error", "words"),
    (
        (torch.full((64, 64), float("nan")), {}, ValueError, r"\[0, 1\], got nan"),
        (MASK + 1.5, {}, ValueError, r"\[0, 1\], got 1.5 to 1.5"),
        (MASK - 0.1, {}, ValueError, r"\[0, 1\], got -0.1"),
        (MASK + float("inf"), {}, ValueError, r"\[0, 1\], got inf"),
        (MASK[0], {}, ValueError, r"\(H, W\) or \(B, H, W\), got \(64,\)"),
        (MASK[None, None], {}, ValueError, r"got \(1, 1, 64, 64\)"),
        (MASK[:1], {}, ValueError, "1 x 64 px"),
        (MASK.to(torch.uint8), {}, TypeError, "floats or booleans, got torch.uint8"),
        ([[0.0, 1.0], [1.0, 0.0]], {}, TypeError, "got list"),
        (MASK, {"num_tokens": 65}, ValueError, "num_tokens=65.*1 to 64"),
        (MASK, {"num_tokens": 0}, ValueError, "num_tokens=0"),
        (MASK, {"num_tokens": 2.5}, TypeError, "integer"),
        (MASK, {"strength": -1.0}, ValueError, "strength=-1.0: expected 0 to"),
        (MASK, {"strength": float("nan")}, ValueError, "strength=nan"),
        (MASK, {"strength": 1e7}, ValueError, "strength"),
        (MASK, {"min_region_size": 1}, ValueError, "at least 2 px"),
    ),
)  # fmt: skip
def test_bad_masks(mask, arguments, error, words):
    with pytest.raises(error, match=words):
        layout_from_mask(mask, **{"num_tokens": 16, **arguments})


def test_arrays_and_empty_batches():
    mask = np.random.default_rng(0).random((2, 40, 60))
    expected = layout_from_mask(torch.from_numpy(mask), 12)
    assert torch.equal(layout_from_mask(mask[:, ::-1][:, ::-1], 12).regions, expected.regions)
    assert layout_from_mask(torch.zeros(0, 64, 64), 7).regions.shape == (0, 7, 4)
