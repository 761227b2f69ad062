"""The partition of images on a GPU by the native library. No pixel goes back to the host."""

from __future__ import annotations

import ctypes
import functools

import torch

from .backend import native

__all__ = ["partition_on_cuda", "serves"]

_OP = "partition_image"
_COUNTS = 64 * 64 + 1  # of samples in a bin, see csrc/partition_shared.h


def serves(device: torch.device) -> bool:
    """Whether images on this device are partitioned there. Logs once if only the library is missing."""
    if device.type != "cuda":
        return False
    if native.library("cuda") is None:
        native.announce_fallback(_OP, "cuda")
        return False
    return True


def partition_on_cuda(
    grey: torch.Tensor,
    num_tokens: int,
    min_region_size: int,
    entropy_exponent: float,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Regions (B, num_tokens, 4) int32 of dense float32 images (B, H, W) on a GPU, and their complexities, float64.

    bias: as the images, or None. Nothing is checked, and only the first call on a device waits for it. Values
    outside [-1, 1] are clamped.
    """
    device = grey.device
    with torch.cuda.device(device):
        terms = _entropy_terms(device)
        sizes = (*grey.shape, num_tokens, min_region_size)
        scratch_bytes = ctypes.c_int64()
        address = ctypes.addressof(scratch_bytes)
        native.call("cuda", "gpstoken_partition_scratch_cuda", *sizes, int(bias is not None), address)
        scratch = torch.empty(scratch_bytes.value, dtype=torch.uint8, device=device)
        regions = torch.empty((len(grey), num_tokens, 4), dtype=torch.int32, device=device)
        complexity = torch.empty((len(grey), num_tokens), dtype=torch.float64, device=device)
        tensors = (grey, bias, terms, scratch, regions, complexity)
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        stream = torch.cuda.current_stream(device).cuda_stream
        native.call("cuda", "gpstoken_partition_cuda", *addresses, *sizes, entropy_exponent, stream)
    return regions, complexity


@functools.cache
def _entropy_terms(device: torch.device) -> torch.Tensor:
    """What each count of a histogram adds to an entropy: computed on the host, with the CPU library's logarithm."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"partition_image has not run on {device} yet: call it once before a CUDA graph is captured, "
            "so that its table is there."
        )
    terms = torch.empty(_COUNTS, dtype=torch.float64)
    native.call("cuda", "gpstoken_partition_terms_cuda", terms.data_ptr())
    return terms.to(device)
