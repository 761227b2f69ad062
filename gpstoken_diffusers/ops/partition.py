"""Adaptive partition of images into regions, and the initial Gaussian of each region.

Detail attracts tokens: the region with the most complex gradients is halved first, or the one of which a coarse picture
leaves the largest error. `ops/partition_reference.py` and `ops/partition_error_reference.py` are the references. A user
can attract tokens too, by an importance map.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from . import partition_cuda
from .backend import native
from .partition_error_reference import partition_error_reference, region_error
from .partition_reference import partition_image_reference, region_complexity

__all__ = ["Partition", "grayscale", "initial_gaussians", "max_tokens", "partition_image"]

SMALLEST_SIDE = 2  # px: the coordinates of a one-pixel axis and the width of its Gaussians would be undefined
SMALLEST_MIN_REGION_SIZE = 2  # px: with less, regions one pixel wide would appear
LARGEST_EXPONENT = 100  # an entropy is at most 8 bits, so complexities stay finite
CRITERIA = ("entropy", "error")
MOST_PIXELS = 1 << 26  # of an image that is divided by error: sums over more might overflow
SEEN_BONUS = 1e-6  # complexity per pixel: nothing beside any detail, more than the rounding of sums over a picture
OVERSHOOT = 2.0  # largest value that is taken for a picture in [-1, 1], not for one on another scale


class Partition(NamedTuple):
    """Regions of a batch of images and their initial Gaussians, in token order.

    regions: (B, N, 4) int32, x0, y0, x1, y1 in pixels, the last ones inclusive.
    geometry: (B, N, 5) float32, sigma_x, sigma_y, rho, x, y in [-1, 1] image coordinates.
    """

    regions: torch.Tensor
    geometry: torch.Tensor


def grayscale(pixel_values: torch.Tensor) -> torch.Tensor:
    """Grey values of images, (B, H, W) float32, on the scale of the input.

    pixel_values: (B, 3, H, W), weighted 0.299 R + 0.587 G + 0.114 B, or (B, 1, H, W), taken as they are.
    ValueError for another shape.
    """
    shape = tuple(pixel_values.shape)
    if pixel_values.ndim != 4 or shape[1] not in (1, 3):
        raise ValueError(f"pixel_values: expected (B, 3, H, W) or (B, 1, H, W), got {shape}.")
    channels = pixel_values.float()
    if shape[1] == 1:
        return channels[:, 0]
    return 0.299 * channels[:, 0] + 0.587 * channels[:, 1] + 0.114 * channels[:, 2]


def initial_gaussians(regions: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Initial Gaussian of each region of a height x width image.

    A sigma is a third of the region's extent (x1 - x0 or y1 - y0), in units where the image spans 2; rho is
    0; the centre is the region's own.
    regions: (..., 4) integers x0, y0, x1, y1 in pixels, the last ones inclusive. Returns (..., 5) float32
    sigma_x, sigma_y, rho, x, y on the same device.
    """
    home = regions if regions.is_cuda else regions.cpu()  # not every device has float64
    x0, y0, x1, y1 = home.double().unbind(-1)
    geometry = torch.stack(
        [
            _quotient(x1 - x0, width) * (2 / 3),
            _quotient(y1 - y0, height) * (2 / 3),
            torch.zeros_like(x0),
            _quotient(x0 + x1, width - 1) - 1,
            _quotient(y0 + y1, height - 1) - 1,
        ],
        dim=-1,
    )
    return geometry.to(regions.device, torch.float32)


def _quotient(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """values / divisor of float64 values, the nearest number on every device.

    Torch divides on CUDA by a number of the host by multiplying with its reciprocal, which may miss the last digit.
    """
    return values / torch.full((), divisor, dtype=torch.float64, device=values.device)


def max_tokens(height: int, width: int, min_region_size: int = 8) -> int:
    """The largest number of tokens that a height x width image can be divided into.

    The longer side of a region, of n pixels, is halved while n - 1 > min_region_size. How many regions that
    gives depends neither on the picture nor on the order. Only a square leaves a choice, and its two cuts give
    transposes of each other, which divide further in the same way.

    ValueError for an image side or a min_region_size below 2 px.
    """
    if min(height, width) < SMALLEST_SIDE:
        raise _too_small(height, width)
    if min_region_size < SMALLEST_MIN_REGION_SIZE:
        raise ValueError(
            f"min_region_size={min_region_size}: expected at least {SMALLEST_MIN_REGION_SIZE} px "
            "(the official models use 8)."
        )
    return _count_leaves(min(height, width), max(height, width), min_region_size)


@functools.lru_cache(maxsize=4096)
def _count_leaves(short: int, long: int, min_region_size: int) -> int:
    if long - 1 <= min_region_size:
        return 1
    first, second = long // 2, long - long // 2
    return sum(_count_leaves(min(short, half), max(short, half), min_region_size) for half in (first, second))


@torch.compiler.disable
def partition_image(
    image: torch.Tensor | np.ndarray,
    num_tokens: int,
    *,
    min_region_size: int = 8,
    criterion: str = "entropy",
    entropy_exponent: float = 2.5,
    importance: torch.Tensor | np.ndarray | None = None,
    importance_strength: float = 1.0,
    complexity_bias: torch.Tensor | np.ndarray | None = None,
    seen: Sequence[tuple[int, int]] | None = None,
) -> Partition:
    """Divides each image into `num_tokens` regions, small ones where there is detail.

    Args:
        image: (H, W) or (B, H, W) grey, or (B, 3, H, W) or (B, 1, H, W); floats in [-1, 1], or uint8
            (0..255). Any size from 2 x 2 px, on any device. On a GPU with CUDA the work is done there, else on
            the CPU by `torch.get_num_threads()` threads; the regions are the same. Where a picture overshoots
            [-1, 1] a little, as decoded ones do, the excess is cut off.
        num_tokens: from 1 to `max_tokens(H, W, min_region_size)`.
        min_region_size: px; a region is split while its longer side, less 1, exceeds this. At least 2.
        criterion: which region is halved next. "entropy": the one of the largest complexity, from the entropy of its
            gradients, as in the paper. "error": the one whose 6 x 6 cells, each in its mean colour, leave the largest
            squared error; a square is halved so that the halves leave the least. The latter is always worked out on
            the CPU.
        entropy_exponent: the complexity of a region is (entropy of its gradients) ** entropy_exponent * area.
            Smaller values divide more evenly. From 0 to 100. Only for "entropy".
        importance: (H, W) for all images, or (B, H, W); boolean, or floats in [0, 1]: where tokens are
            wanted.
        importance_strength: at least 0. Each pixel adds strength * importance * (the image's own complexity
            or error per pixel) to its region. So at 1 a pixel of importance 1 brings as much as an average pixel does,
            on top of its own detail, whatever the contrast of the image.
        complexity_bias: (H, W) or (B, H, W), any finite values: a bonus per pixel in units of complexity, or of
            squared error in [-1, 1], added up over a region (the official code's `cdbias`).
        seen: (height, width) in pixels of each image's top left part that is picture; the rest is padding, whatever it
            holds: it counts as flat, importance and bias do not count there, and a region wholly outside the picture
            is divided only when no other can be. None: all of it is picture.

    Returns:
        Partition of B images (B = 1 for a single one), on the image's device. The order of tokens is that of
        the list of regions when the last split is done: by falling complexity, then the last two halves; by
        error, the order in which regions were made.

    Raises:
        ValueError: sizes, ranges or numbers outside the above, NaN or infinite values.
        TypeError: an image or map of another type.

    Under `torch.compile` it runs outside the graph. A CUDA graph can hold it once it has run on the device; it is
    captured without the checks for NaN and out-of-range values, which need the host.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}.")
    planes, device = _image_batch(image, criterion)
    grey = planes[:, 0]
    batch, height, width = grey.shape
    if criterion == "error" and height * width > MOST_PIXELS:
        raise ValueError(f"image of {height} x {width} px: by error, at most {MOST_PIXELS} px can be divided.")
    num_tokens, min_region_size = operator.index(num_tokens), operator.index(min_region_size)
    largest = max_tokens(height, width, min_region_size)
    if not 1 <= num_tokens <= largest:
        raise ValueError(
            f"num_tokens={num_tokens}: an image of {height} x {width} px can be divided into 1 to {largest} "
            f"tokens with min_region_size={min_region_size}."
        )
    if not 0 <= entropy_exponent <= LARGEST_EXPONENT:
        raise ValueError(f"entropy_exponent={entropy_exponent}: expected 0 to {LARGEST_EXPONENT}.")
    if not (math.isfinite(importance_strength) and importance_strength >= 0):
        raise ValueError(f"importance_strength={importance_strength}: expected a finite number, at least 0.")

    sizes = _seen_sizes(seen, grey)
    outside = _outside(sizes, grey)
    if outside is not None:
        planes = _with_flat_padding(planes, sizes)
        grey = planes[:, 0]
    bias = None
    if complexity_bias is not None:
        bias = _map_batch("complexity_bias", complexity_bias, grey)
    if importance is not None:
        drawn = _map_batch("importance", importance, grey)
        if drawn.numel() and _readable(drawn) and (drawn.min() < 0 or drawn.max() > 1):
            raise ValueError(
                f"importance: expected values in [0, 1], got {drawn.min():.4g} to {drawn.max():.4g}. "
                "Scale the map, and set how much it counts by importance_strength."
            )
        if criterion == "entropy":
            per_pixel = _complexity_per_pixel(grey, float(entropy_exponent), sizes)
        else:
            per_pixel = _error_per_pixel(planes, sizes)
        drawn = drawn * per_pixel * importance_strength
        bias = drawn if bias is None else bias + drawn
    if outside is not None:
        # What a flat region has by itself is taken off again, and a little more, so that any pixel of a picture counts.
        flat = 0.0
        if criterion == "entropy":
            flat = region_complexity(np.zeros((2, 2)), np.array([[0, 0, 1, 1]]), float(entropy_exponent))[0] / 4
        inside = SEEN_BONUS if bias is None else bias + SEEN_BONUS
        bias = torch.where(outside, -flat * (1 + 1e-6), inside)
    if bias is not None:
        bias = bias.expand(grey.shape).float().contiguous()
        if _readable(bias) and not bias.isfinite().all():
            raise ValueError("complexity_bias, importance_strength: expected sums within float32, got infinity.")

    min_region_size = min(min_region_size, max(height, width))  # the same, and it fits the C interface's int
    if criterion == "entropy":
        regions = _regions(grey, num_tokens, min_region_size, float(entropy_exponent), bias)
    else:
        regions = _regions_by_error(planes, num_tokens, min_region_size, bias)
    geometry = initial_gaussians(regions, height, width)
    return Partition(regions.to(device), geometry.to(device))


def _regions(
    grey: torch.Tensor, num_tokens: int, min_region_size: int, entropy_exponent: float, bias: torch.Tensor | None
) -> torch.Tensor:
    """(B, num_tokens, 4) int32 regions of (B, H, W) float32 grey values, natively if the library is there."""
    settings = (num_tokens, min_region_size, entropy_exponent)
    if partition_cuda.serves(grey.device):
        return partition_cuda.partition_on_cuda(grey, *settings, bias)[0]
    if native.library("cpu") is None:
        native.announce_fallback("partition_image", "cpu")
        bias = None if bias is None else bias.numpy()
        return torch.from_numpy(partition_image_reference(grey.numpy(), *settings, bias))
    regions = torch.empty((len(grey), num_tokens, 4), dtype=torch.int32)
    addresses = (grey.data_ptr(), None if bias is None else bias.data_ptr(), regions.data_ptr())
    native.call("cpu", "gpstoken_partition_cpu", *addresses, *grey.shape, *settings, torch.get_num_threads())
    return regions


def _regions_by_error(
    planes: torch.Tensor, num_tokens: int, min_region_size: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """(B, num_tokens, 4) int32 regions of (B, C, H, W) float32 values, natively if the library is there."""
    if native.library("cpu") is None:
        native.announce_fallback("partition_image", "cpu")
        bias = None if bias is None else bias.numpy()
        return torch.from_numpy(partition_error_reference(planes.numpy(), num_tokens, min_region_size, bias))
    regions = torch.empty((len(planes), num_tokens, 4), dtype=torch.int32)
    addresses = (planes.data_ptr(), None if bias is None else bias.data_ptr(), regions.data_ptr())
    settings = (num_tokens, min_region_size, torch.get_num_threads())
    native.call("cpu", "gpstoken_partition_error_cpu", *addresses, *planes.shape, *settings)
    return regions


def _image_batch(image: torch.Tensor | np.ndarray, criterion: str) -> tuple[torch.Tensor, torch.device]:
    """(B, C, H, W) float32 values in [-1, 1] where the work is done, and the device that the image was on.

    By entropy they are grey, and lie on a GPU if its native library is there; else they lie on the CPU.
    """
    image = _as_tensor("image", image)
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image: expected floats in [-1, 1] or uint8, got {image.dtype}.")
    shape = tuple(image.shape)
    if image.ndim not in (2, 3, 4) or (image.ndim == 4 and shape[1] not in (1, 3)):
        raise ValueError(f"image: expected (H, W), (B, H, W), (B, 1, H, W) or (B, 3, H, W), got {shape}.")
    if min(shape[-2:]) < SMALLEST_SIDE:
        raise _too_small(*shape[-2:])
    device = image.device
    home = device if criterion == "entropy" and partition_cuda.serves(device) else torch.device("cpu")
    if image.dtype == torch.uint8:
        image = (_quotient(image.to(home).double(), 127.5) - 1).float()  # rounded once, as in the training data
    if image.ndim == 4 and criterion == "entropy":
        image = grayscale(image)
    planes = image if image.ndim == 4 else image.reshape(-1, 1, *shape[-2:])
    planes = planes.to(home, torch.float32).contiguous()
    if planes.numel() == 0 or not _readable(planes):  # the library for CUDA cuts off by itself
        return planes, device
    low, high = torch.stack(torch.aminmax(planes)).tolist()  # a NaN anywhere becomes both
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("image: it contains NaN or infinite values.")
    if max(-low, high) > OVERSHOOT:
        raise ValueError(f"image: expected values in [-1, 1], got {low:.4g} to {high:.4g}.")
    return (planes if max(-low, high) <= 1 else planes.clamp(-1, 1)), device


def _seen_sizes(seen: Sequence[tuple[int, int]] | None, grey: torch.Tensor) -> list[tuple[int, int]]:
    """(height, width) of what is picture of each of the images (B, H, W)."""
    count, height, width = grey.shape
    if seen is None:
        return [(height, width)] * count
    sizes = [(operator.index(rows), operator.index(cols)) for rows, cols in seen]
    if len(sizes) != count:
        raise ValueError(f"seen: expected a (height, width) for each of the {count} images, got {len(sizes)}.")
    for rows, cols in sizes:
        if not (1 <= rows <= height and 1 <= cols <= width):
            raise ValueError(f"seen: expected (1, 1) to {(height, width)}, the image's size, got {(rows, cols)}.")
    return sizes


def _outside(sizes: list[tuple[int, int]], grey: torch.Tensor) -> torch.Tensor | None:
    """(B, H, W) bool: padding; None if there is none."""
    if all(size == grey.shape[1:] for size in sizes):
        return None
    outside = torch.ones(grey.shape, dtype=torch.bool, device=grey.device)
    for image, (rows, cols) in zip(outside, sizes, strict=True):
        image[:rows, :cols] = False
    return outside


def _with_flat_padding(planes: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """Images (B, C, H, W) whose padding has the mean of the edge that it adjoins, so that there is little of a step.

    The mean is rounded to 1/128, or it would depend on the device in its last bits, and with it ties.
    """
    planes = planes.clone()
    for image, (rows, cols) in zip(planes, sizes, strict=True):
        edges = []
        if rows < planes.shape[2]:
            edges.append(image[:, rows - 1, :cols])
        if cols < planes.shape[3]:
            edges.append(image[:, :rows, cols - 1])
        if edges:
            level = ((torch.cat(edges, dim=1).double().mean(1) * 128).round() / 128)[:, None, None].float()
            image[:, rows:] = level
            image[:, :, cols:] = level
    return planes


def _map_batch(name: str, values: torch.Tensor | np.ndarray, grey: torch.Tensor) -> torch.Tensor:
    """A finite float64 map, (B, H, W) or (1, H, W), for images (B, H, W), on their device."""
    values = _as_tensor(name, values)
    if values.dtype != torch.bool and not values.is_floating_point():
        raise TypeError(f"{name}: expected floats or booleans, got {values.dtype}.")
    given, shape = tuple(values.shape), tuple(grey.shape)
    if given not in (shape[1:], (1, *shape[1:]), shape):
        raise ValueError(f"{name}: expected the image's size, {shape[1:]} or {shape}, got {given}.")
    values = values.to(grey.device).double().reshape(-1, *shape[1:])
    if _readable(values) and not values.isfinite().all():
        raise ValueError(f"{name}: it contains NaN or infinite values.")
    return values


def _readable(tensor: torch.Tensor) -> bool:
    """Whether the host can look at a tensor's values now: not while a CUDA graph is captured."""
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _as_tensor(name: str, values: torch.Tensor | np.ndarray) -> torch.Tensor:
    if isinstance(values, np.ndarray):
        return torch.tensor(np.ascontiguousarray(values))
    if not isinstance(values, torch.Tensor):
        raise TypeError(f"{name}: expected a torch tensor or a NumPy array, got {type(values).__name__}.")
    return values.detach()


def _too_small(height: int, width: int) -> ValueError:
    return ValueError(
        f"image of {height} x {width} px: the smallest that can be divided into tokens is "
        f"{SMALLEST_SIDE} x {SMALLEST_SIDE} px."
    )


def _complexity_per_pixel(grey: torch.Tensor, entropy_exponent: float, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """(B, 1, 1) float64: complexity of what is picture of each image over its number of pixels."""
    per_pixel = torch.empty((len(grey), 1, 1), dtype=torch.float64, device=grey.device)
    for size in dict.fromkeys(sizes):
        height, width = (max(side, SMALLEST_SIDE) for side in size)
        alike = slice(None) if len(set(sizes)) == 1 else [i for i, other in enumerate(sizes) if other == size]
        images = grey[alike][:, :height, :width].contiguous()
        if partition_cuda.serves(grey.device):
            _, totals = partition_cuda.partition_on_cuda(images, 1, max(height, width), entropy_exponent)
        else:
            whole = np.array([[0, 0, width - 1, height - 1]])
            totals = torch.tensor([region_complexity(image, whole, entropy_exponent)[0] for image in images.numpy()])
        per_pixel[alike] = _quotient(totals.double().reshape(-1, 1, 1), height * width)
    return per_pixel


def _error_per_pixel(planes: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """(B, 1, 1) float64: error of what is picture of each image (C, H, W) over its number of pixels."""
    totals = [
        region_error(image, (0, 0, width - 1, height - 1)) / (height * width)
        for image, (height, width) in zip(planes.numpy(), sizes, strict=True)
    ]
    return torch.tensor(totals, dtype=torch.float64).reshape(-1, 1, 1)
