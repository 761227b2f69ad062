"""`splat_gaussians`: tokens to a feature map, with a native version for the CPU and for CUDA.

Registered as the operators `gpstoken::splat_gaussians` and `gpstoken::splat_gaussians_backward`, with fake
kernels and autograd, so that `torch.compile(fullgraph=True)` takes them. The reference, `ops/splat_reference.py`, runs
where no native library does: on other devices, in float64, or without a compiler at installation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backend import native
from .operators import refuse_second_derivative
from .splat_reference import (
    splat_gaussians_backward_reference,
    splat_gaussians_reference,
)

__all__ = ["splat_gaussians"]

_OP = "splat_gaussians"


def splat_gaussians(geometry: Tensor, texture: Tensor, height: int, width: int, support: float = 3.0) -> Tensor:
    """Paints tokens into a feature map: at each pixel the sum over tokens of weight times texture.

    Args:
        geometry: (B, N, 5) = sigma_x, sigma_y, rho, x, y in [-1, 1] coordinates of the image, where -1 and 1
            are the centres of the first and last pixel. sigma > 0, |rho| < 1; a token that is not finite or
            outside these ranges paints nothing and gets zero gradients. Always evaluated in float32 (or
            float64 if given so).
        texture: (B, N, C), float32, float16, bfloat16 (summed in float32) or float64.
        height, width: size of the map in pixels, at least 1.
        support: half size of a token's box in sigmas; outside it the weight is 0.

    Returns:
        (B, C, height, width) in texture's dtype. N = 0 gives zeros.

    The weight is exp(-(u^2 - 2 rho u v + v^2) / (2 (1 - rho^2))) with u = (px - x) / sigma_x, v = (py - y) /
    sigma_y; gradients are those of this formula with the box held fixed. On the CPU and on CUDA results
    repeat bit for bit, whatever the number of threads.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices do not fit together, a size below 1, or a support that is not positive
        and finite.
    """
    _check(geometry, texture, height, width, support)
    if geometry.dtype != torch.float64:
        geometry = geometry.float()
    return torch.ops.gpstoken.splat_gaussians(geometry, texture, height, width, float(support))


def _check(geometry: Tensor, texture: Tensor, height: int, width: int, support: float) -> None:
    for name, tensor in (("geometry", geometry), ("texture", texture)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {kind}.")
    if geometry.ndim != 3 or geometry.shape[2] != 5:
        raise ValueError(
            "geometry: expected shape (batch, tokens, 5) with sigma_x, sigma_y, rho, x, y, "
            f"got {tuple(geometry.shape)}."
        )
    if texture.ndim != 3 or texture.shape[:2] != geometry.shape[:2]:
        raise ValueError(
            "texture: expected shape (batch, tokens, channels) with geometry's "
            f"({geometry.shape[0]}, {geometry.shape[1]}, any), got {tuple(texture.shape)}."
        )
    if geometry.device != texture.device:
        raise ValueError(f"expected one device, got geometry on {geometry.device} but texture on {texture.device}.")
    if height < 1 or width < 1:
        raise ValueError(f"height and width: expected at least 1, got {height} x {width}.")
    if not 0 < support < math.inf:
        raise ValueError(f"support: expected a positive, finite number of sigmas, got {support}.")


# The operators are registered at the dispatcher itself: torch.library.custom_op would do the same, but its
# first call imports torch._dynamo, which takes seconds.
_FORWARD, _BACKWARD = "gpstoken::splat_gaussians", "gpstoken::splat_gaussians_backward"
torch.library.define(
    _FORWARD,
    "(Tensor geometry, Tensor texture, SymInt height, SymInt width, float support) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    _BACKWARD,
    "(Tensor geometry, Tensor texture, Tensor grad_out, float support) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


# ---- forward ----


@torch.library.impl(_FORWARD, "default")
def _(geometry: Tensor, texture: Tensor, height: int, width: int, support: float) -> Tensor:
    return splat_gaussians_reference(geometry, texture, height, width, support)


@torch.library.impl(_FORWARD, ("cpu", "cuda"))
def _(geometry: Tensor, texture: Tensor, height: int, width: int, support: float) -> Tensor:
    if not _native_serves(geometry, texture):
        return splat_gaussians_reference(geometry, texture, height, width, support)
    geometry, texture = geometry.contiguous(), texture.contiguous()
    out = texture.new_empty((texture.shape[0], texture.shape[2], height, width))
    _call_native("forward", [geometry, texture, out], out, texture, support)
    return out


@torch.library.register_fake(_FORWARD)
def _(geometry: Tensor, texture: Tensor, height: int, width: int, support: float) -> Tensor:
    return texture.new_empty((texture.shape[0], texture.shape[2], height, width))


# ---- backward ----


@torch.library.impl(_BACKWARD, "default")
def _(geometry: Tensor, texture: Tensor, grad_out: Tensor, support: float) -> tuple[Tensor, Tensor]:
    return splat_gaussians_backward_reference(geometry, texture, grad_out, support)


@torch.library.impl(_BACKWARD, ("cpu", "cuda"))
def _(geometry: Tensor, texture: Tensor, grad_out: Tensor, support: float) -> tuple[Tensor, Tensor]:
    if not _native_serves(geometry, texture):
        return splat_gaussians_backward_reference(geometry, texture, grad_out, support)
    geometry, texture, grad_out = geometry.contiguous(), texture.contiguous(), grad_out.contiguous()
    grad_geometry, grad_texture = torch.empty_like(geometry), torch.empty_like(texture)
    tensors = [geometry, texture, grad_out, grad_geometry, grad_texture]
    _call_native("backward", tensors, grad_out, texture, support)
    return grad_geometry, grad_texture


@torch.library.register_fake(_BACKWARD)
def _(geometry: Tensor, texture: Tensor, grad_out: Tensor, support: float) -> tuple[Tensor, Tensor]:
    return geometry.new_empty(geometry.shape), texture.new_empty(texture.shape)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    geometry, texture, _, _, ctx.support = inputs
    ctx.save_for_backward(geometry, texture)


def _autograd_backward(ctx, grad_out: Tensor) -> tuple:
    gradients = torch.ops.gpstoken.splat_gaussians_backward(*ctx.saved_tensors, grad_out, ctx.support)
    return *gradients, None, None, None


torch.library.register_autograd(_FORWARD, _autograd_backward, setup_context=_setup_context)
refuse_second_derivative(_BACKWARD)


# ---- the native libraries ----


def _native_serves(geometry: Tensor, texture: Tensor) -> bool:
    """Whether the device's native library takes this call. Logs once if it would but is missing."""
    if geometry.dtype != torch.float32 or native.dtype_code(texture.dtype) is None:
        return False
    device = geometry.device.type
    if native.library(device) is None:
        native.announce_fallback(_OP, device)
        return False
    return True


def _call_native(direction: str, tensors: list[Tensor], image: Tensor, texture: Tensor, support: float) -> None:
    """Calls gpstoken_splat_<direction>_<device>. image: the map or its gradient. All tensors contiguous."""
    device = texture.device
    function = f"gpstoken_splat_{direction}_{device.type}"
    pointers = [tensor.data_ptr() for tensor in tensors]
    sizes = [texture.shape[0], texture.shape[1], *image.shape[1:]]
    arguments = [*pointers, *sizes, support, native.dtype_code(texture.dtype)]
    if device.type == "cuda":
        with torch.cuda.device(device):
            native.call("cuda", function, *arguments, torch.cuda.current_stream(device).cuda_stream)
    else:
        native.call("cpu", function, *arguments, torch.get_num_threads())
