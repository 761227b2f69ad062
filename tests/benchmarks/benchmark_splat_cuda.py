"""Times of the CUDA splatting kernels, as ratios, on the GPU at hand.

    python tests/benchmarks/benchmark_splat_cuda.py [--dtype bfloat16] [--rounds 7]

Each size is timed in alternation, within one process, against
  official   the research code's way of working, built here from emulation/official_shape.cu by nvcc, in
             float32: 16 times the threads in forward, one thread per token in backward, a launch per image;
  floor      the larger of two: what an empty kernel takes, and the time in which this GPU copies as many
             bytes as the kernel must read and write (measured with a large copy);
  plain      the dense PyTorch definition, where its weights fit (forward only).
All of it runs from CUDA graphs, so the times are the device's; `eager` is one call of the public operator,
forward, with the price of Python and dispatch in it. First, results are compared with the official ones.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "support")]

from emulation.toolchain import HERE, SplatLibrary, find_nvcc, run  # noqa: E402

from gpstoken_diffusers.ops.backend import native  # noqa: E402
from gpstoken_diffusers.ops.splat import splat_gaussians  # noqa: E402
from gpstoken_diffusers.ops.splat_reference import splat_gaussians_reference  # noqa: E402

# batch, tokens, channels, side of the map: tokenizer presets, larger images, many tokens.
SIZES = [
    (1, 64, 16, 64),
    (1, 256, 32, 64),
    (8, 256, 32, 64),
    (64, 128, 16, 64),
    (64, 256, 32, 64),
    (256, 256, 32, 64),
    (1, 4096, 32, 256),
    (4, 4096, 32, 512),
]
PLAIN_LIMIT = 2**30  # weights of the dense definition
CALLS = 10  # in one graph


class Official:
    """The official way of working, over a batch: a Python loop of one launch per image."""

    def __init__(self) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            sys.exit("nvcc is not installed: the comparison kernels cannot be built")
        major, minor = torch.cuda.get_device_capability()
        target = Path(tempfile.mkdtemp()) / "libofficial.so"
        source = str(HERE / "official_shape.cu")
        run(
            [
                nvcc,
                "-O3",
                f"-arch=sm_{major}{minor}",
                "-shared",
                "-Xcompiler",
                "-fPIC",
                "-o",
                str(target),
                source,
            ]
        )
        self.library = ctypes.CDLL(str(target))
        pointer, number = ctypes.c_void_p, ctypes.c_int
        tail = [number] * 4 + [ctypes.c_float, pointer]
        self.library.official_forward.argtypes = [pointer] * 3 + tail
        self.library.official_backward.argtypes = [pointer] * 5 + tail
        self.library.launch_nothing.argtypes = [pointer]

    def _each_image(self, function: str, tensors: list[Tensor], image: Tensor, support: float) -> None:
        _, height, width, channels = image.shape
        tokens = tensors[0].shape[1]
        stream = torch.cuda.current_stream().cuda_stream
        for i in range(image.shape[0]):
            pointers = [tensor[i].data_ptr() for tensor in tensors]
            sizes = [tokens, channels, height, width]
            code = getattr(self.library, function)(*pointers, *sizes, support, stream)
            if code != 0:
                raise RuntimeError(f"{function}: CUDA error {code}")

    def forward(self, geometry: Tensor, texture: Tensor, side: int, support: float) -> Tensor:
        """-> (B, side, side, C)"""
        out = texture.new_zeros(texture.shape[0], side, side, texture.shape[2])
        self._each_image("official_forward", [geometry, texture, out], out, support)
        return out

    def backward(self, geometry: Tensor, texture: Tensor, grad: Tensor, support: float) -> tuple[Tensor, Tensor]:
        """grad: (B, side, side, C)"""
        grads = torch.zeros_like(geometry), torch.zeros_like(texture)
        self._each_image("official_backward", [geometry, texture, grad, *grads], grad, support)
        return grads

    def nothing(self) -> None:
        """One empty launch."""
        self.library.launch_nothing(torch.cuda.current_stream().cuda_stream)


def realistic_tokens(batch: int, count: int, channels: int) -> tuple[Tensor, Tensor]:
    """Sigmas as a partition into `count` equal regions gives them, varied by a factor of two either way."""
    generator = torch.Generator().manual_seed(0)
    sigma = (2 / 3) * count**-0.5 * 2.0 ** (2 * torch.rand(2, batch, count, generator=generator) - 1)
    rho = torch.rand(batch, count, generator=generator) - 0.5
    centers = 2 * torch.rand(2, batch, count, generator=generator) - 1
    geometry = torch.stack([*sigma, rho, *centers], dim=-1)
    return geometry.cuda(), torch.randn(batch, count, channels, generator=generator).cuda()


def graph_of(call: Callable[[], object], calls: int) -> Callable[[], None]:
    """A function that replays `calls` calls without any work on the host between them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # allocations and lazy loading happen here
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay


def alternate(replays: dict[str, tuple[Callable[[], None], int]], rounds: int) -> dict[str, float]:
    """Median microseconds per call of each (function, calls in it), taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(rounds + 1):
        for name, (replay, calls) in replays.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            replay()
            start.record()
            replay()
            end.record()
            end.synchronize()
            times[name].append(1e3 * start.elapsed_time(end) / calls)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def copy_bandwidth() -> float:
    """Bytes read and written per microsecond by a large device copy."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    replay = graph_of(lambda: target.copy_(source), 5)
    return 2 * source.nbytes / alternate({"copy": (replay, 5)}, 5)["copy"]


def eager_time(call: Callable[[], object]) -> float:
    """Microseconds per call, queued from Python one after the other."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        call()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / 50


def compare(name: str, result: Tensor, expected: Tensor, tolerance: float) -> None:
    error = ((result.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    if not error <= tolerance:
        sys.exit(f"{name}: off by {error:.2e} of the largest value, allowed {tolerance:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to measure")
    cdll = native.library("cuda")
    if cdll is None:
        sys.exit(f"the CUDA library is not there: {native.why_missing('cuda')}")
    ours, official, support = SplatLibrary(cdll, poison=False), Official(), 3.0
    dtype = getattr(torch, options.dtype)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copies {bandwidth / 1e6:.2f} TB/s, texture in {options.dtype}")
    columns = ["B x N x C x side", "pass", "us", "x floor", "official/ours", "plain/ours", "eager us"]
    print_row(columns)
    for batch, count, channels, side in SIZES:
        geometry, exact = realistic_tokens(batch, count, channels)
        texture = exact.to(dtype)
        grad = torch.randn(batch, channels, side, side, device="cuda").to(dtype)
        last = grad.float().permute(0, 2, 3, 1).contiguous()  # channels last, float32: the official layout

        official_out = official.forward(geometry, texture.float(), side, support).permute(0, 3, 1, 2)
        official_grads = official.backward(geometry, texture.float(), last, support)
        tolerance = 1e-4 if dtype is torch.float32 else 1e-2  # float32 sums in another order; 16-bit results
        compare("map", ours.forward(geometry, texture, side, side, support), official_out, tolerance)
        for result, expected in zip(ours.backward(geometry, texture, grad, support), official_grads, strict=True):
            compare("gradient", result, expected, max(tolerance, 1e-3))

        dense = batch * count * side * side <= PLAIN_LIMIT
        read = geometry.nbytes + texture.nbytes
        passes = {
            "forward": (
                partial(ours.forward, geometry, texture, side, side, support),
                partial(official.forward, geometry, exact, side, support),
                partial(splat_gaussians_reference, geometry, texture, side, side, support) if dense else None,
                read + grad.nbytes,
            ),
            "backward": (
                partial(ours.backward, geometry, texture, grad, support),
                partial(official.backward, geometry, exact, last, support),
                None,
                2 * read + grad.nbytes,
            ),
        }
        for name, (mine, theirs, plain, moved) in passes.items():
            replays = {"ours": (graph_of(mine, CALLS), CALLS), "official": (graph_of(theirs, 1), 1)}
            replays["nothing"] = (graph_of(official.nothing, CALLS), CALLS)
            if plain is not None:
                replays["plain"] = (graph_of(plain, 1), 1)
            times = alternate(replays, options.rounds)
            floor = max(times["nothing"], moved / bandwidth)
            row = [f"{batch} x {count} x {channels} x {side}", name]
            row += [f"{times['ours']:.1f}", f"{times['ours'] / floor:.1f}"]
            row += [f"{times[other] / times['ours']:.1f}" if other in times else "-" for other in ("official", "plain")]
            call = partial(splat_gaussians, geometry, texture, side, side, support)
            print_row([*row, f"{eager_time(call):.1f}" if name == "forward" else "-"])


def print_row(cells: list[str]) -> None:
    print("".join(f"{cell:>{width}}" for cell, width in zip(cells, (21, 9, 9, 9, 15, 12, 10), strict=True)))


if __name__ == "__main__":
    main()
