"""How fast something could be at best: the work that it cannot avoid, over the best that this device does.

Operations are those of matrix products, convolutions and attention (`torch.utils.flop_counter`; a multiplication and an
addition are two), and of every pair of a pixel and a token whose box it lies in. Norms, activations and the partition
are not counted. Bytes are inputs, outputs and weights, each moved once. The device's best is the fastest of several
routes to a matrix product or a convolution, and the fastest copy of no more bytes than the work moves. The floor is the
longer of the two times. The share of the roofline is the floor over the time taken, so it cannot be more than 1, apart
from noise.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gpstoken_diffusers.ops.splat_reference import pixel_centers

# One weight of a token at a pixel: difference, scale, shear, two squares, their sum, the half, and the exponential
# taken for one. Every channel then takes two more.
WEIGHT_OPERATIONS = 8


@dataclass(frozen=True)
class Work:
    """What something cannot do without: arithmetic operations, and bytes to and from memory."""

    operations: int
    moved_bytes: int


@dataclass(frozen=True)
class Peak:
    """The best that a device does.

    Attributes:
        routes: operations per second by dtype, and by the route that reaches them.
        copies: bytes read and written per second, by how many bytes the copy moves.
    """

    routes: Mapping[torch.dtype, Mapping[str, float]]
    copies: Mapping[int, float]

    def fastest(self, dtype: torch.dtype) -> tuple[str, float]:
        """The best route of a dtype, and its operations per second."""
        return max(self.routes[dtype].items(), key=lambda route: route[1])

    def bytes_per_s(self, moved_bytes: int) -> float:
        """Of work that moves so many bytes: what is small stays in caches, and copies are faster there, too."""
        within = [size for size in self.copies if size <= moved_bytes] or [min(self.copies)]
        return max(self.copies[size] for size in self.copies if size >= max(within))

    def floor_s(self, work: Work, dtype: torch.dtype) -> float:
        """The least seconds for some work, computed in `dtype`."""
        return max(work.operations / self.fastest(dtype)[1], work.moved_bytes / self.bytes_per_s(work.moved_bytes))

    def best(self, other: Peak) -> Peak:
        """The better figures of two measurements on one device: whatever disturbs one makes it smaller."""
        return Peak(
            {dtype: _better(routes, other.routes.get(dtype, {})) for dtype, routes in self.routes.items()},
            _better(self.copies, other.copies),
        )


def _better(one: Mapping, other: Mapping) -> dict:
    return {key: max(value, other.get(key, 0.0)) for key, value in one.items()}


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
    """Operations of one call (see the module), and what it returned."""

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


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure_peak(device: torch.device, dtypes: Iterable[torch.dtype], small: bool = False) -> Peak:
    """Measures a device's routes and copies; half a minute, or a moment if `small`.

    dtypes: those to measure beside int8. A dtype that no route takes is left out.
    """
    # Several sizes, as none is the best of every device; on a CPU small enough that most calls are undisturbed.
    on_gpu = device.type == "cuda"
    sides = (256,) if small else (4096, 8192) if on_gpu else (512, 1024, 2048)
    routes: dict[torch.dtype, dict[str, float]] = {}
    for dtype, (name, route) in itertools.product(dict.fromkeys([*dtypes, torch.int8]), ROUTES.items()):
        for side in sides:
            try:
                operations, run = route(device, dtype, side)
                seconds = _least_seconds(run, device)
            except (RuntimeError, AttributeError):  # no kernel here for this dtype; no such operator in this PyTorch
                break
            speeds = routes.setdefault(dtype, {})
            speeds[name] = max(speeds.get(name, 0.0), operations / seconds)
            if seconds > 0.2:  # a dtype that the processor lacks: larger ones would take minutes
                break
    copies = {}
    for count in (2**18, 2**20) if small else (2**18, 2**21, 2**24, 2**28 if on_gpu else 2**26):  # of float32
        source = torch.ones(count, device=device)
        target = torch.empty_like(source)
        copies[8 * count] = 8 * count / _least_seconds(lambda a=source, b=target: b.copy_(a), device)
    return Peak(routes, copies)


Route = tuple[int, Callable[[], object]]
_INT8_INPUT, _INT8_OUTPUT = (0.01, 128), (0.1, 128, torch.uint8, "none", [], "")  # scale, zero point; then what follows


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    numbers = torch.randn(shape, device=device)
    numbers = numbers if dtype.is_floating_point else (numbers * 30 + 128 * (dtype == torch.uint8)).clamp(-127, 255)
    return numbers.to(dtype, memory_format=torch.channels_last if len(shape) == 4 else torch.preserve_format)


def _product(device: torch.device, dtype: torch.dtype, side: int) -> Route:
    left, right = (_numbers((side, side), dtype, device) for _ in range(2))
    if dtype is torch.int8:
        return 2 * side**3, lambda: torch._int_mm(left, right.t())
    target = torch.empty_like(left)
    return 2 * side**3, lambda: torch.mm(left, right, out=target)


def _packed_linear(device: torch.device, dtype: torch.dtype, side: int) -> Route:
    """oneDNN's own linear layer, of a weight that it has put in the order that it likes best."""
    weight = _numbers((side, side), dtype, device)
    if dtype is torch.int8:
        rows, scale = _numbers((side, side), torch.uint8, device), torch.full((side,), 0.01)
        packed, zero = torch.ops.onednn.qlinear_prepack(weight, [side, side]), torch.zeros(side, dtype=torch.int64)
        arguments = (rows, *_INT8_INPUT, packed, scale, zero, None, *_INT8_OUTPUT)
        return 2 * side**3, lambda: torch.ops.onednn.qlinear_pointwise(*arguments)
    rows, packed = _numbers((side, side), dtype, device), torch.ops.mkldnn._reorder_linear_weight(weight, side)
    return 2 * side**3, lambda: torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")


def _convolution(device: torch.device, dtype: torch.dtype, side: int) -> Route:
    """3 x 3, padded, as the models have them."""
    channels = max(32, side // 4)
    shape, pixels = (channels, channels, 3, 3), 64
    kernel, operations = _numbers(shape, dtype, device), 2 * 9 * channels**2 * pixels**2
    maps = _numbers((1, channels, pixels, pixels), torch.uint8 if dtype is torch.int8 else dtype, device)
    if dtype is torch.int8:
        scale, zero, ones = torch.full((channels,), 0.01), torch.zeros(channels, dtype=torch.int64), [1, 1]
        packed = torch.ops.onednn.qconv_prepack(kernel, scale, *_INT8_INPUT, ones, ones, ones, 1, list(maps.shape))
        arguments = (maps, *_INT8_INPUT, packed, scale, zero, None, ones, ones, ones, 1, *_INT8_OUTPUT)
        return operations, lambda: torch.ops.onednn.qconv_pointwise(*arguments)
    return operations, lambda: F.conv2d(maps, kernel, padding=1)


# Ways to many operations per second. oneDNN's operators are private to PyTorch: a version may lack them.
ROUTES = {"product": _product, "packed linear": _packed_linear, "convolution": _convolution}


def _least_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of some calls: the best is what the device does undisturbed."""
    for _ in range(2):  # the first call prepares things
        run()
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < 20 and sum(seconds) < 1):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
