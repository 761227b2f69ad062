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
        self._node_size = 14 if version == 1 else 22
        self._entries = self._walk()

    def names(self) -> list[str]:
        """Paths of all files, `/` between folders, in the order of the tree."""
        return list(self._entries)

    def read(self, name: str) -> bytes:
        """Content of the file `name`, unpacked.

        Raises:
            KeyError: there is no such file.
            ValueError: its data is damaged.
            ModuleNotFoundError: it is packed with zstd and the package `zstandard` is not installed.
        """
        flags, offset = self._entries[name]
        (size,) = self._unpack(">I", self._files + offset)
        content = self._slice(self._files + offset + 4, size)
        if flags & _ZLIB:
            return self._inflate(name, content)
        if flags & _ZSTD:
            import zstandard  # not a dependency: none of our sources needs it so far

            try:
                return zstandard.ZstdDecompressor().decompress(content)
            except zstandard.ZstdError as error:
                raise ValueError(f"damaged Qt resource file: {name} does not unpack ({error})") from error
        return content

    @staticmethod
    def _inflate(name: str, content: bytes) -> bytes:
        if len(content) < 4:
            raise ValueError(f"damaged Qt resource file: {name} lacks its size")
        (size,) = struct.unpack_from(">I", content)
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
        entries = {}
        seen = set()
        todo = [(0, "")]
        while todo:
            node, parent = todo.pop()
            if node in seen:
                raise ValueError(f"damaged Qt resource file: node {node} of its tree is reached twice")
            seen.add(node)
            fields = self._slice(self._tree + node * self._node_size, self._node_size)
            name_offset, flags = struct.unpack_from(">IH", fields)
            path = parent + self._name(name_offset) if node else ""
            if flags & _FOLDER:
                count, first = struct.unpack_from(">II", fields, 6)
                if len(seen) + len(todo) + count > len(self._data) // self._node_size:
                    raise ValueError(f"damaged Qt resource file: it announces a folder of {count} files")
                below = path + "/" if node else ""
                todo.extend((first + child, below) for child in reversed(range(count)))
            else:
                (offset,) = struct.unpack_from(">I", fields, 10)
                entries[path] = (flags, offset)
        return entries

    def _name(self, offset: int) -> str:
        (length,) = self._unpack(">H", self._names + offset)
        try:
            return self._slice(self._names + offset + 6, 2 * length).decode("utf-16-be")
        except UnicodeDecodeError as error:
            at = self._names + offset
            raise ValueError(f"damaged Qt resource file: the name at byte {at} is no text") from error

    def _unpack(self, layout: str, offset: int) -> tuple[int, ...]:
        return struct.unpack(layout, self._slice(offset, struct.calcsize(layout)))

    def _slice(self, offset: int, size: int) -> bytes:
        if offset + size > len(self._data):
            raise ValueError(
                f"damaged Qt resource file: it points to bytes {offset} to {offset + size} "
                f"and has only {len(self._data)}"
            )
        return self._data[offset : offset + size]
