"""The lattice decoder: its geometry, and that it is local."""

from __future__ import annotations

import pytest
import torch
from model_zoo import tiny_model

from gpstoken_diffusers import GPSTokens
from gpstoken_diffusers.models.lattice_painter import ANTIALIAS_PX, REACH_SIGMAS, unfold_lattice
from gpstoken_diffusers.models.windows import map_geometry


def covariance(geometry: torch.Tensor) -> torch.Tensor:
    sigma_x, sigma_y, rho = geometry[..., 0], geometry[..., 1], geometry[..., 2]
    off = rho * sigma_x * sigma_y
    return torch.stack([torch.stack([sigma_x**2, off], -1), torch.stack([off, sigma_y**2], -1)], -2)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_lattice_lies_in_its_parent_s_frame(size):
    parent = torch.tensor([[[0.2, 0.1, 0.6, 0.1, -0.2]]])
    lattice = unfold_lattice(parent, size, 65, 33)
    assert lattice.shape == (1, size**2, 5)
    torch.testing.assert_close(lattice[..., 3:].mean(1), parent[:, 0, 3:])
    # Whitened by the parent's covariance, the points are a square grid of side 2 REACH_SIGMAS (1 - 1 / size).
    whitening = torch.linalg.inv(torch.linalg.cholesky(covariance(parent)[0, 0]))
    white = (lattice[0, :, 3:] - parent[0, 0, 3:]) @ whitening.T
    reach = REACH_SIGMAS * (1 - 1 / size)
    expected = torch.linspace(-reach, reach, size)
    grid = torch.stack(torch.meshgrid(expected, expected, indexing="ij"), -1).flip(-1).reshape(-1, 2)
    torch.testing.assert_close(white, grid, rtol=1e-5, atol=1e-5)
    # Each point: the parent's covariance scaled to half the spacing, plus the blur of half a pixel along each axis.
    blur = torch.diag(torch.tensor([2 * ANTIALIAS_PX / 32, 2 * ANTIALIAS_PX / 64]) ** 2)
    child = covariance(lattice)[0, 0]
    torch.testing.assert_close(child, (REACH_SIGMAS / size) ** 2 * covariance(parent)[0, 0] + blur)
    assert (lattice[..., 2].abs() < 1).all()


def test_map_coordinates_keep_places_and_shapes():
    """An image of 40 x 80 pixels and its map of 10 x 20: pixel p lies at map position (p + 1/2) / 4 - 1/2."""
    pixels = torch.tensor([[0.0, 0.0], [79.0, 39.0], [17.0, 5.0]])  # x, y
    image = torch.tensor([79.0, 39.0])
    geometry = torch.zeros(3, 5)
    geometry[:, 3:] = 2 * pixels / image - 1
    geometry[:, :2] = 2 * 4 / image  # a sigma of 4 image pixels
    moved = map_geometry(geometry, (40, 80), (10, 20))
    samples = torch.tensor([19.0, 9.0])
    torch.testing.assert_close((moved[:, 3:] + 1) / 2 * samples, (pixels + 0.5) / 4 - 0.5, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved[:, :2] / 2 * samples, torch.ones(3, 2))  # one map pixel


@torch.no_grad()
def test_distant_pixels_do_not_change_at_all():
    """What editing rests on: other texture in one corner leaves the far corner bit for bit as it was."""
    model = tiny_model("lattice", sample_size=256, map_size=64)
    place = torch.linspace(-0.9, 0.9, 8)
    y, x = torch.meshgrid(place, place, indexing="ij")
    x, y = x.flatten(), y.flatten()
    geometry = torch.stack([torch.full_like(x, 0.08), torch.full_like(x, 0.06), 0 * x, x, y], -1)
    texture = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0))
    tokens = GPSTokens(geometry[None], texture, (256, 256))
    corner = (geometry[:, 3:] < -0.6).all(-1)
    texture = tokens.texture.clone()
    texture[:, corner] += 1.0
    edited = GPSTokens(tokens.geometry, texture, tokens.image_size)
    before, after = model.decode(tokens).sample, model.decode(edited).sample
    assert (before - after)[..., :64, :64].abs().max() > 1e-3
    assert torch.equal(before[..., 200:, 200:], after[..., 200:, 200:])


@torch.no_grad()
def test_receptive_field_is_as_stated():
    decoder = tiny_model("lattice").decoder
    feature_map = torch.randn(1, 9, 64, 64)
    disturbed = feature_map.clone()
    disturbed[..., 32, 32] += 1.0
    changed = (decoder(feature_map) != decoder(disturbed)).any(dim=(0, 1))
    rows = changed.any(1).nonzero().flatten() // decoder.upscale
    reach = max(32 - int(rows.min()), int(rows.max()) - 32)
    assert 1 < reach <= decoder.receptive_px


@torch.no_grad()
def test_nothing_painted_is_finite():
    """Tokens that lie outside the canvas paint nothing; the picture is the decoder's background."""
    model = tiny_model("lattice")
    geometry = torch.tensor([[[0.05, 0.05, 0.0, 3.0, 3.0]]])
    sample = model.decode(GPSTokens(geometry, torch.ones(1, 1, 4), (32, 32))).sample
    assert sample.isfinite().all()
