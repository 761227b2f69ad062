"""`roi_align`: bilinear samples of a feature map, averaged over a grid of cells in each region; native on the CPU.

The reference is torchvision's RoIAlign (aligned, with as many samples per cell as it has features). It runs where no
native library does. On the CPU it wants float32 in contiguous memory and works number by number. The native version
reads float32, bfloat16 and float16 where channels-last memory has them, and sums in float32. A training step of
gpstoken-mini in bfloat16, batch of 2, takes 6 to 7% longer with torchvision's (one thread of an AMD EPYC with AVX-512).

Registered as `gpstoken::roi_align` with a fake kernel and autograd, so that `torch.compile(fullgraph=True)` takes it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from .operators import call_native, channels_last, native_serves

__all__ = ["roi_align"]

# Samples of one region, along an axis: far beyond any map, and few enough to count in float32.
LARGEST_EXTENT = 2.0**24


def roi_align(features: Tensor, regions: Tensor, size: int, scale: float) -> Tensor:
    """Cells of every region of every map.

    Args:
        features: (B, C, h, w), floating point.
        regions: (B, N, 4), x0, y0, x1, y1 in units of 1 / `scale` features, in any real type; feature i spans i to
            i + 1. A region without extent gives zeros, as do samples more than one feature outside the map.
        size: cells along each axis.
        scale: features per unit of the regions.

    Returns: (B, N, C, size, size) in the dtype of `features`, dense; sums are float32 (or float64). Differentiable by
    the features.

    Raises:
        ValueError: shapes or devices that do not fit together, a size or scale that is not positive, and, on the CPU,
            regions that end before they start or are not finite.
        TypeError: features that are not floating point, regions of booleans or complex numbers.
    """
    if features.ndim != 4 or regions.ndim != 3 or regions.shape[-1] != 4 or len(regions) != len(features):
        raise ValueError(
            "roi_align: expected features (B, C, h, w) and regions (B, N, 4), got "
            f"{tuple(features.shape)} and {tuple(regions.shape)}."
        )
    if not features.is_floating_point():
        raise TypeError(f"roi_align: expected floating-point features, got {features.dtype}.")
    if regions.is_complex() or regions.dtype == torch.bool:
        raise TypeError(f"roi_align: expected regions of real numbers, got {regions.dtype}.")
    if regions.device != features.device:
        raise ValueError(
            f"roi_align: expected one device, got features on {features.device}, regions on {regions.device}."
        )
    if size < 1 or not scale > 0:
        raise ValueError(f"roi_align: expected a positive size and scale, got {size} and {scale}.")
    if features.device.type == "cpu":
        return torch.ops.gpstoken.roi_align(features, regions, size, scale)
    with torch.autocast(features.device.type, enabled=False):
        # Sampling positions want float32, and not every device's kernel knows bfloat16.
        cells = torchvision_roi_align(_wide(features), _boxes(regions, features), size, scale, aligned=True)
    return cells.to(features.dtype).unflatten(0, regions.shape[:2])


# Registered at the dispatcher itself, as in splat.py.
_ROI_ALIGN, _ROI_ALIGN_BACKWARD = "gpstoken::roi_align", "gpstoken::roi_align_backward"
for _name, _schema in {
    _ROI_ALIGN: "(Tensor features, Tensor regions, SymInt size, float scale) -> Tensor",
    _ROI_ALIGN_BACKWARD: "(Tensor grad_cells, Tensor regions, SymInt height, SymInt width, float scale) -> Tensor",
}.items():
    torch.library.define(_name, _schema, tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl(_ROI_ALIGN, "cpu")
def _(features: Tensor, regions: Tensor, size: int, scale: float) -> Tensor:
    _check_regions(regions, scale)
    batch_size, channels, height, width = features.shape
    cells = features.new_empty((batch_size, regions.shape[1], channels, size, size))
    if native_serves("roi_align", features):
        tensors = [channels_last(features), regions.float().contiguous(), cells]
        sizes = [batch_size, height, width, channels, regions.shape[1], size]
        call_native("gpstoken_roi_align_cpu", tensors, [*sizes, scale], features)
        return cells
    reference = torch.ops.torchvision.roi_align
    found = reference(_wide(features), _boxes(regions, features), scale, size, size, -1, True)
    return cells.copy_(found.view(cells.shape))


@torch.library.register_fake(_ROI_ALIGN)
def _(features: Tensor, regions: Tensor, size: int, scale: float) -> Tensor:
    return features.new_empty((features.shape[0], regions.shape[1], features.shape[1], size, size))


@torch.library.impl(_ROI_ALIGN_BACKWARD, "cpu")
def _(grad_cells: Tensor, regions: Tensor, height: int, width: int, scale: float) -> Tensor:
    batch_size, _, channels, size, _ = grad_cells.shape
    shape = (batch_size, channels, height, width)
    grad_features = torch.empty(shape, dtype=grad_cells.dtype, memory_format=torch.channels_last)
    if native_serves("roi_align", grad_features):
        tensors = [regions.float().contiguous(), grad_cells.contiguous(), grad_features]
        sizes = [batch_size, height, width, channels, regions.shape[1], size]
        call_native("gpstoken_roi_align_backward_cpu", tensors, [*sizes, scale], grad_cells)
        return grad_features
    reference = torch.ops.torchvision._roi_align_backward
    boxes, grads = _boxes(regions, grad_cells), _wide(grad_cells).flatten(0, 1)
    return grad_features.copy_(reference(grads, boxes, scale, size, size, *shape, -1, True))


@torch.library.register_fake(_ROI_ALIGN_BACKWARD)
def _(grad_cells: Tensor, regions: Tensor, height: int, width: int, scale: float) -> Tensor:
    shape = (grad_cells.shape[0], grad_cells.shape[2], height, width)
    return grad_cells.new_empty(shape).to(memory_format=torch.channels_last)


def _roi_align_setup(ctx, inputs: tuple, output: Tensor) -> None:
    features, regions, ctx.size, ctx.scale = inputs
    ctx.height, ctx.width = features.shape[-2:]
    ctx.save_for_backward(regions)


def _roi_align_autograd(ctx, grad_cells: Tensor) -> tuple:
    (regions,) = ctx.saved_tensors
    grad = torch.ops.gpstoken.roi_align_backward(grad_cells, regions, ctx.height, ctx.width, ctx.scale)
    return grad, None, None, None


def _roi_align_backward_setup(ctx, inputs: tuple, output: Tensor) -> None:
    grad_cells, regions, _, _, ctx.scale = inputs
    ctx.size = grad_cells.shape[-1]
    ctx.save_for_backward(regions)


def _roi_align_backward_autograd(ctx, grad_of_grad: Tensor) -> tuple:
    # The function is linear in the features, and so the derivative of its gradient is the function itself.
    (regions,) = ctx.saved_tensors
    return torch.ops.gpstoken.roi_align(grad_of_grad, regions, ctx.size, ctx.scale), None, None, None, None


torch.library.register_autograd(_ROI_ALIGN, _roi_align_autograd, setup_context=_roi_align_setup)
torch.library.register_autograd(
    _ROI_ALIGN_BACKWARD, _roi_align_backward_autograd, setup_context=_roi_align_backward_setup
)


def _check_regions(regions: Tensor, scale: float) -> None:
    """ValueError unless each region's extent is a number of features that can be sampled."""
    x0, y0, x1, y1 = regions.double().unbind(-1)
    for axis, extent in (("x", (x1 - x0) * scale), ("y", (y1 - y0) * scale)):
        if not ((extent >= 0) & (extent < LARGEST_EXTENT)).all():  # NaN is neither
            raise ValueError(f"roi_align: expected finite regions that end, in {axis}, where they start or after.")


def _boxes(regions: Tensor, features: Tensor) -> Tensor:
    """Regions (B, N, 4) as torchvision wants them: (B N, 5), each after its image's index."""
    boxes = regions.to(_wide(features[:0]).dtype)
    index = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None, None]
    return torch.cat([index.expand(*boxes.shape[:2], 1), boxes], dim=-1).flatten(0, 1)


def _wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()
