"""The kernels that NVRTC compiles, on a GPU (-m gpu): the reference's results.

GPSTOKEN_BACKEND=nvrtc lets the other tests with a GPU use these kernels too.
"""

from __future__ import annotations

import threading

import pytest
import torch
from emulation.toolchain import SplatLibrary
from layout_judge import noise, picture
from splat_cases import CASES, assert_case, make_tokens, of_library

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


@pytest.mark.parametrize("case", CASES)
def test_gpu_splatting(real_kernels: RunTimeKernels, case: str) -> None:
    assert_case(of_library(SplatLibrary(real_kernels), "cuda"), CASES[case])


def test_gpu_partition(real_kernels: RunTimeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's regions, to the last one."""
    monkeypatch.setattr(native, "library", lambda kind: real_kernels)
    grey = picture(8, 128, 96)
    for bias in (None, noise(8, 128, 96) * 3):
        found, _ = partition_on_cuda(grey.cuda(), 100, 4, 2.5, None if bias is None else bias.cuda())
        arrays = grey.numpy(), 100, 4, 2.5, None if bias is None else bias.numpy()
        assert torch.equal(found.cpu(), torch.from_numpy(partition_image_reference(*arrays)))


def test_gpu_new_thread_and_captured_graph(real_kernels: RunTimeKernels) -> None:
    """A thread without a context, as autograd's are; and a replay."""
    library = SplatLibrary(real_kernels)
    geometry, texture = (tensor.cuda() for tensor in make_tokens(2, 64, 16))
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
