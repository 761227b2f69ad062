"""The normalisations of maps: over groups of channels, per tile for decoding without seams, and per pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.group_norm import group_norm, group_statistics, tile_norm
from ..ops.norm_reference import standard_deviation
from ..ops.pixel_norm import pixel_norm

# Of every group norm in the released checkpoints.
GROUPS = 32
GROUP_NORM_EPS = 1e-6

# The lowest value that the enlarged standard deviation may take, as a share of the smallest one among an image's
# tiles. See `tile_group_norm`.
STD_FLOOR = 0.5


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` by our operator, with SiLU behind it if asked for; (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__(GROUPS, channels, eps=GROUP_NORM_EPS)

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps, silu=silu)


def tile_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    tile_grid: tuple[int, int] = (1, 1),
    std_floor: float | None = STD_FLOOR,
    silu: bool = False,
) -> Tensor:
    """Group normalisation whose mean and deviation vary smoothly from tile to tile.

    Mean and biased standard deviation are taken per tile and group. Both small maps are enlarged bicubically to the
    size of `x`, and y = (x - mean) / (std + eps) * weight + bias. With one tile this is a group normalisation that
    divides by `std + eps` instead of `sqrt(var + eps)`.

    Bicubic enlargement overshoots. Beside a tile that is some ten times rougher, the released code's std falls to zero
    and below: the sign flips and pixels explode. Here the enlarged std is kept above `std_floor` times the smallest
    std among the image's tiles. Where tiles differ by less than about five times, nothing changes.

    Args:
        x: (B, C, H, W); H and W are multiples of `tile_grid`.
        weight, bias: (C,).
        num_groups: divides C.
        eps: added to the standard deviation.
        tile_grid: (rows, cols) of tiles.
        std_floor: see above, in [0, 1]; None gives the released behaviour exactly, explosions included.
        silu: whether SiLU follows.

    Returns: (B, C, H, W), in the dtype of `x`. Statistics are float32.
    """
    if tile_grid == (1, 1):
        return group_norm(x, weight, bias, num_groups, eps, eps_on_std=True, silu=silu)
    var, mean = group_statistics(x, num_groups, tile_grid)
    std = standard_deviation(var)
    lowest = std.amin(dim=(2, 3))
    floor = torch.full_like(lowest, -torch.inf) if std_floor is None else std_floor * lowest
    return tile_norm(x, mean, std, floor, weight, bias, eps, silu=silu)


class TileGroupNorm(nn.Module):
    """Learned [`tile_group_norm`], with SiLU behind it; (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.num_groups, self.eps = GROUPS, GROUP_NORM_EPS
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, tile_grid: tuple[int, int] = (1, 1)) -> Tensor:
        return tile_group_norm(x, self.weight, self.bias, self.num_groups, self.eps, tile_grid, silu=True)


class PixelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel by itself, then SiLU; (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return pixel_norm(x, self.weight, self.bias, self.eps, silu=True)
