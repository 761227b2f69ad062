"""The reader of Qt resource files: every version and packing, and whatever is damaged is refused."""

from __future__ import annotations

import pytest
from photographs.qt_resources import QtResources
from qt_resource_files import PLAIN, ZLIB, ZSTD, build_rcc, packed

FILES = {
    "qml/README": (b"words", PLAIN),
    "qml/deep/er/bird.webp": packed(b"feathers" * 99),
    "qml/deep/leer": (b"", PLAIN),
    "Größe \N{BIRD}.txt": (b"top", PLAIN),
}


def read_all(data: bytes) -> dict[str, bytes]:
    resources = QtResources(data)
    return {name: resources.read(name) for name in resources.names()}


@pytest.mark.parametrize("version", [1, 2, 3])
def test_reads_qt_resources(version):
    assert read_all(build_rcc(FILES, version)) == {
        "qml/README": b"words",
        "qml/deep/er/bird.webp": b"feathers" * 99,
        "qml/deep/leer": b"",
        "Größe \N{BIRD}.txt": b"top",
    }


@pytest.mark.parametrize("version", [1, 2, 3])
def test_refuses_truncated_resources(version):
    data = build_rcc(FILES, version)
    for length in range(len(data)):
        with pytest.raises(ValueError, match="Qt resource file"):
            read_all(data[:length])


def test_damaged_bytes_never_raise_anything_but_value_error():
    data = build_rcc(FILES)
    refused = 0
    for position in range(len(data)):
        for value in (0x00, 0x02, 0x7F, 0xFF):
            try:
                read_all(data[:position] + bytes([value]) + data[position + 1 :])
            except ValueError:
                refused += 1
    assert refused > len(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a Qt resource file"),
        (b"\x89PNG\r\n" + bytes(99), "not a Qt resource file"),
        (build_rcc(FILES).replace(b"qres\0\0\0\3", b"qres\0\0\0\4"), "version 4, expected 1, 2 or 3"),
        (build_rcc({"a": packed(b"12345678", announced=7)}), "a does not unpack to its 7 bytes"),
        (build_rcc({"a": packed(b"12345678", announced=9)}), "a does not unpack to its 9 bytes"),
        (build_rcc({"a": (packed(b"12345678")[0][:-3], ZLIB)}), "a does not unpack to its 8 bytes"),
        (build_rcc({"a": (b"\0\0\0\4junk", ZLIB)}), "a does not unpack"),
        (build_rcc({"a": (b"\0\0", ZLIB)}), "a does not unpack to its"),
        (build_rcc({"a": (b"", ZSTD)}), "a is packed with zstd, expected zlib"),
        # Half a surrogate pair for the name "A".
        (build_rcc({"A": (b"", PLAIN)}).replace(b"\0A", b"\xd8\0"), "is no text"),
        # The root's only child becomes the root itself: a loop.
        (build_rcc({"a": (b"", PLAIN)}, version=1)[:-18] + bytes(4) + bytes(14), "reached twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_corrupt_resources(data, message):
    with pytest.raises(ValueError, match=message):
        read_all(data)
