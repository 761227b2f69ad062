"""Tiles cut out of pictures and put into them, some at a time."""

from __future__ import annotations

import pytest
import torch
from model_zoo import noise_images
from torch.utils._python_dispatch import TorchDispatchMode

from gpstoken_diffusers.image_processor import GPSTokenImageProcessor
from gpstoken_diffusers.layouts.of_pictures import partition_tiles
from gpstoken_diffusers.ops.partition import partition_image
from gpstoken_diffusers.tiling import cut_tiles, join_tiles, pad_to_tiles, seen_sizes, take_tiles, tile_grid_for

SIZES = [(32, 32), (96, 64), (70, 33), (5, 100), (64, 31)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_any_run_of_tiles_is_that_of_the_whole_canvas(size, batch_size):
    images = noise_images(batch_size, *size)
    grid = tile_grid_for(*size, 32)
    expected = cut_tiles(pad_to_tiles(images, 32), grid)
    for start in range(len(expected)):
        for stop in range(start + 1, len(expected) + 3):  # beyond the end, as a last chunk
            assert torch.equal(take_tiles(images, 32, slice(start, stop)), expected[start:stop])
    half = take_tiles(images, 32, slice(0, 2), torch.float16)
    assert torch.equal(half, expected[:2].half())


def test_tiles_of_a_mask_become_numbers():
    mask = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    mask[..., 30:, 30:] = True
    tiles = take_tiles(mask, 32, slice(1, 4), torch.float32)
    assert torch.equal(tiles, cut_tiles(pad_to_tiles(mask.float(), 32), (2, 2))[1:])


class LargestStorage(TorchDispatchMode):
    """Bytes of the largest tensor that was made, views of a given one aside."""

    def __init__(self, given: torch.Tensor):
        super().__init__()
        self.given, self.bytes = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if result.untyped_storage().data_ptr() != self.given:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_one_tile_is_taken_without_the_rest():
    """What is copied are the tiles: nothing larger is made on the way."""
    images = noise_images(1, 320, 320)
    with LargestStorage(images) as largest:
        take_tiles(images, 32, slice(39, 42))  # the last of a row, and two of the next
    assert largest.bytes == 3 * 3 * 32 * 32 * 4


def test_tiles_are_joined_where_they_were():
    images = noise_images(2, 64, 96)
    assert torch.equal(join_tiles(cut_tiles(images, (2, 3)), (2, 3)), images)


@pytest.mark.parametrize("tiles_at_once", [1, 4, 100])
@pytest.mark.parametrize("size", [(70, 90), (96, 64)], ids=str)
def test_the_partition_does_not_depend_on_how_many_tiles_go_at_once(tiles_at_once, size):
    images, grid = noise_images(2, *size), tile_grid_for(*size, 32)
    maps = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(1))
    # Of whole tiles it is that of the tiles, whatever there is for the others.
    seen = None if size == (96, 64) else seen_sizes(2, *size, 32)
    for weights in (None, maps):
        whole = None if weights is None else cut_tiles(pad_to_tiles(weights, 32), grid)[:, 0]
        expected = partition_image(cut_tiles(pad_to_tiles(images, 32), grid), 6, importance=whole, seen=seen)
        found = partition_tiles(images, 32, 6, importance=weights, tiles_at_once=tiles_at_once)
        assert torch.equal(found.regions, expected.regions) and torch.equal(found.geometry, expected.geometry)


def shown(regions: torch.Tensor, seen: tuple[int, int]) -> int:
    """How many regions show something of the picture."""
    return int(((regions[:, 0] < seen[1]) & (regions[:, 1] < seen[0])).sum())


# A size, tokens per tile, and of each tile the most that can show something.
SEEN = [
    ((16, 16), 16, [4]),  # 8 px are the smallest regions
    ((64, 64), 64, [60]),  # the four that cutting 64 x 64 out of 256 x 256 leaves over
    ((257, 257), 256, [256, 32, 32, 1]),  # a column of one pixel
    ((1, 1), 64, [1]),
    ((256, 320), 64, [64, 61]),
    ((2, 200), 64, [25]),
]


@pytest.mark.parametrize("size, num_tokens, most", SEEN, ids=str)
@pytest.mark.parametrize("exponent", [2.5, 0.0])
def test_tokens_go_to_what_is_seen(size, num_tokens, most, exponent):
    """No region wholly outside the picture is divided as long as one that shows something can be."""
    seen = seen_sizes(1, *size, 256)
    pictures = {
        "noise": noise_images(1, *size),
        "flat": torch.full((1, 3, *size), 0.3),
        "stripes": (torch.arange(size[0]) % 2.0)[:, None].expand(1, 3, *size) * 2
        - 1,  # which a copied edge goes on with
    }
    for name, picture in pictures.items():
        for weights in (None, torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0))):
            found = partition_tiles(picture, 256, num_tokens, importance=weights, entropy_exponent=exponent).regions
            assert [shown(*tile) for tile in zip(found, seen, strict=True)] == most, name


@pytest.mark.parametrize("axis", ["right", "bottom"])
def test_importance_at_the_picture_s_edge_stays_in_the_picture(axis):
    """A marked part that reaches the edge of a padded picture draws tokens, and as one that ends before the edge."""
    size, box = (
        ((96, 64), (slice(80, 96), slice(0, 64))) if axis == "bottom" else ((64, 96), (slice(0, 64), slice(80, 96)))
    )
    short = (slice(80, 95), box[1]) if axis == "bottom" else (box[0], slice(80, 95))
    picture, processor = noise_images(1, *size)[0] / 2 + 0.5, GPSTokenImageProcessor(tile_size=64, num_tokens=24)
    counts = {}
    for name, marked in {"none": None, "whole": box, "short": short}.items():
        mask = torch.zeros(size)
        if marked is not None:
            mask[marked] = 1
        for kind, layout in {
            "importance": processor.layout(picture, importance=mask, importance_strength=8.0),
            "mask": processor.layout_from_mask(mask),
        }.items():
            centre = layout.geometry[0, :, 3 if axis == "right" else 4] * 127 / 2 + 63.5
            counts[name, kind] = int(((centre >= 80) & (centre < 96)).sum())
    for kind in ("importance", "mask"):
        assert counts["whole", kind] >= counts["short", kind] > counts["none", kind]


def test_errors_of_a_late_tile_are_raised():
    images = noise_images(1, 32, 96)
    images[..., 70] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        partition_tiles(images, 32, 6, tiles_at_once=1)
    with pytest.raises(ValueError, match="1 to 16"):
        partition_tiles(noise_images(1, 32, 96), 32, 17, tiles_at_once=1)
