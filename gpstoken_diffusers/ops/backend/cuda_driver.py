"""NVIDIA's driver, through its public C interface: loading compiled kernels and queueing them beside torch's own."""

from __future__ import annotations

import ctypes
import sys

import torch

__all__ = ["Driver"]

_INT_AT = ctypes.POINTER(ctypes.c_int)
_POINTER, _UNSIGNED = ctypes.c_void_p, ctypes.c_uint

# Arguments of the functions that are used; each returns an int, 0 if it went well.
_SIGNATURES: dict[str, list[type]] = {
    "cuGetErrorString": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    "cuCtxGetCurrent": [_POINTER],
    "cuCtxSetCurrent": [_POINTER],
    "cuCtxGetDevice": [_INT_AT],
    "cuDeviceGet": [_INT_AT, ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [_POINTER, ctypes.c_int],
    "cuModuleLoadData": [_POINTER, ctypes.c_char_p],
    "cuModuleGetFunction": [_POINTER, _POINTER, ctypes.c_char_p],
    "cuLaunchKernel": [_POINTER] + [_UNSIGNED] * 7 + [_POINTER] * 3,
}


class Driver:
    """The driver's library. Loading it touches no GPU; the methods need that torch works on one already.

    Args:
        path: the file; by default the one of the system.

    Raises:
        OSError: it cannot be loaded: there is no NVIDIA driver, or one without CUDA.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path or ("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        try:
            self._library = ctypes.CDLL(self.path)
            for name, arguments in _SIGNATURES.items():
                getattr(self._library, name).argtypes = arguments
        except (OSError, AttributeError) as error:
            raise OSError(f"NVIDIA's driver cannot be loaded ({error})") from error
        self._devices: dict[int, int] = {}  # torch's number of a context's device
        self._primary: dict[int, int] = {}  # and the other way round

    def enter(self) -> int:
        """The context to work in: the thread's, if it is one of torch's current device, else that one's primary one.

        The latter is what torch itself works in. It becomes the thread's, as after any other of torch's calls: a thread
        that has only just begun may have none, and another library may have left its own.

        Raises:
            RuntimeError: the driver reports an error.
        """
        device = torch.cuda.current_device()
        context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        if context.value is not None and self._devices.get(context.value) == device:
            return context.value
        handle, found = ctypes.c_int(), ctypes.c_int(-1)
        self._call("cuDeviceGet", ctypes.byref(handle), device)
        if context.value is not None:
            self._call("cuCtxGetDevice", ctypes.byref(found))
        if found.value != handle.value:
            if device not in self._primary:
                self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
                self._primary[device] = context.value
            context = ctypes.c_void_p(self._primary[device])
            self._call("cuCtxSetCurrent", context)
        self._devices[context.value] = device
        return context.value

    def load(self, code: bytes, name: str) -> int:
        """Loads a cubin or PTX for the context, for good, and returns a handle of one of its kernels.

        RuntimeError if the driver refuses it.
        """
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), code)
        self._call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        return function.value

    def launch(self, function: int, blocks: int, threads: int, stream: int | None, arguments: int) -> None:
        """Queues a kernel with one parameter, which lies at the address `arguments`; RuntimeError.

        stream: a handle, as torch.cuda.Stream.cuda_stream; None or 0 for the default one.
        """
        parameters = (ctypes.c_void_p * 1)(arguments)
        self._call("cuLaunchKernel", function, blocks, 1, 1, threads, 1, 1, 0, stream, parameters, None)

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._library, function)(*arguments)
        if code != 0:
            words = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(words))
            text = "unknown error" if words.value is None else words.value.decode()
            raise RuntimeError(f"{function} failed with code {code} (CUDA: {text}).")
