"""Compilers for the CUDA sources, a plain one for the host emulation and nvcc; and the C interface."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# Fortified longjmp refuses to go from one fiber's stack to another's.
_EMULATION = ["-std=c++17", *_WARNINGS, "-U_FORTIFY_SOURCE", f"-I{CSRC}", f"-I{HERE}"]


def find_compiler() -> str | None:
    """A C++17 compiler for this machine, or None."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def find_nvcc() -> str | None:
    """nvcc on PATH, below CUDA_HOME, or at its usual place; or None."""
    for folder in (None, os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        found = shutil.which("nvcc") if folder is None else shutil.which(str(Path(folder) / "bin" / "nvcc"))
        if found:
            return found
    return None


def compile_emulation(source: str, target: Path, *options: str) -> Path:
    """Compiles a file of this folder for the host, a library if target ends in .so; RuntimeError."""
    shape = ["-fPIC", "-shared", "-fvisibility=hidden"] if target.suffix == ".so" else []
    command = [str(find_compiler()), *_EMULATION, *shape, *options, "-o", str(target), str(HERE / source)]
    run(command)
    return target


def run(command: list[str]) -> str:
    """Both outputs of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\nended with {done.returncode}:\n{output}")
    return output


class SplatLibrary:
    """Calls gpstoken_splat_{forward,backward}_cuda of a library, the real one or the emulated one.

    Outputs start as NaN, so an element that is not written shows, unless `poison` is false: to measure the
    kernels alone. A launch that fails raises RuntimeError.
    """

    def __init__(self, library: ctypes.CDLL, poison: bool = True) -> None:
        pointer, sizes = ctypes.c_void_p, [ctypes.c_int64] * 5 + [ctypes.c_float, ctypes.c_int]
        library.gpstoken_splat_forward_cuda.argtypes = [pointer] * 3 + sizes + [pointer]
        library.gpstoken_splat_backward_cuda.argtypes = [pointer] * 5 + sizes + [pointer]
        library.gpstoken_cuda_error_string.restype = ctypes.c_char_p
        self.library = library
        self.poison = poison

    def _call(self, function: str, tensors: list[Tensor], sizes: list[int], support: float) -> None:
        image = tensors[2]
        stream = torch.cuda.current_stream(image.device).cuda_stream if image.is_cuda else None
        pointers = [tensor.data_ptr() for tensor in tensors]
        code = getattr(self.library, function)(*pointers, *sizes, support, DTYPE_CODES[image.dtype], stream)
        if code != 0:
            text = self.library.gpstoken_cuda_error_string(code - 1000).decode() if code >= 1000 else "bad argument"
            raise RuntimeError(f"{function} failed with code {code}: {text}")

    def _output(self, tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if self.poison else tensor

    def forward(self, geometry: Tensor, texture: Tensor, height: int, width: int, support: float = 3.0) -> Tensor:
        """(B, N, 5) float32, (B, N, C) -> (B, C, height, width), all dense."""
        batch, count, channels = texture.shape
        out = self._output(texture.new_empty((batch, channels, height, width)))
        sizes = [batch, count, channels, height, width]
        self._call("gpstoken_splat_forward_cuda", [geometry, texture, out], sizes, support)
        return out

    def backward(
        self, geometry: Tensor, texture: Tensor, grad_out: Tensor, support: float = 3.0
    ) -> tuple[Tensor, Tensor]:
        """grad_out (B, C, H, W) -> gradients (B, N, 5) and (B, N, C)."""
        grads = self._output(torch.empty_like(geometry)), self._output(torch.empty_like(texture))
        sizes = [*texture.shape, *grad_out.shape[2:]]
        self._call("gpstoken_splat_backward_cuda", [geometry, texture, grad_out, *grads], sizes, support)
        return grads
