"""Picture files of every kind: what they mean in sRGB and as masks, and what is refused."""

from __future__ import annotations

import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from gpstoken_diffusers import GPSTokenImageProcessor
from gpstoken_diffusers.picture_files import mask_levels, open_picture, upright_rgb

load_image, load_mask = GPSTokenImageProcessor.load_image, GPSTokenImageProcessor.load_mask
GRAY = np.random.default_rng(0).integers(0, 256, (12, 20), dtype=np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(data: bytes) -> np.ndarray:
    return np.asarray(upright_rgb(open_picture(io.BytesIO(data))))


def icc_profile(primaries: tuple[float, ...], gamma: float, description: str = "wide") -> bytes:
    """A matrix profile: XYZ of red, green and blue under the white of D50, and one gamma."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    text = description.encode()
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + bytes(80), b"cprt": b"text" + bytes(5)}
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)
    for place, name in enumerate((b"r", b"g", b"b")):
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*primaries[3 * place : 3 * place + 3])
        tags[name + b"TRC"] = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + bytes(12)
    head += b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + table + body


# AdobeRGB (1998), adapted to D50: https://www.brucelindbloom.com, "RGB Working Space Matrices"
ADOBE = (0.6097559, 0.3111242, 0.0194811, 0.2052401, 0.6256560, 0.0608902, 0.1492240, 0.0632197, 0.7448387)
SRGB_FROM_XYZ = np.array(  # D50, from the same page
    [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
)


def adobe_in_srgb(rgb: np.ndarray) -> np.ndarray:
    """By the formulas of both colour spaces, in float64."""
    xyz = (rgb / 255.0) ** (563 / 256) @ np.reshape(ADOBE, (3, 3))
    linear = (xyz @ SRGB_FROM_XYZ.T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("alpha", [False, True])
def test_colours_are_those_of_the_profile(kind, alpha):
    if alpha and kind == "JPEG":
        pytest.skip("JPEG has no transparency")
    flat = np.full((8, 8, 3), (60, 200, 90), np.uint8)  # far outside sRGB's gray axis, within its gamut
    image = Image.fromarray(flat)
    if alpha:
        image.putalpha(255)
    options = {"icc_profile": icc_profile(ADOBE, 563 / 256)} | ({"lossless": True} if kind == "WEBP" else {})
    found = read(encoded(image, kind, **options)).astype(float)
    expected = adobe_in_srgb(flat)
    assert np.abs(expected - flat).max() > 20
    # 2: the profile's numbers have 16 bits and the picture 8. JPEG's own error of a flat picture is another 2.
    assert np.abs(found - expected).max() <= (4 if kind == "JPEG" else 2)


def test_a_picture_in_srgb_or_with_an_unusable_profile_keeps_its_numbers():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    cut = icc_profile(ADOBE, 2.2)[:200]
    for profile in (srgb, cut, b"no profile at all"):
        assert np.array_equal(read(encoded(Image.fromarray(RGB), icc_profile=profile)), RGB)
    # Of another colour space than the picture.
    assert np.array_equal(read(encoded(Image.fromarray(GRAY), icc_profile=icc_profile(ADOBE, 2.2)))[..., 0], GRAY)


@pytest.mark.parametrize("options", [{}, {"icc_profile": icc_profile(ADOBE, 2.2)}])
def test_nothing_is_converted_or_turned_twice(options):
    exif = Image.Exif()
    exif[0x0112] = 6
    once = upright_rgb(open_picture(io.BytesIO(encoded(Image.fromarray(RGB), exif=exif, **options))))
    assert np.array_equal(upright_rgb(once), once)
    plain = upright_rgb(open_picture(io.BytesIO(encoded(Image.fromarray(RGB), **options))))
    assert np.array_equal(once, np.rot90(plain, -1))  # 6: rotate by 90 degrees clockwise to view


# Metadata


def chunk(name: bytes, data: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(name + data) if crc is None else crc
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


LARGE = zlib.compress(bytes(2_000_000))  # beyond what Pillow inflates of text
METADATA = {
    "eXIf that is none": chunk(b"eXIf", b"no TIFF at all"),
    "eXIf cut off": chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff\x12\x01"),
    "large zTXt": chunk(b"zTXt", b"Comment\0\0" + LARGE),
    "large iTXt": chunk(b"iTXt", b"Comment\0\x01\0\0\0" + LARGE),
    "large iCCP": chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(200_000_000 // 50))),
    "iCCP that does not inflate": chunk(b"iCCP", b"profile\0\0not zlib"),
    "bad CRC": chunk(b"tEXt", b"Comment\0text", crc=1),
    "short pHYs": chunk(b"pHYs", b"\0"),
}


@pytest.mark.parametrize("name", METADATA)
def test_good_pixels_are_read_whatever_their_metadata(name, tmp_path):
    whole = encoded(Image.fromarray(RGB))
    data = whole[:33] + METADATA[name] + whole[33:]  # after the signature and IHDR
    assert np.array_equal(read(data), RGB)
    (tmp_path / "a.png").write_bytes(data[:-40])
    with pytest.raises(ValueError, match=r"a\.png is damaged or truncated"):
        load_image(tmp_path / "a.png")


def test_whatever_a_picture_raises_is_that_pictures_error(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(RGB)))
    for error in (struct.error("x"), KeyError(1), ZeroDivisionError(), RuntimeError("avif"), NotImplementedError()):

        def load(self, error=error):
            raise error

        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
        with pytest.raises(ValueError, match=r"a\.png is damaged or truncated: ."):
            load_image(tmp_path / "a.png")


# Depth


def tiff(values: np.ndarray, bits: int, sample_format: int = 1) -> bytes:
    """An uncompressed little-endian TIFF of one strip, (H, W)."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(height, -1, 2).astype(np.uint32)
        joined = pairs[..., 0] << 12 | pairs[..., 1]
        data = np.stack([joined >> 16, joined >> 8 & 255, joined & 255], -1).astype(np.uint8).tobytes()
    else:
        data = values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    tags[339] = sample_format
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags.items())
    directory = directory.replace(struct.pack("<HHI", 258, 4, 1), struct.pack("<HHI", 258, 3, 1))
    directory = directory.replace(struct.pack("<HHI", 339, 4, 1), struct.pack("<HHI", 339, 3, 1))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4)


def png16(values: np.ndarray, transparent: int) -> bytes:
    whole = encoded(Image.fromarray(values.astype(np.uint16)))
    return whole[:33] + chunk(b"tRNS", struct.pack(">H", transparent)) + whole[33:]


def pfm(values: np.ndarray) -> bytes:
    return b"Pf\n%d %d\n-1.0\n" % values.shape[::-1] + values[::-1].astype("<f4").tobytes()


DEEP = GRAY.astype(np.float64) / 255
DEPTHS = {
    "PNG, 16 bits": encoded(Image.fromarray((DEEP * 65535).round().astype(np.uint16))),
    "TIFF, 12 bits": tiff((DEEP * 4095).round(), 12),
    "TIFF, 16 bits": tiff((DEEP * 65535).round().astype("<u2"), 16),
    "TIFF, 32 bits": tiff((DEEP * (2**32 - 1)).round().astype("<u4"), 32),
    "TIFF, floats": tiff(DEEP.astype("<f4"), 32, sample_format=3),
    "PFM": pfm(DEEP),
    "PGM of 0 to 1000": b"P5 20 12 1000\n" + (DEEP * 1000).round().astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_gray_spans_the_range_that_its_format_states(name, tmp_path):
    # Half a step of 1,000 levels is 0.13 of 255: enough to round to the next of them.
    assert np.abs(read(DEPTHS[name]).astype(int) - GRAY[..., None]).max() <= (1 if "1000" in name else 0)
    (tmp_path / "mask").write_bytes(DEPTHS[name])
    assert np.abs(load_mask(tmp_path / "mask") - DEEP).max() < 1 / 1000


def test_sixteen_bits_with_a_transparent_value():
    values = np.array([[0, 257 * 100, 257 * 200]])
    data = png16(values, transparent=257 * 100)
    assert read(data)[0, :, 0].tolist() == [0, 255, 200]
    assert mask_levels(open_picture(io.BytesIO(data)))[0].tolist() == pytest.approx([0, 0, 200 / 255])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (tiff(DEEP.astype("<f4") * 255, 32, sample_format=3), "gray from 0 to 1, got 0 to 255"),
        (pfm(DEEP - 1), "gray from 0 to 1, got -1 to"),
        (pfm(np.full((2, 2), np.nan)), "gray from 0 to 1, got nan"),
        (tiff(GRAY.astype("<i2"), 16, sample_format=2), "signed integers"),
    ],
)
def test_gray_whose_range_nobody_knows(data, words, tmp_path):
    (tmp_path / "deep").write_bytes(data)
    for load in (load_image, load_mask):
        with pytest.raises(ValueError, match=rf"deep cannot be used: .*{words}"):
            load(tmp_path / "deep")


# Masks


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA", "I;16", "F"])
def test_a_mask_from_any_picture(mode, tmp_path):
    """White at the top, black below, turned by its camera; where transparency is known, the right half is."""
    plane = np.zeros((6, 8), np.uint8)
    plane[:3] = 255
    if mode == "F":
        image = Image.fromarray(plane.astype(np.float32) / 255)
    elif mode == "I;16":
        image = Image.fromarray(plane.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(plane).convert(mode)
    expected = plane / 255.0
    if "A" in mode:
        alpha = np.full((6, 8), 255, np.uint8)
        alpha[:, 4:] = 0
        image.putalpha(Image.fromarray(alpha))
        expected[:, 4:] = 0
    exif = Image.Exif()
    exif[0x0112] = 8  # rotate by 90 degrees counter-clockwise to view
    image.info["exif"] = exif.tobytes()
    assert np.array_equal(mask_levels(image), np.rot90(expected))


# What is no picture


def test_only_raster_formats_are_opened(tmp_path, monkeypatch):
    """For PostScript Pillow would start Ghostscript."""
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("a program was started"))
    (tmp_path / "a.jpg").write_bytes(encoded(Image.fromarray(RGB), "EPS"))
    with pytest.raises(ValueError, match="not an image in a raster format"):
        load_image(tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError, match="No image file"):
        load_image(tmp_path / "absent.png")


@pytest.mark.parametrize("image", [np.zeros((0, 8, 3)), np.zeros((8, 0), np.uint8), Image.new("RGB", (0, 5))])
def test_empty_pictures(image):
    processor = GPSTokenImageProcessor(tile_size=32, num_tokens=4)
    for call in (processor, processor.layout_from_mask, lambda x: processor(np.zeros((8, 8)), importance=x)):
        with pytest.raises(ValueError, match="at least one pixel, got the shape"):
            call(image)
