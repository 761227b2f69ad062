"""A small, strictly local decoder: every token paints a lattice of features, convolutions make the picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.pixel_norm import pixel_norm
from ..ops.splat import splat_gaussians
from ..tokens import CENTER, RHO, SIGMA
from .attention import FeedForward, autocast_disabled

Size = tuple[int, int]  # height, width

# A region reaches 1.5 sigma from its centre (its initial sigma is a third of its extent), so the lattice does too.
REACH_SIGMAS = 1.5
# Blur of a lattice point, in pixels of the map: below half a pixel a Gaussian would fall between the samples.
ANTIALIAS_PX = 0.5
# Weight that an unpainted place has beside the painted ones, so that 0 / 0 cannot occur.
BACKGROUND_WEIGHT = 0.1
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
        return residual + self.conv2(self.norm2(x))


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
        # Shape in units of map pixels, so that a token means the same in an image of any size.
        pixels = geometry.new_tensor([max(width - 1, 1) / 2, max(height - 1, 1) / 2])
        shape = torch.cat([torch.log2(geometry[..., SIGMA] * pixels), geometry[..., RHO : RHO + 1]], dim=-1)
        features = self.unfold_texture(torch.cat([texture, shape.to(texture.dtype)], dim=-1))
        with autocast_disabled(features):
            features = features.float().unflatten(-1, (self.lattice_size**2, -1)).flatten(1, 2)
            features = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)
            lattice = unfold_lattice(geometry, self.lattice_size, height, width)
            painted = splat_gaussians(lattice, features, height, width, self.support)
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


