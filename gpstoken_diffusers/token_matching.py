"""Two pictures, token by token: matching their Gaussians, swapping textures, interpolating between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .geometry import CENTER
from .token_editing import covariance_px, from_covariance_px, half_extent_px, root_of_determinant
from .tokens import GPSTokens


def match_tokens(tokens: GPSTokens, others: GPSTokens) -> Tensor:
    """The best one-to-one correspondence between two sets of Gaussians.

    Among all permutations it is one with the least sum of squared 2-Wasserstein distances in pixels,
    |c1 - c2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), found by shortest augmenting paths in float64. Equal layouts
    are matched in order, and tiles separately. The time grows with n^3 in the worst case.

    Args:
        tokens, others: equally many images, tiles and tokens, of pictures of any size; the second picture is
            treated as stretched to the size of the first.

    Returns: (B, N) long: token i of `tokens` goes with token `matching[b, i]` of `others`.

    Raises ValueError: another number of images, tiles or tokens, or Gaussians that are not finite.
    """
    for name in ("batch_size", "num_tokens", "tile_grid"):
        ours, theirs = getattr(tokens, name), getattr(others, name)
        if ours != theirs:
            raise ValueError(
                f"Tokens are matched one to one, but the two sets differ in {name}: {ours} and {theirs}. Encode both "
                "pictures at one size with the same num_tokens."
            )
    half = half_extent_px(tokens).cpu().double()
    first, second = (
        side.geometry.detach().cpu().double().unflatten(1, (-1, tokens.tokens_per_tile)).flatten(0, 1)
        for side in (tokens, others)
    )
    if not (first.isfinite().all() and second.isfinite().all()):
        raise ValueError("Tokens with NaN or infinite Gaussians cannot be matched: see GPSTokens.validate().")
    matching = [_assign(_wasserstein_squared(a, b, half)) for a, b in zip(first, second, strict=True)]
    offset = torch.arange(0, tokens.num_tokens, tokens.tokens_per_tile)[:, None]
    by_tile = torch.from_numpy(np.stack(matching)).unflatten(0, (tokens.batch_size, -1)) + offset
    return by_tile.flatten(1).to(tokens.device)


def swap_texture(layout: GPSTokens, texture: GPSTokens, matching: Tensor | None = None) -> GPSTokens:
    """The Gaussians of one picture with the textures of another.

    Args:
        layout, texture: as in [`match_tokens`], textures from one autoencoder.
        matching: (N,) or (B, N) long, the token of `texture` for each of `layout`; None takes [`match_tokens`].
    """
    matching = match_tokens(layout, texture) if matching is None else matching
    return replace(layout, texture=_take(texture.texture, matching))


def interpolate_tokens(
    start: GPSTokens, end: GPSTokens, weight: float | Tensor, matching: Tensor | None = None
) -> GPSTokens:
    """A picture between two: every Gaussian moves towards its counterpart.

    Centres and textures go along straight lines, covariances along the geodesic of the 2-Wasserstein distance, by which
    they are matched: axis-aligned sigmas change linearly, and a turned Gaussian keeps its width while it turns.

    Args:
        start, end: as in [`match_tokens`], textures from one autoencoder.
        weight: in [0, 1], one number, or (B,) one for each image.
        matching: (N,) or (B, N) long, the token of `end` for each of `start`; None takes [`match_tokens`]. Give it
            when several weights follow each other, or where order is known to correspond.

    Returns: tokens in the order of `start`: exactly `start` at weight 0, and exactly those of `end` at weight 1.

    Raises ValueError: a weight outside [0, 1], another number of texture channels, or as [`match_tokens`].
    """
    weight = torch.as_tensor(weight, dtype=torch.float32, device=start.device)
    if not ((weight >= 0) & (weight <= 1)).all():
        raise ValueError(f"weight must be from 0 (all start) to 1 (all end), got {weight.tolist()}.")
    if start.texture_channels != end.texture_channels:
        raise ValueError(
            f"Textures have {start.texture_channels} and {end.texture_channels} channels: they come from two models."
        )
    weight = weight.reshape(-1, 1, 1)
    matching = match_tokens(start, end) if matching is None else matching
    target = _take(end.geometry, matching)
    texture = torch.lerp(start.texture.float(), _take(end.texture, matching).float(), weight).to(start.dtype)

    half = half_extent_px(start)
    center = torch.lerp(start.geometry[..., CENTER], target[..., CENTER], weight)
    straight, still = _transport(start.geometry, target, half), torch.eye(2, device=start.device)
    step = torch.lerp(still, straight, weight[..., None])
    covariance = step @ covariance_px(start.geometry, half) @ step.mT
    between = from_covariance_px(covariance, (center + 1) * half, half)
    # Covariances round; the two ends are exact.
    geometry = torch.where(weight == 0, start.geometry, torch.where(weight == 1, target, between))
    return replace(start, geometry=geometry, texture=texture)


def _take(values: Tensor, matching: Tensor) -> Tensor:
    """Rows of (B, N, C) in the order of a matching (N,) or (B, N)."""
    return values.gather(1, matching.to(values.device).expand(values.shape[:2])[..., None].expand_as(values))


def _transport(start: Tensor, end: Tensor, half: Tensor) -> Tensor:
    """The symmetric T with T S T = E for covariances S, E in pixels: Gaussians (..., 5), twice -> (..., 2, 2).

    That is the geometric mean of S^-1 and E. For 2 x 2 matrices of determinant 1 it is their sum X, scaled to
    determinant 1; det X = 2 + tr(S E) / sqrt(det S det E).
    """
    covariance, goal = covariance_px(start, half), covariance_px(end, half)
    root_start, root_goal = (root_of_determinant(side, half)[..., None, None] for side in (start, end))
    (a, shared), (_, b) = (covariance[..., row, :].unbind(-1) for row in (0, 1))
    adjugate = torch.stack([b, -shared, -shared, a], dim=-1).unflatten(-1, (2, 2))
    total = adjugate / root_start + goal / root_goal
    trace = (covariance * goal).sum(dim=(-2, -1), keepdim=True)
    determinant = 2 + trace / (root_start * root_goal)
    return total * (root_goal / root_start / determinant).sqrt()


def _wasserstein_squared(first: Tensor, second: Tensor, half: Tensor) -> np.ndarray:
    """(n, 5) and (m, 5) -> (n, m) squared distances in pixels.

    The trace of the root of a 2 x 2 matrix P is sqrt(tr P + 2 sqrt(det P)).
    """
    a, b = covariance_px(first, half), covariance_px(second, half)
    trace = torch.einsum("nij,mji->nm", a, b)
    roots = root_of_determinant(first, half)[:, None] * root_of_determinant(second, half)
    variances = [side.diagonal(dim1=1, dim2=2).sum(dim=-1) for side in (a, b)]
    shape = variances[0][:, None] + variances[1] - 2 * (trace + 2 * roots).sqrt()
    offset = ((first[:, None, CENTER] - second[:, CENTER]) * half).square().sum(dim=-1)
    # Rounding can take equal Gaussians a little below zero.
    return (offset + shape.clamp(min=0)).numpy()


def _assign(cost: np.ndarray) -> np.ndarray:
    """The permutation with the least sum of cost[i, result[i]]; (n, n) float64 -> (n,) int64.

    Prices keep reduced cost = cost - row_price - column_price at zero or above, and at zero for assigned pairs; each
    row that is still free takes the shortest path of reduced costs to a free column, and passes columns on along it.
    """
    size = len(cost)
    column_price = cost.min(axis=0)
    row_price = (cost - column_price).min(axis=1)
    row_of, column_of = np.full(size, -1), np.full(size, -1)
    for row, column in enumerate((cost - column_price).argmin(axis=1)):
        if row_of[column] < 0:
            row_of[column], column_of[row] = row, column
    for free in np.flatnonzero(column_of < 0):
        distance = cost[free] - row_price[free] - column_price
        previous = np.full(size, free)
        done = np.zeros(size, dtype=bool)
        while True:
            column = int(np.where(done, np.inf, distance).argmin())
            done[column] = True
            row = row_of[column]
            if row < 0:
                break
            through = distance[column] + (cost[row] - row_price[row] - column_price)
            shorter = (through < distance) & ~done
            distance[shorter], previous[shorter] = through[shorter], row
        length = distance[column]
        row_price[free] += length
        done[column] = False  # the new column's price stays
        row_price[row_of[done]] += length - distance[done]
        column_price[done] -= length - distance[done]
        while True:
            row = previous[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
            if row == free:
                break
    return column_of
