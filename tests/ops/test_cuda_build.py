"""The CUDA sources under nvcc, for every architecture. Those under NVRTC: test_nvrtc.py.

A warning, a register spill or a stack frame fails. No GPU is needed. Without nvcc these tests skip.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from emulation.toolchain import CSRC, HERE, find_nvcc, run

from gpstoken_diffusers.ops.backend import native

NVCC = find_nvcc()
STRICT = [
    "-std=c++17",
    "-O3",
    "-Werror",
    "all-warnings",
    "-Xcompiler",
    "-fPIC,-Wall,-Wextra",
    "-Xptxas",
    "-v",
]

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: the CUDA sources are NOT compiled here")


class Kernel(NamedTuple):
    """What ptxas reports of one kernel on one architecture."""

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    spill_bytes: int  # stores and loads
    shared_bytes: int


def parse_ptxas(output: str) -> list[Kernel]:
    """The kernels in the output of `nvcc -Xptxas -v`."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>sm_\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, "
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    kernels = []
    for match in pattern.finditer(output):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        numbers = int(match["registers"]), int(match["stack"]), int(match["stores"]) + int(match["loads"])
        kernels.append(Kernel(match["name"], match["architecture"], *numbers, int(shared[1]) if shared else 0))
    return kernels


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The CUDA library for all major architectures, and what the compilers said."""
    target = tmp_path_factory.mktemp("cuda") / "libgpstoken_cuda.so"
    command = [str(NVCC), *STRICT, "-arch=all-major", "--threads", "2", "-shared", "-cudart", "static"]
    return target, run([*command, "-o", str(target), *map(str, sorted(CSRC.glob("*_cuda.cu")))])


@needs_nvcc
def test_no_warnings_no_spills(built: tuple[Path, str]) -> None:
    _, output = built
    assert "warning" not in output.lower(), output
    kernels = parse_ptxas(output)
    architectures = {kernel.architecture for kernel in kernels}
    assert len(architectures) >= 4, architectures
    # Splatting: forward and backward, three element types, slices of 4, 8, 16 and 32 channels, on each architecture.
    splat = [kernel for kernel in kernels if "splat" in kernel.name]
    assert len(splat) == 2 * 3 * 4 * len(architectures)
    # Partition: levels, list, rows and columns of the bias.
    assert len(kernels) - len(splat) == 4 * len(architectures)
    spilled = [kernel for kernel in kernels if kernel.spill_bytes or kernel.stack_bytes]
    assert not spilled, spilled
    for kernel in kernels:
        # Four blocks of 128 threads, or two of 256, on a multiprocessor with 65,536 registers.
        assert kernel.registers <= 128, kernel
        # So that shared memory never limits that: 64 KiB on the oldest architecture. The partition's samples alone
        # take 16 KiB; its kernel with many blocks shall have three on a multiprocessor all the same.
        assert kernel.shared_bytes <= (16 if kernel in splat else 64 // 3) * 1024, kernel


@needs_nvcc
def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    """A kernel with more live values than the registers it may use."""
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spills(float* data) {\n"
        "    float value[96];\n"
        "#pragma unroll\n"
        "    for (int i = 0; i < 96; ++i) value[i] = data[i * 1024 + threadIdx.x];\n"
        "    __syncthreads();\n"
        "#pragma unroll\n"
        "    for (int i = 0; i < 96; ++i) data[i * 1024 + threadIdx.x] = value[i] * value[95 - i];\n"
        "}\n"
    )
    output = run([str(NVCC), *STRICT, "-arch=sm_80", "-c", "-o", str(tmp_path / "spills.o"), str(source)])
    (kernel,) = parse_ptxas(output)
    assert kernel.spill_bytes > 0 and kernel.registers <= 32


@needs_nvcc
def test_library_loads(built: tuple[Path, str]) -> None:
    """It stands alone, and without a GPU it answers with a CUDA error instead of crashing."""
    library = ctypes.CDLL(str(built[0]))
    assert library.gpstoken_abi_version() == native.ABI_VERSION
    library.gpstoken_cuda_error_string.restype = ctypes.c_char_p
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: test_splat_cuda.py runs the kernels")
    sizes = [ctypes.c_int64(size) for size in (1, 1, 1, 1, 1)]
    code = library.gpstoken_splat_forward_cuda(None, None, None, *sizes, ctypes.c_float(3.0), 0, None)
    assert code > 1000
    assert len(library.gpstoken_cuda_error_string(code - 1000)) > 5


@needs_nvcc
def test_benchmark_kernels_compile(tmp_path: Path) -> None:
    source, target = HERE / "official_shape.cu", tmp_path / "official_shape.o"
    assert "warning" not in run([str(NVCC), *STRICT, "-arch=sm_90", "-c", "-o", str(target), str(source)]).lower()
