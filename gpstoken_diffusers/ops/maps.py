"""What the operators on maps (B, C, H, W) share: their checks, their memory format, calls of the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from gpstoken_diffusers.ops.backend import native

__all__ = ["call_native", "channels_last", "check_map", "native_serves"]


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
            raise ValueError(f"{op}: {name} must have the shape ({channels},), got {tuple(values.shape)}.")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: {channels} channels do not divide into {num_groups} groups.")
    if min(tile_grid) < 1 or height % rows or width % cols:
        raise ValueError(f"{op}: {height} x {width} pixels do not divide into {rows} x {cols} tiles.")


def channels_last(x: Tensor) -> Tensor:
    """The same map in the memory format that convolutions on the CPU are fastest on."""
    return x.contiguous(memory_format=torch.channels_last)


def native_serves(op: str, x: Tensor) -> bool:
    """Whether the native library takes this call; says so once if it only fails to be there."""
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
