"""The kernels that NVRTC compiles, on a GPU (-m gpu): the definition's results, and those of nvcc's library.

GPSTOKEN_BACKEND=nvrtc lets the other tests with a GPU use these kernels too.
"""

from __future__ import annotations

import threading

import pytest
import torch
from emulation.toolchain import SplatLibrary
from layout_judge import noise, picture
from splat_cuda_cases import CASES, expect_case, random_tokens

from gpstoken_diffusers.ops.backend import native
from gpstoken_diffusers.ops.backend.run_time_kernels import RunTimeKernels
from gpstoken_diffusers.ops.partition_cuda import partition_on_cuda
from gpstoken_diffusers.ops.partition_reference import partition_image_reference

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session")
def real_kernels() -> RunTimeKernels:
    """The installed library, on the current GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    kernels, reason = native._load("nvrtc")
    if kernels is None:
        pytest.skip(f"kernels cannot be compiled: {reason}")
    return kernels


@pytest.mark.parametrize("case", CASES, ids=lambda case: "b{}-n{}-c{}-{}x{}-s{:g}-{}".format(*case))
def test_gpu_splatting(real_kernels: RunTimeKernels, case: tuple) -> None:
    """The definition's values, and nvcc's but for what two compilers round differently."""
    expect_case(SplatLibrary(real_kernels), case, "cuda")
    nvcc_library, reason = native._load("cuda")
    if nvcc_library is None:
        pytest.skip(f"compared with the definition only: {reason}")
    batch, tokens, channels, height, width, support, dtype = case
    geometry, texture = random_tokens(batch, tokens, channels)
    inputs = geometry.cuda(), texture.to("cuda", dtype)
    libraries = SplatLibrary(real_kernels), SplatLibrary(nvcc_library)
    ours, theirs = (library.forward(*inputs, height, width, support) for library in libraries)
    torch.testing.assert_close(ours, theirs, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)


def test_gpu_partition(real_kernels: RunTimeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition's regions, to the last one."""
    monkeypatch.setattr(native, "library", lambda kind: real_kernels)
    grey = picture(8, 128, 96)
    for bias in (None, noise(8, 128, 96) * 3):
        found, _ = partition_on_cuda(grey.cuda(), 100, 4, 2.5, None if bias is None else bias.cuda())
        arrays = grey.numpy(), 100, 4, 2.5, None if bias is None else bias.numpy()
        assert torch.equal(found.cpu(), torch.from_numpy(partition_image_reference(*arrays)))


def test_gpu_new_thread_and_captured_graph(real_kernels: RunTimeKernels) -> None:
    """A thread without a context, as autograd's are; and a replay."""
    library = SplatLibrary(real_kernels)
    geometry, texture = (tensor.cuda() for tensor in random_tokens(2, 64, 16))
    expected, found = library.forward(geometry, texture, 64, 64), []
    thread = threading.Thread(target=lambda: found.append(library.forward(geometry, texture, 64, 64)))
    thread.start()
    thread.join()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = library.forward(geometry, texture, 64, 64)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found[0], expected) and torch.equal(captured, expected)
