"""Qt resource files, built for tests of what reads them."""

from __future__ import annotations

import struct
import zlib

PLAIN, ZLIB, FOLDER, ZSTD = 0, 1, 2, 4


def build_rcc(files: dict[str, tuple[bytes, int]], version: int = 3) -> bytes:
    """A Qt resource file, in the order data, names, tree; `files` maps path -> (stored bytes, flags)."""
    folders = {"": []}
    for path in files:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if folder not in folders:
                folders[folder] = []
                folders["/".join(parts[: depth - 1])].append(folder)
        folders["/".join(parts[:-1])].append(path)
    order = [""]
    for path in order:  # grows: children of a folder lie next to one another
        order.extend(folders.get(path, []))
    data, names, tree = b"", b"", b""
    for path in order:
        name = path.split("/")[-1].encode("utf-16-be")
        head = struct.pack(">I", len(names))
        names += struct.pack(">HI", len(name) // 2, 0) + name
        if path in folders:
            first = order.index(folders[path][0])
            node = head + struct.pack(">HII", FOLDER, len(folders[path]), first)
        else:
            stored, flags = files[path]
            node = head + struct.pack(">HHHI", flags, 0, 1, len(data))
            data += struct.pack(">I", len(stored)) + stored
        tree += node + (struct.pack(">Q", 1234) if version >= 2 else b"")
    start = 24 if version >= 3 else 20
    offsets = (start + len(data) + len(names), start, start + len(data))  # tree, data, names
    flags = struct.pack(">I", 0) if version >= 3 else b""
    return b"qres" + struct.pack(">4I", version, *offsets) + flags + data + names + tree


def packed(content: bytes, announced: int | None = None) -> tuple[bytes, int]:
    """The stored bytes and flags of a compressed file, with its size or another one announced."""
    size = len(content) if announced is None else announced
    return struct.pack(">I", size) + zlib.compress(content), ZLIB
