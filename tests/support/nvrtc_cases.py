"""What tests of the kernels that NVRTC compiles need: their host side, a driver's double, every kernel there is."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from emulation.toolchain import compile_emulation

from gpstoken_diffusers.ops.backend import native
from gpstoken_diffusers.ops.backend.nvrtc import Compiler, find_compiler
from gpstoken_diffusers.ops.backend.run_time_kernels import _LAUNCHER


class Launch(NamedTuple):
    """What the host side asks of a launcher."""

    source: str
    name: str
    blocks: int
    threads: int
    size: int


def compiler_or_skip() -> Compiler:
    """The NVRTC that users of this torch would get."""
    try:
        return find_compiler()
    except OSError as error:
        pytest.skip(f"no NVRTC, which comes with torch for CUDA or as nvidia-cuda-nvrtc-cu12: {error}")


def build_host(folder: Path) -> Path:
    """libgpstoken_nvrtc, as CMake builds it."""
    return compile_emulation("../../csrc/nvrtc_host.cpp", folder / "libgpstoken_nvrtc.so", "-O2", "-ffp-contract=off")


def load_host(path: Path, kind: str = "nvrtc") -> ctypes.CDLL:
    """A library with the C interface of the one for CUDA."""
    library = ctypes.CDLL(str(path))
    for function, arguments in native._SIGNATURES[kind].items():
        getattr(library, function).argtypes = arguments
    return library


def all_launches(host: ctypes.CDLL) -> list[Launch]:
    """One launch of every kernel that the host side can ask for, and of no other."""
    found: dict[str, Launch] = {}

    def launch(source, name, blocks, threads, stream, arguments, size):
        found.setdefault(name, Launch(source.decode(), name.decode(), blocks, threads, size))
        return 0

    launcher = _LAUNCHER(launch)
    host.gpstoken_set_launcher.argtypes, host.gpstoken_set_launcher.restype = [_LAUNCHER], None
    host.gpstoken_set_launcher(launcher)
    try:
        for dtype in range(3):
            for sizes in splat_sizes():
                assert host.gpstoken_splat_forward_cuda(None, None, None, *sizes, 3.0, dtype, None) == 0
                assert host.gpstoken_splat_backward_cuda(*[None] * 5, *sizes, 3.0, dtype, None) == 0
        for batch, tokens in ((1, 4), (3, 100), (1, 1)):
            addresses = [None, 256, None, 256, None, None]
            assert host.gpstoken_partition_cuda(*addresses, batch, 64, 64, tokens, 2, 2.5, None) == 0
    finally:
        host.gpstoken_set_launcher(_LAUNCHER(0))
    return list(found.values())


def splat_sizes() -> Iterator[tuple[int, ...]]:
    """B, N, C, H, W: around every limit at which the host chooses another kernel."""
    for batch, pixels in ((1, 16), (1, 1024), (300, 3)):
        for channels in (1, 4, 5, 8, 9, 16, 17, 32, 33, 100):
            yield batch, 2, channels, pixels, pixels
