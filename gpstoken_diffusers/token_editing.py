"""Editing pictures by their tokens: select, move, scale, rotate, delete, duplicate, recompose.

Every function takes GPSTokens and returns new ones. Gradients reach geometry, texture, and numbers given as tensors.
Lengths are in pixels of the picture (`_px`): x to the right, y downwards, and pixel i is centred at i.

A selection is a boolean mask of tokens, (N,) for all images alike or (B, N); combine several by `&`, `|` and `~`.

What edits can and cannot do:

- A texture is stretched with its Gaussian, but not turned or mirrored: after `rotate_tokens` and `flip_tokens` the
  Gaussians lie where they should, while the detail within each stays upright. The smaller the tokens, the less this
  shows.
- With the lattice decoder an edit changes nearby pixels and leaves the rest exactly as it was. The map decoder
  normalises over the whole map, so every pixel changes a little.
- A token may move into another tile. Decoders that merge tiles draw it there. A decoder that works tile by tile draws
  each tile from that tile's own tokens alone: call `retile_tokens` first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .geometry import CENTER, RHO, SIGMA, bounded
from .tokens import GPSTokens

DELETED_GEOMETRY = (1e-3, 1e-3, 0.0, 3.0, 3.0)
"""Where deleted tokens lie: a whole canvas beyond the right and bottom edge."""

# Selections


def select_by_mask(tokens: GPSTokens, mask: Tensor, criterion: str = "footprint", reach_sigmas: float = 3.0) -> Tensor:
    """Tokens that a mask of pixels touches.

    Args:
        tokens: B images.
        mask: (H, W) or (B, H, W) of the picture's size, bool, or numbers of which those above 0.5 count.
        criterion: "footprint": some masked pixel lies in the box of `reach_sigmas` around the centre, outside which
            the splat paints nothing; or "center": the pixel under the token's centre is masked.
        reach_sigmas: half size of the box. 3 is the support of the released models; 1.5 is about the region that a
            token stands for.

    Returns: (B, N) bool.

    Raises ValueError: a mask of another shape or with NaN, or an unknown criterion.
    """
    if criterion not in ("footprint", "center"):
        raise ValueError(f'criterion must be "footprint" or "center", got {criterion!r}.')
    (height, width), batch_size = tokens.image_size, tokens.batch_size
    if tuple(mask.shape) not in ((height, width), (batch_size, height, width)):
        raise ValueError(
            f"mask must have the shape {(height, width)} or {(batch_size, height, width)}, one number for each pixel "
            f"of the picture, got {tuple(mask.shape)}. Resize it to the picture first."
        )
    if mask.is_floating_point() and mask.isnan().any():
        raise ValueError("mask has NaN values: it must be boolean, or numbers of which those above 0.5 count.")
    mask = (mask if mask.dtype == torch.bool else mask > 0.5).to(tokens.device).expand(batch_size, height, width)
    half = half_extent_px(tokens)
    center = (tokens.geometry[..., CENTER].detach() + 1) * half
    if criterion == "center":
        first = last = center.round()
    else:
        reach = reach_sigmas * tokens.geometry[..., SIGMA].detach() * half
        first, last = (center - reach).ceil(), (center + reach).floor()
    size = torch.tensor([width, height], device=tokens.device)
    # Counts of masked pixels above and left of each place; a box holds the difference of its four corners.
    counts = torch.nn.functional.pad(mask.to(torch.int32), (1, 0, 1, 0)).cumsum(1).cumsum(2)
    # A box beyond the picture becomes an empty one at its edge.
    x0, y0 = first.clamp(min=0).minimum(size).long().unbind(-1)
    x1, y1 = (last + 1).clamp(min=0).minimum(size).long().unbind(-1)
    x1, y1 = x1.maximum(x0), y1.maximum(y0)
    image = torch.arange(batch_size, device=tokens.device)[:, None]
    inside = counts[image, y1, x1] - counts[image, y0, x1] - counts[image, y1, x0] + counts[image, y0, x0]
    return inside > 0


def select_by_box(tokens: GPSTokens, box_px: Sequence[float]) -> Tensor:
    """Tokens whose centre lies in the box (x0, y0, x1, y1), borders included: (B, N) bool."""
    x0, y0, x1, y1 = box_px
    if x1 < x0 or y1 < y0:
        raise ValueError(f"box_px must be (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1, got {tuple(box_px)}.")
    x, y = ((tokens.geometry[..., CENTER].detach() + 1) * half_extent_px(tokens)).unbind(-1)
    return (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)


def select_by_size(tokens: GPSTokens, smallest_px: float = 0.0, largest_px: float = math.inf) -> Tensor:
    """Tokens of which sqrt(sigma_x sigma_y) is from `smallest_px` to `largest_px`, deleted ones never: (B, N) bool."""
    size = (tokens.geometry[..., SIGMA].detach() * half_extent_px(tokens)).prod(dim=-1).sqrt()
    return (size >= smallest_px) & (size <= largest_px) & ~deleted_tokens(tokens)


def deleted_tokens(tokens: GPSTokens) -> Tensor:
    """Which tokens are deleted, by `delete_tokens` or because a tile had to be filled up: (B, N) bool."""
    return (tokens.geometry.detach() == tokens.geometry.new_tensor(DELETED_GEOMETRY)).all(dim=-1)


# Moving and reshaping


def move_tokens(
    tokens: GPSTokens, selection: Tensor, dx_px: float | Tensor = 0.0, dy_px: float | Tensor = 0.0
) -> GPSTokens:
    """Shifts the selected tokens to the right and down, each by a number or a tensor of one element.

    Steps of whole map pixels (sample_size / map_size; 4 in the released models) move the painted features unchanged.
    """
    selected = _editable(tokens, selection)
    step = torch.stack([torch.as_tensor(d, dtype=torch.float32, device=tokens.device) for d in (dx_px, dy_px)])
    center = tokens.geometry[..., CENTER] + step / half_extent_px(tokens)
    moved = torch.cat([tokens.geometry[..., : CENTER.start], center], dim=-1)
    return replace(tokens, geometry=torch.where(selected[..., None], moved, tokens.geometry))


def scale_tokens(
    tokens: GPSTokens, selection: Tensor, factor: float | Tensor, about_px: Sequence[float] | None = None
) -> GPSTokens:
    """Enlarges the selected tokens and their distances from a point; arguments as in [`transform_tokens`].

    Raises ValueError: the factor is not greater than 0.
    """
    if not factor > 0:
        raise ValueError(f"factor must be greater than 0, got {float(factor)}. flip_tokens mirrors.")
    factor = torch.as_tensor(factor, dtype=torch.float32, device=tokens.device)
    return transform_tokens(tokens, selection, factor * torch.eye(2, device=tokens.device), about_px)


def rotate_tokens(
    tokens: GPSTokens, selection: Tensor, degrees: float | Tensor, about_px: Sequence[float] | None = None
) -> GPSTokens:
    """Turns the selected tokens counter-clockwise, as PIL does; other arguments as in [`transform_tokens`].

    Centres and covariances turn, in pixels, so that angles are right in a picture of any shape. Textures do not.
    """
    # In float64, where a quarter of a turn is one; some devices do not have it.
    angle = torch.deg2rad(torch.as_tensor(degrees, device="cpu").double())
    # y grows downwards, so that this turns x towards -y.
    rows = [torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])]
    return transform_tokens(tokens, selection, torch.stack(rows).float(), about_px)


def flip_tokens(
    tokens: GPSTokens, selection: Tensor, direction: str = "horizontal", about_px: Sequence[float] | None = None
) -> GPSTokens:
    """Mirrors the selected tokens left-right ("horizontal") or top-bottom ("vertical"), as in [`transform_tokens`].

    Raises ValueError: an unknown direction.
    """
    if direction not in ("horizontal", "vertical"):
        raise ValueError(f'direction must be "horizontal" or "vertical", got {direction!r}.')
    signs = [-1.0, 1.0] if direction == "horizontal" else [1.0, -1.0]
    return transform_tokens(tokens, selection, torch.diag(torch.tensor(signs)), about_px)


def transform_tokens(
    tokens: GPSTokens, selection: Tensor, matrix: Tensor, about_px: Sequence[float] | None = None
) -> GPSTokens:
    """Applies a linear map to the selected Gaussians: centre c -> p + M (c - p), covariance S -> M S M^T.

    Args:
        tokens: B images.
        selection: (N,) or (B, N) bool.
        matrix: (2, 2), M, on (x, y) in pixels.
        about_px: the fixed point p as (x, y); None takes, in each image, the mean of the selected centres, weighted by
            the areas of their ellipses: the middle of what the selected tokens paint.

    Returns: tokens with sigma >= 1e-5 and |rho| <= 1 - 1e-6 where they are selected. Sigmas may exceed 1.

    Raises ValueError: a matrix of another shape or without an inverse, or a selection that does not fit.
    """
    matrix = matrix.to(tokens.device, torch.float32)
    if matrix.shape != (2, 2):
        raise ValueError(f"matrix must have the shape (2, 2), got {tuple(matrix.shape)}.")
    if not torch.linalg.det(matrix.detach()).abs() > 0:
        raise ValueError(f"matrix must have an inverse, got {matrix.tolist()}: it would flatten Gaussians to lines.")
    selected = _editable(tokens, selection)
    half = half_extent_px(tokens)
    center = (tokens.geometry[..., CENTER] + 1) * half
    if about_px is None:
        weight = root_of_determinant(tokens.geometry, half) * selected
        # An image without selected tokens needs no middle, but must not divide by 0.
        total = weight.sum(dim=1).clamp(min=torch.finfo(weight.dtype).tiny)
        about = ((weight[..., None] * center).sum(dim=1) / total[:, None])[:, None]
    else:
        about = torch.as_tensor(about_px, dtype=torch.float32, device=tokens.device)
    moved = about + (center - about) @ matrix.mT
    covariance = matrix @ covariance_px(tokens.geometry, half) @ matrix.mT
    changed = from_covariance_px(covariance, moved, half)
    return replace(tokens, geometry=torch.where(selected[..., None], changed, tokens.geometry))


# Taking away, adding, recomposing


def delete_tokens(tokens: GPSTokens, selection: Tensor) -> GPSTokens:
    """Takes the selected tokens out of the picture, and keeps their places in the tensors.

    All images of a batch and all tiles must hold equally many tokens, so a deleted one stays, at `DELETED_GEOMETRY`
    beyond the canvas and with zero texture. No decoder paints it. (Zero texture alone would do for the map decoder,
    which sums, but not for the lattice decoder, which also counts the painted weight.) Other edits leave it where it
    is; `compact_tokens` removes it where possible.

    Where no other token paints, the decoder shows what it makes of an empty map: a hole, not the background.
    """
    selected = _fitting(tokens, selection)[..., None]
    return replace(
        tokens,
        geometry=torch.where(selected, tokens.geometry.new_tensor(DELETED_GEOMETRY), tokens.geometry),
        texture=torch.where(selected, torch.zeros_like(tokens.texture), tokens.texture),
    )


def compact_tokens(tokens: GPSTokens) -> GPSTokens:
    """Removes deleted tokens: each tile keeps as many places as the fullest one of the batch needs, at least one."""
    geometry, texture, live = (
        _by_tile(tokens, values) for values in (tokens.geometry, tokens.texture, ~deleted_tokens(tokens))
    )
    return _pack(tokens, geometry, texture, live)


def duplicate_tokens(
    tokens: GPSTokens, selection: Tensor, dx_px: float | Tensor = 0.0, dy_px: float | Tensor = 0.0
) -> GPSTokens:
    """Adds a copy of each selected token, shifted as in [`move_tokens`].

    Returns: tokens in which each tile has as many more places as the fullest selection takes; others are filled with
    deleted tokens. Those of the original come first in each tile, in their order, the deleted ones last.
    """
    copies = move_tokens(tokens, selection, dx_px, dy_px)
    return _join(tokens, ~deleted_tokens(tokens), copies, _editable(tokens, selection))


def exchange_tokens(tokens: GPSTokens, away: Tensor, sources: Sequence[int], geometry: Tensor) -> GPSTokens:
    """Removes tokens, and adds Gaussians with the textures of others, which may be among those removed.

    Args:
        tokens: B images.
        away: (N,) or (B, N) bool, a selection.
        sources: K indices of the tokens whose textures and tiles the new ones take.
        geometry: (K, 5), where the new ones lie in all images.

    Returns: tokens in the order of [`duplicate_tokens`], of which each tile has as many places as the fullest one
        needs; sigma >= 1e-5 and |rho| <= 1 - 1e-6 where they are new.
    """
    num_tiles = tokens.tile_grid[0] * tokens.tile_grid[1]
    source = torch.tensor(sources, dtype=torch.long, device=tokens.device)
    # Every tile is offered all of them, and takes its own.
    belongs = source // tokens.tokens_per_tile == torch.arange(num_tiles, device=tokens.device)[:, None]
    new = replace(
        tokens,
        geometry=bounded(geometry.to(tokens.device)).repeat(tokens.batch_size, num_tiles, 1),
        texture=tokens.texture[:, source].repeat(1, num_tiles, 1),
    )
    keep = ~deleted_tokens(tokens) & ~_fitting(tokens, away)
    return _join(tokens, keep, new, belongs.flatten().expand(tokens.batch_size, -1))


def merge_tokens(outside: GPSTokens, inside: GPSTokens, mask: Tensor) -> GPSTokens:
    """Recomposes two pictures: tokens of `inside` whose centre lies in the mask, of `outside` elsewhere.

    Args:
        outside, inside: tokens of pictures of one size from one autoencoder; their numbers of tokens may differ.
        mask: as in [`select_by_mask`].

    Returns: tokens of which each tile has as many places as the fullest one needs.

    Raises ValueError: the two differ in batch size, picture size, tiles or texture channels.
    """
    for name in ("batch_size", "texture_channels", "image_size", "tile_grid", "canvas_size"):
        ours, theirs = getattr(outside, name), getattr(inside, name)
        if ours != theirs:
            raise ValueError(
                f"The two pictures differ in {name}: {ours} and {theirs}. Encode pictures of one size with one model."
            )
    keep = ~select_by_mask(outside, mask, "center") & ~deleted_tokens(outside)
    # A deleted token's centre is in no mask.
    return _join(outside, keep, inside, select_by_mask(inside, mask, "center"))


def retile_tokens(tokens: GPSTokens) -> GPSTokens:
    """Assigns each token to the tile that holds its centre, or the nearest; for decoding tile by tile after edits.

    Returns: tokens of which each tile has as many places as the fullest one needs.
    """
    rows, cols = tokens.tile_grid
    size = torch.tensor([cols, rows], device=tokens.device)
    # The border of two tiles lies halfway between their last and first pixels.
    pixel = (tokens.geometry[..., CENTER].detach() + 1) * half_extent_px(tokens) + 0.5
    tile_px = torch.tensor(list(reversed(tokens.canvas_size)), device=tokens.device) / size
    col, row = (pixel / tile_px).floor().clamp(min=0).minimum(size - 1).long().unbind(-1)
    tiles = torch.arange(rows * cols, device=tokens.device)[:, None]
    belongs = ((row * cols + col)[:, None] == tiles) & ~deleted_tokens(tokens)[:, None]  # (B, T, N)
    geometry, texture = (
        values[:, None].expand(-1, rows * cols, -1, -1) for values in (tokens.geometry, tokens.texture)
    )
    return _pack(tokens, geometry, texture, belongs)


# Selections and tiles


def _fitting(tokens: GPSTokens, selection: Tensor) -> Tensor:
    """The selection as (B, N) on the tokens' device."""
    shape = (tokens.batch_size, tokens.num_tokens)
    if selection.dtype != torch.bool or tuple(selection.shape) not in (shape, shape[1:]):
        raise ValueError(
            f"selection must be boolean with the shape {shape} or {shape[1:]}, got {selection.dtype} of "
            f"{tuple(selection.shape)}. select_by_mask and its siblings make one."
        )
    return selection.to(tokens.device).expand(shape)


def _editable(tokens: GPSTokens, selection: Tensor) -> Tensor:
    """The selection without deleted tokens, which an edit could bring back onto the canvas."""
    return _fitting(tokens, selection) & ~deleted_tokens(tokens)


def _by_tile(tokens: GPSTokens, values: Tensor) -> Tensor:
    """(B, N, ...) -> (B, tiles, n, ...)."""
    return values.unflatten(1, (tokens.tile_grid[0] * tokens.tile_grid[1], tokens.tokens_per_tile))


def _join(tokens: GPSTokens, keep: Tensor, others: GPSTokens, add: Tensor) -> GPSTokens:
    """The tokens of one set in the mask `keep` (B, N) and those of another in `add`, tile by tile."""
    geometry, texture, live = (
        torch.cat([_by_tile(tokens, ours), _by_tile(others, theirs)], dim=2)
        for ours, theirs in (
            (tokens.geometry, others.geometry),
            (tokens.texture, others.texture.to(tokens.dtype)),
            (keep, add),
        )
    )
    return _pack(tokens, geometry, texture, live)


def _pack(tokens: GPSTokens, geometry: Tensor, texture: Tensor, live: Tensor) -> GPSTokens:
    """Live tokens to the front of each tile in their order, then deleted ones up to the fullest tile's number.

    Shapes: geometry (B, T, n, 5), texture (B, T, n, C), live (B, T, n) bool.
    """
    places = max(1, int(live.sum(dim=-1).max()))
    order = live.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :places]
    packed = [values.gather(2, order[..., None].expand(-1, -1, -1, values.shape[-1])) for values in (geometry, texture)]
    result = replace(tokens, geometry=packed[0].flatten(1, 2), texture=packed[1].flatten(1, 2))
    return delete_tokens(result, ~live.gather(2, order).flatten(1))


# Gaussians in pixels


def half_extent_px(tokens: GPSTokens) -> Tensor:
    """(2,) pixels per unit of [-1, 1] coordinates along x and y."""
    height, width = tokens.canvas_size
    return torch.tensor([max(width - 1, 1) / 2, max(height - 1, 1) / 2], device=tokens.device)


def covariance_px(geometry: Tensor, half: Tensor) -> Tensor:
    """(..., 5) -> (..., 2, 2) in square pixels."""
    x, y = (geometry[..., SIGMA] * half).unbind(-1)
    shared = geometry[..., RHO] * x * y
    return torch.stack([x * x, shared, shared, y * y], dim=-1).unflatten(-1, (2, 2))


def root_of_determinant(geometry: Tensor, half: Tensor) -> Tensor:
    """(..., 5) -> (...): square root of the covariance's determinant, in square pixels; an ellipse's area goes with it.

    Computed without the cancellation that the covariance itself would bring.
    """
    rho = geometry[..., RHO]
    return (geometry[..., SIGMA] * half).prod(dim=-1) * ((1 - rho) * (1 + rho)).sqrt()


def from_covariance_px(covariance: Tensor, center_px: Tensor, half: Tensor) -> Tensor:
    """Covariances (..., 2, 2) and centres (..., 2) in pixels -> (..., 5), within the bounds."""
    sigma = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    rho = covariance[..., 0, 1] / sigma.prod(dim=-1)
    return bounded(torch.cat([sigma / half, rho[..., None], center_px / half - 1], dim=-1))
