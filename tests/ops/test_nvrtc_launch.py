"""Launching the kernels that NVRTC compiles: results, launches, errors and contexts as with nvcc's library.

No GPU is needed: a double of the driver runs the kernels by emulation, so that results are real. NVRTC is
(nvidia-cuda-nvrtc-cu12, or what torch for CUDA brings). Tests with a GPU are in test_nvrtc_gpu.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulation.toolchain import CSRC, SplatLibrary, compile_emulation, find_compiler
from layout_judge import noise, picture
from nvrtc_cases import build_host, compiler_or_skip, load_host
from splat_cases import CASES, assert_case, make_tokens, of_library

from gpstoken_diffusers.ops import partition_cuda
from gpstoken_diffusers.ops.backend import native
from gpstoken_diffusers.ops.backend.cuda_driver import Driver
from gpstoken_diffusers.ops.backend.run_time_kernels import KernelBuilder, RunTimeKernels
from gpstoken_diffusers.ops.partition_cuda import partition_on_cuda
from gpstoken_diffusers.ops.partition_reference import partition_image_reference

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: the host side cannot be built"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulation is for Linux"),
]


@pytest.fixture(scope="session")
def host_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_host(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="session")
def driver_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("driver") / "libfake.so"
    options = "-O1", "-march=native", "-ffp-contract=off", "-fvisibility=default"
    return compile_emulation("fake_driver.cpp", target, *options)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that tests share, so that each kernel is compiled once."""
    return tmp_path_factory.mktemp("cache") / "kernels"


@pytest.fixture
def fake(driver_path: Path) -> ctypes.CDLL:
    library = load_host(driver_path, "cuda")
    library.fake_launches.restype = ctypes.c_char_p
    library.fake_launches()
    return library


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Answers what launching a kernel asks of torch.cuda."""
    state = SimpleNamespace(device=0, capturing=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


@pytest.fixture
def kernels(host_path: Path, driver_path: Path, cache: Path, gpu: SimpleNamespace) -> RunTimeKernels:
    builder = KernelBuilder(CSRC, compiler_or_skip(), cache)
    return RunTimeKernels(load_host(host_path), builder, Driver(str(driver_path)))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_splatting(kernels: RunTimeKernels, case: str) -> None:
    assert_case(of_library(SplatLibrary(kernels)), CASES[case])


def test_launches_are_those_of_nvccs_library(kernels: RunTimeKernels, fake: ctypes.CDLL) -> None:
    """The same bits as from the sources when nvcc compiles them, whole, with kernels called instead of named."""
    fake.gpstoken_cuda_error_string.restype = ctypes.c_char_p
    geometry, texture = make_tokens(3, 40, 6)
    results = []
    for library in (SplatLibrary(kernels), SplatLibrary(fake)):
        out = library.forward(geometry, texture, 20, 33)
        results.append((out, *library.backward(geometry, texture, out)))
    assert all(map(torch.equal, *results))
    blocks = 3 * 2 * 3  # tiles of 16 x 16
    assert fake.fake_launches().decode().splitlines() == [f"100 0 {blocks} 128", f"100 0 {3 * 40} 256"]


@pytest.fixture
def partition_on_host(kernels: RunTimeKernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets tensors on the CPU take the way of those on a GPU."""
    monkeypatch.setattr(native, "library", lambda kind: kernels)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    partition_cuda._entropy_terms.cache_clear()
    yield
    partition_cuda._entropy_terms.cache_clear()


def cpu_regions(grey: torch.Tensor, tokens: int, bias: torch.Tensor | None) -> torch.Tensor:
    """The reference's."""
    arrays = grey.numpy(), tokens, 4, 2.5, None if bias is None else bias.numpy()
    return torch.from_numpy(partition_image_reference(*arrays))


@pytest.mark.usefixtures("partition_on_host")
def test_partition(fake: ctypes.CDLL) -> None:
    """Four kernels, some after the other: the reference's regions, and everything on the caller's stream."""
    grey = picture(2, 40, 50)
    for bias in (None, noise(2, 40, 50) * 3):
        found, _ = partition_on_cuda(grey, 20, 4, 2.5, bias)
        assert torch.equal(found, cpu_regions(grey, 20, bias))
    launches = [line.split() for line in fake.fake_launches().decode().splitlines()]
    assert [int(threads) for *_, threads in launches] == [256, 512, 64, 64, 256, 512]
    assert {stream for _, stream, _, _ in launches} == {"77"}


def splat_one(kernels: RunTimeKernels) -> torch.Tensor:
    return SplatLibrary(kernels).forward(*make_tokens(1, 2, 1), 3, 3)


def test_errors_of_a_launch_reach_the_caller(kernels: RunTimeKernels, fake: ctypes.CDLL) -> None:
    expected = splat_one(kernels)
    fake.fake_fail_next_launch(700)
    with pytest.raises(RuntimeError, match=r"cuLaunchKernel failed with code 700 \(CUDA: an illegal address\)"):
        splat_one(kernels)
    fake.fake_fail_next_launch(9999)
    with pytest.raises(RuntimeError, match=r"code 9999 \(CUDA: unknown error\)"):
        splat_one(kernels)
    assert torch.equal(splat_one(kernels), expected), "an error was remembered"


def test_a_kernel_that_cannot_be_had(kernels: RunTimeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (2, 0))
    with pytest.raises(RuntimeError, match=r"this GPU has 2.0.\nGPSTOKEN_BACKEND=reference works without"):
        splat_one(kernels)


def test_errors_of_the_host_side_stay_codes(kernels: RunTimeKernels) -> None:
    assert kernels.gpstoken_splat_forward_cuda(None, None, None, 1, 1, 1, 1, 1, 3.0, 7, None) == 2
    with pytest.raises(AttributeError):
        _ = kernels.gpstoken_no_such_function


def test_a_first_use_while_a_graph_is_captured_is_refused(kernels: RunTimeKernels, gpu: SimpleNamespace) -> None:
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="call the operation once before a CUDA graph is captured"):
        splat_one(kernels)
    gpu.capturing = False
    expected = splat_one(kernels)
    gpu.capturing = True
    assert torch.equal(splat_one(kernels), expected)


def test_contexts(kernels: RunTimeKernels, fake: ctypes.CDLL, gpu: SimpleNamespace) -> None:
    """torch's device decides; its primary context is used where the thread has none of that device."""
    retained = [fake.fake_retained(0), fake.fake_retained(1)]
    cases = [  # the thread's context, torch's device, the context that is launched in
        (0, 0, 100),  # a thread that has only just begun
        (100, 0, 100),
        (300, 0, 300),  # another one of the same device: a library's own
        (100, 1, 101),
        (300, 1, 101),  # left behind by something else
        (0, 0, 100),
    ]
    for current, device, expected in cases:
        fake.cuCtxSetCurrent(current)
        gpu.device = device
        splat_one(kernels)
        assert int(fake.fake_launches().split()[0]) == expected, (current, device)
    assert [fake.fake_retained(0) - retained[0], fake.fake_retained(1) - retained[1]] == [1, 1]


def test_threads_load_a_kernel_once(kernels: RunTimeKernels, fake: ctypes.CDLL, gpu: SimpleNamespace) -> None:
    loaded = fake.fake_modules()
    barrier, errors = threading.Barrier(4), []
    launch = kernels._driver.launch
    kernels._driver.launch = lambda *arguments: None  # the emulation has one thread

    def work() -> None:
        try:
            barrier.wait()
            splat_one(kernels)
        except AssertionError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kernels._driver.launch = launch
    assert not errors and fake.fake_modules() == loaded + 1
