"""How fast a stage could be at best: work that cannot be avoided, over what this device does at its best.

Operations are those of matrix products, convolutions and attention (`torch.utils.flop_counter`, a multiplication and an
addition being two), and of every pair of a pixel and a token whose box it lies in. Norms, activations and the partition
are not counted. Bytes are inputs, outputs and weights, each moved once. The device's best is a matrix product and a
large copy, measured before and after everything else. The floor is the longer of the two times; a stage's share of the
roofline is the floor over its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..ops.splat_reference import pixel_centers
from .measure import synchronizer

# One weight of a token at a pixel: difference, scale, shear, two squares, their sum, the half, and the exponential
# taken for one. Every channel then takes two more.
WEIGHT_OPERATIONS = 8


@dataclass(frozen=True)
class Work:
    """What a stage cannot do without: floating-point operations, and bytes to and from memory."""

    operations: int
    moved_bytes: int


@dataclass(frozen=True)
class Peak:
    """The best that a device does: operations per second by dtype, bytes per second (read and written)."""

    operations_per_s: Mapping[torch.dtype, float]
    bytes_per_s: float

    def floor_s(self, work: Work, dtype: torch.dtype) -> float:
        """The least seconds for some work, computed in `dtype`."""
        return max(work.operations / self.operations_per_s[dtype], work.moved_bytes / self.bytes_per_s)

    def best(self, other: Peak) -> Peak:
        """The better figures of two measurements on one device: whatever disturbs one makes it smaller."""
        products = {dtype: max(speed, other.operations_per_s[dtype]) for dtype, speed in self.operations_per_s.items()}
        return Peak(products, max(self.bytes_per_s, other.bytes_per_s))


def pairs_in_boxes(geometry: Tensor, height: int, width: int, support: float) -> int:
    """How many pairs of a token and a pixel of a height x width map there are with the pixel in the token's box.

    geometry: (B, N, 5) = sigma_x, sigma_y, rho, x, y in [-1, 1] coordinates. support: half a box in sigmas.
    """
    inside = []
    for axis, length in ((0, width), (1, height)):
        distance = (pixel_centers(length, geometry.device) - geometry[..., 3 + axis, None]).abs()
        inside.append((distance <= support * geometry[..., axis, None]).sum(-1))
    return int((inside[0] * inside[1]).sum())


def count_operations(run: Callable[[], object]) -> tuple[int, object]:
    """Floating-point operations of one call, see the module, and what it returned."""

    def splat(geometry: Tensor, texture: Tensor, height: int, width: int, support: float, **_: object) -> int:
        return pairs_in_boxes(geometry, height, width, support) * (WEIGHT_OPERATIONS + 2 * texture.shape[-1])

    splat._get_raw = True  # the counter then hands over tensors, not their shapes
    with FlopCounterMode(display=False, custom_mapping={torch.ops.gpstoken.splat_gaussians: splat}) as counter:
        result = run()
    return counter.get_total_flops(), result


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weight_bytes(modules: Iterable[nn.Module], dtype: torch.dtype) -> int:
    """Bytes of the modules' parameters, each once, if they were of `dtype`."""
    parameters = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(parameters.values()) * dtype.itemsize


@torch.no_grad()
def measure_peak(device: torch.device, dtypes: Iterable[torch.dtype], small: bool) -> Peak:
    """Measures a device's matrix products and copies; some seconds, or a moment if `small`.

    device: where. dtypes: of the matrix products.
    """
    on_gpu, synchronize = device.type == "cuda", synchronizer(device)
    # Of several sizes, as no one is the best of every device; on a CPU small enough that most calls are undisturbed.
    sides = (256,) if small else (4096, 8192) if on_gpu else (512, 1024, 2048)
    operations_per_s = dict.fromkeys(dtypes, 0.0)
    for dtype in operations_per_s:
        for side in sides:
            left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            product = torch.empty_like(left)
            seconds = _least_seconds(lambda a=left, b=right, out=product: torch.mm(a, b, out=out), synchronize)
            operations_per_s[dtype] = max(operations_per_s[dtype], 2 * side**3 / seconds)
    count = 2**20 if small else 2**28 if on_gpu else 2**26  # of float32: larger than the caches unless small
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    seconds = _least_seconds(lambda: target.copy_(source), synchronize)
    return Peak(operations_per_s, 2 * tensor_bytes([source]) / seconds)


def _least_seconds(run: Callable[[], object], synchronize: Callable[[], None], rounds: int = 20) -> float:
    """The shortest of some calls: a peak is what the device does undisturbed."""
    best = float("inf")
    for number in range(rounds + 2):  # two to warm up
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        if number >= 2:
            best = min(best, time.perf_counter() - started)
    return best
