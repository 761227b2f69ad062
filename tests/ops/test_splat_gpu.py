"""The CUDA splatting kernels on a GPU (-m gpu): real sizes, torch's machinery, streams, NVIDIA's checkers."""

from __future__ import annotations

import shutil

import pytest
import torch
from emulation.checkers import expect_clean_on_gpu
from emulation.toolchain import SplatLibrary
from splat_cuda_cases import BF16, F16, F32, expect_definition, random_tokens, real_library

from gpstoken_diffusers.ops.splat import splat_gaussians


@pytest.fixture(scope="session")
def gpu() -> SplatLibrary:
    """The real library, on the current GPU."""
    return real_library()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("sizes", [(1, 64, 16), (8, 256, 32), (64, 128, 16), (2, 4096, 130)])
def test_gpu_real_sizes(gpu: SplatLibrary, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    geometry, texture = random_tokens(*sizes)
    expect_definition(gpu, geometry.cuda(), texture.to("cuda", dtype), 64, 80, 3.0)


@pytest.mark.gpu
def test_gpu_operator(gpu: SplatLibrary) -> None:
    """The public operator on CUDA: autograd, dense copies of strided inputs, torch's own checks."""
    geometry, texture = (t.cuda() for t in random_tokens(2, 17, 6))
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
    geometry, texture = (t.cuda() for t in random_tokens(4, 256, 32))
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
    geometry, texture = (t.cuda() for t in random_tokens(1, 64, 16))
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
    geometry, texture = (t.cuda() for t in random_tokens(70_000, 2, 4))
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
        "from splat_cuda_cases import CASES, expect_case, real_library; library = real_library()\n"
        "for case in CASES: expect_case(library, case, 'cuda')"
    )
    expect_clean_on_gpu(tool, code)
