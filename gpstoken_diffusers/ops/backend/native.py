"""Finds, loads and explains the native libraries. No other module knows where they lie.

They have a C interface (csrc/gpstoken_native.h), are built by CMake while pip installs, and lie in the package's `lib`
folder. Everything works without them, more slowly, on the references (`ops/*_reference.py`). Where nvcc was missing,
NVRTC compiles the CUDA kernels when they are first used (`ops/backend/run_time_kernels.py`).

    python -m gpstoken_diffusers.ops.backend.native      prints which backends exist and which one each op uses

The environment variable GPSTOKEN_BACKEND=reference goes without native code; GPSTOKEN_BACKEND=nvrtc goes without the
library that nvcc built.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import logging
import os
import platform
import sys
from pathlib import Path

import torch

import gpstoken_diffusers

from .cuda_driver import Driver
from .nvrtc import find_compiler
from .run_time_kernels import KernelBuilder, RunTimeKernels

__all__ = ["announce_fallback", "call", "doctor", "dtype_code", "library", "reference_forced", "why_missing"]

logger = logging.getLogger(__name__)

ABI_VERSION = 4  # GPSTOKEN_ABI_VERSION of csrc/gpstoken_native.h
BACKEND_VARIABLE = "GPSTOKEN_BACKEND"

_FOLDER = Path(gpstoken_diffusers.__file__).resolve().parent

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_FLOAT, _DOUBLE = ctypes.c_float, ctypes.c_double
_SPLAT_SIZES = [_SIZE] * 5 + [_FLOAT, _INT]  # B, N, C, H, W, support, dtype
_PIXEL_NORM = [_SIZE] * 2 + [_FLOAT] + [_INT] * 3  # P, C, eps, silu, dtype, num_threads
_GROUP_NORM = [_SIZE] * 5 + [_INT] * 3  # B, H, W, C, G, silu, dtype, num_threads
_ROI_ALIGN = [_SIZE] * 6 + [_FLOAT] + [_INT] * 2  # B, H, W, C, N, bins, scale, dtype, num_threads

# Arguments of every function of the C interface that returns a result code, in the header's order.
_SIGNATURES: dict[str, dict[str, list[type]]] = {
    "cpu": {
        "gpstoken_splat_forward_cpu": [_POINTER] * 3 + _SPLAT_SIZES + [_INT],
        "gpstoken_splat_backward_cpu": [_POINTER] * 5 + _SPLAT_SIZES + [_INT],
        "gpstoken_partition_cpu": [_POINTER] * 3 + [_SIZE] * 4 + [_INT, _DOUBLE, _INT],
        "gpstoken_partition_error_cpu": [_POINTER] * 3 + [_SIZE] * 5 + [_INT] * 2,
        "gpstoken_roi_align_cpu": [_POINTER] * 3 + _ROI_ALIGN,
        "gpstoken_roi_align_backward_cpu": [_POINTER] * 3 + _ROI_ALIGN,
        "gpstoken_pixel_norm_cpu": [_POINTER] * 4 + _PIXEL_NORM,
        "gpstoken_pixel_norm_backward_cpu": [_POINTER] * 7 + _PIXEL_NORM,
        "gpstoken_group_statistics_cpu": [_POINTER] * 3 + [_SIZE] * 7 + [_INT] * 2,
        "gpstoken_group_norm_cpu": [_POINTER] * 6 + _GROUP_NORM,
        "gpstoken_tile_norm_cpu": [_POINTER] * 9 + [_SIZE] * 6 + [_FLOAT] + [_INT] * 3,
        "gpstoken_group_norm_backward_cpu": [_POINTER] * 10 + _GROUP_NORM,
    },
    "cuda": {
        "gpstoken_splat_forward_cuda": [_POINTER] * 3 + _SPLAT_SIZES + [_POINTER],
        "gpstoken_splat_backward_cuda": [_POINTER] * 5 + _SPLAT_SIZES + [_POINTER],
        "gpstoken_partition_terms_cuda": [_POINTER],
        "gpstoken_partition_scratch_cuda": [_SIZE] * 4 + [_INT] * 2 + [_POINTER],
        "gpstoken_partition_cuda": [_POINTER] * 6 + [_SIZE] * 4 + [_INT, _DOUBLE, _POINTER],
    },
}

# What the remaining functions return: they describe the library.
_ANSWERS: dict[str, dict[str, type]] = {
    "cpu": {"gpstoken_cpu_isa": ctypes.c_char_p, "gpstoken_partition_evaluations_cpu": _SIZE},
    "cuda": {"gpstoken_cuda_error_string": ctypes.c_char_p},
}

# The host side of the CUDA library, with kernels that NVRTC compiles: the same interface.
_SIGNATURES["nvrtc"], _ANSWERS["nvrtc"] = _SIGNATURES["cuda"], _ANSWERS["cuda"]
_STAND_INS = {"cuda": ("cuda", "nvrtc")}  # what can serve as a library, the first choice first

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_RESULTS = {
    1: "invalid argument",
    2: "unsupported dtype",
    3: "out of memory",
    4: "too many tokens",
}
_CUDA_ERROR = 1000

# The native libraries that can serve an op on each kind of device, the fastest first; with none there is only
# the reference. The cpu library serves other devices by way of host memory.
_OPS: dict[str, dict[str, tuple[str, ...]]] = {
    "splat_gaussians": {"cpu": ("cpu",), "cuda": ("cuda",), "mps": ()},
    "group_norm": {"cpu": ("cpu",), "cuda": (), "mps": ()},
    "pixel_norm": {"cpu": ("cpu",), "cuda": (), "mps": ()},
    "roi_align": {"cpu": ("cpu",), "cuda": (), "mps": ()},
    "partition_image": {"cpu": ("cpu",), "cuda": ("cuda", "cpu"), "mps": ("cpu",)},
}

_announced: set[tuple[str, str]] = set()


def reference_forced() -> bool:
    """Whether GPSTOKEN_BACKEND asks for the references. ValueError for an unknown value."""
    return _backend() == "reference"


def _backend() -> str:
    value = os.environ.get(BACKEND_VARIABLE, "") or "auto"
    if value not in ("auto", "nvrtc", "reference"):
        raise ValueError(f"{BACKEND_VARIABLE}={value!r}: expected 'auto' (or unset), 'nvrtc' or 'reference'.")
    return value


def library(kind: str) -> ctypes.CDLL | RunTimeKernels | None:
    """The loaded native library "cpu" or "cuda"; None if not built, not loadable, or switched off.

    For "cuda" it is the one that nvcc built, else "nvrtc", which has the same functions.
    """
    for candidate in _STAND_INS.get(kind, (kind,)):
        lib = _find(candidate)[0]
        if lib is not None:
            return lib
    return None


def why_missing(kind: str) -> str:
    """Why `library(kind)` is None, in one line; "" if it is there."""
    if library(kind) is not None:
        return ""
    return "; ".join(dict.fromkeys(_find(candidate)[1] for candidate in _STAND_INS.get(kind, (kind,))))


def dtype_code(dtype: torch.dtype) -> int | None:
    """The C interface's number of an element type; None for those that only the references take."""
    return _DTYPE_CODES.get(dtype)


def call(kind: str, function: str, *arguments: object) -> None:
    """Calls a function of a library; RuntimeError with its name and the cause if it fails."""
    lib = library(kind)
    if lib is None:
        raise RuntimeError(f"{function}: the {kind} library is not available ({why_missing(kind)}).")
    code = getattr(lib, function)(*arguments)
    if code == 0:
        return
    if code >= _CUDA_ERROR:
        text = "CUDA: " + lib.gpstoken_cuda_error_string(code - _CUDA_ERROR).decode()
    else:
        text = _RESULTS.get(code, "unknown error")
    raise RuntimeError(f"{function} failed with code {code} ({text}).")


def announce_fallback(op: str, device: str) -> None:
    """Logs, once per op and device, which missing native library would make it faster."""
    kinds = _OPS[op].get(device, ())
    if not kinds or reference_forced() or (op, device) in _announced:
        return
    _announced.add((op, device))
    message = "%s on %s runs on %s, which is slower: %s. %s `gpstoken doctor` shows all backends."
    found = _first_there(kinds)
    runs_on = f"the {found} library" if found else "the Python reference"
    logger.warning(message, op, device, runs_on, why_missing(kinds[0]), _remedy(kinds[0]))


def _first_there(kinds: tuple[str, ...]) -> str | None:
    return next((kind for kind in kinds if library(kind) is not None), None)


def doctor() -> str:
    """Which backends exist, which one each op uses on each device, and how to get the faster ones."""
    lines = [
        f"gpstoken_diffusers {_version('gpstoken_diffusers')} at {_FOLDER}",
        f"  Python {platform.python_version()} on {platform.system()} {platform.machine()}; "
        + ", ".join(f"{name} {_version(name)}" for name in ("torch", "torchvision", "diffusers", "transformers")),
        f"  devices: {', '.join(_devices())}; CPU threads: {torch.get_num_threads()} (torch.set_num_threads)",
        "",
        "native libraries",
    ]
    for kind in _SIGNATURES:
        lib, reason = _find(kind)
        if lib is None:
            lines.append(f"  {kind:<5} missing: {reason}")
            lines += [f"        {advice}" for advice in _advice(kind)]
        elif kind == "cpu":
            lines.append(f"  {kind:<5} {lib._name}, instruction set: {lib.gpstoken_cpu_isa().decode()}")
        elif kind == "nvrtc":
            lines.append(f"  {kind:<5} {lib._name}, {lib.builder.compiler}, compiled kernels in {lib.builder.cache}")
        else:
            lines.append(f"  {kind:<5} {lib._name}")
    lines += ["", "which implementation runs"]
    for op, kinds in _OPS.items():
        for device in _devices():
            found = _first_there(kinds[device])
            text = f"native ({_described(found)})" if found else "Python reference"
            lines.append(f"  {op:<16} on {device:<5} {text}{'' if kinds[device] else ' (no native version)'}")
    return "\n".join(lines)


def _described(kind: str) -> str:
    return "kernels compiled by NVRTC" if isinstance(library(kind), RunTimeKernels) else f"{kind} library"


def _advice(kind: str) -> list[str]:
    """What to do about a missing library, unless the reason already says it."""
    if kind != "cpu" and not torch.cuda.is_available():
        return ["Not needed: torch sees no CUDA device."]
    if kind == "nvrtc" and _find("cuda")[0] is not None:
        return ["Not needed: the cuda library is there."]
    built = kind == "nvrtc" and _open(kind)[0] is not None  # then it is NVRTC or a driver that is missing
    return [] if built and not _switched_off(kind) else [_remedy(kind)]


def _devices() -> list[str]:
    """The kinds of device that this process can use."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _remedy(kind: str) -> str:
    """What to do to get a native library."""
    if _switched_off(kind):
        return f"Unset {BACKEND_VARIABLE}."
    needs = "a C++17 compiler and CUDA's nvcc (CUDA_HOME)" if kind == "cuda" else "a C++17 compiler"
    root = _FOLDER.parent
    if (root / "CMakeLists.txt").exists():
        where = str(root)
        command = (
            "cmake -S . -B build -G Ninja && cmake --build build && cmake --install build --prefix gpstoken_diffusers"
        )
    else:
        where, command = "the source folder", "pip install --force-reinstall --no-deps --no-cache-dir ."
    return f"To get it, install {needs}, then run in {where}: `{command}`."


def _file_name(kind: str) -> str:
    if sys.platform == "win32":
        return f"gpstoken_{kind}.dll"
    return f"libgpstoken_{kind}.{'dylib' if sys.platform == 'darwin' else 'so'}"


def _switched_off(kind: str) -> bool:
    return _backend() == "reference" or (_backend() == "nvrtc" and kind == "cuda")


def _find(kind: str) -> tuple[ctypes.CDLL | RunTimeKernels | None, str]:
    """(library, "") or (None, reason), of this kind alone."""
    if _switched_off(kind):
        return None, f"switched off by {BACKEND_VARIABLE}={_backend()}"
    return _load(kind)


@functools.cache
def _load(kind: str) -> tuple[ctypes.CDLL | RunTimeKernels | None, str]:
    """(library, "") or (None, reason), whatever GPSTOKEN_BACKEND says."""
    if kind not in _SIGNATURES:
        raise ValueError(f"native library {kind!r}: expected one of {', '.join(_SIGNATURES)}.")
    lib, reason = _open(kind)
    if lib is None or kind != "nvrtc":
        return lib, reason
    try:
        return RunTimeKernels(lib, KernelBuilder(_sources(), find_compiler()), Driver()), ""
    except (OSError, RuntimeError) as error:
        return None, str(error)


def _sources() -> Path:
    """csrc: of an installed package in its folder, of a checkout beside it. FileNotFoundError."""
    roots = [Path(root) for root in dict.fromkeys(gpstoken_diffusers.__path__)]
    for folder in [root / "csrc" for root in roots] + [root.parent / "csrc" for root in roots]:
        if (folder / "splat_forward.cuh").is_file():
            return folder
    raise FileNotFoundError("the kernels' sources (csrc) are not part of this installation: install it again")


def _open(kind: str) -> tuple[ctypes.CDLL | None, str]:
    """(library, "") or (None, reason). Searches all folders of the package: editable installs have several."""
    name = _file_name(kind)
    folders = [Path(root) / "lib" for root in dict.fromkeys(gpstoken_diffusers.__path__)]
    reason = f"{name} was not built (looked in {', '.join(map(str, folders))})"
    for path in (folder / name for folder in folders):
        if not path.exists():
            continue
        try:
            lib = ctypes.CDLL(str(path))
            found = lib.gpstoken_abi_version()
            if found != ABI_VERSION:
                reason = f"{path} has interface {found}, expected {ABI_VERSION}: rebuild it"
                continue
            for function, arguments in _SIGNATURES[kind].items():
                getattr(lib, function).argtypes = arguments
            for function, answer in _ANSWERS[kind].items():
                getattr(lib, function).restype = answer
        except (OSError, AttributeError) as error:
            reason = f"{path} cannot be loaded ({error})"
            continue
        return lib, ""
    return None, reason


if __name__ == "__main__":
    print(doctor())
