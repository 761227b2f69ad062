"""The pictures that commands read, and how to tell later whether something was made of the same ones."""

from __future__ import annotations

import io
import logging
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from ..picture_files import read_picture, upright_rgb

logger = logging.getLogger(__name__)

Record = dict[str, Any]

# The fingerprint is of so many blocks, spread over a file: a resumed run looks at a disk of pictures in minutes.
_BLOCKS, _BLOCK_BYTES = 16, 4096


def read_source(path: Path) -> tuple[bytes, Record]:
    """The bytes of a file or pipe, and the record of what was read.

    Raises:
        FileNotFoundError: no file is there.
        OSError: it cannot be read.
    """
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"No image file at {path}.")
    with open(path, "rb") as file:
        modified = os.fstat(file.fileno()).st_mtime_ns
        data = file.read()
    return data, {"bytes": len(data), "crc32": _fingerprint(io.BytesIO(data)), "modified_ns": modified}


def picture_of(data: bytes, path: Path, background: list[int]) -> Image.Image:
    """The upright 8-bit RGB picture in a file's bytes. Says so if it is the first of several pages.

    Raises ValueError: no picture, or a damaged one.
    """

    def convert(image: Image.Image) -> Image.Image:
        # Of a photograph in the format MPO the other frames are previews, or the other eye's.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            logger.warning("%s holds %d pages or frames: the first is taken.", path, image.n_frames)
        return upright_rgb(image, background)

    return read_picture(io.BytesIO(data), str(path), convert)


def folder_mark(folder: Path) -> str:
    """Tells a folder from others of the same name, and not where it lies."""
    return f"{zlib.crc32(os.fsencode(folder.resolve())):08x}"


def is_same_source(record: Record, path: Path, folder: Path) -> bool:
    """Whether a record is of the picture that is at `path` now.

    Args:
        record: as [`read_source`] gives it, with `folder`, the mark of the folder that was named.
        path: the picture.
        folder: the folder that is named now.

    Raises:
        ValueError: it is of another picture of the same name, in another folder.
        OSError: the picture cannot be read.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        same_time = record.get("modified_ns") == status.st_mtime_ns
        if "crc32" not in record:  # of the first release
            return same_time and record.get("bytes") == status.st_size
        same = record.get("bytes") == status.st_size and record["crc32"] == _fingerprint(file)
    if record.get("folder") == folder_mark(folder):
        return same and same_time  # the blocks of the fingerprint may not show a change
    if not same:
        raise ValueError(f"{path} has the same name as another picture, in another folder, that was taken before")
    return True


def _fingerprint(file: BinaryIO) -> str:
    size = file.seek(0, os.SEEK_END)
    checksum = zlib.crc32(str(size).encode())
    for block in range(_BLOCKS):
        # The first block begins the file, and the last one ends it.
        file.seek(max(0, size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
        checksum = zlib.crc32(file.read(_BLOCK_BYTES), checksum)
    return f"{checksum:08x}"
