"""The partition by error: the native library against the reference, and what the criterion means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpstoken_diffusers.ops.partition import partition_image
from gpstoken_diffusers.ops.partition_error_reference import partition_error_reference, region_error


def pictures(batch: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Coarse blobs, a fine texture in one corner, an empty corner, and a drawn edge."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, channels, 5, 5, generator=generator) * 2 - 1
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    image[..., : height // 3, : width // 3] = torch.rand(batch, channels, height // 3, width // 3, generator=generator)
    image[..., height // 2 :, width // 2 :] = 0.25
    image[..., -height // 5, :] = -1
    return image.clamp(-1, 1)


@pytest.mark.parametrize(
    "batch, channels, height, width, num_tokens, smallest",
    [(2, 3, 64, 64, 40, 4), (1, 1, 37, 53, 25, 4), (1, 3, 128, 96, 90, 8), (1, 3, 64, 64, 1, 8), (1, 3, 16, 16, 16, 2)],
)
@pytest.mark.parametrize("biased", [False, True])
def test_native_equals_reference(batch, channels, height, width, num_tokens, smallest, biased):
    images = pictures(batch, channels, height, width)
    bias = torch.rand(batch, height, width, generator=torch.Generator().manual_seed(1)) if biased else None
    found = partition_image(
        images, num_tokens, min_region_size=smallest, criterion="error", complexity_bias=bias
    ).regions
    expected = partition_error_reference(images.numpy(), num_tokens, smallest, None if bias is None else bias.numpy())
    assert np.array_equal(found.numpy(), expected)


def test_error_is_what_cells_in_their_mean_colour_leave():
    image = pictures(1, 3, 48, 60)[0]
    cells = torch.nn.functional.adaptive_avg_pool2d(image.double(), 6)
    painted = cells.repeat_interleave(8, 1).repeat_interleave(10, 2)
    expected = (image - painted).square().sum().item()
    # Values are rounded to 1 / 511.5, by half of that at most: 8,640 values of some 0.3 from their cell's mean.
    assert region_error(image.numpy(), (0, 0, 59, 47)) == pytest.approx(expected, rel=1e-2)
    assert region_error(np.full((3, 9, 7), 0.3, np.float32), (0, 0, 6, 8)) == 0


def test_tokens_go_where_the_error_is():
    image = torch.zeros(1, 3, 64, 64)
    image[..., 40:, 40:] = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    regions = partition_image(image, 40, min_region_size=4, criterion="error").regions[0]
    inside = (regions[:, 2] >= 40) & (regions[:, 3] >= 40)
    assert inside.sum() > 30
    # Colour counts: two colours of one grey value make an edge.
    image = torch.zeros(1, 3, 64, 64)
    image[:, 0, :, 30:], image[:, 1, :, 30:] = 0.587, -0.299
    grey = image.mul(torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
    assert grey.abs().max() < 1e-6
    regions = partition_image(image, 24, min_region_size=4, criterion="error").regions[0]
    sides = regions[:, 2] - regions[:, 0] + 1
    touching = (regions[:, 0] <= 30) & (regions[:, 2] >= 29)
    assert sides[touching].max() == sides.min() and sides[~touching].max() > 16


def test_importance_draws_tokens():
    image, wanted = pictures(1, 3, 64, 64), torch.zeros(64, 64)
    wanted[32:, 32:] = 1
    settings = {"min_region_size": 4, "criterion": "error", "importance": wanted}
    count = []
    for strength in (0.0, 10.0):
        regions = partition_image(image, 30, importance_strength=strength, **settings).regions[0]
        count.append((regions[:, :2] >= 32).all(1).sum())
    assert count[1] > count[0] + 5


def test_padding_gets_no_tokens_that_the_picture_can_take():
    image, importance = pictures(1, 3, 64, 64), torch.ones(64, 64)
    settings = {"min_region_size": 4, "criterion": "error", "importance": importance, "seen": [(40, 32)]}
    regions = partition_image(image, 60, **settings).regions
    image[..., 40:, :] = torch.rand(1, 3, 24, 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(partition_image(image, 60, **settings).regions, regions)
    outside = (regions[0, :, 0] >= 32) | (regions[0, :, 1] >= 40)
    # What halving leaves over around the picture: 32 px at its right, 16 below, and three of 8 px at its lower edge.
    assert outside.sum() <= 5


def test_unknown_criterion_and_too_large_images_are_refused():
    with pytest.raises(ValueError, match="criterion must be one of entropy, error, got 'colour'"):
        partition_image(torch.zeros(1, 3, 16, 16), 4, criterion="colour")
    with pytest.raises(ValueError, match="at most 67108864 px"):
        partition_image(torch.zeros(1, 1).expand(8193, 8193), 4, criterion="error")
