"""Pickles of plain data are read as Python's unpickler reads them; everything else is refused, and nothing runs."""

from __future__ import annotations

import collections
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpstoken_diffusers.layouts.official_pickle import parse_pickle, read_pickle

PROTOCOLS = (2, 3, 4, 5)


def assert_same(found, expected) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert found.tobytes() == expected.tobytes() and not found.flags.writeable
        assert found.flags.f_contiguous == np.asarray(expected, order="K").flags.f_contiguous or expected.ndim < 2
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    else:
        assert found == expected


# ---- plain data ----

values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**80), 2**80), st.floats(allow_nan=False), st.text(),
    st.binary(max_size=300), st.sets(st.integers(), max_size=4), st.frozensets(st.text(), max_size=4),
)  # fmt: skip
trees = st.recursive(
    values,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(st.one_of(st.integers(), st.text(), st.tuples(st.integers(), st.text())), inner, max_size=5),
    ),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(tree=trees, protocol=st.sampled_from(PROTOCOLS))
def test_plain_data(tree, protocol):
    assert_same(parse_pickle(pickle.dumps(tree, protocol=protocol)), tree)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ("f8", "f4", "f2", "i8", "u1", "?", ">f4", ">i2", "c8"))
def test_arrays(dtype, protocol):
    numbers = np.random.default_rng(0).integers(0, 100, (3, 4, 5)).astype(dtype)
    arrays = [numbers, np.asfortranarray(numbers), numbers[:, ::2], numbers[0, 0, 0], numbers[:0]]
    arrays += [np.array(numbers[0, 0]), *[numbers[0]] * 2]  # the last two shared by the memo
    assert_same(parse_pickle(pickle.dumps(arrays, protocol=protocol)), arrays)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_both_names_of_numpys_modules(protocol):
    """NumPy 1 writes numpy.core, NumPy 2 numpy._core: the same bytes with a name exchanged."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    data = pickle.dumps([array, array[0, 0], np.float64(2)], protocol=protocol)
    new, old = data, data
    for part in (b"multiarray", b"numeric"):
        for before, after in ((b"numpy._core." + part, b"numpy.core." + part),):
            new, old = _exchanged(new, after, before), _exchanged(old, before, after)
    assert new != old
    assert_same(parse_pickle(new), [array, array[0, 0], np.float64(2)])
    assert_same(parse_pickle(old), [array, array[0, 0], np.float64(2)])


def _exchanged(data: bytes, before: bytes, after: bytes) -> bytes:
    short_text = b"\x8c" + bytes([len(before)]) + before  # with its length, from protocol 4 on
    data = data.replace(short_text, b"\x8c" + bytes([len(after)]) + after).replace(b"c" + before, b"c" + after)
    if data[1] >= 4:  # the frame's length follows
        data = data[:3] + struct.pack("<Q", len(data) - 11) + data[11:]
    return data


def test_layouts_as_the_official_file_holds_them(tmp_path):
    generator = np.random.default_rng(0)
    layouts = {label: [generator.random((128, 21), dtype=np.float32) for _ in range(3)] for label in (0, 7, "cat")}
    path = tmp_path / "initg.pickle"
    path.write_bytes(pickle.dumps(layouts))
    assert_same(read_pickle(path), layouts)


def test_sharing_is_kept():
    shared = [1, 2]
    found = parse_pickle(pickle.dumps([shared, {"a": shared}]))
    assert found[0] is found[1]["a"]


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


def by_hand(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


def text(string: str) -> bytes:
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def self_containing() -> list:
    values: list = []
    values.append({"a": values})
    return values


MINUS_ONE = b"J\xff\xff\xff\xff"
DTYPE = b"cnumpy\ndtype\n" + text("f4") + b"\x89\x88\x87R(K\x03" + text("<") + b"NNN" + MINUS_ONE * 2 + b"K\x00tb"
RAW_DTYPE = b"cnumpy\ndtype\n" + text("f4") + b"\x85R"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
EMPTY_ARRAY = RECONSTRUCT + b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R"


def array_of(shape: bytes, contents: bytes = b"C\x04abcd", dtype: bytes = DTYPE) -> bytes:
    return by_hand(EMPTY_ARRAY + b"(K\x01" + shape + dtype + b"\x89" + contents + b"tb")


HUGE = b"\x8a\x08" + b"\xff" * 7 + b"\x3f"  # 2^62 - 1
MALICE = {
    "GLOBAL alone": (by_hand(b"cos\nsystem\n"), "os.system"),
    "GLOBAL, dotted": (by_hand(b"cbuiltins\neval.__call__\n"), "builtins.eval.__call__"),
    "GLOBAL, dotted below an allowed name": (by_hand(b"cnumpy\nndarray.__class__\n"), "numpy.ndarray.__class__"),
    "STACK_GLOBAL": (by_hand(text("os") + text("system") + b"\x93", 4), "os.system"),
    "STACK_GLOBAL, nested": (by_hand(text("numpy") + text("f2py.os.system") + b"\x93", 4), "numpy.f2py.os.system"),
    "STACK_GLOBAL of no text": (by_hand(b"K\x01K\x02\x93", 4), "name that is not text"),
    "INST": (by_hand(b"(" + text("true") + b"ios\nsystem\n"), "INST"),
    "OBJ": (by_hand(b"(cnumpy\nndarray\nK\x01o"), "OBJ"),
    "NEWOBJ": (by_hand(b"cnumpy\nndarray\n)\x81"), "NEWOBJ"),
    "NEWOBJ_EX": (by_hand(b"cnumpy\nndarray\n)}\x92", 4), "NEWOBJ_EX"),
    "EXT1": (by_hand(b"\x82\x01"), "EXT1"),
    "EXT2": (by_hand(b"\x83\x01\x00"), "EXT2"),
    "EXT4": (by_hand(b"\x84\x01\x00\x00\x00"), "EXT4"),
    "PERSID": (by_hand(b"Pstorage\n"), "PERSID.*torch.save"),
    "BINPERSID": (by_hand(text("storage") + b"Q"), "BINPERSID.*torch.save"),
    "NEXT_BUFFER": (by_hand(b"\x97", 5), "NEXT_BUFFER"),
    "BUILD on a dict": (by_hand(b"}}" + text("a") + b"K\x01sb"), "BUILD on dict"),
    "BUILD on a list": (by_hand(b"]K\x01b"), "BUILD on list"),
    "object with state": (pickle.dumps(Stateful()), "Stateful"),
    "BUILD on a class": (by_hand(b"cnumpy\nndarray\n}b"), "BUILD on _Function"),
    "call of a value": (by_hand(text("os.system") + text("true") + b"\x85R"), "call of str"),
    "call of ndarray": (by_hand(b"cnumpy\nndarray\nK\x01\x85\x85R"), "call of ndarray"),
    "call of bytes": (by_hand(b"c__builtin__\nbytes\n" + HUGE + b"\x85R"), "bytes with arguments"),
    "class as a value": (by_hand(b"cnumpy\nndarray\n"), "as a value"),
    "class in a list": (by_hand(b"]cnumpy\nndarray\na"), "as a value"),
    "class as a key": (by_hand(b"}cnumpy\nndarray\nK\x01s"), "key"),
    "list as a key": (by_hand(b"}]K\x01s"), "key"),
    "encoding": (by_hand(b"c_codecs\nencode\n" + text("a") + text("zip") + b"\x86R"), "latin1"),
    "object array": (pickle.dumps(np.array([None, 1], dtype=object)), "dtype 'O8'"),
    "object scalar type": (by_hand(b"cnumpy\ndtype\n" + text("O") + b"\x89\x88\x87R"), "dtype 'O'"),
    "structured array": (pickle.dumps(np.zeros(2, [("a", "f4"), ("b", "O")])), "dtype 'V12'"),
    "dates": (pickle.dumps(np.zeros(2, "M8[s]")), "dtype 'M8'"),
    "subclass of ndarray": (pickle.dumps(np.zeros(2).view(ArrayOfOurs)), "ArrayOfOurs"),
    "not ndarray": (by_hand(RECONSTRUCT + b"c_codecs\nencode\nK\x00\x85C\x01b\x87R"), "other than ndarray"),
    "dtype never built": (array_of(b"K\x01\x85", dtype=RAW_DTYPE), "one of numbers"),
    "array never built": (by_hand(EMPTY_ARRAY), "without contents"),
    "claims too much": (array_of(b"K\x02\x85"), r"shape \(2,\) that claims 8 bytes but holds 4"),
    "claims too little": (array_of(b"K\x00\x85"), "claims 0 bytes but holds 4"),
    "claims 2^64 bytes": (array_of(HUGE + b"\x85"), "claims 18446744073709551612 bytes"),
    "negative sizes": (array_of(b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86"), "not a tuple of sizes"),
    "a size of millions of digits": (array_of(b"\x8b\x00\x00\x10\x00" + b"\x7f" * (1 << 20) + b"\x85"), "sizes"),
    "empty, too large to index": (array_of(b"K\x00" + HUGE + HUGE + b"\x87", contents=b"C\x00"), "damaged"),
    "contents are a list": (array_of(b"K\x01\x85", contents=b"]"), "a list, not bytes"),
    "ordered dict": (pickle.dumps(collections.OrderedDict(a=1)), "collections.OrderedDict"),
    "tensor": (pickle.dumps({"w": torch.zeros(2)}), "'torch.*safetensors.torch.save_file"),
    "list in itself": (pickle.dumps(self_containing()), "list that contains itself"),
    "tuple in itself": (by_hand(b"]q\x00h\x00\x85a"), "contains itself"),
    "deeply nested": (by_hand(b"]" * 20_000 + b"a" * 19_999), "nested more than 100"),
    "deeply nested shape": (array_of(b"]" * 20_000 + b"a" * 19_999), "not a tuple of sizes"),
    "trailing bytes": (pickle.dumps(1) + pickle.dumps(2), "after the end"),
    "no stack": (by_hand(b""), "damaged"),
    "no memo": (by_hand(b"h\x07"), "damaged"),
    "no mark": (by_hand(b"t"), "damaged"),
    "tuple of too few": (by_hand(b"K\x01\x87"), "damaged"),
    "left over": (by_hand(b"K\x01K\x02"), "left over"),
    "text of 4 GB": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 32) + b"abc", "truncated"),
    "text of 2^63 bytes": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 63) + b"abc", "truncated"),
    "unknown instruction": (by_hand(b"\xff"), "damaged"),
    "protocol 0": (pickle.dumps([1], protocol=0), "protocol 2 to 5"),
    "protocol 9": (b"\x80\x09N.", "protocol 2 to 5"),
    "empty": (b"", "0 bytes"),
    "a picture": (b"\x89PNG\r\n", "not a pickle"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALICE)
def test_refused(name, tmp_path):
    data, words = MALICE[name]
    path = tmp_path / "layouts.pickle"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        read_pickle(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("wrap", (lambda x: x, lambda x: {0: [x]}, lambda x: [np.zeros(3), (x,)]))
def test_nothing_is_executed(tmp_path, protocol, wrap):
    """Files that do write a canary when Python unpickles them."""
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()"
    calls = (os.system, f"touch '{canary}'"), (eval, code), (exec, code), (os.mkdir, str(canary))
    for evil in (Calls(*call) for call in calls):
        data = pickle.dumps(wrap(evil), protocol=protocol)
        with pytest.raises(ValueError, match=r"refused: the name '\w+\.(system|eval|exec|mkdir)'"):
            parse_pickle(data)
        assert not canary.exists()
    pickle.loads(pickle.dumps(Calls(os.system, f"touch '{canary}'")))
    assert canary.exists()  # the files are as evil as they claim


def test_torch_checkpoints(tmp_path):
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pt"
        torch.save({"w": torch.zeros(2)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"torch.save.*weights_only=True.*safetensors.torch.save_file"):
            read_pickle(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_pickle(tmp_path / "none.pickle")


def test_truncated_anywhere():
    data = pickle.dumps({"a": [np.arange(3.0), (1, 2)], "b": {3}})
    for end in range(len(data)):
        with pytest.raises(ValueError):
            parse_pickle(data[:end])


def test_shared_values_do_not_multiply():
    """60 pairs, each of the one before twice: 2^60 leaves for whoever walks through them all."""
    pairs = b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    found = parse_pickle(by_hand(b"]q\x00" + pairs))
    assert found[0] is found[1] and found[0][1] is found[1][0]


@pytest.mark.parametrize(
    "copy", (b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R", b"c__builtin__\nset\nh\x01\x85R")
)
def test_copies_are_limited(copy):
    """A dozen bytes of file must not make a long text or list anew each time."""
    numbers = b"]q\x01(" + b"".join(b"J" + struct.pack("<i", i) for i in range(10_000)) + b"e"
    start = text("a" * 50_000) + b"q\x00" + numbers
    assert len(parse_pickle(by_hand(start + copy + b"\x87"))) == 3
    with pytest.raises(ValueError, match="more data than the file holds"):
        parse_pickle(by_hand(b"(" + start + copy * 20 + b"t"))


def test_arrays_share_the_bytes_of_the_file():
    array = EMPTY_ARRAY + b"(K\x01J" + struct.pack("<i", 1000) + b"\x85h\x01\x89h\x00tb"
    start = b"B" + struct.pack("<I", 4000) + bytes(4000) + b"q\x00"
    first = array.replace(b"h\x01", DTYPE + b"q\x01")
    found = parse_pickle(by_hand(b"(" + start + first + array * 50 + b"t"))
    assert np.shares_memory(found[1], found[2])


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_damage_is_always_a_value_error(data):
    protocol = data.draw(st.sampled_from(PROTOCOLS))
    original = [np.arange(4.0), {"a": (1, 2.5, None), (1, "b"): {3, 4}}, np.float32(1), b"abc", "text", 10**20]
    damaged = bytearray(pickle.dumps(original, protocol=protocol))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(2, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_pickle(bytes(damaged))
    except ValueError:
        pass


SINGLE_BYTES = b"Nt(]})e\x85\x86\x87Rbsu\x90\x91\x8f\x94a0."
PIECES = [EMPTY_ARRAY, DTYPE, text("<"), b"C\x04abcd", b"h\x00", b"K\x01", *(bytes([byte]) for byte in SINGLE_BYTES)]


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES)))
def test_any_program_ends_in_a_value_or_a_value_error(pieces):
    try:
        parse_pickle(by_hand(b"".join(pieces), 4))
    except ValueError:
        pass
