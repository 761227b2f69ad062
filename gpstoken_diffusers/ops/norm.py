"""`pixel_norm`, `group_norm` and `group_statistics`: normalisation of maps with SiLU behind it, native on the CPU.

Registered as operators of the same names with fake kernels and autograd, so that `torch.compile(fullgraph=True)` takes
them. One pass over memory does what torch does in four; torch's own group norm for channels-last maps on the CPU also
subtracts two large sums, and is off by 5e-5 of the largest value at 256 x 256, which is more than a released
checkpoint's geometry bears. `ops/norm_reference.py` defines the results and runs wherever no native library does.

The native versions work on channels-last memory, which is what convolutions on the CPU are fastest on, and give it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpstoken_diffusers.ops import native
from gpstoken_diffusers.ops.norm_reference import (
    group_norm_backward_reference,
    group_norm_reference,
    group_statistics_reference,
    inverse_std,
    pixel_norm_backward_reference,
    pixel_norm_reference,
)

__all__ = ["group_norm", "group_statistics", "pixel_norm"]


def pixel_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool = False) -> Tensor:
    """Layer normalisation over the channels of each pixel by itself, then SiLU if asked for.

    Args:
        x: (B, C, H, W), floating point.
        weight, bias: (C,).
        eps: added to the variance.

    Returns: (B, C, H, W) in the dtype of `x`; statistics are float32.

    Raises ValueError: shapes that do not fit together.
    """
    _check("pixel_norm", x, weight, bias)
    return torch.ops.gpstoken.pixel_norm(x, weight, bias, eps, silu)


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
    _check("group_norm", x, weight, bias, num_groups)
    return torch.ops.gpstoken.group_norm(x, weight, bias, num_groups, eps, eps_on_std, silu)[0]


def group_statistics(x: Tensor, num_groups: int, tile_grid: tuple[int, int] = (1, 1)) -> tuple[Tensor, Tensor]:
    """Biased variance and mean of each group of channels in each tile: two (B, num_groups, rows, cols) float32.

    Args:
        x: (B, C, H, W), floating point.
        num_groups: divides C.
        tile_grid: (rows, cols), which divide H and W.

    Differentiable, then by the plain definition. Raises ValueError: shapes that do not fit together.
    """
    _check("group_statistics", x, None, None, num_groups, tile_grid)
    if torch.is_grad_enabled() and x.requires_grad:
        return group_statistics_reference(x, num_groups, *tile_grid)
    return torch.ops.gpstoken.group_statistics(x, num_groups, *tile_grid)


def _check(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int = 1,
    tile_grid: tuple[int, int] = (1, 1),
) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"{op}: expected a floating-point map (B, C, H, W), got {x.dtype} {tuple(x.shape)}.")
    channels, (height, width), (rows, cols) = x.shape[1], x.shape[2:], tile_grid
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None and values.shape != (channels,):
            raise ValueError(f"{op}: {name} must have the shape ({channels},), got {tuple(values.shape)}.")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: {channels} channels do not divide into {num_groups} groups.")
    if min(tile_grid) < 1 or height % rows or width % cols:
        raise ValueError(f"{op}: {height} x {width} pixels do not divide into {rows} x {cols} tiles.")


# Registered at the dispatcher itself, as in splat.py.
_PIXEL_NORM, _PIXEL_NORM_BACKWARD = "gpstoken::pixel_norm", "gpstoken::pixel_norm_backward"
_GROUP_NORM, _GROUP_NORM_BACKWARD = "gpstoken::group_norm", "gpstoken::group_norm_backward"
_GROUP_STATISTICS = "gpstoken::group_statistics"
for _name, _schema in {
    _PIXEL_NORM: "(Tensor x, Tensor weight, Tensor bias, float eps, bool silu) -> Tensor",
    _PIXEL_NORM_BACKWARD: "(Tensor x, Tensor weight, Tensor bias, Tensor grad_out, float eps, bool silu) "
    "-> (Tensor, Tensor, Tensor)",
    # The map, then the variance and the mean (B, G, 1, 1) that the backward pass needs.
    _GROUP_NORM: "(Tensor x, Tensor weight, Tensor bias, SymInt num_groups, float eps, bool eps_on_std, bool silu) "
    "-> (Tensor, Tensor, Tensor)",
    _GROUP_NORM_BACKWARD: "(Tensor x, Tensor weight, Tensor bias, Tensor grad_out, Tensor var, Tensor mean, "
    "SymInt num_groups, float eps, bool eps_on_std, bool silu) -> (Tensor, Tensor, Tensor)",
    _GROUP_STATISTICS: "(Tensor x, SymInt num_groups, SymInt rows, SymInt cols) -> (Tensor, Tensor)",
}.items():
    torch.library.define(_name, _schema, tags=torch.Tag.pt2_compliant_tag)


# ---- over the channels of a pixel ----


@torch.library.impl(_PIXEL_NORM, "default")
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    return _channels_last(pixel_norm_reference(x, weight, bias, eps, silu))


@torch.library.impl(_PIXEL_NORM, "cpu")
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    if not _native_serves("pixel_norm", x):
        return _channels_last(pixel_norm_reference(x, weight, bias, eps, silu))
    x, weight, bias = _channels_last(x), weight.float().contiguous(), bias.float().contiguous()
    out = torch.empty_like(x)
    _call("gpstoken_pixel_norm_cpu", [x, weight, bias, out], [_pixels(x), x.shape[1], eps, silu], x)
    return out


@torch.library.register_fake(_PIXEL_NORM)
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.impl(_PIXEL_NORM_BACKWARD, "default")
def _(x: Tensor, weight: Tensor, bias: Tensor, grad_out: Tensor, eps: float, silu: bool):
    return _plain_pixel_norm_backward(x, weight, bias, grad_out, eps, silu)


@torch.library.impl(_PIXEL_NORM_BACKWARD, "cpu")
def _(x: Tensor, weight: Tensor, bias: Tensor, grad_out: Tensor, eps: float, silu: bool):
    if not _native_serves("pixel_norm", x):
        return _plain_pixel_norm_backward(x, weight, bias, grad_out, eps, silu)
    x, grad_out = _channels_last(x), _channels_last(grad_out.to(x.dtype))
    plain = [weight.float().contiguous(), bias.float().contiguous()]
    grad_x, grads = torch.empty_like(x), [torch.empty_like(values) for values in plain]
    tensors = [x, *plain, grad_out, grad_x, *grads]
    _call("gpstoken_pixel_norm_backward_cpu", tensors, [_pixels(x), x.shape[1], eps, silu], x)
    return grad_x, grads[0].to(weight.dtype), grads[1].to(bias.dtype)


@torch.library.register_fake(_PIXEL_NORM_BACKWARD)
def _(x: Tensor, weight: Tensor, bias: Tensor, grad_out: Tensor, eps: float, silu: bool):
    return (
        torch.empty_like(x, memory_format=torch.channels_last),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    )


def _pixel_norm_setup(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.eps, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias)


def _pixel_norm_autograd(ctx, grad_out: Tensor) -> tuple:
    gradients = torch.ops.gpstoken.pixel_norm_backward(*ctx.saved_tensors, grad_out, ctx.eps, ctx.silu)
    return *gradients, None, None


def _plain_pixel_norm_backward(x, weight, bias, grad_out, eps: float, silu: bool):
    grad_x, *others = pixel_norm_backward_reference(x, weight, bias, grad_out, eps, silu)
    return _channels_last(grad_x), *others


torch.library.register_autograd(_PIXEL_NORM, _pixel_norm_autograd, setup_context=_pixel_norm_setup)


# ---- over groups of channels ----


@torch.library.impl(_GROUP_STATISTICS, "default")
def _(x: Tensor, num_groups: int, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    return group_statistics_reference(x, num_groups, rows, cols)


@torch.library.impl(_GROUP_STATISTICS, "cpu")
def _(x: Tensor, num_groups: int, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    if not _native_serves("group_norm", x):
        return group_statistics_reference(x, num_groups, rows, cols)
    x = _channels_last(x)
    batch_size, channels, height, width = x.shape
    var, mean = x.new_empty((2, batch_size, num_groups, rows, cols), dtype=torch.float32)
    sizes = [batch_size, height, width, channels, num_groups, rows, cols]
    _call("gpstoken_group_statistics_cpu", [x, mean, var], sizes, x)
    return var.clone(), mean.clone()


@torch.library.register_fake(_GROUP_STATISTICS)
def _(x: Tensor, num_groups: int, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    shape, dtype = (x.shape[0], num_groups, rows, cols), _statistics_dtype(x)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


@torch.library.impl(_GROUP_NORM, "default")
def _(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, eps_on_std: bool, silu: bool):
    return _plain_group_norm(x, weight, bias, num_groups, eps, eps_on_std, silu)


@torch.library.impl(_GROUP_NORM, "cpu")
def _(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, eps_on_std: bool, silu: bool):
    if not _native_serves("group_norm", x):
        return _plain_group_norm(x, weight, bias, num_groups, eps, eps_on_std, silu)
    x = _channels_last(x)
    var, mean = torch.ops.gpstoken.group_statistics(x, num_groups, 1, 1)
    inverse, _ = inverse_std(var, eps, eps_on_std)
    out = torch.empty_like(x)
    tensors = [x, mean, inverse, weight.float().contiguous(), bias.float().contiguous(), out]
    _call("gpstoken_group_norm_cpu", tensors, [*_group_sizes(x, num_groups), silu], x)
    return out, var, mean


@torch.library.register_fake(_GROUP_NORM)
def _(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, eps_on_std: bool, silu: bool):
    shape, dtype = (x.shape[0], num_groups, 1, 1), _statistics_dtype(x)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return out, x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


@torch.library.impl(_GROUP_NORM_BACKWARD, "default")
def _(x, weight, bias, grad_out, var, mean, num_groups: int, eps: float, eps_on_std: bool, silu: bool):
    return _plain_group_norm_backward(x, weight, bias, grad_out, num_groups, eps, eps_on_std, silu)


@torch.library.impl(_GROUP_NORM_BACKWARD, "cpu")
def _(x, weight, bias, grad_out, var, mean, num_groups: int, eps: float, eps_on_std: bool, silu: bool):
    if not _native_serves("group_norm", x):
        return _plain_group_norm_backward(x, weight, bias, grad_out, num_groups, eps, eps_on_std, silu)
    x, grad_out = _channels_last(x), _channels_last(grad_out.to(x.dtype))
    plain = [weight.float().contiguous(), bias.float().contiguous()]
    grad_x, grads = torch.empty_like(x), [torch.empty_like(values) for values in plain]
    figures = [mean.contiguous(), *inverse_std(var.contiguous(), eps, eps_on_std)]
    tensors = [x, *figures, *plain, grad_out, grad_x, *grads]
    _call("gpstoken_group_norm_backward_cpu", tensors, [*_group_sizes(x, num_groups), silu], x)
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


def _plain_group_norm(x, weight, bias, num_groups: int, eps: float, eps_on_std: bool, silu: bool):
    var, mean = group_statistics_reference(x, num_groups, 1, 1)
    out = group_norm_reference(x, weight, bias, num_groups, eps, eps_on_std, silu)
    return _channels_last(out), var, mean


def _plain_group_norm_backward(x, weight, bias, grad_out, num_groups: int, eps: float, eps_on_std: bool, silu: bool):
    grad_x, *others = group_norm_backward_reference(x, weight, bias, grad_out, num_groups, eps, eps_on_std, silu)
    return _channels_last(grad_x), *others


# ---- shared ----


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _group_sizes(x: Tensor, num_groups: int) -> list[int]:
    batch_size, channels, height, width = x.shape
    return [batch_size, height, width, channels, num_groups]


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _native_serves(op: str, x: Tensor) -> bool:
    """Whether the native library takes this call; says so once if it only fails to be there."""
    if native.dtype_code(x.dtype) is None or x.numel() == 0:
        return False
    if native.library("cpu") is None:
        native.announce_fallback(op, "cpu")
        return False
    return True


def _call(function: str, tensors: list[Tensor], settings: list[int | float | bool], x: Tensor) -> None:
    pointers = [tensor.data_ptr() for tensor in tensors]
    native.call("cpu", function, *pointers, *settings, native.dtype_code(x.dtype), torch.get_num_threads())
