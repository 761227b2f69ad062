"""The CUDA splatting kernels: orders of threads, bounds of buffers, and on a GPU (-m gpu) streams and graphs.

Their values and gradients are compared with the reference in test_splat.py.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from emulation.checkers import expect_clean_on_gpu, sanitised_program
from emulation.toolchain import SplatLibrary
from splat_cases import (
    BF16,
    F16,
    F32,
    assert_is_reference,
    emulated_library,
    make_tokens,
    needs_emulation,
    of_library,
    random_upstream,
    real_library,
)

from gpstoken_diffusers.ops.backend import native
from gpstoken_diffusers.ops.splat import splat_gaussians
from gpstoken_diffusers.ops.splat_reference import pixel_centers


@pytest.fixture
def emulated() -> SplatLibrary:
    emulated_library().emulation_set_seed(0)
    return SplatLibrary(emulated_library())


@pytest.fixture
def gpu() -> SplatLibrary:
    return real_library()


# ---- what must not matter ----


@needs_emulation
@pytest.mark.parametrize("sizes", [(2, 150, 33, 21, 35), (4, 260, 4, 18, 18)])
def test_order_of_threads(emulated: SplatLibrary, sizes: tuple[int, ...]) -> None:
    """A missing barrier shows as a difference between orders. A block per token, and eight to a block; boxes for one
    warp, and for all warps of a block, several in the same block."""
    *shape, height, width = sizes
    geometry, texture = make_tokens(*shape, sigma=0.15)
    grad_out, results = random_upstream(texture, height, width), []
    for seed in range(4):
        emulated.library.emulation_set_seed(seed)
        out = emulated.forward(geometry, texture, height, width, 5.0)
        results.append((out, *emulated.backward(geometry, texture, grad_out, 5.0)))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize(
    ("library", "device"),
    [pytest.param("emulated", "cpu", marks=needs_emulation), pytest.param("gpu", "cuda", marks=pytest.mark.gpu)],
)
def test_batch(request: pytest.FixtureRequest, library: str, device: str) -> None:
    """One image alone (narrow slices, a block per token) and among 70 (wide slices, eight to a block)."""
    kernels: SplatLibrary = request.getfixturevalue(library)
    geometry, texture = make_tokens(70, 15, 33)
    tensors = [tensor.to(device) for tensor in (geometry, texture, random_upstream(texture, 17, 20))]
    last = [tensor[69:].contiguous() for tensor in tensors]
    many, one = ((kernels.forward(*t[:2], 17, 20), *kernels.backward(*t)) for t in (tensors, last))
    assert all(torch.equal(a[69:], b) for a, b in zip(many, one, strict=True))


# ---- the parts ----


@needs_emulation
def test_pixel_centers_are_those_of_the_reference() -> None:
    """The correction that replaces a division gives the very bits that float64 does."""
    for n in [*range(1, 1100), 2047, 2048, 4096, 5000]:
        centers = torch.full((n,), float("nan"))
        emulated_library().emulation_axis(n, ctypes.c_void_p(centers.data_ptr()))
        assert torch.equal(centers, pixel_centers(n)), n


@needs_emulation
def test_arguments(emulated: SplatLibrary) -> None:
    """Result codes for what the kernels cannot do, and for having nothing to do."""

    def code(*sizes: int, dtype: int = 0) -> int:
        return emulated.library.gpstoken_splat_forward_cuda(*[None] * 3, *sizes, 3.0, dtype, None)

    assert emulated.library.gpstoken_abi_version() == native.ABI_VERSION
    assert code(1, 0, 3, 4, -1) == 1
    assert code(1, 0, 3, 2**24, 4) == 1
    assert code(2**40, 0, 3, 4, 4) == 1  # more blocks than a grid has
    assert code(1, 0, 3, 4, 4, dtype=3) == 2
    assert code(0, 5, 3, 4, 4) == code(1, 5, 0, 4, 4) == code(1, 5, 3, 0, 4) == 0


@needs_emulation
def test_no_access_outside_buffers(tmp_path: Path) -> None:
    """Address and undefined-behaviour sanitisers over both kernels, NaN and infinite geometry included."""
    run = sanitised_program("out_of_bounds.cpp", tmp_path / "program")
    done = run()
    assert done.returncode == 0 and "20 launches" in done.stdout, done.stdout + done.stderr
    for direction in ("forward", "backward"):
        done = run(direction)
        assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, direction


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("sizes", [(1, 64, 16), (8, 256, 32), (64, 128, 16), (2, 4096, 130)])
def test_gpu_real_sizes(gpu: SplatLibrary, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    geometry, texture = make_tokens(*sizes, sigma=0.05)
    assert_is_reference(of_library(gpu, "cuda"), geometry, texture.to(dtype), 64, 80)


@pytest.mark.gpu
def test_gpu_runs_repeat(gpu: SplatLibrary) -> None:
    geometry, texture = make_tokens(8, 256, 32)
    tensors = [tensor.cuda() for tensor in (geometry, texture, random_upstream(texture, 64, 64))]
    first, *others = ((gpu.forward(*tensors[:2], 64, 64), *gpu.backward(*tensors)) for _ in range(50))
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, first, strict=True))


@pytest.mark.gpu
def test_gpu_operator(gpu: SplatLibrary) -> None:
    """The public operator on CUDA: autograd, dense copies of strided inputs, torch's own checks."""
    geometry, texture = (t.cuda() for t in make_tokens(2, 17, 6))
    strided = texture.transpose(1, 2).contiguous().transpose(1, 2)
    inputs = geometry.requires_grad_(), strided.requires_grad_()
    out = splat_gaussians(*inputs, 33, 20)
    assert torch.equal(out, gpu.forward(geometry.detach(), texture, 33, 20))
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    assert all(map(torch.equal, grads, gpu.backward(geometry.detach(), texture, weight)))
    torch.library.opcheck(torch.ops.gpstoken.splat_gaussians, (*inputs, 33, 20, 3.0))


@pytest.mark.gpu
def test_gpu_stream(gpu: SplatLibrary) -> None:
    """The work waits for what its own stream does before it, and is not queued on another."""
    geometry, texture = (t.cuda() for t in make_tokens(4, 256, 32))
    expected = splat_gaussians(geometry, texture, 64, 64)
    late = torch.zeros_like(texture)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        late.copy_(texture)
        out = splat_gaussians(geometry, late, 64, 64)
        late.zero_()  # must not overtake the kernel either
    assert not stream.query(), "the call waited for the device"
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_gpu_graph(gpu: SplatLibrary) -> None:
    """Launches can be captured in a CUDA graph."""
    geometry, texture = (t.cuda() for t in make_tokens(1, 64, 16))
    expected = splat_gaussians(geometry, texture, 64, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = splat_gaussians(geometry, texture, 64, 64)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_gpu_large_batch(gpu: SplatLibrary) -> None:
    """More images than the second and third dimension of a grid can count."""
    geometry, texture = (t.cuda() for t in make_tokens(70_000, 2, 4))
    out = gpu.forward(geometry, texture, 3, 3)
    grads = gpu.backward(geometry, texture, torch.ones_like(out))
    assert torch.equal(out[-1:], gpu.forward(geometry[-1:].contiguous(), texture[-1:].contiguous(), 3, 3))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_gpu_sanitizer(gpu: SplatLibrary, tool: str) -> None:
    """Both kernels under NVIDIA's checkers."""
    code = (
        "from splat_cases import CASES, assert_case, of_library, real_library\n"
        "splat = of_library(real_library(), 'cuda')\n"
        "for case in CASES.values(): assert_case(splat, case)"
    )
    expect_clean_on_gpu(tool, code)
