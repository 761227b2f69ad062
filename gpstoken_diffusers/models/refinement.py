"""The refinement transformer: initial Gaussians and region features -> refined Gaussians and their texture."""

from __future__ import annotations

from itertools import zip_longest

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..geometry import GEOMETRY_CHANNELS, RHO, SIGMA, bounded
from ..ops.linear import run_linear
from ..ops.roi_align import roi_align
from .attention import FeedForward, TokenAttention, autocast_disabled
from .region_sizes import NUM_SIZES, size_weights, sized_linear


class RefinementBlock(nn.Module):
    """One pre-norm transformer block that first adds its reading of the regions, if it has one.

    Shapes: tokens (B, N, hidden_size) and region features of the same shape -> (B, N, hidden_size).
    """

    def __init__(self, hidden_size: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = TokenAttention(hidden_size, heads)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.ff = FeedForward(hidden_size, 4 * hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, region_features: Tensor | None) -> Tensor:
        if region_features is not None:
            hidden_states = hidden_states + region_features
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.ff(self.norm2(hidden_states))


class RegionCells(nn.Module):
    """RoIAlign of every token's region.

    Shapes: features (B, channels, h, w) and regions (B, N, 4) as inclusive pixel indices -> (B N, channels, cells) in
    the dtype of the features, cells = roi_size^2.
    """

    def __init__(self, roi_size: int, patch_size: int):
        super().__init__()
        self.roi_size, self.patch_size = roi_size, patch_size

    def forward(self, features: Tensor, regions: Tensor) -> Tensor:
        cells = roi_align(features, regions, self.roi_size, 1 / self.patch_size)
        return rearrange(cells, "b n channels y x -> (b n) channels (y x)")


class PooledRegionReader(nn.Module):
    """One learned pooling of a region's cells for each transformer block, as the released checkpoints do.

    The release embeds each cell x_c by a 1x1 convolution to the transformer's width, then block l pools the cells with
    weights of its own: sum_c w_lc (W x_c + b) + b_l. Both steps are linear. Here the cells are pooled first, in the
    stem's channels, and embedded as W (sum_c w_lc x_c) + b + (sum_c w_lc - 1) b + b_l: the same function at less than
    half the arithmetic and a quarter of the memory.

    Shapes: cells (B N, channels, cells) -> (num_layers, B N, hidden_size).
    """

    def __init__(self, channels: int, hidden_size: int, num_layers: int, num_cells: int):
        super().__init__()
        self.proj = nn.Linear(channels, hidden_size)
        self.pool_weight = nn.Parameter(torch.empty(num_layers, num_cells))
        self.pool_bias = nn.Parameter(torch.zeros(num_layers))
        bound = num_cells**-0.5  # the range of a linear layer with as many inputs
        nn.init.uniform_(self.pool_weight, -bound, bound)

    def forward(self, cells: Tensor) -> Tensor:
        # One more pooling gives zeros, and embedded the bias b. The layer is called, once, and never read: its weights
        # may be quantised, offloaded, or have an adapter.
        pool_weight = F.pad(self.pool_weight, (0, 0, 0, 1)).to(cells.dtype)
        pooled = rearrange(torch.matmul(cells, pool_weight.T), "regions channels layers -> layers regions channels")
        *embedded, bias = run_linear(self.proj, pooled).split((len(self.pool_weight), 1))
        excess = (self.pool_weight.sum(1) - 1).to(bias.dtype)[:, None, None]
        return embedded[0] + (excess * bias[:, :1] + self.pool_bias.to(bias.dtype)[:, None, None])


class FlatRegionReader(nn.Module):
    """Reads all cells of a region by one linear layer, for the first transformer block alone.

    With few blocks, a pooling per block would pass on little of the cells; this passes on all of them.

    Shapes: cells (B N, channels, cells) -> (1, B N, hidden_size).
    """

    def __init__(self, channels: int, hidden_size: int, num_cells: int):
        super().__init__()
        self.proj = nn.Linear(channels * num_cells, hidden_size)

    def forward(self, cells: Tensor) -> Tensor:
        return run_linear(self.proj, cells.flatten(1))[None]


class Float32Linear(nn.Linear):
    """A linear layer in float32 whatever the dtype of its weights and input; (..., in) -> (..., out) float32."""

    def forward(self, x: Tensor) -> Tensor:
        with autocast_disabled(x):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class RegionPicture(nn.Module):
    """Reads each region as a small picture: for the transformer, and by a linear layer straight into the texture.

    The picture has `side`^2 cells, and a quarter of the region around it as context. The layer into the texture has
    weights for each size of region.

    Shapes: pixels (B, C, H, W) and regions (B, N, 4) as inclusive pixel indices -> (B, N, hidden_size) and (B, N,
    texture_channels).
    """

    def __init__(self, side: int, image_channels: int, hidden_size: int, texture_channels: int):
        super().__init__()
        self.margin = side // 4
        self.cells = side + 2 * self.margin
        numbers = image_channels * self.cells**2
        self.proj = nn.Linear(numbers, hidden_size)
        self.direct_weight = nn.Parameter(torch.randn(NUM_SIZES, texture_channels, numbers) * numbers**-0.5)
        self.direct_bias = nn.Parameter(torch.zeros(NUM_SIZES, texture_channels))

    def forward(self, pixels: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        pictures, sizes = self.read(pixels, regions)
        return run_linear(self.proj, pictures), self.straight(pictures, sizes)

    def read(self, pixels: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures of regions with their context (B, N, C cells^2), and weights of their sizes (B, N, sizes)."""
        start, stop = regions[..., :2].float(), regions[..., 2:].float() + 1
        context = (stop - start) * self.margin / (self.cells - 2 * self.margin)
        padding = max(pixels.shape[-2:]) // 4  # a region's context reaches no further beyond the border
        padded = F.pad(pixels, (padding,) * 4, mode="replicate")
        boxes = torch.cat([start - context, stop + context], dim=-1) + padding
        return roi_align(padded, boxes, self.cells, 1.0).flatten(2), size_weights(stop - start)

    def straight(self, pictures: Tensor, sizes: Tensor) -> Tensor:
        return sized_linear(pictures, self.direct_weight, self.direct_bias, sizes).to(pictures.dtype)


class GaussianRefiner(nn.Module):
    """Refines the initial Gaussians of a partition and gives each its texture (section "Refinement" of the paper).

    Args:
        in_channels: channels of the stem's features.
        hidden_size, num_layers, num_attention_heads: the transformer.
        texture_channels: numbers of texture per token.
        roi_size: cells of RoIAlign along each axis.
        region_reading: "pool" ([`PooledRegionReader`], as released) or "flatten" ([`FlatRegionReader`]).
        patch_size: pixels per stem feature along each axis.
        region_pixels: side of the small picture of each region that is read beside the features; 0 for none.
        image_channels: of that picture.

    Shapes: features (B, in_channels, h, w), initial geometry (B, N, 5) float32, regions (B, N, 4) as inclusive pixel
    indices x0, y0, x1, y1, pixels (B, image_channels, H, W) where they are read -> geometry (B, N, 5) float32, texture
    (B, N, texture_channels).

    The geometry head gives residuals in logit space ([`add_in_logit_space`]). Both are float32 whatever the model's
    dtype: bfloat16 has 8 bits, so a centre would be off by up to a pixel of a 256-pixel image.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        texture_channels: int,
        roi_size: int,
        region_reading: str,
        patch_size: int,
        region_pixels: int = 0,
        image_channels: int = 3,
    ):
        super().__init__()
        self.region_picture, self.norm_out = None, nn.Identity()
        if region_pixels:
            self.region_picture = RegionPicture(region_pixels, image_channels, hidden_size, texture_channels)
            # The heads start at zero and correct what is good already. Without a norm the stream's few large channels
            # let one step of the optimizer change a texture by a fifth of its deviation.
            self.norm_out = nn.LayerNorm(hidden_size)
        self.region_cells = RegionCells(roi_size, patch_size)
        if region_reading == "pool":
            self.region_reader = PooledRegionReader(in_channels, hidden_size, num_layers, roi_size**2)
        elif region_reading == "flatten":
            self.region_reader = FlatRegionReader(in_channels, hidden_size, roi_size**2)
        else:
            raise ValueError(f'region_reading must be "pool" or "flatten", got {region_reading!r}.')
        self.token_embedding = nn.Parameter(torch.randn(1, hidden_size) * 0.02)
        self.geometry_embedding = FeedForward(GEOMETRY_CHANNELS, hidden_size, hidden_size)
        self.blocks = nn.ModuleList(RefinementBlock(hidden_size, num_attention_heads) for _ in range(num_layers))
        self.geometry_head = Float32Linear(hidden_size, GEOMETRY_CHANNELS)
        self.texture_head = nn.Linear(hidden_size, texture_channels)
        nn.init.zeros_(self.geometry_head.weight)
        nn.init.zeros_(self.geometry_head.bias)
        self.gradient_checkpointing = False

    def forward(
        self, features: Tensor, initial_geometry: Tensor, regions: Tensor, pixels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        region_features = self.region_reader(self.region_cells(features, regions))
        region_features = region_features.unflatten(1, regions.shape[:2])
        hidden_states = self.token_embedding + self.geometry_embedding(initial_geometry.to(features.dtype))
        if self.region_picture is not None:
            seen, direct = self.region_picture(pixels, regions)
            hidden_states = hidden_states + seen
        for block, read in zip_longest(self.blocks, region_features):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, read)
            else:
                hidden_states = block(hidden_states, read)
        hidden_states = self.norm_out(hidden_states)
        texture = self.texture_head(hidden_states)
        if self.region_picture is not None:
            texture = texture + direct
        residual = self.geometry_head(hidden_states).float()  # float32 already, unless quantised
        return add_in_logit_space(initial_geometry.float(), residual), texture


def add_in_logit_space(initial_geometry: Tensor, residual: Tensor) -> Tensor:
    """Moves Gaussians by a residual in logit space; the result is a valid geometry whatever the residual.

    sigma = sigmoid(logit(sigma_0) + r); rho, x and y: v = 2 sigmoid(logit((1 + v_0) / 2) + r) - 1.

    Args:
        initial_geometry: (..., 5) float32, sigma in (0, 1), rho, x, y in [-1, 1].
        residual: (..., 5) float32, unbounded; zero leaves a Gaussian as it is.

    Returns: (..., 5) float32 with sigma in [1e-5, 1) and |rho| < 1.
    """
    sigma = torch.sigmoid(torch.logit(initial_geometry[..., SIGMA], eps=1e-7) + residual[..., SIGMA])
    rest = (1 + initial_geometry[..., RHO:]) / 2
    rest = 2 * torch.sigmoid(torch.logit(rest, eps=1e-7) + residual[..., RHO:]) - 1
    # Bounded, because a sigmoid saturates in float32.
    return bounded(torch.cat([sigma, rest], dim=-1))
