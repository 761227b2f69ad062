"""NVRTC, NVIDIA's compiler for CUDA sources in memory, through its public C interface.

It comes with PyTorch for CUDA and needs neither a GPU nor a driver. By ctypes, because torch brings the package
cuda-bindings to Linux alone, and only its later versions do.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

__all__ = ["Compiler", "find_compiler"]

_STRINGS = ctypes.POINTER(ctypes.c_char_p)
_SIZE_AT = ctypes.POINTER(ctypes.c_size_t)
_INT_AT = ctypes.POINTER(ctypes.c_int)

# Arguments of the functions that are used; each returns an int, 0 if it went well.
_SIGNATURES: dict[str, list[type]] = {
    "nvrtcVersion": [_INT_AT, _INT_AT],
    "nvrtcGetNumSupportedArchs": [_INT_AT],
    "nvrtcGetSupportedArchs": [_INT_AT],
    "nvrtcCreateProgram": [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, _STRINGS, _STRINGS],
    "nvrtcDestroyProgram": [ctypes.c_void_p],
    "nvrtcAddNameExpression": [ctypes.c_void_p, ctypes.c_char_p],
    "nvrtcCompileProgram": [ctypes.c_void_p, ctypes.c_int, _STRINGS],
    "nvrtcGetLoweredName": [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    "nvrtcGetProgramLogSize": [ctypes.c_void_p, _SIZE_AT],
    "nvrtcGetProgramLog": [ctypes.c_void_p, ctypes.c_char_p],
    "nvrtcGetCUBINSize": [ctypes.c_void_p, _SIZE_AT],
    "nvrtcGetCUBIN": [ctypes.c_void_p, ctypes.c_char_p],
    "nvrtcGetPTXSize": [ctypes.c_void_p, _SIZE_AT],
    "nvrtcGetPTX": [ctypes.c_void_p, ctypes.c_char_p],
}
_COMPILATION_FAILED = 6  # the one result that the log explains


class Compiler:
    """One NVRTC library.

    Args:
        path: the file, or a name that the system's loader finds.

    Attributes:
        path: as given.
        version: major and minor, as (13, 2).
        architectures: compute capabilities that it compiles for, rising, as 90 for sm_90.

    Raises:
        OSError: it cannot be loaded, or lacks functions (NVRTC before 11.2 does).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        try:
            for name, arguments in _SIGNATURES.items():
                getattr(self._library, name).argtypes = arguments
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        except AttributeError as error:
            raise OSError(f"{self.path} is not NVRTC 11.2 or later ({error})") from error
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        self.architectures = tuple(sorted(numbers))

    def __str__(self) -> str:
        return f"NVRTC {self.version[0]}.{self.version[1]} ({self.path})"

    def architecture_option(self, capability: tuple[int, int]) -> str:
        """What to compile for a device: machine code for just it, or else portable code that the driver translates.

        Args:
            capability: the device's compute capability, as (9, 0).

        Returns:
            "sm_90", or for a device that came after this NVRTC, "compute_" and the newest that it knows.

        Raises:
            RuntimeError: this NVRTC no longer compiles for so old a device.
        """
        wanted = 10 * capability[0] + capability[1]
        if wanted in self.architectures:
            return f"sm_{wanted}"
        older = [number for number in self.architectures if number < wanted]
        if older:
            return f"compute_{older[-1]}"
        raise RuntimeError(
            f"{self} compiles for compute capability {self.architectures[0] / 10} or later, "
            f"and this GPU has {wanted / 10}."
        )

    def compile(
        self, source: str, headers: Mapping[str, str], options: Sequence[str], name: str
    ) -> tuple[str, bytes, str]:
        """Compiles a program.

        Args:
            source: its text.
            headers: what it includes, by name: NVRTC reads no file.
            options: as nvcc's; "--gpu-architecture=" and what [`architecture_option`] gives is among them.
            name: a C++ expression that names the kernel to keep, a template's arguments included.

        Returns:
            The name of that kernel in the compiled code; the code, a cubin for an "sm_" architecture and PTX for a
            "compute_" one; and the compiler's log, with its warnings.

        Raises:
            RuntimeError: it cannot be compiled; the message holds the compiler's own.
        """
        encoded = [option.encode() for option in options]
        with self._program(source, headers) as program:
            self._call("nvrtcAddNameExpression", program, name.encode())
            array = (ctypes.c_char_p * len(encoded))(*encoded)
            code = self._library.nvrtcCompileProgram(program, len(encoded), array)
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            if code != 0:
                explanation = log if code == _COMPILATION_FAILED else f"{self._words(code)}\n{log}".strip()
                raise RuntimeError(f"{self} cannot compile {name}:\n{explanation}")
            lowered = ctypes.c_char_p()
            self._call("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(lowered))
            kind = "CUBIN" if any("=sm_" in option for option in options) else "PTX"
            return lowered.value.decode(), self._read(program, kind), log

    @contextlib.contextmanager
    def _program(self, source: str, headers: Mapping[str, str]) -> Iterator[ctypes.c_void_p]:
        strings = ctypes.c_char_p * len(headers)
        texts, names = strings(*map(str.encode, headers.values())), strings(*map(str.encode, headers))
        program = ctypes.c_void_p()
        address = ctypes.byref(program)
        self._call("nvrtcCreateProgram", address, source.encode(), b"program.cu", len(headers), texts, names)
        try:
            yield program
        finally:
            self._library.nvrtcDestroyProgram(address)

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, data)
        return data.raw

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._library, function)(*arguments)
        if code != 0:
            raise RuntimeError(f"{function} failed with code {code} ({self._words(code)}).")

    def _words(self, code: int) -> str:
        return self._library.nvrtcGetErrorString(code).decode()


def find_compiler() -> Compiler:
    """The NVRTC of the CUDA version that torch was built for: its driver takes that one's code.

    Looked for among Python's packages first, in torch's own folder next, then where the system keeps libraries.

    Raises:
        OSError: torch is not built for CUDA, there is no such library, or none can be loaded; says how to get one.
    """
    if torch.version.cuda is None:
        raise OSError("this torch is not built for CUDA")
    major = torch.version.cuda.partition(".")[0]
    failures = []
    for path in _candidates(major):
        try:
            return Compiler(path)
        except OSError as error:
            failures.append(str(error))
    package = f"nvidia-cuda-nvrtc-cu{major}" if int(major) < 13 else f"'nvidia-cuda-nvrtc=={major}.*'"
    raise OSError(f"NVRTC {major} cannot be loaded ({'; '.join(failures)}): pip install {package}")


def _candidates(major: str) -> Iterator[str | Path]:
    windows = sys.platform == "win32"
    soname = "libnvrtc.so." + ("11.2" if major == "11" else major)  # all of CUDA 11 from 11.2 on have this name
    pattern = f"nvrtc64_{major}*_0.dll" if windows else soname
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages.submodule_search_locations or ()) if packages else ():
        yield from sorted(Path(folder).glob(f"*/bin/**/{pattern}" if windows else f"*/lib/{pattern}"))
    yield from sorted((Path(torch.__file__).parent / "lib").glob(pattern))
    yield f"nvrtc64_{major}0_0.dll" if windows else soname
