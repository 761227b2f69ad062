"""Files of tokens: what is written, whole or not at all, and what is refused when it is read."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from golden_files import golden
from PIL import Image
from safetensors.torch import load_file, save_file
from token_zoo import GEOMETRY, TEXTURE, assert_same, make_tokens

from gpstoken_diffusers.tokens import RHO, GPSTokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_keep_every_bit(tmp_path, dtype):
    tokens = make_tokens(2, 12, 3, dtype, image_size=(50, 60), tile_grid=(2, 2), canvas_size=(64, 64))
    path = tmp_path / "a.safetensors"
    tokens.save(path)
    assert_same(GPSTokens.load(path), tokens)
    assert_same(GPSTokens.load(str(path)), tokens)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    # 8 bytes of length, a JSON header padded to 8, and the two tensors: nothing else is stored.
    header_length = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header_length + 2 * tokens.num_bytes


@pytest.mark.parametrize(
    ("dtype", "digest"),
    [
        (torch.float32, "09cc9a0db31b17e9866cd74e89165d89751e2064636bf873c8aae8802df2dfdb"),
        (torch.float16, "0a7fabec8793dc501d6dc81bf935281405a5bc7c57d0c204b3b8e6c834e4415c"),
        (torch.bfloat16, "160f8606a1e8809cb986b461face37b9c0108032ab99877906cbae61d87300df"),
    ],
)
def test_plain_files_are_those_of_the_first_release(tmp_path, dtype, digest):
    """Digests of what the code before format version 2 wrote: older programs must be able to read such files."""
    values = (torch.arange(2 * 6 * 8).reshape(2, 6, 8) + 1) / 128
    tokens = GPSTokens(values[..., :5].contiguous(), values[..., 5:].to(dtype), (50, 60), (2, 3), (64, 96))
    tokens.save(tmp_path / "a.safetensors", {"model": "tiny"})
    data = (tmp_path / "a.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    # safetensors writes the header's strings in a random order: they are sorted here.
    header = json.dumps([end - 8, json.loads(data[8:end])], sort_keys=True)
    assert hashlib.sha256(header.encode() + data[end:]).hexdigest() == digest


@pytest.mark.parametrize("dtype", [None, "float16", "uint8"])
@pytest.mark.parametrize("is_layout", [True, False])
def test_a_layout_of_older_programs_is_a_layout(tmp_path, dtype, is_layout):
    """They gave layouts one channel of zeros; one channel with any number in it is a texture."""
    tokens = make_tokens(2, 12, 1, torch.float32, image_size=(50, 60), tile_grid=(2, 2), canvas_size=(64, 64))
    texture = torch.zeros(2, 12, 1)
    if not is_layout:
        texture[-1, -1] = 0.5
    dataclasses.replace(tokens, texture=texture).save(tmp_path / "old.gps", dtype=dtype)
    loaded = GPSTokens.load(tmp_path / "old.gps")
    assert loaded.is_layout == is_layout
    assert loaded.num_tokens == tokens.num_tokens
    torch.testing.assert_close(loaded.geometry, tokens.geometry, atol=0.02, rtol=0.02)  # 8 bits round


def test_saving_views_and_parameters(tmp_path):
    # One row, so that both slices are contiguous views of one storage.
    for shape in ((1, 1, 8), (2, 6, 8)):
        tokens = GPSTokens.from_tensor(torch.full(shape, 0.5, requires_grad=True), (8, 8))
        tokens.save(tmp_path / "a.safetensors")
        assert_same(GPSTokens.load(tmp_path / "a.safetensors"), tokens.detach())


def test_header_and_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    make_tokens(tile_grid=(2, 2), canvas_size=(64, 64)).save(path, metadata={"model": "gpstoken-mini"})
    assert GPSTokens.read_metadata(path) == {
        "format": "gpstoken.tokens",
        "format_version": "1",
        "image_size": "[48, 64]",
        "tile_grid": "[2, 2]",
        "canvas_size": "[64, 64]",
        "model": "gpstoken-mini",
        "encoding": "float32",
    }


def test_what_is_not_saved(tmp_path):
    broken = make_tokens()
    broken.geometry[0, 3, RHO] = 1
    for tokens, arguments, error, words in (
        (make_tokens(), ({"tile_grid": "", "format": "", "x": "", "encoding": ""},), ValueError, "encoding, format, t"),
        (make_tokens(), ({"shape": ""}, "uint8"), ValueError, "own header: shape"),
        (make_tokens(), ({"steps": 3},), TypeError, "strings to strings"),
        (broken, (), ValueError, "token 3 of image 0"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            tokens.save(tmp_path / "a", *arguments)
    assert os.listdir(tmp_path) == []


def test_files_that_cannot_be_written_or_read(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, error in (("missing", FileNotFoundError), ("file", NotADirectoryError)):
        with pytest.raises(error, match="cannot write the file") as caught:
            make_tokens().save(tmp_path / folder / "a.safetensors")
        assert caught.value.filename == str(tmp_path / folder / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        GPSTokens.load(tmp_path / "nothing.safetensors")
    with pytest.raises(IsADirectoryError):
        GPSTokens.load(tmp_path)


@pytest.mark.parametrize("kept", [1, 7, 8, 9, 100, -5000, -1])
def test_truncated_files(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    make_tokens(2, 100, 32).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    message = "not a safetensors file" if kept in (1, 7, 8) else "truncated or damaged safetensors file"
    with pytest.raises(ValueError, match=f"a.safetensors: (a )?{message}.*Encode the image again"):
        GPSTokens.load(path)


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def _torch_saved(value: object, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda _: b"", "the file is empty"),
        (lambda _: b"geometry: 1 2 3, texture: 4 5 6", "not a safetensors file"),
        (lambda _: b"\0" * 64, "not a safetensors file"),
        (lambda _: _png(), "not a safetensors file"),
        (lambda target: pickle.dumps(Bomb(target), protocol=2), "a Python pickle"),
        (lambda target: pickle.dumps(Bomb(target)), "a Python pickle"),
        (lambda target: _torch_saved(Bomb(target), zipped=True), "a Python pickle"),
        (lambda target: _torch_saved(Bomb(target), zipped=False), "a Python pickle"),
    ],
    ids=["empty", "text", "zeros", "png", "pickle2", "pickle", "torch", "torch-legacy"],
)
def test_files_of_another_kind(tmp_path, content, message):
    target = tmp_path / "executed"
    (tmp_path / "a.safetensors").write_bytes(content(target))
    for read in (GPSTokens.load, GPSTokens.read_metadata):
        with pytest.raises(ValueError, match=f"a.safetensors: .*{message}"):
            read(tmp_path / "a.safetensors")
    assert not target.exists()


def write_file(path: Path, tensors: dict[str, torch.Tensor], **header: str | None) -> None:
    sizes = {name: json.dumps(size) for name, size in (("image_size", (8, 8)), ("tile_grid", (1, 1)))}
    whole = {"format": "gpstoken.tokens", "format_version": "1", "canvas_size": "[8, 8]"} | sizes | header
    save_file(tensors, path, metadata={name: text for name, text in whole.items() if text is not None})


GOOD = {"geometry": GEOMETRY, "texture": TEXTURE}


def test_the_hand_written_file_is_good(tmp_path):
    write_file(tmp_path / "a", GOOD)
    assert_same(GPSTokens.load(tmp_path / "a"), GPSTokens(GEOMETRY, TEXTURE, (8, 8)))


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        (GOOD, {"format": None}, r"not of tokens: it holds 2 tensors \(geometry, texture\)"),
        (
            {f"block.{i}": TEXTURE + i for i in range(5)},
            {"format": "pt"},
            r"5 tensors \(block.0, block.1, .*, \.\.\.\)",
        ),
        (GOOD, {"format_version": "3"}, "format version 3, but this program reads up to 2. Upgrade it"),
        (GOOD, {"format_version": "latest"}, "their format version reads 'latest'"),
        (GOOD, {"format_version": None}, "damaged"),
        ({"geometry": GEOMETRY}, {}, "the tokens lack 'texture'"),
        (GOOD, {"image_size": None}, "the tokens lack 'image_size'"),
        (GOOD, {"image_size": "8 by 8"}, "damaged"),
        (GOOD, {"image_size": '"ab"'}, "image_size must be two ints"),
        (GOOD, {"image_size": "[8, -8]"}, "image_size must be at least 1"),
        (GOOD, {"tile_grid": "[4, 1]"}, "6 tokens do not divide evenly"),
        (GOOD | {"geometry": GEOMETRY.double()}, {}, "float32, not torch.float64"),
        (GOOD | {"geometry": GEOMETRY[0]}, {}, r"\(B, N, 5\), not \(6, 5\)"),
        (GOOD | {"texture": TEXTURE.int()}, {}, "not torch.int32"),
        (GOOD | {"texture": TEXTURE / 0}, {}, "the texture must be finite"),
        (GOOD | {"geometry": GEOMETRY * 2}, {}, "rho must lie strictly"),
        (GOOD | {"geometry": GEOMETRY * 0}, {}, "sigma_x and sigma_y must be greater than 0"),
        ({"geometry": GEOMETRY[:0], "texture": TEXTURE[:0]}, {}, "tokens are empty"),
    ],
)
def test_damaged_and_foreign_safetensors(tmp_path, tensors, header, message):
    path = tmp_path / "a.safetensors"
    write_file(path, tensors, **header)
    with pytest.raises(ValueError, match=f"a.safetensors: .*{message}"):
        GPSTokens.load(path)


def test_a_checkpoint_is_not_tokens():
    with pytest.raises(ValueError, match="not of tokens: it holds .* tensors"):
        GPSTokens.load(golden("ae_small_weights.safetensors"))


# Files of few bits per number


def write_payload(path: Path, data: bytes, **header: str | None) -> None:
    """A file of format version 2 of 1 x 2 tokens of 3 channels, whose payload inflates to the data given."""
    stream = torch.frombuffer(bytearray(zlib.compress(data)), dtype=torch.uint8)
    header = {"format_version": "2", "encoding": "uint8", "shape": "[1, 2, 3]"} | header
    write_file(path, {"payload": stream}, **header)


# 3 ranges, 2 x 5 codes of four bytes, 2 x 3 codes of one byte.
ZEROS = bytes(3 * 8 + 2 * 5 * 4 + 2 * 3)


def test_the_hand_written_payload_is_good(tmp_path):
    write_payload(tmp_path / "a", ZEROS)
    # A code of 0 is a sigma of 1, in an image that spans 2, and 0 for the others.
    expected = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]).expand(1, 2, 5)
    assert_same(GPSTokens.load(tmp_path / "a"), GPSTokens(expected, torch.zeros(1, 2, 3), (8, 8)))


def test_the_payload_means_what_the_format_says(tmp_path):
    """Four tokens in 1 x 2 tiles: codes, and what they stand for, by hand."""

    def codes(*values: int) -> bytes:
        unsigned = [2 * value if value >= 0 else -2 * value - 1 for value in values]
        return b"".join(bytes(value >> shift & 255 for value in unsigned) for shift in (24, 16, 8, 0))

    ranges = struct.pack("<4f", -1.0, 1.0, 5.0, 5.0)
    sigma = codes(-128, 0, 0, 0, -256, 0, 0, -2560)  # steps of 1/128 of log sigma; all sigma_x, then all sigma_y
    rho = codes(0, 128, 0, 0)
    centre = codes(0, 0, 64, 300, 0, 0, -64, 300)
    texture = bytes([0, 255, 51, 204, 0, 0, 0, 0])
    data = ranges + sigma + rho + centre + texture
    write_payload(tmp_path / "a", data, shape="[1, 4, 2]", tile_grid="[1, 2]")
    expected = [
        # sigma_x of a tile is half that of the picture; the middle of a tile is at -0.5 or 0.5.
        [math.exp(-1) / 2, math.exp(-2), 0.0, -0.5, 0.0],
        [0.5, 1.0, math.tanh(1), -0.5, 0.0],
        [0.5, 1.0, 0.0, 0.5 + 64 / 128 / 2, -64 / 128],
        # e^-20 / 128 is below the smallest step of a centre, 2^-14.
        [0.5, math.exp(-20), 0.0, 0.5 + 300 / 128 / 2, 300 / 2**14],
    ]
    loaded = GPSTokens.load(tmp_path / "a")  # float32 keeps 6e-8 of a number
    torch.testing.assert_close(loaded.geometry, torch.tensor([expected]), rtol=2e-7, atol=0)
    texture = [[-1.0, 5.0], [1.0, 5.0], [-1 + 2 * 51 / 255, 5.0], [-1 + 2 * 204 / 255, 5.0]]
    torch.testing.assert_close(loaded.texture, torch.tensor([texture]), rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("data", "header", "message"),
    [
        (ZEROS[:-1], {}, r"does not hold 1 x 2 tokens of 3 texture channels"),
        (ZEROS + b"\0", {}, "does not hold 1 x 2 tokens"),
        (b"", {}, "does not hold 1 x 2 tokens"),
        (b"\0\0\xc0\x7f" + ZEROS[4:], {}, "the texture must be finite"),
        # The highest byte of a code of sigma_x: the Gaussian is 2^24 / 128 octaves wide, and so are its steps.
        (ZEROS[:24] + b"\x02" + ZEROS[25:], {}, "the geometry must be finite"),
        (ZEROS, {"shape": "[1, 3, 2]"}, "does not hold 1 x 3 tokens of 2 texture channels"),
        (ZEROS, {"shape": "[1, 1000000000000000000000, 3]"}, "does not hold"),
        (ZEROS, {"shape": "[1, 2]"}, "their shape reads"),
        (ZEROS, {"shape": "[1, 0, 2]"}, "their shape reads"),
        (ZEROS, {"shape": "[true, 2, 3]"}, "their shape reads"),
        (ZEROS, {"shape": '"2"'}, "their shape reads"),
        (ZEROS, {"shape": "[" * 100_000}, "damaged"),
        (ZEROS, {"shape": None}, "the tokens lack 'shape'"),
        (ZEROS, {"encoding": "uint7"}, "encoding reads 'uint7', not uint8"),
        (ZEROS, {"encoding": None}, "the tokens lack 'encoding'"),
        (ZEROS, {"tile_grid": "[3, 1]"}, "2 tokens do not divide evenly"),
        (ZEROS, {"tile_grid": "[1000000, 1000000]"}, "2 tokens do not divide evenly"),
        (ZEROS, {"image_size": "[9, 8]"}, "canvas_size .* is smaller"),
        (ZEROS, {"format_version": "1"}, "the tokens lack 'geometry'"),
    ],
)
def test_damaged_payloads(tmp_path, data, header, message):
    path = tmp_path / "a.safetensors"
    write_payload(path, data, **header)
    with pytest.raises(ValueError, match=f"a.safetensors: .*{message}.*Encode the image again"):
        GPSTokens.load(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"payload": torch.zeros(4)}, r"must be bytes, not torch.float32 of the shape \(4,\)"),
        ({"payload": torch.zeros(1, 4, dtype=torch.uint8)}, "must be bytes"),
        ({"payload": torch.zeros(400, dtype=torch.uint8)}, "does not inflate"),
        (GOOD, "the tokens lack 'payload'"),
    ],
)
def test_what_is_no_payload(tmp_path, tensors, message):
    path = tmp_path / "a.safetensors"
    write_file(path, tensors, format_version="2", encoding="uint8", shape="[1, 2, 3]")
    with pytest.raises(ValueError, match=f"a.safetensors: .*{message}.*Encode the image again"):
        GPSTokens.load(path)


def test_a_payload_inflates_no_further_than_its_shape(tmp_path):
    path = tmp_path / "a.safetensors"
    write_payload(path, ZEROS + bytes(64_000_000))
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="does not hold 1 x 2 tokens"):
            GPSTokens.load(path)
        # The file itself and a little more; the bomb is 64 MB.
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_payloads_that_end_too_late_or_too_soon(tmp_path):
    path = tmp_path / "a.safetensors"
    write_payload(path, ZEROS)
    payload = load_file(path)["payload"]
    # One byte more, the checksum cut, the checksum gone: all numbers are there in each.
    for other in (torch.cat([payload, payload[:1]]), payload[:-1], payload[:-4]):
        write_file(path, {"payload": other}, format_version="2", encoding="uint8", shape="[1, 2, 3]")
        with pytest.raises(ValueError, match="does not hold"):
            GPSTokens.load(path)


@pytest.mark.parametrize("dtype", [None, "uint8"])
def test_damage_anywhere_is_refused_or_harmless(tmp_path, dtype):
    """Every seventh byte, three ways: tokens that pass all checks, or an error that names the file."""
    path = tmp_path / "a.safetensors"
    tokens = make_tokens(1, 12, 3, tile_grid=(2, 2), canvas_size=(64, 64))
    tokens.save(path, {"model": "tiny"}, dtype)
    whole, saved = path.read_bytes(), GPSTokens.load(path)
    payload = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for position in range(0, len(whole), 7):
        for flip in (0x01, 0x10, 0xFF):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            try:
                loaded = GPSTokens.load(path).validate()
            except ValueError as error:
                assert str(error).startswith(f"{path}: ")
                refused += 1
            else:
                if dtype is not None and position >= payload:  # covered by a checksum, but for bits that fill a byte
                    assert_same(loaded, saved)
            try:
                GPSTokens.read_metadata(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: ")
    assert refused > len(whole) // 7
