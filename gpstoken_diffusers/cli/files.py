"""What the commands write: pictures in the format of their suffix, each file whole or not at all."""

from __future__ import annotations

import io
import secrets
from pathlib import Path

from PIL import Image, PngImagePlugin

from ..safe_files import check_writable, write_atomically
from ..token_files import is_cut_off, read_metadata
from .made_folders import make_folder

# How to write each format at a quality that does not hide what the model did.
_FORMATS: dict[str, tuple[str, dict]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
    ".bmp": ("BMP", {}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
    ".ppm": ("PPM", {}),
}

_LARGEST_SIDES = {"JPEG": 65500, "WEBP": 16383}  # px; of JPEG, what libjpeg writes


def prepare_folder(folder: Path) -> None:
    """Make a folder if it is missing, and make sure that files can be written into it.

    Raises:
        OSError: it cannot be made or written to; said before any work is done.
    """
    try:
        make_folder(folder)
        # Trying is the only sure way: permissions do not tell of read-only disks or of network shares.
        probe = folder / f".gpstoken.{secrets.token_hex(4)}.tmp"
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"cannot write to the output folder {folder} ({reason}). Choose another one.") from error


def prepare_file(path: Path, source: Path | None = None) -> None:
    """Make sure that the output file `path` can be written, and that it is not the input `source`, if there is one.

    Raises:
        OSError: its folder cannot be made or written to, or it is read-only or no regular file.
        ValueError: it is a folder, or the input.
    """
    if path.is_dir():
        raise ValueError(f"the output {path} is a folder, but it must be a file: add a name to it.")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise ValueError(f"the output {path} is the input itself. Choose another name.")
    check_writable(path)
    prepare_folder(path.parent)


def check_tokens_output(path: Path) -> None:
    """Raises ValueError for a file that is there and holds no tokens, such as the weights of a model: it is kept."""
    if not path.exists() or is_cut_off(path):
        return
    try:
        read_metadata(path)
    except ValueError as error:
        raise ValueError(f"the output {path} is there and holds no tokens: it is kept. Choose another name.") from error


def check_picture_size(path: Path, width: int, height: int) -> None:
    """Raises ValueError for a size in pixels that the format of the path's suffix cannot hold."""
    kind, _ = _FORMATS[path.suffix.lower()]
    largest = _LARGEST_SIDES.get(kind)
    if largest is not None and max(width, height) > largest:
        raise ValueError(
            f"the output {path} would have {width} x {height} px, but {kind} holds {largest} px along a side: write a "
            ".png, or a smaller picture."
        )


def check_picture_suffix(path: Path) -> None:
    """Raises ValueError for a suffix that names no picture format to write."""
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"the output {path} must end in one of {', '.join(_FORMATS)}: the suffix chooses the format.")


def write_picture(picture: Image.Image, path: Path, texts: dict[str, str] | None = None) -> None:
    """Write a picture whole or not at all, in the format of the path's suffix.

    Args:
        picture: an RGB picture.
        path: where; its suffix is one that `check_picture_suffix` allows.
        texts: strings to store inside, for PNG.
    """
    kind, options = _FORMATS[path.suffix.lower()]
    if texts:
        info = PngImagePlugin.PngInfo()
        for name, text in texts.items():
            info.add_itxt(name, text)
        options = {**options, "pnginfo": info}
    data = io.BytesIO()
    picture.save(data, kind, **options)
    write_atomically(path, data.getvalue())
