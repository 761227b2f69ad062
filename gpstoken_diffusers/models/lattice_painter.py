"""From tokens to the map that the lattice decoder draws: every token paints a lattice of features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..geometry import RHO, SIGMA
from ..ops.splat import splat_gaussians
from .attention import FeedForward, autocast_disabled
from .windows import Size, Window, map_geometry, touches, window_geometry

# A region reaches 1.5 sigma from its centre (its initial sigma is a third of its extent), so the lattice does too.
REACH_SIGMAS = 1.5
# A lattice point's sigma, as a share of the distance to the next.
POINT_SHARE = 0.5
# Blur of a lattice point, in pixels of the map: below half a pixel a Gaussian would fall between the samples.
ANTIALIAS_PX = 0.5
# Weight that an unpainted place has beside the painted ones, so that 0 / 0 cannot occur.
BACKGROUND_WEIGHT = 0.1
# The tokens of a window are filled up to a multiple of this.
TOKENS_ROUNDED_TO = 256
# How many tokens are searched at once for those that reach a window.
TOKENS_AT_ONCE = 2**15


def unfold_lattice(
    geometry: Tensor,
    lattice_size: int,
    height: int,
    width: int,
    reach: float = REACH_SIGMAS,
    share: float = POINT_SHARE,
    blur_px: float = ANTIALIAS_PX,
) -> Tensor:
    """Splits every Gaussian into `lattice_size`^2 smaller ones, laid out in its own frame.

    The lattice is regular in the coordinates in which the Gaussian is a unit circle, so it moves, grows and shears
    with it. Each point has the parent's shape, scaled to a share of the lattice's spacing, and blurred.

    Args:
        geometry: (B, N, 5) float32.
        lattice_size: points along each axis of the parent.
        height, width: size of the map in pixels, for the blur.
        reach: of the lattice from its parent's centre, in the parent's sigmas.
        share: a point's sigma, as a share of the spacing.
        blur_px: sigma of the blur, in pixels of the map.

    Returns: (B, N * lattice_size^2, 5) float32, points of a token contiguous, rows first.
    """
    spacing = 2 * reach / lattice_size
    offset = (torch.arange(lattice_size, device=geometry.device, dtype=torch.float32) + 0.5) * spacing - reach
    offset_b, offset_a = torch.meshgrid(offset, offset, indexing="ij")
    offset_a, offset_b = offset_a.flatten(), offset_b.flatten()

    sigma_x, sigma_y, rho, x, y = geometry.float().unsqueeze(-1).unbind(2)  # each (B, N, 1)
    # Cholesky factor of the covariance: (a, b) on the unit circle -> the ellipse.
    child_x = x + sigma_x * offset_a
    child_y = y + sigma_y * (rho * offset_a + torch.sqrt(1 - rho * rho) * offset_b)

    scale = share * spacing
    blur_x, blur_y = (2 * blur_px / max(size - 1, 1) for size in (width, height))
    child_sigma_x = torch.sqrt((scale * sigma_x) ** 2 + blur_x**2)
    child_sigma_y = torch.sqrt((scale * sigma_y) ** 2 + blur_y**2)
    child_rho = scale**2 * rho * sigma_x * sigma_y / (child_sigma_x * child_sigma_y)
    child = [c.expand_as(child_x) for c in (child_sigma_x, child_sigma_y, child_rho, child_x, child_y)]
    return torch.stack(child, dim=-1).flatten(1, 2)


class LatticePainter(FeedForward):
    """Splats every token as a lattice of smaller Gaussians whose features a perceptron makes.

    1. The perceptron turns each token's texture and shape into `lattice_size`^2 feature vectors.
    2. They are splatted in the token's frame ([`unfold_lattice`]), together with a channel of ones; features are
       divided by the painted weight, so that overlapping tokens blend.

    Args:
        in_channels: texture channels of a token.
        hidden_channels: width of the perceptron.
        lattice_size: lattice points per token along each axis.
        lattice_channels: channels that each point paints.
        support: reach of a painted Gaussian, in sigmas.
        cell_px: side in map pixels of the squares that windows are painted in, see [`paint_window`].
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        lattice_size: int,
        lattice_channels: int,
        support: float,
        cell_px: int,
    ):
        super().__init__(in_channels + 3, hidden_channels, lattice_size**2 * lattice_channels)
        self.lattice_size, self.support, self.cell_px = lattice_size, support, cell_px

    def forward(self, geometry: Tensor, texture: Tensor, map_size: Size, canvas_size: Size) -> Tensor:
        """Paints a whole map: -> (B, lattice_channels + 1, h, w) float32, the last channel is log weight.

        Args:
            geometry: (B, N, 5) in coordinates of the canvas.
            texture: (B, N, in_channels) in the dtype of the weights.
            map_size: (h, w) of the map.
            canvas_size: (height, width) in pixels of the canvas.
        """
        geometry = map_geometry(geometry.float(), canvas_size, map_size)
        return self._splat(geometry, self._features(geometry, texture, map_size, canvas_size), map_size)

    def paint_window(
        self, geometry: Tensor, texture: Tensor, map_size: Size, window: Window, canvas_size: Size | None = None
    ) -> Tensor:
        """Paints what is seen in a window of a map: -> (1, lattice_channels + 1, window's h, w) float32.

        The map is painted in cells of `cell_px` squared, each in its own coordinates by the tokens that reach it, so
        that a map pixel comes out the same whichever window shows it, but for the rounding of the perceptron's sums.
        Against a map painted whole, places are rounded differently, by 1e-4 map pixels: where that moves the end of a
        lattice point's box over a map pixel's centre, the pixel gains or loses exp(-support^2 / 2) of the point's
        weight.

        Args:
            geometry: (N, 5) float32 in coordinates of the whole map, as [`map_geometry`] gives them.
            texture: (N, in_channels).
            map_size: (height, width) of the whole map.
            window: its top and left on whole cells.
            canvas_size: (height, width) in pixels of the canvas at its own size; None is that of the map.
        """
        near = self.reaches(geometry, map_size, window)
        geometry, texture = geometry[near], texture[near]
        # In round numbers: on a CPU, oneDNN keeps a program of a megabyte for each number of rows that it has seen.
        spare = (0, 0, 0, -len(geometry) % TOKENS_ROUNDED_TO)
        features = self._features(F.pad(geometry, spare, value=1.0), F.pad(texture, spare), map_size, canvas_size)
        features = features[: len(geometry)]
        # Stands for no token where a cell has fewer than its neighbours: far outside.
        nothing = geometry.new_tensor([0.0, 0.0, 0.0, 8.0, 8.0]).expand(1, 5)
        features = torch.cat([features, features.new_zeros(1, *features.shape[1:])])
        cell, rows = self.cell_px, []
        for top in range(window.top, window.bottom, cell):
            # A row of cells at a time: some hold many tokens, and all are padded to the fullest.
            cells = [Window(top, left, top + cell, left + cell) for left in range(window.left, window.right, cell)]
            own = [window_geometry(geometry, map_size, place) for place in cells]
            reaching = torch.stack([self._touches(moved, (cell, cell)) for moved in own])
            count = reaching.sum(1)
            listed = torch.arange(int(count.max()), device=count.device) < count[:, None]
            index = torch.full(listed.shape, len(geometry), device=count.device)
            index[listed] = reaching.nonzero()[:, 1]
            own = torch.stack([torch.cat([moved, nothing])[chosen] for moved, chosen in zip(own, index, strict=True)])
            rows.append(rearrange(self._splat(own, features[index], (cell, cell)), "cells c h w -> c h (cells w)"))
        height, width = window.size
        return torch.cat(rows, dim=-2)[None, :, :height, :width]

    def tokens_near(
        self, geometry: Tensor, texture: Tensor, canvas_size: Size, map_size: Size, window: Window
    ) -> tuple[Tensor, Tensor]:
        """Geometry (n, 5), in coordinates of the map, and texture (n, C) of the tokens that may paint into a window.

        Some tokens at a time: a large picture has hundreds of thousands, and the search makes several copies.

        geometry: (N, 5) in coordinates of the canvas; texture: (N, C); sizes as (height, width).
        """
        found = []
        for start in range(0, len(geometry), TOKENS_AT_ONCE):
            chunk = slice(start, start + TOKENS_AT_ONCE)
            moved = map_geometry(geometry[chunk], canvas_size, map_size)
            near = self.reaches(moved, map_size, window)
            found.append((moved[near], texture[chunk][near]))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def reaches(self, geometry: Tensor, map_size: Size, window: Window) -> Tensor:
        """(N,) bool: which tokens may paint into a window; geometry (N, 5) in coordinates of the whole map."""
        return self._touches(window_geometry(geometry, map_size, window), window.size)

    def _touches(self, geometry: Tensor, size: Size) -> Tensor:
        # The outermost lattice points and their boxes; sqrt(2) is how far a shear can carry a corner along y.
        sigmas = REACH_SIGMAS * (math.sqrt(2) * (1 - 1 / self.lattice_size) + self.support / self.lattice_size)
        return touches(geometry, sigmas, self.support * ANTIALIAS_PX, size)

    def _features(self, geometry: Tensor, texture: Tensor, map_size: Size, canvas_size: Size | None) -> Tensor:
        """What each lattice point paints: -> (..., N, lattice_size^2, lattice_channels + 1) float32, the last 1.

        geometry: (..., N, 5) float32 in coordinates of the whole map; texture: (..., N, in_channels); canvas_size:
        (height, width) in pixels of the canvas at its own size; None is that of the map.
        """
        # Shape in units of map pixels, so that a token means the same in an image of any size.
        sigma_px = self._sigma_px(geometry, map_size, canvas_size)
        shape = torch.cat([torch.log2(sigma_px), geometry[..., RHO : RHO + 1]], dim=-1)
        features = super().forward(torch.cat([texture, shape.to(texture.dtype)], dim=-1))
        features = features.float().unflatten(-1, (self.lattice_size**2, -1))
        return torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)

    def _sigma_px(self, geometry: Tensor, map_size: Size, canvas_size: Size | None) -> Tensor:
        """(..., 2) sigmas in map pixels by which a token knows its size; arguments as of `_features`."""
        return geometry[..., SIGMA] * geometry.new_tensor([max(side - 1, 1) / 2 for side in reversed(map_size)])

    def _splat(self, geometry: Tensor, features: Tensor, size: Size) -> Tensor:
        """Geometry (B, N, 5) in coordinates of a map or window of `size`, with its features -> that map, painted."""
        height, width = size
        with autocast_disabled(features):
            lattice = unfold_lattice(geometry, self.lattice_size, height, width)
            painted = splat_gaussians(lattice, features.flatten(1, 2), height, width, self.support)
            weight = painted[:, -1:] + BACKGROUND_WEIGHT
            return torch.cat([painted[:, :-1] / weight, torch.log(weight)], dim=1)
