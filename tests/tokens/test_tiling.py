"""Tiles cut out of pictures and put into them, some at a time."""

from __future__ import annotations

import pytest
import torch
from model_zoo import noise_images
from torch.utils._python_dispatch import TorchDispatchMode

from gpstoken_diffusers.layouts.of_pictures import partition_tiles
from gpstoken_diffusers.ops.partition import partition_image
from gpstoken_diffusers.tiling import cut_tiles, join_tiles, pad_to_tiles, put_tiles, take_tiles, tile_grid_for

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


def test_tiles_are_put_where_they_were():
    images = noise_images(2, 64, 96)
    tiles = cut_tiles(images, (2, 3))
    canvas = torch.full_like(images, torch.nan)
    for start in (0, 5, 10):
        put_tiles(canvas, tiles[start : start + 5], start, (2, 3))
    assert torch.equal(canvas, images) and torch.equal(join_tiles(tiles, (2, 3)), images)


@pytest.mark.parametrize("tiles_at_once", [1, 4, 100])
def test_the_partition_does_not_depend_on_how_many_tiles_go_at_once(tiles_at_once):
    images = noise_images(2, 70, 90)
    maps = torch.rand(2, 1, 70, 90, generator=torch.Generator().manual_seed(1))
    for weights in (None, maps):
        whole = None if weights is None else cut_tiles(pad_to_tiles(weights, 32), (3, 3))[:, 0]
        expected = partition_image(cut_tiles(pad_to_tiles(images, 32), (3, 3)), 6, importance=whole)
        found = partition_tiles(images, 32, 6, importance=weights, tiles_at_once=tiles_at_once)
        assert torch.equal(found.regions, expected.regions) and torch.equal(found.geometry, expected.geometry)


def test_errors_of_a_late_tile_are_raised():
    images = noise_images(1, 32, 96)
    images[..., 70] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        partition_tiles(images, 32, 6, tiles_at_once=1)
    with pytest.raises(ValueError, match="1 to 16"):
        partition_tiles(noise_images(1, 32, 96), 32, 17, tiles_at_once=1)
