"""A small, strictly local decoder: every token paints a lattice of features, convolutions make the picture."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.pixel_norm import pixel_norm
from ..ops.splat import splat_gaussians
from ..tokens import CENTER, RHO, SIGMA
from .attention import FeedForward, autocast_disabled
from .windows import Size, Window, touches, window_geometry

# A region reaches 1.5 sigma from its centre (its initial sigma is a third of its extent), so the lattice does too.
REACH_SIGMAS = 1.5
# Blur of a lattice point, in pixels of the map: below half a pixel a Gaussian would fall between the samples.
ANTIALIAS_PX = 0.5
# Weight that an unpainted place has beside the painted ones, so that 0 / 0 cannot occur.
BACKGROUND_WEIGHT = 0.1
# The tokens of a window are filled up to a multiple of this.
TOKENS_ROUNDED_TO = 256
# Blocks at twice the map's resolution: four times the memory traffic of one below, and little left to decide.
NUM_FINE_LAYERS = 1


def unfold_lattice(geometry: Tensor, lattice_size: int, height: int, width: int) -> Tensor:
    """Splits every Gaussian into `lattice_size`^2 smaller ones, laid out in its own frame.

    The lattice is regular in the coordinates in which the Gaussian is a unit circle, so it moves, grows and shears
    with it. Each point has the parent's shape, scaled to half the lattice's spacing and blurred by half a map pixel.

    Args:
        geometry: (B, N, 5) float32.
        lattice_size: points along each axis of the parent.
        height, width: size of the map in pixels, for the blur.

    Returns: (B, N * lattice_size^2, 5) float32, points of a token contiguous, rows first.
    """
    spacing = 2 * REACH_SIGMAS / lattice_size
    offset = (torch.arange(lattice_size, device=geometry.device, dtype=torch.float32) + 0.5) * spacing - REACH_SIGMAS
    offset_b, offset_a = torch.meshgrid(offset, offset, indexing="ij")
    offset_a, offset_b = offset_a.flatten(), offset_b.flatten()

    sigma_x, sigma_y, rho, x, y = geometry.float().unsqueeze(-1).unbind(2)  # each (B, N, 1)
    # Cholesky factor of the covariance: (a, b) on the unit circle -> the ellipse.
    child_x = x + sigma_x * offset_a
    child_y = y + sigma_y * (rho * offset_a + torch.sqrt(1 - rho * rho) * offset_b)

    scale = spacing / 2
    blur_x, blur_y = (2 * ANTIALIAS_PX / max(size - 1, 1) for size in (width, height))
    child_sigma_x = torch.sqrt((scale * sigma_x) ** 2 + blur_x**2)
    child_sigma_y = torch.sqrt((scale * sigma_y) ** 2 + blur_y**2)
    child_rho = scale**2 * rho * sigma_x * sigma_y / (child_sigma_x * child_sigma_y)
    child = [c.expand_as(child_x) for c in (child_sigma_x, child_sigma_y, child_rho, child_x, child_y)]
    return torch.stack(child, dim=-1).flatten(1, 2)


def map_geometry(geometry: Tensor, image_size: tuple[int, int], map_size: tuple[int, int]) -> Tensor:
    """Carries image coordinates over to those of a coarser map whose pixels cover whole blocks of image pixels.

    [-1, 1] runs between the centres of the first and last *sample*, so it means different places for an image and for
    its map: image pixel p lies at map position (p + 1/2) / f - 1/2, f pixels to a map pixel.

    The map may also be finer than the image, or another map: only the ratio of the sizes counts.

    Args and returns: geometry (..., 5) float32; sizes as (height, width).
    """
    scale, shift = [], []
    for image, samples in zip(reversed(image_size), reversed(map_size), strict=True):  # x, then y
        factor = image / samples
        # x_map = 2 m / (samples - 1) - 1 with m = ((x + 1) / 2 (image - 1) + 1/2) / factor - 1/2; a single sample
        # lies at 0, and is taken to be 2 wide.
        span = max(samples - 1, 1)
        scale.append((image - 1) / factor / span)
        shift.append(((image - 1) / factor + 1 / factor - 1) / span - (1 if samples > 1 else 0))
    scale_xy, shift_xy = geometry.new_tensor(scale), geometry.new_tensor(shift)
    sigma = geometry[..., SIGMA] * scale_xy
    center = geometry[..., CENTER] * scale_xy + shift_xy
    return torch.cat([sigma, geometry[..., RHO : RHO + 1], center], dim=-1)


class PixelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel by itself, then SiLU; (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return pixel_norm(x, self.weight, self.bias, self.eps, silu=True)


class LocalBlock(nn.Module):
    """Residual block of two steps, PixelNorm and a 3x3 convolution; (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = PixelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = PixelNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.conv1(self.norm1(x))
        return self.conv2(self.norm2(x)).add_(residual)  # in place, as in the stem


class LatticeDecoder(nn.Module):
    """Tokens to picture by local steps alone, so that any window of a picture can be decoded by itself.

    1. A perceptron turns each token's texture and shape into `lattice_size`^2 feature vectors.
    2. They are splatted as a lattice of smaller Gaussians in the token's frame ([`unfold_lattice`]), together with
       a channel of ones; features are divided by the painted weight, so that overlapping tokens blend.
    3. Residual convolutions at the map's resolution, then at twice that, then a pixel shuffle to the picture.

    There is no attention and no statistic over the map, and a token's place enters by where it paints alone. A
    token's influence ends within [`receptive_px`] map pixels of what it paints: tiles merge without seams, editing a
    token leaves distant pixels exactly as they were, and memory is bounded by the window.

    Args:
        in_channels: texture channels of a token.
        out_channels: image channels.
        block_out_channels: (channels at twice the map's resolution, channels at the map's resolution).
        num_layers: residual blocks at the map's resolution; one follows at twice that.
        lattice_size: lattice points per token along each axis.
        lattice_channels: channels that each point paints.
        upscale: image pixels per map pixel along each axis, even.
        support: reach of a painted Gaussian, in sigmas.

    Shapes: geometry (B, N, 5) in image coordinates, texture (B, N, in_channels), map size (h, w), see [`paint`]
    -> picture (B, out_channels, h upscale, w upscale).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, int],
        num_layers: int,
        lattice_size: int,
        lattice_channels: int,
        upscale: int,
        support: float,
    ):
        super().__init__()
        fine, coarse = block_out_channels
        self.lattice_size, self.upscale, self.support = lattice_size, upscale, support
        self.unfold_texture = FeedForward(in_channels + 3, 2 * coarse, lattice_size**2 * lattice_channels)
        self.conv_in = nn.Conv2d(lattice_channels + 1, coarse, 3, padding=1)
        self.blocks = nn.ModuleList(LocalBlock(coarse) for _ in range(num_layers))
        self.norm_mid = PixelNorm(coarse)
        self.conv_mid = nn.Conv2d(coarse, 4 * fine, 3, padding=1)
        self.fine_blocks = nn.ModuleList(LocalBlock(fine) for _ in range(NUM_FINE_LAYERS))
        self.norm_out = PixelNorm(fine)
        self.conv_out = nn.Conv2d(fine, out_channels * (upscale // 2) ** 2, 3, padding=1)
        self.gradient_checkpointing = False

    @property
    def receptive_px(self) -> int:
        """How many map pixels around an output block the convolutions look at."""
        coarse = 2 + 2 * len(self.blocks)
        fine = 1 + 2 * len(self.fine_blocks)
        return coarse + (fine + 1) // 2

    @property
    def cell_px(self) -> int:
        """Side in map pixels of the squares that large maps are painted in, see [`paint_window`]."""
        return 2 * self.receptive_px

    def paint(
        self, geometry: Tensor, texture: Tensor, map_size: Size, canvas_size: Size | None = None
    ) -> Tensor:
        """Splats the tokens' lattices: -> (B, lattice_channels + 1, h, w) float32, the last is log weight.

        canvas_size: (height, width) in pixels of the canvas whose coordinates the geometry is in, where the map is
            not to show it at its own size; None is the size of the picture that the map gives.
        """
        height, width = map_size
        image_size = (height * self.upscale, width * self.upscale) if canvas_size is None else canvas_size
        geometry = map_geometry(geometry.float(), image_size, map_size)
        return self._splat(geometry, self._lattice_features(geometry, texture, map_size), map_size)

    def paint_window(self, geometry: Tensor, texture: Tensor, map_size: Size, window: Window) -> Tensor:
        """Splats what is seen in a window of a map: -> (1, lattice_channels + 1, window's h, w) float32.

        The map is painted in cells of `cell_px` squared, each in coordinates of its own by the tokens that reach it, so
        that a map pixel comes out the same bit for bit whichever window shows it. Against [`paint`] of the whole map,
        places are rounded otherwise, by 1e-4 map pixels: where that moves the end of a lattice point's box over a map
        pixel's centre, that pixel gains or loses the last exp(-support^2 / 2) of the point's weight.

        Args:
            geometry: (N, 5) float32 in coordinates of the whole map, as [`map_geometry`] gives them.
            texture: (N, in_channels).
            map_size: (height, width) of the whole map.
            window: its top and left on whole cells.
        """
        near = self.reaches(geometry, map_size, window)
        geometry, texture = geometry[near], texture[near]
        # In round numbers: on a CPU, oneDNN keeps a program of a megabyte for each number of rows that it has seen.
        spare = (0, 0, 0, -len(geometry) % TOKENS_ROUNDED_TO)
        features = self._lattice_features(F.pad(geometry, spare, value=1.0), F.pad(texture, spare), map_size)
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
            painted = self._splat(own, features[index], (cell, cell))
            rows.append(torch.cat(painted.unbind(), dim=-1))
        height, width = window.size
        return torch.cat(rows, dim=-2)[None, :, :height, :width]

    def reaches(self, geometry: Tensor, map_size: Size, window: Window) -> Tensor:
        """(N,) bool: which tokens may paint into a window; geometry (N, 5) in coordinates of the whole map."""
        return self._touches(window_geometry(geometry, map_size, window), window.size)

    def _touches(self, geometry: Tensor, size: Size) -> Tensor:
        # The outermost lattice points and their boxes; sqrt(2) is how far a shear can carry a corner along y.
        sigmas = REACH_SIGMAS * (math.sqrt(2) * (1 - 1 / self.lattice_size) + self.support / self.lattice_size)
        return touches(geometry, sigmas, self.support * ANTIALIAS_PX, size)

    def _lattice_features(self, geometry: Tensor, texture: Tensor, map_size: Size) -> Tensor:
        """What each lattice point paints: -> (..., N, lattice_size^2, lattice_channels + 1) float32, the last 1.

        geometry: (..., N, 5) float32 in coordinates of the whole map; texture: (..., N, in_channels).
        """
        # Shape in units of map pixels, so that a token means the same in an image of any size.
        pixels = geometry.new_tensor([max(side - 1, 1) / 2 for side in reversed(map_size)])
        shape = torch.cat([torch.log2(geometry[..., SIGMA] * pixels), geometry[..., RHO : RHO + 1]], dim=-1)
        features = self.unfold_texture(torch.cat([texture, shape.to(texture.dtype)], dim=-1))
        features = features.float().unflatten(-1, (self.lattice_size**2, -1))
        return torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)

    def _splat(self, geometry: Tensor, features: Tensor, size: Size) -> Tensor:
        """Geometry (B, N, 5) in coordinates of a map or window of `size`, with its features -> that map, painted."""
        height, width = size
        with autocast_disabled(features):
            lattice = unfold_lattice(geometry, self.lattice_size, height, width)
            painted = splat_gaussians(lattice, features.flatten(1, 2), height, width, self.support)
            weight = painted[:, -1:] + BACKGROUND_WEIGHT
            return torch.cat([painted[:, :-1] / weight, torch.log(weight)], dim=1)

    def render(self, feature_map: Tensor) -> Tensor:
        """Painted map (B, lattice_channels + 1, h, w) -> picture (B, out_channels, h upscale, w upscale)."""
        x = self.conv_in(feature_map)
        x = self._run(self.blocks, x)
        x = F.pixel_shuffle(self.conv_mid(self.norm_mid(x)), 2)
        x = self._run(self.fine_blocks, x)
        return F.pixel_shuffle(self.conv_out(self.norm_out(x)), self.upscale // 2)

    def forward(
        self, geometry: Tensor, texture: Tensor, map_size: Size, canvas_size: Size | None = None
    ) -> Tensor:
        feature_map = self.paint(geometry, texture, map_size, canvas_size)
        dtype = self.conv_in.weight.dtype
        return self.render(feature_map.to(dtype, memory_format=torch.channels_last))

    def _run(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        return x


