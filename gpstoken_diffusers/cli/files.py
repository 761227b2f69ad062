"""What the commands write: pictures in the format of their suffix, each file whole or not at all."""

from __future__ import annotations

import io
import secrets
from pathlib import Path

from PIL import Image, PngImagePlugin

from ..safe_files import write_atomically

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


def prepare_folder(folder: Path) -> None:
    """Make a folder if it is missing, and make sure that files can be written into it.

    Raises:
        OSError: it cannot be made or written to; said before any work is done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
        OSError: its folder cannot be made or written to.
        ValueError: it is a folder, or the input.
    """
    if path.is_dir():
        raise ValueError(f"the output {path} is a folder, but it must be a file: add a name to it.")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise ValueError(f"the output {path} is the input itself. Choose another name.")
    prepare_folder(path.parent)


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
