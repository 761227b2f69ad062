"""Two sets of tokens: the best correspondence, exchange of textures, and pictures in between."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from model_zoo import tiny_model
from token_zoo import assert_same, random_tokens

from gpstoken_diffusers import GPSTokens
from gpstoken_diffusers.token_matching import interpolate_tokens, match_tokens, swap_texture


def shuffled(tokens: GPSTokens, seed: int = 0) -> tuple[GPSTokens, torch.Tensor]:
    """The same tokens in another order in each image, and where each has gone."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(tokens.num_tokens, generator=generator) for _ in tokens])
    geometry, texture = (
        torch.stack([rows[image_order] for rows, image_order in zip(values, order, strict=True)])
        for values in (tokens.geometry, tokens.texture)
    )
    return GPSTokens(geometry, texture, tokens.image_size), order.argsort(1)


def covariances_px(tokens: GPSTokens) -> torch.Tensor:
    height, width = tokens.canvas_size
    sigma = tokens.geometry[..., :2].double() * torch.tensor([width - 1, height - 1]) / 2
    rho = tokens.geometry[..., 2].double()
    shared = rho * sigma.prod(-1)
    return torch.stack([sigma[..., 0] ** 2, shared, shared, sigma[..., 1] ** 2], -1).unflatten(-1, (2, 2))


def root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag_embed(values.clamp(min=0).sqrt()) @ vectors.mT


def distances(a: GPSTokens, b: GPSTokens) -> torch.Tensor:
    """(N, N) squared 2-Wasserstein distances of the first images in pixels, by eigenvalues."""
    height, width = a.canvas_size
    center_a, center_b = (t.geometry[0, :, 3:].double() * torch.tensor([width - 1, height - 1]) / 2 for t in (a, b))
    first, second = covariances_px(a)[0][:, None], covariances_px(b)[0][None]
    between = root(root(first) @ second @ root(first))
    trace = torch.einsum("nmii->nm", first + second - 2 * between)
    return torch.cdist(center_a, center_b).square() + trace


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.0])
def test_the_sum_of_distances_is_the_least_of_all_permutations(spread):
    """Also of concentric Gaussians, where the shapes alone decide."""
    permutations = torch.tensor(list(itertools.permutations(range(6))))
    for seed in range(8):
        a, b = random_tokens(1, 6, seed=seed), random_tokens(1, 6, seed=seed + 100)
        for tokens in (a, b):
            tokens.geometry[..., 3:] *= spread
        cost = distances(a, b)
        every_sum = cost[torch.arange(6), permutations].sum(1)
        assert cost[torch.arange(6), match_tokens(a, b)[0]].sum() == pytest.approx(every_sum.min().item(), rel=1e-5)


def test_it_beats_taking_the_nearest_that_is_left():
    a, b = random_tokens(1, 60, seed=1), random_tokens(1, 60, seed=2)
    cost = distances(a, b)
    best = cost[torch.arange(60), match_tokens(a, b)[0]].sum()
    left, greedy = cost.clone(), 0.0
    for _ in range(60):
        row, column = divmod(left.argmin().item(), 60)
        greedy += cost[row, column].item()
        left[row] = left[:, column] = math.inf
    assert best < 0.95 * greedy


def test_the_same_tokens_find_each_other():
    tokens = random_tokens(2, 50)
    other, place = shuffled(tokens)
    assert torch.equal(match_tokens(tokens, other), place)
    assert torch.equal(match_tokens(tokens, tokens), torch.arange(50).expand(2, -1))
    assert_same(swap_texture(tokens, other), tokens)


def test_tiles_are_matched_each_by_itself():
    grid = {"tile_grid": (1, 2), "image_size": (48, 80)}
    tokens = random_tokens(2, 20, **grid)
    order = torch.cat([torch.randperm(10), 10 + torch.randperm(10)])
    other = GPSTokens(tokens.geometry[:, order], tokens.texture[:, order], **grid)
    assert torch.equal(match_tokens(tokens, other), order.argsort().expand(2, -1))


def test_swapped_textures():
    a, b = random_tokens(seed=1), random_tokens(seed=2)
    swapped = swap_texture(a, b)
    assert torch.equal(swapped.geometry, a.geometry)
    assert torch.equal(swapped.texture, torch.stack([t[m] for t, m in zip(b.texture, match_tokens(a, b), strict=True)]))
    assert torch.equal(swap_texture(a, b, torch.arange(12)).texture, b.texture)


# In between


def test_both_ends_are_exact():
    a, b = random_tokens(seed=1), random_tokens(seed=2)
    matching = match_tokens(a, b)
    assert_same(interpolate_tokens(a, b, 0.0), a)
    at_end = interpolate_tokens(a, b, torch.tensor([1.0, 1.0]))
    for image in range(2):
        assert torch.equal(at_end.geometry[image], b.geometry[image][matching[image]])
        assert torch.equal(at_end.texture[image], b.texture[image][matching[image]])
    mixed = interpolate_tokens(a, b, torch.tensor([0.0, 1.0]))
    assert_same(mixed[0], a[0])
    assert_same(mixed[1], at_end[1])


@pytest.mark.parametrize("weight", [0.25, 0.5, 0.9])
def test_gaussians_travel_along_the_shortest_way(weight):
    """On a geodesic, distances from both ends are in proportion to the weight; centres lie on a straight line."""
    a, b = random_tokens(1, 8, seed=1), random_tokens(1, 8, seed=2)
    a.geometry[0, 0, 2], b.geometry[0, 0, 2] = 0.97, -0.97
    between = interpolate_tokens(a, b, weight, torch.arange(8)).validate()
    whole = distances(a, b).diagonal().sqrt()
    torch.testing.assert_close(distances(a, between).diagonal().sqrt(), weight * whole, atol=2e-2, rtol=1e-3)
    torch.testing.assert_close(distances(between, b).diagonal().sqrt(), (1 - weight) * whole, atol=2e-2, rtol=1e-3)
    torch.testing.assert_close(between.geometry[..., 3:], torch.lerp(a.geometry[..., 3:], b.geometry[..., 3:], weight))
    torch.testing.assert_close(between.texture, torch.lerp(a.texture, b.texture, weight))


def test_sigmas_of_upright_gaussians_change_linearly():
    a, b = random_tokens(seed=1), random_tokens(seed=2)
    a.geometry[..., 2] = b.geometry[..., 2] = 0
    between = interpolate_tokens(a, b, 0.3, torch.arange(12)).geometry
    torch.testing.assert_close(between[..., :2], torch.lerp(a.geometry, b.geometry, 0.3)[..., :2])
    assert (between[..., 2].abs() < 1e-6).all()


def test_extreme_gaussians_stay_possible():
    a, b = random_tokens(seed=1), random_tokens(seed=2)
    a.geometry[..., 2], b.geometry[..., 2] = 0.999999, -0.999999
    a.geometry[0, :6, 0], b.geometry[0, 3:9, :2] = 1e-5, 1e-5
    for weight in (1e-6, 0.5, 1 - 1e-6):
        interpolate_tokens(a, b, weight).validate()


def test_interpolation_is_differentiable():
    a, b = random_tokens(1, 5, seed=1), random_tokens(1, 5, seed=2)
    inputs = [a.geometry, a.texture, b.geometry, b.texture, torch.tensor(0.4)]
    for each in inputs:
        each.requires_grad_()
    between = interpolate_tokens(a, b, inputs[-1])
    (between.geometry.square().sum() + between.texture.square().sum()).backward()
    assert all(each.grad.isfinite().all() and each.grad.any() for each in inputs)


@torch.no_grad()
def test_pictures_in_between_are_decoded():
    model = tiny_model("lattice")
    a, b = (random_tokens(1, 6, 4, seed=seed, image_size=(32, 32)) for seed in (1, 2))
    pictures = [model.decode(interpolate_tokens(a, b, weight)).sample for weight in (0.0, 0.5, 1.0)]
    assert torch.equal(pictures[0], model.decode(a).sample)
    torch.testing.assert_close(pictures[2], model.decode(b).sample, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(pictures[1], (pictures[0] + pictures[2]) / 2, atol=1e-3)


def test_bad_input():
    tokens = random_tokens()
    with pytest.raises(ValueError, match="differ in num_tokens: 12 and 13"):
        match_tokens(tokens, random_tokens(count=13))
    with pytest.raises(ValueError, match="differ in tile_grid"):
        match_tokens(tokens, random_tokens(tile_grid=(1, 2)))
    broken = random_tokens()
    broken.geometry[0, 3, 1] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        match_tokens(tokens, broken)
    for weight in (-0.1, 1.1, math.nan, torch.tensor([0.5, 2.0])):
        with pytest.raises(ValueError, match="weight must be from 0"):
            interpolate_tokens(tokens, tokens, weight)
    with pytest.raises(ValueError, match="Textures have 3 and 4 channels"):
        interpolate_tokens(tokens, random_tokens(channels=4), 0.5)
