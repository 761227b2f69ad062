"""Times the native splat, forward and backward, against its reference, and how it grows with tokens and with the map.

    python tests/benchmarks/benchmark_splat.py
    python tests/benchmarks/benchmark_splat.py --device cuda [--dtype bfloat16]     # needs nvcc

Tokens are the initial Gaussians of real partitions of the photograph that the package ships, with 32 channels. On a GPU
they are random ones of such sizes, and every time is the device's own, by CUDA graphs of several calls. There it stands
beside `floor`, an empty kernel or a copy of as many bytes as must be read and written, whichever takes longer, and
`official`, the research code's way of working, built from emulation/official_shape.cu in float32: 16 times the threads
in forward, one thread per token in backward, a launch per image. Results are compared with the official ones.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from harness import Case, conditions, copy, main, make_parser, photograph, run_cases
from roofline import pairs_in_boxes
from torch import Tensor

from gpstoken_diffusers.ops.partition import partition_image
from gpstoken_diffusers.ops.splat import splat_gaussians
from gpstoken_diffusers.ops.splat_reference import splat_gaussians_backward_reference, splat_gaussians_reference

CHANNELS, SUPPORT = 32, 3.0
CALLS = 10  # in one CUDA graph
# batch, tokens, channels, side of the map: tokenizer presets, larger images, many tokens.
GPU_SIZES = [
    (1, 64, 16, 64),
    (1, 256, 32, 64),
    (8, 256, 32, 64),
    (64, 128, 16, 64),
    (64, 256, 32, 64),
    (256, 256, 32, 64),
    (1, 4096, 32, 256),
    (4, 4096, 32, 512),
]


def native(geometry: Tensor, texture: Tensor, grad: Tensor) -> Sequence[Tensor]:
    """The public operator with autograd, as training calls it."""
    geometry, texture = geometry.detach().requires_grad_(), texture.detach().requires_grad_()
    out = splat_gaussians(geometry, texture, *grad.shape[2:])
    return out, *torch.autograd.grad(out, (geometry, texture), grad)


def reference(geometry: Tensor, texture: Tensor, grad: Tensor) -> Sequence[Tensor]:
    """With its written-out gradient, which is faster than autograd's."""
    out = splat_gaussians_reference(geometry, texture, *grad.shape[2:])
    return out, *splat_gaussians_backward_reference(geometry, texture, grad)


def cpu_cases() -> Iterator[Case]:
    def case(table: str, geometry: Tensor, side: int, *ways: Callable) -> Case:
        generator = torch.Generator().manual_seed(0)
        texture = torch.randn(*geometry.shape[:2], CHANNELS, generator=generator)
        grad = torch.randn(len(geometry), CHANNELS, side, side, generator=generator)
        inside = pairs_in_boxes(geometry, side, side, SUPPORT)
        share = inside / (geometry.shape[0] * geometry.shape[1] * side**2)
        labels = {"B x N": f"{len(geometry)} x {geometry.shape[1]}", "map": f"{side} x {side}"}
        labels |= {"pairs in boxes": f"{inside:,} ({share:.1%})"}
        return Case(table, labels, {way.__name__: partial(way, geometry, texture, grad) for way in ways})

    eight = torch.cat([photograph(256, 256, part) for part in torch.linspace(1, 0.5, 8).tolist()])
    yield case("Against the reference", partition_image(eight, 256).geometry, 64, native, reference)
    large = photograph(1024)
    tokens = {count: partition_image(large, count).geometry for count in (64, 256, 1024, 4096)}
    for geometry in tokens.values():
        yield case("With the number of tokens", geometry, 256, native)
    for geometry in tokens.values():
        equal = torch.cat([torch.full_like(geometry[..., :2], 0.02), geometry[..., 2:]], dim=-1)
        yield case("With the number of tokens, every sigma 0.02", equal, 256, native)
    for side in (32, 64, 128, 256, 512):
        yield case("With the size of the map", tokens[256], side, native)


# ---- on a GPU ----


class Official:
    """The official way of working, over a batch: a Python loop of one launch per image."""

    def __init__(self) -> None:
        sys.path[:0] = [str(Path(__file__).parents[1])]
        from emulation.toolchain import HERE, find_nvcc, run

        nvcc = find_nvcc()
        if nvcc is None:
            raise ValueError("expected nvcc, which builds the kernels to compare with, but it is not installed.")
        major, minor = torch.cuda.get_device_capability()
        target = Path(tempfile.mkdtemp()) / "libofficial.so"
        options = ["-O3", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler", "-fPIC", "-o", str(target)]
        run([nvcc, *options, str(HERE / "official_shape.cu")])
        self.library = ctypes.CDLL(str(target))
        pointer, number = ctypes.c_void_p, ctypes.c_int
        tail = [number] * 4 + [ctypes.c_float, pointer]
        self.library.official_forward.argtypes = [pointer] * 3 + tail
        self.library.official_backward.argtypes = [pointer] * 5 + tail
        self.library.launch_nothing.argtypes = [pointer]

    def _each_image(self, function: str, tensors: list[Tensor], image: Tensor) -> None:
        _, height, width, channels = image.shape
        sizes = [tensors[0].shape[1], channels, height, width]
        stream = torch.cuda.current_stream().cuda_stream
        for i in range(image.shape[0]):
            pointers = [tensor[i].data_ptr() for tensor in tensors]
            code = getattr(self.library, function)(*pointers, *sizes, SUPPORT, stream)
            if code != 0:
                raise RuntimeError(f"{function}: CUDA error {code}")

    def forward(self, geometry: Tensor, texture: Tensor, side: int) -> Sequence[Tensor]:
        out = texture.new_zeros(texture.shape[0], side, side, texture.shape[2])
        self._each_image("official_forward", [geometry, texture, out], out)
        return (out.permute(0, 3, 1, 2),)

    def backward(self, geometry: Tensor, texture: Tensor, grad: Tensor) -> Sequence[Tensor]:
        """grad: (B, side, side, C)."""
        grads = torch.zeros_like(geometry), torch.zeros_like(texture)
        self._each_image("official_backward", [geometry, texture, grad, *grads], grad)
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


def graph_of(call: Callable[[], Sequence[Tensor] | None]) -> Callable[[], Sequence[Tensor] | None]:
    """Replays `CALLS` calls without any work on the host between them; returns what the last one gave."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # allocations and lazy loading happen here
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            result = call()

    def replay() -> Sequence[Tensor] | None:
        graph.replay()
        return result

    return replay


def gpu_cases(dtype: torch.dtype) -> Iterator[Case]:
    official = Official()
    for batch, count, channels, side in GPU_SIZES:
        geometry, exact = realistic_tokens(batch, count, channels)
        texture = exact.to(dtype)
        grad = torch.randn(batch, channels, side, side, device="cuda").to(dtype)
        last = grad.float().permute(0, 2, 3, 1).contiguous()  # float32, channels innermost: the official layout
        moved = geometry.nbytes + texture.nbytes + grad.nbytes
        source, target = (torch.empty(moved // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
        backward = torch.ops.gpstoken.splat_gaussians_backward
        passes = {
            "forward": {
                "native": lambda g=geometry, t=texture, s=side: (splat_gaussians(g, t, s, s, SUPPORT),),
                "official": partial(official.forward, geometry, exact, side),
            },
            "backward": {
                "native": partial(backward, geometry, texture, grad, SUPPORT),
                "official": partial(official.backward, geometry, exact, last),
            },
        }
        for name, ways in passes.items():
            floors = {"empty": official.nothing, "copy": partial(copy, source, target)}
            graphs = {way: graph_of(call) for way, call in (floors | ways).items()}
            labels = {"B x N x C x side": f"{batch} x {count} x {channels} x {side}"}
            yield Case(f"Splat, {name}, texture in {str(dtype)[6:]}", labels, graphs, torch.device("cuda"), calls=CALLS)


def run() -> None:
    parser = make_parser(__doc__, rounds=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="on a GPU")
    args = parser.parse_args()
    if args.device == "cpu":
        run_cases(args, "Splat, forward and backward", conditions(args), cpu_cases(), 14)
        return
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device.")
    device = torch.device("cuda")
    cases = gpu_cases(getattr(torch, args.dtype))
    run_cases(args, "Splat", conditions(args, device), cases, 2 * len(GPU_SIZES), device=device)


if __name__ == "__main__":
    sys.exit(main(run))
