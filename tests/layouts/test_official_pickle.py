"""The official file of layouts is read; whatever else a pickle can hold is refused, and nothing in it runs."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpstoken_diffusers.layouts.official_pickle import read_official_layouts

PROTOCOLS = (3, 4, 5)
NUMBERS = np.random.default_rng(0).integers(0, 100, (3, 4, 5))
SHARED = NUMBERS.astype("f4")
LAYOUTS = {
    0: [NUMBERS.astype(code) for code in ("f8", "f4", "f2", "i8", "u1", ">f4", ">i2")],
    np.int64(7): [SHARED, SHARED, np.asfortranarray(SHARED), SHARED[:, ::2], SHARED[:0], np.array(SHARED[0, 0, 0])],
    "cat": [],
}


@pytest.fixture
def read(tmp_path):
    """Reads bytes as a file."""

    def read_bytes(data: bytes):
        (tmp_path / "initg.pickle").write_bytes(data)
        return read_official_layouts(tmp_path / "initg.pickle")

    return read_bytes


def renamed(data: bytes, old: bytes, new: bytes) -> bytes:
    """A module's name exchanged, with the lengths that stand before it from protocol 4 on."""
    data = data.replace(b"\x8c" + bytes([len(old)]) + old, b"\x8c" + bytes([len(new)]) + new)
    data = data.replace(b"c" + old, b"c" + new)
    return data if data[1] < 4 else data[:3] + struct.pack("<Q", len(data) - 11) + data[11:]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("core", (b"numpy.core", b"numpy._core"))  # NumPy 1 and 2
def test_the_official_form(read, protocol, core):
    data = pickle.dumps(LAYOUTS, protocol=protocol)
    for module in (b".multiarray", b".numeric"):
        data = renamed(renamed(data, b"numpy._core" + module, core + module), b"numpy.core" + module, core + module)
    found = read(data)
    assert list(found) == [0, 7, "cat"] and list(map(type, found)) == [int, int, str]
    for name, arrays in LAYOUTS.items():
        assert len(found[name]) == len(arrays)
        for array, expected in zip(found[name], arrays, strict=True):
            assert array.dtype == expected.dtype and np.array_equal(array, expected) and array.shape == expected.shape
            assert not array.flags.writeable
    assert found[7][0] is found[7][1]


# ---- malice ----


class Calls:
    """Pickles to a call of anything."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Stateful:
    def __init__(self) -> None:
        self.x = 1


class ArrayOfOurs(np.ndarray):
    pass


def by_hand(body: bytes, protocol: int = 4) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


def text(string: str) -> bytes:
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def listed(body: bytes) -> bytes:
    """{0: [what the instructions make]}"""
    return by_hand(b"}K\x00]" + body + b"as")


def array_of(shape: bytes, contents: bytes = b"C\x04abcd", dtype: bytes | None = None) -> bytes:
    return listed(EMPTY_ARRAY + b"(K\x01" + shape + (dtype or DTYPE) + b"\x89" + contents + b"tb")


RAW_DTYPE = b"cnumpy\ndtype\n" + text("f4") + b"\x89\x88\x87R"
DTYPE_STATE = b"(K\x03" + text("<") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00t"
DTYPE = RAW_DTYPE + DTYPE_STATE + b"b"
EMPTY_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
FROM_BUFFER = b"cnumpy.core.numeric\n_frombuffer\n"
HUGE = b"\x8a\x08" + b"\xff" * 7 + b"\x3f"  # 2^62 - 1
UNFIT = "shape, dtype and contents do not fit"
NEEDLESS = "instructions that no such file needs"
TANGLE = b"]q\x00" + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))  # 2^60 leaves
MALICE = {
    "GLOBAL": (by_hand(b"cos\nsystem\n"), "'os.system'"),
    "GLOBAL, dotted": (by_hand(b"cbuiltins\neval.__call__\n"), "'builtins.eval.__call__'"),
    "GLOBAL, dotted below an allowed name": (by_hand(b"cnumpy\nndarray.__class__\n"), "'numpy.ndarray.__class__'"),
    "STACK_GLOBAL": (by_hand(text("os") + text("system") + b"\x93"), "'os.system'"),
    "STACK_GLOBAL, nested": (by_hand(text("numpy") + text("f2py.os.system") + b"\x93"), "'numpy.f2py.os.system'"),
    "STACK_GLOBAL of no text": (by_hand(b"K\x01K\x02\x93"), "damaged"),
    "set": (pickle.dumps({0: {1}}, protocol=3), "'builtins.set'"),
    "encode, in memory again and again": (by_hand(b"c_codecs\nencode\n"), "'_codecs.encode'"),
    "INST": (by_hand(b"(" + text("true") + b"ios\nsystem\n"), NEEDLESS),
    "OBJ": (by_hand(b"(cnumpy\nndarray\nK\x01o"), NEEDLESS),
    "NEWOBJ": (by_hand(b"cnumpy\nndarray\n)\x81"), NEEDLESS),
    "NEWOBJ_EX": (by_hand(b"cnumpy\nndarray\n)}\x92"), NEEDLESS),
    "EXT1": (by_hand(b"\x82\x01"), NEEDLESS),
    "EXT2": (by_hand(b"\x83\x01\x00"), NEEDLESS),
    "EXT4": (by_hand(b"\x84\x01\x00\x00\x00"), NEEDLESS),
    "PERSID": (by_hand(b"Pstorage\n"), NEEDLESS),
    "BINPERSID": (by_hand(text("storage") + b"Q"), NEEDLESS),
    "NEXT_BUFFER": (by_hand(b"\x97", 5), NEEDLESS),
    "LONG4": (by_hand(b"\x8b\x00\x00\x10\x00" + b"\x7f" * (1 << 20)), NEEDLESS),
    "unknown instruction": (by_hand(b"\xff"), NEEDLESS),
    "BUILD on a dict": (by_hand(b"}}" + text("a") + b"K\x01sb"), NEEDLESS),
    "BUILD on a list": (by_hand(b"]K\x01b"), NEEDLESS),
    "BUILD on a function": (by_hand(FROM_BUFFER + b"}" + text("__doc__") + b"K\x01sb"), NEEDLESS),
    "BUILD on a class": (by_hand(b"cnumpy\ndtype\n}b"), NEEDLESS),
    "object with state": (pickle.dumps(Stateful(), protocol=4), "Stateful|" + NEEDLESS),
    "call of a value": (by_hand(text("os.system") + text("true") + b"\x85R"), "not callable"),
    "call of ndarray": (by_hand(b"cnumpy\nndarray\nK\x01\x85\x85R"), "not callable"),
    "function as a value": (listed(FROM_BUFFER), "entry 0 of class 0 is a function"),
    "dtype as a value": (listed(DTYPE), "is a _Dtype"),
    "class as a key": (by_hand(b"}cnumpy\ndtype\nK\x01s"), "class that is a type"),
    "deeply nested key": (by_hand(b"})" + b"\x85" * 1_000_000 + b"]s"), "class that is a tuple"),
    "object array": (pickle.dumps(np.array([None, 1], dtype=object), protocol=4), "dtype 'O8'"),
    "structured array": (pickle.dumps(np.zeros(2, [("a", "f4"), ("b", "O")]), protocol=4), "dtype 'V12'"),
    "dates": (pickle.dumps(np.zeros(2, "M8[s]"), protocol=4), "dtype 'M8'"),
    "dtype of a tangle": (by_hand(b"cnumpy\ndtype\n" + TANGLE + b"\x85R"), "dtype 'tuple'"),
    "dtype with fields": (by_hand(RAW_DTYPE + DTYPE_STATE.replace(b"NNN", b"N}}") + b"b"), "fields"),
    "subclass of ndarray": (pickle.dumps(np.zeros(2).view(ArrayOfOurs), protocol=4), "ArrayOfOurs"),
    "array of a built-in type": (by_hand(EMPTY_ARRAY.replace(b"numpy\nndarray", b"builtins\nlist")), "builtins.list"),
    "claims too much": (array_of(b"K\x02\x85"), UNFIT),
    "claims too little": (array_of(b"K\x00\x85"), UNFIT),
    "claims 2^64 bytes": (array_of(HUGE + b"\x85"), UNFIT),
    "negative sizes": (array_of(b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86"), UNFIT),
    "sizes without end": (array_of(b"(" + b"\x8a\xff" + b"\x7f" * 255 + b"2" * 1000 + b"t"), NEEDLESS),
    "empty, too large to index": (array_of(b"K\x00" + HUGE + HUGE + b"\x87", contents=b"C\x00"), "damaged"),
    "contents are a list": (array_of(b"K\x01\x85", contents=b"]"), UNFIT),
    "shape is deeply nested": (array_of(b"]" * 20_000 + b"a" * 19_999), UNFIT),
    "ordered dict": (pickle.dumps(collections.OrderedDict(a=1)), "'collections.OrderedDict'"),
    "tensor": (pickle.dumps({"w": torch.zeros(2)}), "'torch."),
    "list of a tangle": (listed(TANGLE), "is a tuple, not an array"),
    "list in itself": (by_hand(b"}K\x00]q\x00h\x00as"), "is a list, not an array"),
    "deeply nested": (listed(b"]" * 20_000 + b"a" * 19_999), "is a list, not an array"),
    "trailing bytes": (pickle.dumps({0: []}) + pickle.dumps(2), "follow its end"),
    "text of 4 GB": (by_hand(b"\x8d" + struct.pack("<Q", 1 << 32) + b"abc"), NEEDLESS),
    "bytes of 2^63": (by_hand(b"\x8e" + struct.pack("<Q", 1 << 63) + b"abc"), "damaged"),
    "no stack": (by_hand(b""), "damaged"),
    "no memo": (by_hand(b"h\x07"), "damaged"),
    "no mark": (by_hand(b"t"), "damaged"),
    "protocol 9": (b"\x80\x09N.", "damaged.*protocol: 9"),
    "empty": (b"", "damaged"),
    "a picture": (b"\x89PNG\r\n", NEEDLESS),
    "not a dict": (pickle.dumps([1]), "something else"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALICE)
def test_refused(name, read, tmp_path):
    data, words = MALICE[name]
    with pytest.raises(ValueError, match=words) as caught:
        read(data)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'initg.pickle'}: expected the official initg.pickle") and len(message) < 500


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("wrap", (lambda x: x, lambda x: {0: [x]}, lambda x: {0: [np.zeros(3), (x,)]}))
def test_nothing_is_executed(read, tmp_path, protocol, wrap):
    """Files that do write a canary when Python unpickles them."""
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()"
    for call in (os.system, f"touch '{canary}'"), (eval, code), (exec, code), (os.mkdir, str(canary)):
        with pytest.raises(ValueError, match=r"asks for '\w+\.(system|eval|exec|mkdir)'"):
            read(pickle.dumps(wrap(Calls(*call)), protocol=protocol))
        assert not canary.exists()
    pickle.loads(pickle.dumps(Calls(os.mkdir, str(canary))))
    assert canary.exists()  # the files are as evil as they claim


def test_torch_checkpoints_and_missing_files(tmp_path):
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pt"
        torch.save({"w": torch.zeros(2)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="expected the official"):
            read_official_layouts(path)
    with pytest.raises(FileNotFoundError):
        read_official_layouts(tmp_path / "none.pickle")


SWAPPED = DTYPE.replace(text("<"), text(">"))  # NumPy copies such arrays when it takes their state
BOMBS = {
    "a place far out in the memo": b"Nr\xff\xff\xff\x7f",
    "a byte array that is not there": b"\x96" + struct.pack("<Q", 1 << 32),
    "bytes that are not there": b"\x8e" + struct.pack("<Q", 1 << 32),
    "a frame that is not there": b"\x95" + struct.pack("<Q", 1 << 32),
    "a dummy that is larger than an array": EMPTY_ARRAY.replace(b"K\x00\x85", HUGE + b"\x85"),
    "one array again and again": b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b"q\x00" + SWAPPED + b"q\x01"
    + (EMPTY_ARRAY + b"(K\x01J" + struct.pack("<i", 1 << 18) + b"\x85h\x01\x89h\x00tb") * 500,
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_memory_grows_with_the_file_alone(name, read):
    data = by_hand(BOMBS[name], 5)
    tracemalloc.start()
    with pytest.raises(ValueError):
        read(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6 + 10 * len(data)  # each of them would be 500 MB or more


# ---- damage ----


def test_truncated_anywhere(read):
    data = pickle.dumps({"a": [np.arange(3.0)], 2: []})
    for end in range(len(data)):
        with pytest.raises(ValueError):
            read(data[:end])


PIECES = [EMPTY_ARRAY, DTYPE, FROM_BUFFER, text("<"), b"C\x04abcd", b"h\x00", b"K\x01"]
PIECES += [bytes([byte]) for byte in b"Nt(]})e\x85\x86\x87Rbsu\x93\x94a0."]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_program_ends_in_layouts_or_a_value_error(tmp_path_factory, data):
    if data.draw(st.booleans()):
        program = by_hand(b"".join(data.draw(st.lists(st.sampled_from(PIECES)))))
    else:
        program = bytearray(pickle.dumps(LAYOUTS, protocol=data.draw(st.sampled_from(PROTOCOLS))))
        for _ in range(data.draw(st.integers(1, 4))):
            program[data.draw(st.integers(2, len(program) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "any.pickle"
    path.write_bytes(program)
    try:
        read_official_layouts(path)
    except ValueError:
        pass
