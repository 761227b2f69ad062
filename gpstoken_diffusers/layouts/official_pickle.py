"""Reads the official `initg.pickle`, lists of float arrays by class, and nothing else that a pickle can hold.

A pickle is a program that calls what it names, with arguments of its choice. So the standard library's unpickler is
cut down here: to the instructions of such a file, and to the names by which NumPy writes arrays. Those names stand for
the code below, because NumPy's own believes its arguments: it allocates any shape and takes any dtype. Here an array is
a view of bytes that are in the file, however often it repeats them, so that memory grows with the size of the file
alone. The unpickler in Python is used because it lets its instructions be chosen; the one in C also reserves memory for
whatever place in its memo a file names.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import struct
from typing import Any, BinaryIO

import numpy as np

LARGEST_FILE = 16 << 30  # 1.3 million layouts of 128 tokens with all 21 channels, once for each picture of ImageNet

_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NONE NEWTRUE "
    "NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE SHORT_BINUNICODE SHORT_BINBYTES BINBYTES BINBYTES8 "
    "EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND APPENDS EMPTY_DICT"
)


class _Refused(ValueError):
    """The file holds what it should not; the message completes "expected ..., but"."""


def read_official_layouts(path: str | os.PathLike) -> dict[int | str, list[np.ndarray]]:
    """The lists of number arrays by class in a pickle of protocol 3 to 5; nothing in the file is executed.

    Returns: arrays of any shape, read-only.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file holds anything else, is damaged, or larger than 16 GiB.
    """
    expected = f"{path}: expected the official initg.pickle, a dict of lists of float arrays by class, but"
    with open(path, "rb") as file:
        try:
            return _listed(_Reader(file).load())
        except OSError:
            raise
        except _Refused as error:
            raise ValueError(f"{expected} {error}. Nothing in it was run.") from error
        except Exception as error:  # a damaged file can end the unpickler in almost any of them
            what = f"{type(error).__name__} {_shown(error)}".strip()
            raise ValueError(f"{expected} it is truncated or damaged ({what}).") from error


def _listed(data: Any) -> dict[int | str, list[np.ndarray]]:
    if type(data) is not dict or not data or not all(type(arrays) is list for arrays in data.values()):
        raise _Refused("it holds something else")
    for name, arrays in data.items():
        for i, array in enumerate(arrays):
            if not isinstance(array, _Array):
                raise _Refused(f"entry {i} of class {_shown(name)} is a {type(array).__name__}, not an array")
    return {name: [array.value for array in arrays] for name, arrays in data.items()}


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


class _Dtype:
    """A dtype of plain numbers in the making: first its code, then its byte order."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if type(code) is not str or not re.fullmatch("[fiu][248]|[iu]1", code):
            # Text alone is shown: a few bytes of lists within lists can take forever to print.
            raise _Refused(f"it holds the dtype {_shown(code) if type(code) is str else type(code).__name__!r}")
        self.value = np.dtype(code)

    def build(self, state: tuple) -> None:
        version, order, *rest = state
        if version != 3 or order not in ("<", ">", "|") or rest != [None, None, None, -1, -1, 0]:
            raise _Refused("it holds a dtype with fields, a shape or metadata")
        self.value = self.value.newbyteorder(order)


class _Array:
    """An array in the making: it can be referred to before `build` brings its contents."""

    def __init__(self, kind: Any = None, shape: Any = None, dtype: Any = None) -> None:  # NumPy's dummies
        self.value = np.empty(0)

    def build(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, contents = state
        sizes = shape if type(shape) is tuple and len(shape) <= 32 else (None,)
        fits = isinstance(dtype, _Dtype) and type(contents) is bytes and all(type(n) is int and n >= 0 for n in sizes)
        if not fits or math.prod(sizes) * dtype.value.itemsize != len(contents):
            raise _Refused("it holds an array whose shape, dtype and contents do not fit")
        self.value = np.frombuffer(contents, dtype.value).reshape(shape, order="F" if is_fortran else "C")


def _from_buffer(contents: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.build((1, shape, dtype, order == "F", contents))
    return array


def _scalar(dtype: Any, contents: Any) -> int | float:
    return _from_buffer(contents, dtype, (), "C").value.item()


_FUNCTIONS = {("numpy", "dtype"): _Dtype, ("numpy", "ndarray"): "the only kind"}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _FUNCTIONS[f"{_core}.multiarray", "_reconstruct"] = _Array
    _FUNCTIONS[f"{_core}.multiarray", "scalar"] = _scalar
    _FUNCTIONS[f"{_core}.numeric", "_frombuffer"] = _from_buffer


class _Reader(pickle._Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_FILE:
            raise _Refused(f"it is larger than {LARGEST_FILE >> 30} GiB")
        self._file_read = lambda count: file.read(min(count, size))  # room is made before anything is read

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _FUNCTIONS:
            raise _Refused(f"it asks for {_shown(f'{module}.{name}')!r}")
        return _FUNCTIONS[module, name]

    def persistent_load(self, name: Any) -> Any:
        raise _Refused("it refers to another file")

    def load(self) -> Any:
        value = super().load()
        if self.read(1):
            raise _Refused("more bytes follow its end")
        return value

    def refuse(self) -> None:
        raise _Refused("it holds instructions that no such file needs")

    def build(self) -> None:
        """State for what is being made, and nothing else: Python's own sets attributes of any object."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (_Dtype, _Array)):
            self.refuse()
        self.stack[-1].build(state)

    def bytes_of_array(self) -> None:
        """Python's own clears as much memory as the file claims."""
        self.append(self.read(struct.unpack("<Q", self.read(8))[0]))

    def set_items(self, items: list[Any] | None = None) -> None:
        """Classes are keys. Tuples are not: the hash of a deeply nested one would overflow the stack."""
        items = self.pop_mark() if items is None else items
        for name, arrays in zip(items[::2], items[1::2], strict=True):
            if type(name) not in (int, str):
                raise _Refused(f"it has a class that is a {type(name).__name__}, not an integer or text")
            self.stack[-1][name] = arrays

    def set_item(self) -> None:
        items = [self.stack.pop(), self.stack.pop()]
        self.set_items(items[::-1])

    dispatch = dict.fromkeys(range(256), refuse)
    for _name in _INSTRUCTIONS.split():
        _code = getattr(pickle, _name)[0]
        dispatch[_code] = pickle._Unpickler.dispatch[_code]
    dispatch |= {pickle.BUILD[0]: build, pickle.BYTEARRAY8[0]: bytes_of_array}
    dispatch |= {pickle.SETITEM[0]: set_item, pickle.SETITEMS[0]: set_items}
