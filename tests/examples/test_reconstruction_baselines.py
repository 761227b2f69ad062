"""The baselines are what they claim to be: regions in their mean colours, principal components, files of a size."""

from __future__ import annotations

import io

import numpy as np
import pytest
import skimage.data
import torch
from model_zoo import noise_images, tiny_model
from PIL import Image
from reconstruction.baselines import (
    FileFormat,
    FileFormatWithin,
    PatchGrid,
    RegionMeans,
    file_bytes,
    fit_patch_pcas,
    largest_within,
    patch_grid,
    principal_directions,
)
from reconstruction.methods import GPSTokenMethod
from reconstruction_zoo import write_pictures

from gpstoken_diffusers.training.data import TrainingCrops, to_pixel_values


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(skimage.data.astronaut()[60:188, 170:298])


# Regions


@pytest.mark.parametrize("side", [32, 40])
def test_regions_cover_the_picture_tile_by_tile(side):
    method = RegionMeans(GPSTokenMethod("ours", tiny_model("lattice"), 9))
    images = noise_images(2, side, side)
    code = method.encode(images, [0, 1])
    painted = method.decode(code)
    tiles = (-(-side // 32)) ** 2
    assert code.boxes.shape == (2, 9 * tiles, 4)
    covered = torch.zeros(side, side)
    for x0, y0, x1, y1 in code.boxes[1].tolist():
        covered[y0 : y1 + 1, x0 : x1 + 1] += 1
        window = images[1, :, y0 : y1 + 1, x0 : x1 + 1]
        if window.numel():
            torch.testing.assert_close(painted[1, :, y0, x0], window.mean((1, 2)))
    assert (covered == 1).all()
    cost = method.cost(code)
    assert (cost.tokens, cost.numbers) == (9 * tiles, 7 * 9 * tiles)
    assert cost.bytes["coded"] == [-(-9 * tiles * 27 // 8)] * 2
    assert (method.decode(cost.coded) - painted).abs().max() <= 0.5 / 127.5 + 1e-6


# Principal components


def test_all_principal_components_lose_nothing_and_fewer_lose_more(tmp_path):
    folder = write_pictures(tmp_path / "pictures", [(70, 50)] * 3)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grids = [PatchGrid(4, 4, components) for components in (3 * 4 * 4, 20, 5)]
    errors = []
    for pca in fit_patch_pcas(folder, 32, grids, crops=40):
        code = pca.encode(images, [0, 1])
        assert code.shape == (2, pca.grid.components, 8, 8)
        errors.append((pca.decode(code) - images).square().mean().item())
    assert errors[0] < 1e-9  # rounding
    assert errors[0] < errors[1] < errors[2]


def test_principal_components_are_those_of_the_patches(tmp_path):
    folder = write_pictures(tmp_path / "pictures", [(70, 50)] * 3)
    (pca,) = fit_patch_pcas(folder, 32, [PatchGrid(4, 8, 6)], crops=20)
    crops = TrainingCrops(folder, 32, num_tokens=1, length=20)
    patches = torch.cat([pca.grid.cut(crops[i]["pixel_values"][None])[0] for i in range(20)]).double()
    torch.testing.assert_close(pca.mean.double(), patches.mean(0), atol=1e-6, rtol=0)
    covariance = torch.cov(patches.T, correction=0)
    values = torch.linalg.eigvalsh(covariance)[-6:]
    basis = pca.basis.double()
    torch.testing.assert_close((basis.T @ covariance @ basis).diag(), values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64), atol=1e-5, rtol=0)
    assert pca.parameters == 96 * 7


def test_principal_directions_capture_what_eigenvectors_do():
    generator = torch.Generator().manual_seed(1)
    vectors = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64)).Q
    covariance = vectors * torch.arange(1, 61).double().pow(-1.5) @ vectors.T
    basis = principal_directions(covariance, 10)
    captured = (basis.T @ covariance @ basis).trace()
    assert captured == pytest.approx(torch.arange(1, 11).double().pow(-1.5).sum().item(), rel=1e-6)


def test_patches_are_as_many_as_tokens():
    assert patch_grid(256, 256, 37) == PatchGrid(16, 16, 37)
    assert patch_grid(256, 128, 37) == PatchGrid(16, 32, 37)
    assert patch_grid(512, 1024, 37) == PatchGrid(16, 16, 37)
    assert patch_grid(256, 100, 37) is None  # no side of a patch would be whole
    assert patch_grid(64, 1024, 37) is None  # patches of 2 x 2 px have 12 numbers
    assert patch_grid(256, 32, 37) == PatchGrid(32, 64, 37)
    assert patch_grid(256, 16, 37) is None  # covariances of gigabytes


# Files


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
@pytest.mark.parametrize("limit", [1500, 9000])
def test_files_are_as_large_as_allowed(codec, limit, photograph):
    images = to_pixel_values(photograph)[None]
    method = FileFormatWithin(codec, {7: limit}, "ours")
    code = method.encode(images, [7])
    (content,) = code.contents
    assert len(content) <= limit
    assert method.cost(code).bytes == {"coded": [len(content)]}
    assert method.cost(code).coded is None
    # It is the file of some quality, and that of the next quality would be too large.
    files = {quality: file_bytes(photograph, codec, quality) for quality in range(1, 101)}
    quality = max(quality for quality, file in files.items() if file == content)
    assert quality == 100 or len(files[quality + 1]) > limit
    with Image.open(io.BytesIO(content)) as file:
        assert file.format == codec.upper()
        assert file.size == photograph.size
        if codec == "jpeg":
            assert file.info["progressive"]
        decoded = np.asarray(file.convert("RGB"))
    back = ((method.decode(code)[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(back, decoded)


def test_pictures_are_halved_where_no_quality_is_small_enough(photograph):
    smallest = len(file_bytes(photograph, "jpeg", 1))
    assert largest_within(photograph, "jpeg", smallest - 1) is None
    assert largest_within(photograph, "jpeg", smallest) is not None
    method = FileFormatWithin("jpeg", {0: smallest - 1}, "ours")
    code = method.encode(to_pixel_values(photograph)[None], [0])
    assert len(code.contents[0]) < smallest
    with Image.open(io.BytesIO(code.contents[0])) as file:
        assert file.size == (64, 64)
    assert method.decode(code).shape == (1, 3, 128, 128)
    with pytest.raises(ValueError, match="no JPEG file has only 20 bytes"):
        FileFormatWithin("jpeg", {0: 20}, "ours").encode(to_pixel_values(photograph)[None], [0])


def test_each_picture_has_its_own_limit(photograph):
    method = FileFormatWithin("webp", {3: 1500, 5: 6000}, "ours")
    code = method.encode(to_pixel_values(photograph).expand(2, -1, -1, -1), [3, 5])
    small, large = method.cost(code).bytes["coded"]
    assert small <= 1500 < large <= 6000


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_a_quality_is_pillows(codec, photograph, tmp_path):
    settings = {"progressive": True, "optimize": True} if codec == "jpeg" else {"method": 6}
    photograph.save(tmp_path / f"picture.{codec}", quality=40, **settings)
    code = FileFormat(codec, 40).encode(to_pixel_values(photograph)[None], [0])
    assert code.contents[0] == (tmp_path / f"picture.{codec}").read_bytes()
    assert FileFormat(codec, 40).cost(code).bytes["coded"] == [(tmp_path / f"picture.{codec}").stat().st_size]


def test_impossible_formats_are_refused():
    with pytest.raises(ValueError, match="must be one of jpeg, webp, not 'gif'"):
        FileFormat("gif", 50)
    with pytest.raises(ValueError, match="must be 1 to 100, not 0"):
        FileFormat("jpeg", 0)
