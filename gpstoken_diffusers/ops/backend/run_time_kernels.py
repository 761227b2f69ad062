"""The CUDA kernels of csrc on a machine with a GPU but without nvcc: NVRTC compiles each at its first use.

The host side is the same C++ as in the library that nvcc builds, csrc/*_cuda.cu. Compiled without CUDA
(csrc/nvrtc_host.cpp), it asks for kernels by name. Here they are compiled for the GPU at hand, kept on disk for the
next process, loaded, and queued on torch's current stream.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import kernel_cache
from .cuda_driver import Driver
from .nvrtc import Compiler

__all__ = ["KernelBuilder", "RunTimeKernels"]

logger = logging.getLogger(__name__)

# gpstoken_launcher of csrc/gpstoken_native.h: source, name, blocks, threads, stream, arguments, bytes
_LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_uint,
)

# Takes one kernel out of a file, and checks that the host side knows the size of its arguments.
_PROGRAM = """#include "{source}"
namespace {{
template <class Arguments>
__device__ constexpr unsigned long long bytes_of(void (*)(Arguments)) {{ return sizeof(Arguments); }}
static_assert(bytes_of({name}) == {size}, "libgpstoken_nvrtc was built from other sources: rebuild it");
}}
"""
_OPTIONS = ("--std=c++17",)


class KernelBuilder:
    """Compiled kernels, from disk where they have been compiled before.

    Args:
        sources: folder of the kernels' sources, csrc.
        compiler: what compiles them.
        cache: folder of compiled kernels.

    Attributes:
        compiler, cache: as given.
    """

    def __init__(self, sources: Path, compiler: Compiler, cache: Path = kernel_cache.CACHE) -> None:
        self.compiler = compiler
        self.cache = cache
        self._sources = sources

    def build(self, source: str, name: str, size: int, capability: tuple[int, int]) -> tuple[str, bytes]:
        """A kernel's name in its code, and the code: from disk, or compiled and put there.

        Args:
            source: the file that defines the kernel.
            name: the kernel, a C++ expression.
            size: of its only parameter, in bytes, as the host side has it.
            capability: the device's compute capability.

        Raises:
            RuntimeError: the compiler refuses the source, or no longer knows so old a device.
            OSError: a source is missing.
        """
        program, headers = self._program(source, name, size)
        options = [*_OPTIONS, f"--gpu-architecture={self.compiler.architecture_option(capability)}"]
        inputs = [program, headers, options, name, self.compiler.version]
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        kept = kernel_cache.read_kernel(key, self.cache)
        if kept is not None:
            return kept
        start = time.perf_counter()
        lowered, code, log = self.compiler.compile(program, headers, options, name)
        logger.info("compiled %s in %.1f s (%s)", name, time.perf_counter() - start, log or "no warnings")
        kernel_cache.write_kernel(key, lowered, code, self.cache)
        return lowered, code

    def _program(self, source: str, name: str, size: int) -> tuple[str, dict[str, str]]:
        """What NVRTC is to compile: a program, and the files that it includes by their names."""
        headers: dict[str, str] = {}
        missing = [source]
        while missing:
            file = missing.pop()
            if file not in headers:
                headers[file] = (self._sources / file).read_text(encoding="utf-8")
                missing += re.findall(r'^#include "([^"]+)"', headers[file], re.MULTILINE)
        return _PROGRAM.format(source=source, name=name, size=size), headers


class RunTimeKernels:
    """Has the functions of the library that nvcc builds, and stands in for it.

    They raise RuntimeError if a kernel cannot be compiled, loaded or queued, or if its first use comes while a CUDA
    graph is captured, and OSError if its source is missing.

    Args:
        host: libgpstoken_nvrtc, with the types of its functions set.
        builder: where kernels come from.
        driver: what launches them.

    Attributes:
        builder: as given.
    """

    def __init__(self, host: ctypes.CDLL, builder: KernelBuilder, driver: Driver) -> None:
        self._name = host._name  # as a ctypes.CDLL has it
        self.builder = builder
        self._host, self._driver = host, driver
        self._lock = threading.Lock()
        self._functions: dict[tuple[int, bytes], int] = {}  # by context and name
        self._failure = threading.local()
        self._launcher = _LAUNCHER(self._launch)  # ctypes does not keep what it passes on
        host.gpstoken_set_launcher.argtypes, host.gpstoken_set_launcher.restype = [_LAUNCHER], None
        host.gpstoken_set_launcher(self._launcher)

    def __getattr__(self, function: str) -> Callable[..., object]:
        called = getattr(self._host, function)

        def call(*arguments: object) -> object:
            self._failure.error = None
            result = called(*arguments)
            error, self._failure.error = self._failure.error, None
            if error is not None:
                raise error
            return result

        setattr(self, function, call)
        return call

    def _launch(
        self, source: bytes, name: bytes, blocks: int, threads: int, stream: int | None, arguments: int, size: int
    ) -> int:
        try:
            key = (self._driver.enter(), name)
            function = self._functions.get(key) or self._load(key, source.decode(), size)
            self._driver.launch(function, blocks, threads, stream, arguments)
        except BaseException as error:  # ctypes would print and forget it; the caller raises it
            self._failure.error = error
            return 1
        return 0

    def _load(self, key: tuple[int, bytes], source: str, size: int) -> int:
        name = key[1].decode()
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{name} has not run on this GPU yet: call the operation once before a CUDA graph is captured, "
                "so that its kernel is there."
            )
        with self._lock:  # threads that wait for the same kernel find it made
            if key not in self._functions:
                try:
                    lowered, code = self.builder.build(source, name, size, torch.cuda.get_device_capability())
                    self._functions[key] = self._driver.load(code, lowered)
                except RuntimeError as error:
                    raise RuntimeError(f"{error}\nGPSTOKEN_BACKEND=reference works without this kernel.") from error
            return self._functions[key]
