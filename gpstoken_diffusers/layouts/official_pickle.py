"""Reads pickles of plain data without executing anything in them.

A pickle is a program that may call any function. This reader is an interpreter of its own for the few instructions
that plain data need: containers, strings, numbers, and NumPy arrays and scalars of numbers. Names in the file are
compared with a list and never looked up; nothing named in it is imported or called; no object gets state of the
file's choosing. Everything else is refused by its name. Python's unpickler takes no part, `pickletools.genops` only
cuts the bytes into instructions.
"""

from __future__ import annotations

import math
import os
import pickletools
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["parse_pickle", "read_pickle"]

DEEPEST_NESTING = 100
# The old format of torch.save begins with a pickle of nothing but this number; more pickles follow.
_TORCH_LEGACY_START = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
_TORCH_ADVICE = (
    "This is a checkpoint of torch.save. Where you trust it, load it with torch.load(path, weights_only=True) and "
    "write its tensors with safetensors.torch.save_file."
)
_NUMBER_CODE = re.compile(r"b1|[iu][1248]|f[248]|c8|c16")
_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # NumPy 1 and 2
_BUFFER_MODULES = ("numpy.core.numeric", "numpy._core.numeric")
_BUILTIN_MODULES = ("builtins", "__builtin__")
_FUNCTIONS = {
    **{(module, "_reconstruct"): "array" for module in _ARRAY_MODULES},
    **{(module, "scalar"): "scalar" for module in _ARRAY_MODULES},
    **{(module, "_frombuffer"): "frombuffer" for module in _BUFFER_MODULES},
    **{(module, "set"): "set" for module in _BUILTIN_MODULES},
    **{(module, "frozenset"): "frozenset" for module in _BUILTIN_MODULES},
    **{(module, "bytes"): "no_bytes" for module in _BUILTIN_MODULES},
    ("_codecs", "encode"): "encode",
    ("numpy", "dtype"): "dtype",
    ("numpy", "ndarray"): "ndarray",
}
_Atom = (type(None), bool, int, float, str, bytes, np.generic)


class _Function:
    """Stands for an allowed name of the file; holds nothing that could be called."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Dtype:
    """A dtype in the making: first its code, then, by BUILD, its byte order."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.value: np.dtype | None = None


class _Array:
    """An array in the making: it exists, and is referred to, before BUILD brings its contents."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None


class _Refused(ValueError):
    """What the file wants is not on the list; the message says what it was."""


def read_pickle(path: str | os.PathLike) -> Any:
    """The plain data in a pickle file, protocols 2 to 5; nothing in the file is executed.

    Returns:
        dict, list, tuple, set, frozenset, str, bytes, bytearray, int, float, bool, None, NumPy scalars
        and arrays of booleans, integers, floats or complex numbers, nested up to 100 deep. Arrays are
        read-only views of the file's bytes.
        Keys of dicts and members of sets are single values, or tuples of such.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file asks for anything else (the message names it), contains itself, is truncated or
            damaged, claims arrays larger than the bytes it holds, or is a checkpoint of torch.save.
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        return parse_pickle(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_pickle(data: bytes) -> Any:
    """`read_pickle` of bytes in memory."""
    if not data:
        raise ValueError("the file is empty (0 bytes).")
    if data.startswith(b"PK\x03\x04") or (
        data.startswith(_TORCH_LEGACY_START) and len(data) > len(_TORCH_LEGACY_START)
    ):
        raise ValueError(_TORCH_ADVICE)
    if data[0] != 0x80 or data[1:2] not in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise ValueError("not a pickle of protocol 2 to 5. Write it again with pickle.dump(data, file, protocol=4).")
    try:
        return _Reader(data).read()
    except _Refused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        # Whatever a random byte can do to the stack, the memo or an argument's form ends here.
        raise ValueError(f"the pickle is truncated or damaged ({error}).") from error


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise _Refused(f"refused: {what}. Only containers, text, numbers and NumPy arrays of numbers are read.")


class _Reader:
    """The stack machine: one method for each kind of instruction."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}
        self.allowance = len(data)  # items that may be copied: each is in an honest file once

    def read(self) -> Any:
        for opcode, argument, position in pickletools.genops(self.data):
            if opcode.name == "STOP":
                rest = len(self.data) - position - 1
                _need(rest == 0, f"{rest} bytes after the end of the pickle")
                value = self.stack.pop()
                if self.stack or self.marked:
                    raise ValueError("values left over at its end")
                return self.finish(value)
            if opcode.name in _PUSHED:
                self.stack.append(argument)
            elif opcode.name in _INSTRUCTIONS:
                _INSTRUCTIONS[opcode.name](self, argument)
            elif opcode.name in ("PERSID", "BINPERSID"):
                raise _Refused(f"refused: the instruction {opcode.name}, a reference to another file. {_TORCH_ADVICE}")
            else:
                _need(False, f"the instruction {opcode.name} at byte {position}")
        raise ValueError("no end")  # not reached: genops raises first

    # Stack and memo

    def mark(self, _: None) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    # Containers

    def make_tuple(self, _: None) -> None:
        items = tuple(self.pop_to_mark())
        self.stack.append(items)

    def append(self, _: None) -> None:
        item = self.stack.pop()
        self.top(list).append(item)

    def appends(self, _: None) -> None:
        items = self.pop_to_mark()
        self.top(list).extend(items)

    def set_item(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.top(dict)[_key(key)] = value

    def set_items(self, _: None) -> None:
        items = self.pop_to_mark()
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def add_items(self, _: None) -> None:
        items = self.pop_to_mark()
        self.top(set).update(map(_key, items))

    def make_frozenset(self, _: None) -> None:
        items = frozenset(map(_key, self.pop_to_mark()))
        self.stack.append(items)

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"{kind.__name__} expected, {type(self.stack[-1]).__name__} found")
        return self.stack[-1]

    # Names, calls and state

    def global_name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")  # genops joins the two lines by a space
        self.push_function(module, name)

    def stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        _need(isinstance(name, str) and isinstance(module, str), "a name that is not text")
        self.push_function(module, name)

    def push_function(self, module: str, name: str) -> None:
        advice = f" {_TORCH_ADVICE}" if module.split(".")[0] == "torch" else ""
        _need((module, name) in _FUNCTIONS, f"the name {f'{module}.{name}'!r:.120}{advice}")
        self.stack.append(_Function(_FUNCTIONS[module, name]))

    def reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        _need(isinstance(function, _Function), f"a call of {type(function).__name__}")
        _need(type(arguments) is tuple, "a call without a tuple of arguments")
        self.stack.append(self.call(function.name, arguments))

    def call(self, name: str, arguments: tuple) -> Any:
        if name == "array":
            kind, _, _ = arguments  # shape and type are those of a dummy
            _need(isinstance(kind, _Function) and kind.name == "ndarray", "an array of a class other than ndarray")
            return _Array()
        if name == "frombuffer":
            buffer, dtype, shape, order = arguments
            return _array(buffer, dtype, shape, order)
        if name == "scalar":
            dtype, buffer = arguments
            return _array(buffer, dtype, (), "C")[()]
        if name == "dtype":
            code = arguments[0]
            _need(isinstance(code, str), "a dtype that is not named by text")
            _need(_NUMBER_CODE.fullmatch(code) is not None, f"the dtype {code!r:.80}")
            return _Dtype(code)
        if name == "encode":  # how protocol 2 writes bytes
            text, encoding = arguments
            _need(isinstance(text, str) and encoding == "latin1", "an encoding other than latin1")
            self.charge(len(text))
            return text.encode("latin1")
        if name == "no_bytes":  # how protocol 2 writes b""
            _need(not arguments, "a call of bytes with arguments")
            return b""
        _need(name in ("set", "frozenset"), f"a call of {name}")
        (items,) = arguments
        _need(type(items) is list, f"a {name} of anything but a list")
        self.charge(len(items))
        return (set if name == "set" else frozenset)(map(_key, items))

    def charge(self, amount: int) -> None:
        """A short file could otherwise fill the memory by copying one long value again and again."""
        self.allowance -= amount
        _need(self.allowance >= 0, "more data than the file holds")

    def build(self, _: None) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        _need(isinstance(target, (_Dtype, _Array)), f"the instruction BUILD on {type(target).__name__}")
        _need(type(state) is tuple and target.value is None, "an unusual state of an array or dtype")
        if isinstance(target, _Array):
            _, shape, dtype, is_fortran, buffer = state
            target.value = _array(buffer, dtype, shape, "F" if is_fortran is True else "C")
        else:
            _need(
                state[0] == 3 and state[1] in ("<", ">", "|") and state[2:] == (None, None, None, -1, -1, 0),
                f"the dtype {target.code!r} with fields, a shape or metadata",
            )
            target.value = np.dtype(state[1] + target.code)

    # The result

    def finish(self, value: Any) -> Any:
        """The value with all arrays in their places; what several places share stays shared."""
        done: dict[int, Any] = {}
        open_values: set[int] = set()

        def finished(value: Any, depth: int) -> Any:
            kind = type(value)
            if kind is _Array:
                _need(value.value is not None, "an array without contents")
                return value.value
            _need(kind not in (_Function, _Dtype), "a function, class or dtype as a value")
            if kind not in (dict, list, tuple):
                return value
            if id(value) not in done:
                _need(id(value) not in open_values, f"a {kind.__name__} that contains itself")
                _need(depth < DEEPEST_NESTING, f"values nested more than {DEEPEST_NESTING} deep")
                open_values.add(id(value))
                if kind is dict:
                    done[id(value)] = {key: finished(item, depth + 1) for key, item in value.items()}
                else:
                    done[id(value)] = kind([finished(item, depth + 1) for item in value])
                open_values.discard(id(value))
            return done[id(value)]

        return finished(value, 0)


def _key(key: Any) -> Any:
    """A key of a dict or member of a set: values whose hash and equality run no code of anyone's."""
    parts = key if type(key) is tuple else (key,)
    _need(all(isinstance(part, _Atom) for part in parts), "a key or member that is neither a value nor a tuple of some")
    return key


def _array(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """A read-only array over the bytes of the file; no memory of its own, whatever shape is claimed."""
    _need(isinstance(dtype, _Dtype) and dtype.value is not None, "an array whose dtype is not one of numbers")
    _need(isinstance(buffer, (bytes, bytearray)), f"an array whose contents are a {type(buffer).__name__}, not bytes")
    # Nothing but text is ever shown: what a few bytes of pickle hold can take forever to print.
    sizes_fit = type(shape) is tuple and len(shape) <= 32 and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    _need(sizes_fit, "an array whose shape is not a tuple of sizes")
    _need(order in ("C", "F"), "an array in an order other than C or F")
    size = math.prod(shape) * dtype.value.itemsize
    _need(size == len(buffer), f"an array of shape {shape} that claims {size} bytes but holds {len(buffer)}")
    array = np.frombuffer(buffer, dtype.value).reshape(shape, order=order)
    array.flags.writeable = False
    return array


_PUSHED = frozenset(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES "
    "BINBYTES8 BYTEARRAY8".split()
)


def _constant(make: Callable[[], Any]) -> Callable[[_Reader, None], None]:
    return lambda reader, _: reader.stack.append(make())


def _short_tuple(length: int) -> Callable[[_Reader, None], None]:
    def instruction(reader: _Reader, _: None) -> None:
        items = tuple(reader.stack[-length:])
        if len(items) < length:
            raise ValueError("a tuple of too few values")
        reader.stack[-length:] = [items]

    return instruction


_INSTRUCTIONS: dict[str, Callable[[_Reader, Any], None]] = {
    "PROTO": lambda reader, version: None,
    "FRAME": lambda reader, length: None,
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_LIST": _constant(list),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_SET": _constant(set),
    "EMPTY_TUPLE": _constant(tuple),
    "TUPLE1": _short_tuple(1),
    "TUPLE2": _short_tuple(2),
    "TUPLE3": _short_tuple(3),
    "TUPLE": _Reader.make_tuple,
    "MARK": _Reader.mark,
    "APPEND": _Reader.append,
    "APPENDS": _Reader.appends,
    "SETITEM": _Reader.set_item,
    "SETITEMS": _Reader.set_items,
    "ADDITEMS": _Reader.add_items,
    "FROZENSET": _Reader.make_frozenset,
    "BINPUT": _Reader.put,
    "LONG_BINPUT": _Reader.put,
    "MEMOIZE": _Reader.memoize,
    "BINGET": _Reader.get,
    "LONG_BINGET": _Reader.get,
    "GLOBAL": _Reader.global_name,
    "STACK_GLOBAL": _Reader.stack_global,
    "REDUCE": _Reader.reduce,
    "BUILD": _Reader.build,
}
