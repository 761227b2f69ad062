"""A local decoder in which every token carries a small picture of its region, painted at full resolution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.splat import splat_gaussians
from .attention import autocast_disabled
from .lattice_decoder import LatticeDecoder
from .lattice_painter import LatticePainter, unfold_lattice
from .region_sizes import NUM_SIZES, size_weights, sized_linear
from .windows import Size, map_geometry, touches

# A region reaches 1.5 sigma from its centre, less half a pixel at each end: a little more, so that it is covered.
REACH_SIGMAS = 1.6
# Sigma of a painted point: this share of the lattice's spacing, and so many pixels. Measured on what 192 components of
# 8 x 8 pictures hold of 1,024 regions: wider points cost up to 4 dB, narrower ones leave gaps in large regions.
POINT_SHARE = 0.4
POINT_BLUR_PX = 0.2
# Weight that an unpainted place has beside the painted ones, so that 0 / 0 cannot occur.
BACKGROUND_WEIGHT = 0.01


class PatchPainter(LatticePainter):
    """Splats every token's small picture, and features beside it, at the resolution of the whole picture.

    A linear layer, with weights by the token's size, makes the colours of the picture's `lattice_size`^2 points from
    the texture, a perceptron the other channels. A block of `upscale`^2 pixels becomes the channels of one map pixel.

    Args: as of [`LatticePainter`], and

        colours: the first channels of each point, those of a picture.
        upscale: pixels per map pixel along each axis.

    Shapes: -> (B, (lattice_channels + 1) upscale^2, h, w).
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        lattice_size: int,
        lattice_channels: int,
        support: float,
        cell_px: int,
        colours: int,
        upscale: int,
    ):
        super().__init__(in_channels, hidden_channels, lattice_size, lattice_channels - colours, support, cell_px)
        self.upscale = upscale
        # Parameters, not a layer: the perceptron is a sequence of this module's layers.
        numbers = lattice_size**2 * colours
        self.colour_weight = nn.Parameter(torch.randn(NUM_SIZES, numbers, in_channels) * in_channels**-0.5)
        self.colour_bias = nn.Parameter(torch.zeros(NUM_SIZES, numbers))

    def _touches(self, geometry: Tensor, size: Size) -> Tensor:
        outermost = math.sqrt(2) * (1 - 1 / self.lattice_size) + 2 * POINT_SHARE * self.support / self.lattice_size
        # A map pixel is painted if any of its pixels is.
        return touches(geometry, REACH_SIGMAS * outermost, 0.5 + self.support * POINT_BLUR_PX / self.upscale, size)

    def _features(self, geometry: Tensor, texture: Tensor, map_size: Size, canvas_size: Size | None) -> Tensor:
        sigma_px = self._sigma_px(geometry, map_size, canvas_size) * self.upscale
        features = super()._features(geometry, texture, map_size, canvas_size)
        return torch.cat([self.colours(sigma_px, texture), features], dim=-1)

    def _sigma_px(self, geometry: Tensor, map_size: Size, canvas_size: Size | None) -> Tensor:
        sigma_px = super()._sigma_px(geometry, map_size, canvas_size)
        if canvas_size is None:
            return sigma_px
        # Of the map at the picture's own size: drawn larger or smaller, a token's small picture stays the same.
        own = [side / (self.upscale * drawn) for side, drawn in zip(canvas_size, map_size, strict=True)]
        return sigma_px * geometry.new_tensor(own[::-1])

    def colours(self, sigma_px: Tensor, texture: Tensor) -> Tensor:
        """Small pictures: sigmas (..., N, 2) in pixels and textures -> (..., N, lattice_size^2, colours) float32."""
        # A region's sigma is a third of the way from its first to its last pixel.
        sizes = size_weights(3 * sigma_px + 1)
        colours = sized_linear(texture, self.colour_weight, self.colour_bias, sizes)
        return colours.unflatten(-1, (self.lattice_size**2, -1))

    def _splat(self, geometry: Tensor, features: Tensor, size: Size) -> Tensor:
        height, width = (side * self.upscale for side in size)
        with autocast_disabled(features):
            geometry = map_geometry(geometry, size, (height, width))
            lattice = unfold_lattice(
                geometry, self.lattice_size, height, width, REACH_SIGMAS, POINT_SHARE, POINT_BLUR_PX
            )
            painted = splat_gaussians(lattice, features.flatten(1, 2), height, width, self.support)
            weight = painted[:, -1:] + BACKGROUND_WEIGHT
            painted = torch.cat([painted[:, :-1] / weight, torch.log(weight)], dim=1)
            return F.pixel_unshuffle(painted, self.upscale)


class PatchDecoder(LatticeDecoder):
    """Tokens to picture by local steps: the tokens' small pictures, blended into one, and what convolutions add to it.

    The convolutions are those of [`LatticeDecoder`], and so are its locality and its windows. They begin at zero: with
    [`training.linear_start`] the model reconstructs as principal components of regions do before it is trained.

    Args: as of [`LatticeDecoder`]; `lattice_channels` holds the colours and more.

    Shapes: painted map (B, (lattice_channels + 1) upscale^2, h, w) -> picture (B, out_channels, h upscale, w upscale).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, int],
        num_layers: int,
        map_size: int,
        upscale: int,
        support: float,
        lattice_size: int,
        lattice_channels: int,
    ):
        if lattice_channels <= out_channels:
            raise ValueError(
                f"A patch decoder's lattice_channels must be more than the image's {out_channels}, got "
                f"{lattice_channels}."
            )
        sizes = (in_channels, out_channels, block_out_channels, num_layers, map_size, upscale, support)
        super().__init__(*sizes, lattice_size, lattice_channels)
        coarse = block_out_channels[1]
        self.colour_channels = out_channels * upscale**2
        self.unfold_texture = PatchPainter(
            in_channels, 2 * coarse, lattice_size, lattice_channels, support, self.cell_px, out_channels, upscale
        )
        self.conv_in = nn.Conv2d((lattice_channels + 1) * upscale**2, coarse, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, feature_map: Tensor) -> Tensor:
        painted = F.pixel_shuffle(feature_map[:, : self.colour_channels], self.upscale)
        return painted + super().forward(feature_map)
