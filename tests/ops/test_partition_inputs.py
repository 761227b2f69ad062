"""What a caller may pass to the partition: pictures of any type, importance, and mistakes that it names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layout_judge import noise

from gpstoken_diffusers.ops.partition import grayscale, max_tokens, partition_image
from gpstoken_diffusers.ops.partition_reference import region_complexity


def test_inputs_that_mean_the_same():
    picture = ((noise(2, 3, 48, 80) + 1) * 127.5).to(torch.uint8)
    floats = (picture.double() / 127.5 - 1).float()
    expected = partition_image(floats, 20)
    grey = grayscale(floats)
    channels_last = floats.to(memory_format=torch.channels_last)
    flipped = np.ascontiguousarray(floats.numpy()[..., ::-1])[..., ::-1]  # negative strides
    same = (picture, picture.numpy(), flipped, floats.double(), grey, grey[:, None], channels_last)
    for image in (*same, floats.clone().requires_grad_()):
        found = partition_image(image, 20)
        assert torch.equal(found.regions, expected.regions) and torch.equal(found.geometry, expected.geometry)
        assert not found.geometry.requires_grad
    assert torch.equal(partition_image(grey[0], 20).regions[0], expected.regions[0])
    every_other = partition_image(grey[:, ::2].clone(), 9).regions
    for strided in (floats[:, :, ::2], grey[:, ::2], grey[:, None, ::2], grey.numpy()[:, ::2]):
        assert torch.equal(partition_image(strided, 9).regions, every_other)
    for dtype in (torch.float16, torch.bfloat16):  # equal to what the rounded values give
        found = partition_image(grey.to(dtype), 20)
        assert torch.equal(found.regions, partition_image(grey.to(dtype).float(), 20).regions)


def test_inputs_stay_as_they_are():
    image, importance = noise(1, 1, 40, 40) * 1.1, noise(40, 40).abs()
    copies = image.clone(), importance.clone()
    partition_image(image, 9, importance=importance)
    assert torch.equal(image, copies[0]) and torch.equal(importance, copies[1])


def test_overshoot_is_cut_off():
    image = noise(1, 40, 40) * 1.3
    assert torch.equal(partition_image(image, 9).regions, partition_image(image.clamp(-1, 1), 9).regions)


def test_empty_batch():
    partition = partition_image(torch.zeros(0, 3, 32, 32), 5, importance=torch.ones(32, 32))
    assert partition.regions.shape == (0, 5, 4) and partition.geometry.shape == (0, 5, 5)


def test_compiled_caller():
    @torch.compile(backend="eager")
    def centres(image: torch.Tensor) -> torch.Tensor:
        return partition_image(image * 1.0, 12).geometry[..., 3:] + 0.0

    image = noise(1, 40, 40)
    assert torch.equal(centres(image), partition_image(image, 12).geometry[..., 3:])


@pytest.mark.gpu
def test_gpu_image():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    image = noise(2, 3, 64, 64)
    found, expected = partition_image(image.cuda(), 30, importance=torch.ones(64, 64).cuda()), None
    expected = partition_image(image, 30, importance=torch.ones(64, 64))
    assert found.regions.is_cuda and found.geometry.is_cuda
    assert torch.equal(found.regions.cpu(), expected.regions)
    assert torch.equal(found.geometry.cpu(), expected.geometry)


# ---- importance ----


def tokens_inside(partition, mask: torch.Tensor) -> int:
    """How many regions have their centre inside the mask, in the first image."""
    x0, y0, x1, y1 = partition.regions[0].long().unbind(-1)
    return int(mask[(y0 + y1) // 2, (x0 + x1) // 2].sum())


@pytest.mark.parametrize("contrast", (1.0, 0.1, 0.0))
def test_importance_draws_tokens(contrast):
    """More with more strength, whatever the contrast, even where there is no detail at all."""
    mask = torch.zeros(128, 128)
    mask[32:64, 64:96] = 1
    image = noise(1, 128, 128) * contrast
    counts = []
    for strength in (0, 2, 16):
        partition = partition_image(image, 64, importance=mask, importance_strength=strength)
        counts.append(tokens_inside(partition, mask))
    plain = partition_image(image, 64)
    assert counts[0] == tokens_inside(plain, mask) == 4  # even detail: 1/16 of the area, 1/16 of the tokens
    assert counts[0] < counts[1] <= counts[2] == 16  # all that fit at 8 px


def test_importance_is_a_scaled_bias():
    image = noise(2, 64, 64) * torch.tensor([1.0, 0.2])[:, None, None]
    mask = noise(64, 64, seed=1).abs()
    whole = np.array([[0, 0, 63, 63]])
    per_pixel = [float(region_complexity(grey.numpy(), whole)[0]) / 64**2 for grey in image]
    bias = torch.stack([mask.double() * 3 * value for value in per_pixel])
    found = partition_image(image, 30, importance=mask, importance_strength=3)
    assert torch.equal(found.regions, partition_image(image, 30, complexity_bias=bias).regions)
    # both together add up
    both = partition_image(image, 30, importance=mask, importance_strength=3, complexity_bias=bias)
    assert torch.equal(both.regions, partition_image(image, 30, complexity_bias=2 * bias).regions)


def test_importance_shapes_and_types():
    image = noise(2, 64, 64)
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[10:30, 20:50] = True
    expected = partition_image(image, 25, importance=mask).regions
    batch = mask.float().expand(2, -1, -1)
    for same in (mask.float(), mask.numpy(), mask.double()[None], batch, batch.half()):
        assert torch.equal(partition_image(image, 25, importance=same).regions, expected)
    first_only = torch.stack([mask.float(), torch.zeros(64, 64)])
    mixed = partition_image(image, 25, importance=first_only).regions
    assert torch.equal(mixed[0], expected[0])
    assert torch.equal(mixed[1], partition_image(image, 25).regions[1])


# ---- mistakes ----


def with_value(value: float) -> torch.Tensor:
    image = torch.zeros(32, 32)
    image[3, 4] = value
    return image


GOOD = torch.zeros(32, 32)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "words"),
    (
        ((GOOD, 0), {}, ValueError, "1 to 16 tokens"),
        ((GOOD, -3), {}, ValueError, "num_tokens=-3"),
        ((GOOD, 17), {}, ValueError, "1 to 16 tokens"),
        ((GOOD, 2.5), {}, TypeError, "integer"),
        ((torch.zeros(1, 3, 1, 1), 1), {}, ValueError, "2 x 2 px"),
        ((torch.zeros(1, 40), 1), {}, ValueError, "2 x 2 px"),
        ((torch.zeros(0, 0), 1), {}, ValueError, "2 x 2 px"),
        ((with_value(float("nan")), 4), {}, ValueError, "NaN"),
        ((with_value(float("-inf")), 4), {}, ValueError, "NaN or infinite"),
        ((with_value(255.0), 4), {}, ValueError, r"\[-1, 1\], got 0 to 255"),
        ((torch.zeros(32), 4), {}, ValueError, r"\(B, 3, H, W\)"),
        ((torch.zeros(1, 4, 32, 32), 4), {}, ValueError, r"\(B, 3, H, W\)"),
        ((torch.zeros(32, 32, dtype=torch.int64), 4), {}, TypeError, "int64"),
        (("photo.jpg", 4), {}, TypeError, "str"),
        ((GOOD, 4), {"min_region_size": 1}, ValueError, "at least 2 px"),
        ((GOOD, 4), {"min_region_size": 8.0}, TypeError, "integer"),
        ((GOOD, 4), {"entropy_exponent": -1}, ValueError, "entropy_exponent=-1"),
        ((GOOD, 4), {"entropy_exponent": float("nan")}, ValueError, "entropy_exponent=nan"),
        ((GOOD, 4), {"importance": GOOD, "importance_strength": -1}, ValueError, "importance_strength=-1"),
        ((GOOD, 4), {"importance": GOOD, "importance_strength": float("inf")}, ValueError, "strength=inf"),
        ((GOOD, 4), {"importance": torch.zeros(31, 32)}, ValueError, r"\(32, 32\).*got \(31, 32\)"),
        ((GOOD, 4), {"importance": torch.zeros(2, 32, 32)}, ValueError, r"got \(2, 32, 32\)"),
        ((GOOD, 4), {"importance": with_value(-0.5)}, ValueError, r"\[0, 1\], got -0.5 to 0"),
        ((GOOD, 4), {"importance": with_value(2.0)}, ValueError, r"\[0, 1\], got 0 to 2"),
        ((GOOD, 4), {"importance": with_value(float("nan"))}, ValueError, "importance: .*NaN"),
        ((GOOD, 4), {"importance": torch.zeros(32, 32, dtype=torch.uint8)}, TypeError, "uint8"),
        ((GOOD, 4), {"importance": [[0.0]]}, TypeError, "list"),
        ((GOOD, 4), {"complexity_bias": with_value(float("inf"))}, ValueError, "complexity_bias: .*infinite"),
        ((GOOD, 4), {"seen": [(32, 33)]}, ValueError, r"seen: expected \(1, 1\) to \(32, 32\).*got \(32, 33\)"),
        ((GOOD, 4), {"seen": [(0, 32)]}, ValueError, r"seen: .*got \(0, 32\)"),
        ((GOOD, 4), {"seen": [(8, 8)] * 2}, ValueError, "each of the 1 images, got 2"),
    ),
)  # fmt: skip
def test_bad_input(arguments, settings, error, words):
    with pytest.raises(error, match=words):
        partition_image(*arguments, **settings)


def test_bias_beyond_float32():
    bias = torch.zeros(32, 32, dtype=torch.float64)
    bias[0, 0] = 1e300
    with pytest.raises(ValueError, match="within float32"):
        partition_image(GOOD, 4, complexity_bias=bias)


@pytest.mark.parametrize("shape", ((3, 32, 32), (1, 2, 32, 32), (32, 32)))
def test_grayscale_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        grayscale(torch.zeros(shape))


def test_max_tokens_refuses():
    with pytest.raises(ValueError, match="2 x 2 px"):
        max_tokens(1, 50)
    with pytest.raises(ValueError, match="min_region_size=0"):
        max_tokens(50, 50, 0)
