"""The references of `pixel_norm`, `group_norm` and `tile_norm` in PyTorch, for every device.

Both normalise a map (B, C, H, W), y = activate((x - mean) / deviation * weight + bias), where activate is SiLU or
nothing: over the channels of each pixel by itself, deviation = sqrt(var + eps); or over groups of channels and the
pixels of a tile, deviation = sqrt(var + eps) or, as the released decoder has it, sqrt(var) + eps. Variances are biased.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "group_norm_backward_reference",
    "group_norm_reference",
    "group_statistics_reference",
    "inverse_std",
    "normalise_reference",
    "pixel_norm_backward_reference",
    "pixel_norm_reference",
    "standard_deviation",
    "tile_norm_reference",
]


def pixel_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """(B, C, H, W) -> the same; see the module."""
    rows = x.permute(0, 2, 3, 1)
    with torch.autocast(x.device.type, enabled=False):
        y = F.layer_norm(rows, rows.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps).permute(0, 3, 1, 2)
    return F.silu(y) if silu else y


def pixel_norm_backward_reference(
    x: Tensor, weight: Tensor, bias: Tensor, grad_out: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(result * grad_out): of x, weight and bias, in their dtypes."""
    var, mean = torch.var_mean(_wide(x), dim=1, keepdim=True, correction=0)
    return _backward(x, weight, bias, grad_out, mean, *inverse_std(var, eps, False), None, (1,), silu)


def group_statistics_reference(x: Tensor, num_groups: int, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Biased variance and mean per group and tile, each (B, num_groups, rows, cols) float32 (or float64)."""
    batch_size, channels, height, width = x.shape
    tiles = x.reshape(batch_size, num_groups, channels // num_groups, rows, height // rows, cols, width // cols)
    return torch.var_mean(_wide(tiles), dim=(2, 4, 6), correction=0)


def normalise_reference(
    x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor, silu: bool
) -> Tensor:
    """activate((x - mean) * inverse_std * weight + bias).

    The mean is subtracted first. Folded into a shift it would cancel only after both were multiplied by up to 1 / eps,
    and in a flat group nothing but rounding would be left.

    Args:
        x: (B, C, H, W).
        mean, inverse_std: (B, G, 1, 1), or (B, G, H, W) where they vary.
        weight, bias: (C,).
    """
    group_size = x.shape[1] // mean.shape[1]
    mean = mean.repeat_interleave(group_size, dim=1)
    scale = inverse_std.repeat_interleave(group_size, dim=1) * weight.to(mean.dtype)[:, None, None]
    # In float32 at least: 16 bits would round the mean, and 1 / eps of a flat group lies beyond float16's range.
    y = torch.addcmul(bias.to(mean.dtype)[:, None, None], x - mean, scale)
    return (F.silu(y) if silu else y).to(x.dtype)


def group_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, eps_on_std: bool, silu: bool
) -> Tensor:
    """(B, C, H, W) -> the same, with the whole map as one tile; see the module."""
    var, mean = group_statistics_reference(x, num_groups, 1, 1)
    return normalise_reference(x, mean, inverse_std(var, eps, eps_on_std)[0], weight, bias, silu)


def group_norm_backward_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad_out: Tensor,
    num_groups: int,
    eps: float,
    eps_on_std: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(result * grad_out): of x, weight and bias, in their dtypes."""
    var, mean = (figure[..., None] for figure in group_statistics_reference(x, num_groups, 1, 1))
    return _backward(x, weight, bias, grad_out, mean, *inverse_std(var, eps, eps_on_std), num_groups, (2, 3, 4), silu)


def tile_norm_reference(
    x: Tensor, mean: Tensor, std: Tensor, floor: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    """activate((x - mean) / (max(std, floor) + eps) * weight + bias) with figures that vary smoothly over the map.

    Args:
        x: (B, C, H, W).
        mean, std: (B, G, rows, cols), one figure for each tile, enlarged bicubically to the map's size.
        floor: (B, G), the least that the enlarged std may be.
        weight, bias: (C,).
    """
    size = x.shape[-2:]
    mean, std = (F.interpolate(figure, size=size, mode="bicubic", align_corners=False) for figure in (mean, std))
    std = torch.maximum(std, floor[..., None, None])
    return normalise_reference(x, mean, 1 / (std + eps), weight, bias, silu)


def inverse_std(var: Tensor, eps: float, eps_on_std: bool) -> tuple[Tensor, Tensor]:
    """1 / deviation, and its derivative by the variance: 0 where the deviation is 0."""
    if not eps_on_std:
        inverse = torch.rsqrt(var + eps)
        return inverse, -0.5 * inverse**3
    std = standard_deviation(var)
    inverse = 1 / (std + eps)
    return inverse, torch.where(std > 0, -0.5 * inverse**2 / std, 0)


def standard_deviation(var: Tensor) -> Tensor:
    """The root of a variance, with a gradient of zero where that is zero.

    There the root has none, and autograd would multiply infinity by the variance's own zero.
    """
    deviates = var > 0
    return torch.where(deviates, var, 1).sqrt() * deviates


def _backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad_out: Tensor,
    mean: Tensor,
    inverse: Tensor,
    slope: Tensor,
    num_groups: int | None,
    dims: tuple[int, ...],
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, with `mean`, `inverse` and `slope` of `inverse_std` over `dims` of x, split into groups if any."""

    def split(tensor: Tensor) -> Tensor:
        return tensor if num_groups is None else tensor.unflatten(-3, (num_groups, -1))

    gain, shift = (split(_wide(values)[:, None, None]) for values in (weight, bias))
    centered = split(_wide(x)) - mean
    grad = split(_wide(grad_out))
    if silu:
        z = centered * inverse * gain + shift
        share = torch.sigmoid(z)
        grad = grad * share * (1 + z * (1 - share))
    scaled = grad * gain
    grad_x = inverse * (scaled - scaled.mean(dims, keepdim=True))
    grad_x = grad_x + 2 * slope * centered * (scaled * centered).mean(dims, keepdim=True)
    per_channel = [(grad * centered * inverse).reshape(x.shape).sum((0, 2, 3)), grad.reshape(x.shape).sum((0, 2, 3))]
    return grad_x.reshape(x.shape).to(x.dtype), per_channel[0].to(weight.dtype), per_channel[1].to(bias.dtype)


def _wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()
