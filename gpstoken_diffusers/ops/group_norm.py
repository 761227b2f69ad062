"""`group_norm` and `tile_norm`: normalisation over groups of channels with SiLU behind it, native on the CPU.

Registered as operators of the same names with fake kernels and autograd, so that `torch.compile(fullgraph=True)` takes
them. torch's own group norm for channels-last maps on the CPU subtracts two large sums. At 256 x 256 it is off by 5e-5
of the largest value, too much for a released checkpoint's geometry. `ops/norm_reference.py` has the references, which
run where no native library does. The native versions take and give channels-last memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm_reference import (
    group_norm_backward_reference,
    group_norm_reference,
    group_statistics_reference,
    inverse_std,
    tile_norm_reference,
)
from .operators import call_native, channels_last, check_map, native_serves, refuse_second_derivative

__all__ = ["group_norm", "group_statistics", "tile_norm"]


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    *,
    eps_on_std: bool = False,
    silu: bool = False,
) -> Tensor:
    """Normalisation over groups of channels and all pixels of each image, then SiLU if asked for.

    Args:
        x: (B, C, H, W), floating point.
        weight, bias: (C,).
        num_groups: divides C.
        eps: added to the variance, or to its root with `eps_on_std`.

    Returns: (B, C, H, W) in the dtype of `x`; statistics are float32.

    Raises ValueError: shapes that do not fit together.
    """
    check_map("group_norm", x, weight, bias, num_groups)
    if x.device.type != "cpu":  # torch.compile fuses the reference there
        return group_norm_reference(x, weight, bias, num_groups, eps, eps_on_std, silu)
    return torch.ops.gpstoken.group_norm(x, weight, bias, num_groups, eps, eps_on_std, silu)[0]


def group_statistics(x: Tensor, num_groups: int, tile_grid: tuple[int, int] = (1, 1)) -> tuple[Tensor, Tensor]:
    """Biased variance and mean of each group of channels in each tile: two (B, num_groups, rows, cols) float32.

    Args:
        x: (B, C, H, W), floating point.
        num_groups: divides C.
        tile_grid: (rows, cols), which divide H and W.

    Differentiable, by autograd through the reference. Raises ValueError: shapes that do not fit together.
    """
    check_map("group_statistics", x, None, None, num_groups, tile_grid)
    if x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
        return group_statistics_reference(x, num_groups, *tile_grid)
    return torch.ops.gpstoken.group_statistics(x, num_groups, *tile_grid)


def tile_norm(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    floor: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = False,
) -> Tensor:
    """Normalisation by figures that vary smoothly from tile to tile, then SiLU if asked for.

    Args:
        x: (B, C, H, W), floating point.
        mean, std: (B, G, rows, cols) float32, one figure for each tile; enlarged bicubically to the size of `x`.
        floor: (B, G) float32, the least that the enlarged std may be.
        weight, bias: (C,).
        eps: added to the std.

    Returns: (B, C, H, W) in the dtype of `x`. Differentiable, by autograd through the reference.

    Raises ValueError: shapes that do not fit together.
    """
    check_map("tile_norm", x, weight, bias, mean.shape[1])
    if mean.shape != std.shape or floor.shape != mean.shape[:2] or len(mean) != len(x):
        shapes = [tuple(figure.shape) for figure in (mean, std, floor)]
        raise ValueError(f"tile_norm: expected mean and std (B, G, rows, cols) and floor (B, G), got {shapes}.")
    inputs = (x, mean, std, floor, weight, bias)
    if x.device.type != "cpu" or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
        return tile_norm_reference(*inputs, eps, silu)
    return torch.ops.gpstoken.tile_norm(*inputs, eps, silu)


# Registered at the dispatcher itself, as in splat.py.
_GROUP_NORM, _GROUP_NORM_BACKWARD = "gpstoken::group_norm", "gpstoken::group_norm_backward"
_GROUP_STATISTICS, _TILE_NORM = "gpstoken::group_statistics", "gpstoken::tile_norm"
for _name, _schema in {
    # The map, then the variance and the mean (B, G, 1, 1) that the backward pass needs.
    _GROUP_NORM: "(Tensor x, Tensor weight, Tensor bias, SymInt num_groups, float eps, bool eps_on_std, bool silu) "
    "-> (Tensor, Tensor, Tensor)",
    _GROUP_NORM_BACKWARD: "(Tensor x, Tensor weight, Tensor bias, Tensor grad_out, Tensor var, Tensor mean, "
    "SymInt num_groups, float eps, bool eps_on_std, bool silu) -> (Tensor, Tensor, Tensor)",
    _TILE_NORM: "(Tensor x, Tensor mean, Tensor std, Tensor floor, Tensor weight, Tensor bias, float eps, bool silu) "
    "-> Tensor",
    _GROUP_STATISTICS: "(Tensor x, SymInt num_groups, SymInt rows, SymInt cols) -> (Tensor, Tensor)",
}.items():
    torch.library.define(_name, _schema, tags=torch.Tag.pt2_compliant_tag)


# ---- over groups of channels ----


@torch.library.impl(_GROUP_STATISTICS, "cpu")
def _(x: Tensor, num_groups: int, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    if not native_serves("group_norm", x):
        return group_statistics_reference(x, num_groups, rows, cols)
    x = channels_last(x)
    batch_size, channels, height, width = x.shape
    var, mean = x.new_empty((2, batch_size, num_groups, rows, cols), dtype=torch.float32)
    sizes = [batch_size, height, width, channels, num_groups, rows, cols]
    call_native("gpstoken_group_statistics_cpu", [x, mean, var], sizes, x)
    return var.clone(), mean.clone()


@torch.library.register_fake(_GROUP_STATISTICS)
def _(x: Tensor, num_groups: int, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    shape, dtype = (x.shape[0], num_groups, rows, cols), _statistics_dtype(x)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


@torch.library.impl(_GROUP_NORM, "cpu")
def _(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, eps_on_std: bool, silu: bool):
    if not native_serves("group_norm", x):
        return _group_norm_on_reference(x, weight, bias, num_groups, eps, eps_on_std, silu)
    x = channels_last(x)
    var, mean = torch.ops.gpstoken.group_statistics(x, num_groups, 1, 1)
    inverse, _ = inverse_std(var, eps, eps_on_std)
    out = torch.empty_like(x)
    tensors = [x, mean, inverse, weight.float().contiguous(), bias.float().contiguous(), out]
    call_native("gpstoken_group_norm_cpu", tensors, [*_group_sizes(x, num_groups), silu], x)
    return out, var, mean


@torch.library.register_fake(_GROUP_NORM)
def _(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, eps_on_std: bool, silu: bool):
    shape, dtype = (x.shape[0], num_groups, 1, 1), _statistics_dtype(x)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return out, x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


@torch.library.impl(_GROUP_NORM_BACKWARD, "cpu")
def _(x, weight, bias, grad_out, var, mean, num_groups: int, eps: float, eps_on_std: bool, silu: bool):
    if not native_serves("group_norm", x):
        return _group_norm_backward_on_reference(x, weight, bias, grad_out, num_groups, eps, eps_on_std, silu)
    x, grad_out = channels_last(x), channels_last(grad_out.to(x.dtype))
    parameters = [weight.float().contiguous(), bias.float().contiguous()]
    grad_x, grads = torch.empty_like(x), [torch.empty_like(values) for values in parameters]
    figures = [mean.contiguous(), *inverse_std(var.contiguous(), eps, eps_on_std)]
    tensors = [x, *figures, *parameters, grad_out, grad_x, *grads]
    call_native("gpstoken_group_norm_backward_cpu", tensors, [*_group_sizes(x, num_groups), silu], x)
    return grad_x, grads[0].to(weight.dtype), grads[1].to(bias.dtype)


@torch.library.register_fake(_GROUP_NORM_BACKWARD)
def _(x, weight, bias, grad_out, var, mean, num_groups: int, eps: float, eps_on_std: bool, silu: bool):
    return (
        torch.empty_like(x, memory_format=torch.channels_last),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    )


def _group_norm_setup(ctx, inputs: tuple, output: tuple) -> None:
    x, weight, bias, *ctx.settings = inputs
    _, var, mean = output
    ctx.mark_non_differentiable(var, mean)
    ctx.save_for_backward(x, weight, bias, var, mean)


def _group_norm_autograd(ctx, grad_out: Tensor, grad_var: None, grad_mean: None) -> tuple:
    x, weight, bias, var, mean = ctx.saved_tensors
    gradients = torch.ops.gpstoken.group_norm_backward(x, weight, bias, grad_out, var, mean, *ctx.settings)
    return *gradients, None, None, None, None


torch.library.register_autograd(_GROUP_NORM, _group_norm_autograd, setup_context=_group_norm_setup)
refuse_second_derivative(_GROUP_NORM_BACKWARD)


def _group_norm_on_reference(x, weight, bias, num_groups, eps, eps_on_std, silu):
    var, mean = group_statistics_reference(x, num_groups, 1, 1)
    out = group_norm_reference(x, weight, bias, num_groups, eps, eps_on_std, silu)
    return channels_last(out), var, mean


def _group_norm_backward_on_reference(x, weight, bias, grad_out, num_groups, eps, eps_on_std, silu):
    grad_x, *others = group_norm_backward_reference(x, weight, bias, grad_out, num_groups, eps, eps_on_std, silu)
    return channels_last(grad_x), *others


# ---- between tiles ----


@torch.library.impl(_TILE_NORM, "cpu")
def _(x, mean, std, floor, weight, bias, eps: float, silu: bool) -> Tensor:
    if not native_serves("group_norm", x):
        return channels_last(tile_norm_reference(x, mean, std, floor, weight, bias, eps, silu))
    x = channels_last(x)
    sizes, cols = _group_sizes(x, mean.shape[1]), mean.shape[3]
    # The enlargement is separable. Down the columns by torch, which leaves few numbers: (B, H, cols, G).
    tall = [
        F.interpolate(figure.float(), size=(x.shape[2], cols), mode="bicubic", align_corners=False)
        .permute(0, 2, 3, 1)
        .contiguous()
        for figure in (mean, std)
    ]
    tiles, shares = _bicubic_taps(cols, x.shape[3])
    out = torch.empty_like(x)
    others = [floor.float().contiguous(), tiles, shares, weight.float().contiguous(), bias.float().contiguous()]
    call_native("gpstoken_tile_norm_cpu", [x, *tall, *others, out], [*sizes, cols, eps, silu], x)
    return out


@torch.library.register_fake(_TILE_NORM)
def _(x, mean, std, floor, weight, bias, eps: float, silu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _bicubic_taps(samples: int, size: int) -> tuple[Tensor, Tensor]:
    """Which four of `samples` count for each of `size` places of an enlargement, and how much: two (size, 4).

    As in torch: half-pixel centres, the ends repeated, Keys' kernel with a = -0.75.
    """
    place = (torch.arange(size, dtype=torch.float64) + 0.5) * samples / size - 0.5
    first = place.floor()
    distance = (place - first)[:, None] - torch.arange(-1, 3)  # to the four samples around it
    a, d = -0.75, distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    tiles = (first[:, None].int() + torch.arange(-1, 3, dtype=torch.int32)).clamp(0, samples - 1)
    return tiles.contiguous(), torch.where(d <= 1, near, far).float().contiguous()


def _group_sizes(x: Tensor, num_groups: int) -> list[int]:
    batch_size, channels, height, width = x.shape
    return [batch_size, height, width, channels, num_groups]


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
