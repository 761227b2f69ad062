"""Picture files of any kind -> upright 8-bit sRGB, or a mask. Only raster formats are read; no program is started."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

# Pillow's names; HEIF where a plugin knows it. Not EPS, for which Pillow starts Ghostscript, nor formats of other data.
_FORMATS = "AVIF BMP DDS DIB GIF HEIF ICNS ICO JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP".split()

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # what the pixels need
_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _SIGNED = 258, 339, 2  # of TIFF

_Converted = TypeVar("_Converted")


def image_suffixes() -> tuple[str, ...]:
    """Files that are taken for pictures when a folder or an archive is searched: in lower case, with their dots.

    Those that the installed Pillow reads, with plugins that have registered themselves (as `pillow_heif` does).
    """
    return tuple(sorted(end for end, name in Image.registered_extensions().items() if name in readable_formats()))


def readable_formats() -> list[str]:
    """Pillow's names of the raster formats that it can read here."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def open_picture(source: str | os.PathLike | BinaryIO) -> Image.Image:
    """A picture file in a raster format, with its pixels loaded; of several frames or pages the first.

    Metadata are not needed: a PNG whose metadata are damaged is read without them.

    Raises whatever Pillow raises for files that are damaged or no pictures: there is no list of it.
    """
    try:
        image = Image.open(source, formats=readable_formats())
        image.load()
        return image
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception:
        if hasattr(source, "read"):
            source.seek(0)
            data = source.read()
        else:
            with open(source, "rb") as file:
                data = file.read()
        if not data.startswith(_PNG_START):
            raise
        image = Image.open(io.BytesIO(_without_metadata(data)), formats=["PNG"])
        image.load()
        return image


def read_picture(
    source: str | os.PathLike | BinaryIO, name: str, convert: Callable[[Image.Image], _Converted]
) -> _Converted:
    """What `convert` makes of a picture file, such as [`upright_rgb`]; `name` is what to call it in messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file, one that is no picture in a raster format, a damaged one, or what `convert` raises.
        OSError: the system cannot read the file, through no fault of what is in it.
    """
    if not hasattr(source, "read"):
        if not os.path.isfile(source):
            raise FileNotFoundError(f"No image file at {name}.")
    if not (source.seek(0, os.SEEK_END) if hasattr(source, "read") else os.path.getsize(source)):
        raise ValueError(f"{name} is empty (0 bytes), so it holds no image.")
    try:
        with open_picture(source) as image:
            return convert(image)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image in a raster format that Pillow reads.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is larger than Pillow allows: {error}") from error
    except Exception as error:  # Pillow's plugins raise many kinds for damaged files
        if isinstance(error, OSError) and error.errno is not None:  # the system's own
            raise
        what = "cannot be used" if isinstance(error, ValueError) else "is damaged or truncated"
        raise ValueError(f"{name} {what}: {str(error) or type(error).__name__}") from error


def _without_metadata(png: bytes) -> bytes:
    """A PNG of the chunks that its pixels need."""
    kept, start = [_PNG_START], len(_PNG_START)
    while start + 12 <= len(png):  # length, name, data, CRC
        stop = start + 12 + int.from_bytes(png[start : start + 4], "big")
        if png[start + 4 : start + 8] in _PNG_CHUNKS:
            kept.append(png[start:stop])
        start = stop
    return b"".join(kept)


def upright_rgb(image: Image.Image, background: Sequence[int] = (255, 255, 255)) -> Image.Image:
    """A picture of any mode as [`upright`] makes it, laid on a colour where it is transparent: 8-bit RGB."""
    check_background(background)
    picture = upright(image)
    if picture.mode == "RGB":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, (*background, 255)), picture).convert("RGB")


def check_background(background: Sequence[int]) -> None:
    """Raises ValueError unless it is a colour: three integers from 0 to 255."""
    if len(background) != 3 or not all(isinstance(level, Integral) and 0 <= level <= 255 for level in background):
        raise ValueError(f"background must be three integers from 0 to 255, red, green and blue, got {background!r}.")


def upright(image: Image.Image) -> Image.Image:
    """A picture of any mode in 8-bit sRGB, turned as its camera says: RGBA where it has transparency, else RGB.

    Colours are converted to sRGB by the picture's colour profile. Without a profile, or with one that cannot be used,
    its numbers are taken for sRGB, and CMYK is converted by Pillow's formula. Gray of more than 8 bits is scaled as in
    [`mask_levels`]. The result carries no metadata.

    Raises ValueError: gray numbers whose range is not known.
    """
    levels, alpha = _deep_gray(image), None
    if levels is not None:
        color = Image.fromarray((levels * 255).round().astype(np.uint8))
        if (opaque := _opaque(image)) is not None:
            alpha = Image.fromarray(opaque.astype(np.uint8) * 255)
    elif image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        color = _srgb(image.convert("L" if image.mode == "LA" else "RGB"))
    else:
        color = _srgb(image)
    color = color.convert("RGB")
    if alpha is not None:
        color.putalpha(alpha)
    picture = _turned(color, image)
    picture.info = {}
    return picture


def mask_levels(image: Image.Image) -> np.ndarray:
    """A mask from a picture of any mode: (H, W) float32 in [0, 1], turned as its camera says; transparent is 0.

    Gray of 16 bits spans 0 to 65535; of TIFF, what its header states (12 bits: 0 to 4095). Floats must lie in [0, 1].

    Raises ValueError: gray numbers whose range is not known.
    """
    levels = _deep_gray(image)
    if levels is not None:
        opaque = _opaque(image)
        levels = levels if opaque is None else levels * opaque
    elif image.has_transparency_data:
        gray, alpha = (np.asarray(band, np.float32) / 255 for band in image.convert("RGBA").convert("LA").split())
        levels = gray * alpha
    else:
        levels = np.asarray(image.convert("L"), np.float32) / 255
    return np.array(_turned(Image.fromarray(levels.astype(np.float32)), image))


def _deep_gray(image: Image.Image) -> np.ndarray | None:
    """Gray of more than 8 bits as (H, W) float32 in [0, 1]; None for pictures of 8 bits."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return None
    values, largest = np.asarray(image), 1 if image.mode == "F" else 65535
    if image.format == "TIFF" and image.mode != "F":
        if image.tag_v2.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED:
            raise ValueError("expected a range of gray from 0 on, got signed integers: store them as unsigned ones.")
        largest = 2 ** image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0] - 1
        if largest > 65535:
            values = values.astype(np.int32).view(np.uint32)  # Pillow's integers are signed
    if not ((values >= 0) & (values <= largest)).all():  # NaN fails this too
        raise ValueError(
            f"expected gray from 0 to {largest}, got {values.min():g} to {values.max():g}: scale it to that range."
        )
    return (values / np.float64(largest)).astype(np.float32)


def _opaque(image: Image.Image) -> np.ndarray | None:
    """(H, W) bool, where gray of more than 8 bits is not the value that a PNG calls transparent."""
    transparent = image.info.get("transparency")
    return np.asarray(image) != transparent if isinstance(transparent, int) else None


def _srgb(image: Image.Image) -> Image.Image:
    """Colours by the picture's own profile, in sRGB; the picture itself where it has none or an unusable one."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        color = image.convert("RGB") if image.mode == "P" else image
        return ImageCms.profileToProfile(color, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except Exception:  # damaged, of another colour space, or a Pillow without colour management: the pixels are good
        return image


def _turned(picture: Image.Image, original: Image.Image) -> Image.Image:
    """The picture turned as the EXIF or XMP data of the original say; damaged data say nothing."""
    try:
        method = _UPRIGHT.get(original.getexif().get(_ORIENTATION))
    except Exception:  # Pillow's parser raises many kinds, and the pixels are good
        method = None
    return picture if method is None else picture.transpose(method)
