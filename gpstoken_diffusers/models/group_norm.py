"""Group normalisation: accurate in every memory format, and with statistics per tile for decoding without seams."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The lowest value that the enlarged standard deviation may take, as a share of the smallest one among an image's
# tiles. See `tile_group_norm`.
STD_FLOOR = 0.5


def _group_statistics(x: Tensor, num_groups: int, tile_grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Biased variance and mean per group and tile, each (B, num_groups, rows, cols) float32."""
    batch_size, channels, height, width = x.shape
    rows, cols = tile_grid
    tiles = x.reshape(batch_size, num_groups, channels // num_groups, rows, height // rows, cols, width // cols)
    return torch.var_mean(tiles.float(), dim=(2, 4, 6), correction=0)


def _normalise(x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(x - mean) * inverse_std * weight + bias.

    The mean goes first: folded into one scale and shift, it would cancel against x only after both were multiplied,
    which in a flat group (inverse_std up to 1 / eps) leaves nothing but rounding.
    """
    group_size = x.shape[1] // mean.shape[1]
    mean = mean.repeat_interleave(group_size, dim=1)
    scale = inverse_std.repeat_interleave(group_size, dim=1) * weight.float()[:, None, None]
    dtype = x.dtype
    if dtype == torch.float16:
        x = x.float()  # 1 / eps lies beyond float16's range, which a flat group would meet
    normalised = torch.addcmul(bias.to(x.dtype)[:, None, None], x - mean.to(x.dtype), scale.to(x.dtype))
    return normalised.to(dtype)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` with statistics that do not depend on the memory format; (B, C, H, W) -> (B, C, H, W).

    torch's CPU kernel for channels-last subtracts two large sums: at 256 x 256 it is off by 5e-5 of the largest value,
    a hundred times more than the same layer on contiguous memory, and more than a released checkpoint's geometry bears.
    """

    def forward(self, x: Tensor) -> Tensor:
        var, mean = _group_statistics(x, self.num_groups, (1, 1))
        return _normalise(x, mean, torch.rsqrt(var + self.eps), self.weight, self.bias)


def tile_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    tile_grid: tuple[int, int] = (1, 1),
    std_floor: float | None = STD_FLOOR,
) -> Tensor:
    """Group normalisation whose mean and deviation vary smoothly from tile to tile.

    Mean and biased standard deviation are taken per tile and group, both small maps are enlarged bicubically to the
    size of `x`, and y = (x - mean) / (std + eps) * weight + bias. With one tile this is a group normalisation that
    divides by `std + eps` rather than by `sqrt(var + eps)`.

    Bicubic enlargement overshoots: beside a tile some ten times rougher, the released code's std falls to zero and
    below, the sign flips and pixels explode. Here the enlarged std is kept above `std_floor` times the smallest std
    among the image's tiles. Where tiles differ by less than about five times, nothing changes.

    Args:
        x: (B, C, H, W); H and W are multiples of `tile_grid`.
        weight, bias: (C,).
        num_groups: divides C.
        eps: added to the standard deviation.
        tile_grid: (rows, cols) of tiles.
        std_floor: see above, in [0, 1]; None gives the released behaviour exactly, explosions included.

    Returns: (B, C, H, W), in the dtype of `x`. Statistics are float32.
    """
    var, mean = _group_statistics(x, num_groups, tile_grid)
    std = var.sqrt()
    if tile_grid != (1, 1):
        lowest = std.amin(dim=(2, 3), keepdim=True)
        mean = F.interpolate(mean, size=x.shape[-2:], mode="bicubic", align_corners=False)
        std = F.interpolate(std, size=x.shape[-2:], mode="bicubic", align_corners=False)
        if std_floor is not None:
            std = torch.maximum(std, std_floor * lowest)
    return _normalise(x, mean, 1 / (std + eps), weight, bias)


class TileGroupNorm(nn.Module):
    """Learned [`tile_group_norm`]; (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, num_groups: int, channels: int, eps: float):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, tile_grid: tuple[int, int] = (1, 1)) -> Tensor:
        return tile_group_norm(x, self.weight, self.bias, self.num_groups, self.eps, tile_grid)
