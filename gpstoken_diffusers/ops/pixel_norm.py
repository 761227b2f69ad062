"""`pixel_norm`: layer normalisation over the channels of each pixel of a map with SiLU behind it, native on the CPU.

Registered as `gpstoken::pixel_norm` with a fake kernel and autograd, so that `torch.compile(fullgraph=True)` takes it.
One pass over memory does what torch does in two. The reference is in `ops/norm_reference.py` and runs where no native
library does. The native version takes and gives channels-last memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm_reference import (
    pixel_norm_backward_reference,
    pixel_norm_reference,
)
from .operators import call_native, channels_last, check_map, native_serves, refuse_second_derivative

__all__ = ["pixel_norm"]


def pixel_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool = False) -> Tensor:
    """Layer normalisation over the channels of each pixel by itself, then SiLU if asked for.

    Args:
        x: (B, C, H, W), floating point.
        weight, bias: (C,).
        eps: added to the variance.

    Returns: (B, C, H, W) in the dtype of `x`; statistics are float32.

    Raises ValueError: shapes that do not fit together.
    """
    check_map("pixel_norm", x, weight, bias)
    if x.device.type != "cpu":  # torch.compile fuses the reference there
        return pixel_norm_reference(x, weight, bias, eps, silu)
    return torch.ops.gpstoken.pixel_norm(x, weight, bias, eps, silu)


# Registered at the dispatcher itself, as in splat.py.
_PIXEL_NORM, _PIXEL_NORM_BACKWARD = "gpstoken::pixel_norm", "gpstoken::pixel_norm_backward"
for _name, _schema in {
    _PIXEL_NORM: "(Tensor x, Tensor weight, Tensor bias, float eps, bool silu) -> Tensor",
    _PIXEL_NORM_BACKWARD: "(Tensor x, Tensor weight, Tensor bias, Tensor grad_out, float eps, bool silu) "
    "-> (Tensor, Tensor, Tensor)",
}.items():
    torch.library.define(_name, _schema, tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl(_PIXEL_NORM, "cpu")
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    if not native_serves("pixel_norm", x):
        return channels_last(pixel_norm_reference(x, weight, bias, eps, silu))
    x, weight, bias = channels_last(x), weight.float().contiguous(), bias.float().contiguous()
    out = torch.empty_like(x)
    call_native("gpstoken_pixel_norm_cpu", [x, weight, bias, out], [_pixels(x), x.shape[1], eps, silu], x)
    return out


@torch.library.register_fake(_PIXEL_NORM)
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.impl(_PIXEL_NORM_BACKWARD, "cpu")
def _(x: Tensor, weight: Tensor, bias: Tensor, grad_out: Tensor, eps: float, silu: bool):
    if not native_serves("pixel_norm", x):
        return _pixel_norm_backward_on_reference(x, weight, bias, grad_out, eps, silu)
    x, grad_out = channels_last(x), channels_last(grad_out.to(x.dtype))
    parameters = [weight.float().contiguous(), bias.float().contiguous()]
    grad_x, grads = torch.empty_like(x), [torch.empty_like(values) for values in parameters]
    tensors = [x, *parameters, grad_out, grad_x, *grads]
    call_native("gpstoken_pixel_norm_backward_cpu", tensors, [_pixels(x), x.shape[1], eps, silu], x)
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


def _pixel_norm_backward_on_reference(x, weight, bias, grad_out, eps: float, silu: bool):
    grad_x, *others = pixel_norm_backward_reference(x, weight, bias, grad_out, eps, silu)
    return channels_last(grad_x), *others


torch.library.register_autograd(_PIXEL_NORM, _pixel_norm_autograd, setup_context=_pixel_norm_setup)
refuse_second_derivative(_PIXEL_NORM_BACKWARD)


def _pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]
