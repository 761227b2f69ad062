"""Reader of Qt resource files (.rcc, magic "qres", format versions 1 to 3).

Layout, all numbers big-endian: "qres", version, offset of the tree, of the data, of the names, and from
version 3 on overall flags (32 bits each). A tree node is 14 bytes, 22 from version 2 on (modification time):

    name offset (32)  flags (16)  folder: number of children (32), index of the first child (32)
                                  file:   country (16), language (16), data offset (32)

A name is its length in UTF-16 units (16 bits), a hash (32) and the units. Data is a size (32) and that many
bytes; of a zlib-compressed file the first 4 of these bytes are the size when unpacked.
"""

import struct
import zlib

_ZLIB, _FOLDER, _ZSTD = 1, 2, 4


class QtResources:
    """The files inside one .rcc.

    Args:
        data: the whole .rcc file.

    Raises:
        ValueError: `data` is not a Qt resource file of version 1 to 3, or it is damaged.
    """

    def __init__(self, data: bytes):
        self._data = data
        if data[:4] != b"qres":
            raise ValueError(f"not a Qt resource file: it begins with {data[:4]!r}, expected b'qres'")
        version, self._tree, self._files, self._names = self._unpack(">4I", 4)
        if version not in (1, 2, 3):
            raise ValueError(f"Qt resource file of version {version}, expected 1, 2 or 3")
        self._node = ">IHII" if version == 1 else ">IHII8x"
        self._entries = self._walk()

    def names(self) -> list[str]:
        """Paths of all files, `/` between folders, in the order of the tree."""
        return list(self._entries)

    def read(self, name: str) -> bytes:
        """Content of the file `name`, unpacked.

        Raises:
            KeyError: there is no such file.
            ValueError: its data is damaged, or packed with zstd, as in none of our sources.
        """
        flags, offset = self._entries[name]
        (size,) = self._unpack(">I", self._files + offset)
        (content,) = self._unpack(f">{size}s", self._files + offset + 4)
        if flags & _ZSTD:
            raise ValueError(f"Qt resource file: {name} is packed with zstd, expected zlib")
        if not flags & _ZLIB:
            return content
        (size,) = self._unpack(">I", self._files + offset + 4)
        unpacker = zlib.decompressobj()
        try:
            # One byte more than announced is enough to notice a lie, and no lie can fill the memory.
            unpacked = unpacker.decompress(content[4:], size + 1)
        except zlib.error as error:
            raise ValueError(f"damaged Qt resource file: {name} does not unpack ({error})") from error
        if len(unpacked) != size or not unpacker.eof:
            raise ValueError(f"damaged Qt resource file: {name} does not unpack to its {size} bytes")
        return unpacked

    def _walk(self) -> dict[str, tuple[int, int]]:
        """Path -> (flags, data offset) of every file below node 0, the root."""
        entries, seen = {}, set()
        unfinished = [(iter([0]), "")]
        while unfinished:
            nodes, folder = unfinished[-1]
            node = next(nodes, None)
            if node is None:
                unfinished.pop()
                continue
            if node in seen:
                raise ValueError(f"damaged Qt resource file: node {node} of its tree is reached twice")
            seen.add(node)
            start = self._tree + node * struct.calcsize(self._node)
            # A folder's children: how many, from which on. A file: country and language, where its data is.
            name_offset, flags, first, second = self._unpack(self._node, start)
            path = folder + self._name(name_offset) if node else ""
            if flags & _FOLDER:
                unfinished.append((iter(range(second, second + first)), f"{path}/" if node else ""))
            else:
                entries[path] = (flags, second)
        return entries

    def _name(self, offset: int) -> str:
        (length,) = self._unpack(">H", self._names + offset)
        (units,) = self._unpack(f">{2 * length}s", self._names + offset + 6)
        try:
            return units.decode("utf-16-be")
        except UnicodeDecodeError as error:
            raise ValueError(f"damaged Qt resource file: the name {units!r} is no text") from error

    def _unpack(self, layout: str, offset: int) -> tuple:
        try:
            return struct.unpack_from(layout, self._data, offset)
        except struct.error as error:
            raise ValueError(f"damaged Qt resource file: {error}") from error
