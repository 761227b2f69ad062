"""What the operators share: checks of maps (B, C, H, W), calls of the CPU library, no second derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import native

__all__ = ["call_native", "channels_last", "check_map", "native_serves", "refuse_second_derivative"]


def check_map(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int = 1,
    tile_grid: tuple[int, int] = (1, 1),
) -> None:
    """Raises ValueError unless x is a map, weight and bias are (C,), and groups and tiles divide it."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"{op}: expected a floating-point map (B, C, H, W), got {x.dtype} {tuple(x.shape)}.")
    channels, (height, width), (rows, cols) = x.shape[1], x.shape[2:], tile_grid
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None and values.shape != (channels,):
            raise ValueError(f"{op}: expected {name} of shape ({channels},), got {tuple(values.shape)}.")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: expected num_groups that divides {channels} channels, got {num_groups}.")
    if min(tile_grid) < 1 or height % rows or width % cols:
        raise ValueError(f"{op}: expected a tile_grid that divides {height} x {width} pixels, got {rows} x {cols}.")


def channels_last(x: Tensor) -> Tensor:
    """The same map in the memory format that convolutions on the CPU are fastest on."""
    return x.contiguous(memory_format=torch.channels_last)


def native_serves(op: str, x: Tensor) -> bool:
    """Whether the native library takes this call. Logs once if it would but is missing."""
    if native.dtype_code(x.dtype) is None or x.numel() == 0:
        return False
    if native.library("cpu") is None:
        native.announce_fallback(op, "cpu")
        return False
    return True


def call_native(function: str, tensors: list[Tensor], settings: list[int | float | bool], x: Tensor) -> None:
    """Calls a function of the CPU library: pointers, then settings, then the element type of x and the threads."""
    pointers = [tensor.data_ptr() for tensor in tensors]
    native.call("cpu", function, *pointers, *settings, native.dtype_code(x.dtype), torch.get_num_threads())


def refuse_second_derivative(backward_op: str) -> None:
    """Makes `backward_op`, which computes the gradient of another operator, raise when it is itself differentiated.

    A RuntimeError, as of torch's `once_differentiable`, in the backward pass of a second derivative
    (`create_graph=True`). Without it the dispatcher would warn and give zeros.
    """

    def refuse(ctx, *grads) -> tuple:
        op = backward_op.removeprefix("gpstoken::").removesuffix("_backward")
        raise RuntimeError(
            f"{op} has no second derivative: expected to be differentiated once. "
            "Leave its inputs out of what is differentiated twice, such as a gradient penalty."
        )

    torch.library.register_autograd(backward_op, refuse, setup_context=lambda ctx, inputs, output: None)
