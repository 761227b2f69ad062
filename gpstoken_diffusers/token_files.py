"""Tokens in files: safetensors that hold them as they are, or with a few bits per number.

A file of format version 1 holds the tensors `geometry` and `texture`. One of version 2 holds a single tensor of bytes,
`payload`, and names its `encoding` ("uint8") and its `shape` ([B, N, C]) in the header. The payload is a zlib stream,
whose checksum covers every number; inflated it holds, one after the other:

    ranges           (B, C, 2) float32, little-endian: lowest and highest value of a texture channel in a picture
    sigma codes      (4, 2, B, N) bytes: the four bytes of each code, the highest first, byte by byte
    rho codes        (4, 1, B, N) bytes
    centre codes     (4, 2, B, N) bytes
    texture codes    (C, B, N) bytes, each below 2^bits

A code of the geometry is a signed integer k, stored as 2 k or as -2 k - 1 for k < 0. With bits = 8 (files of the first
release may have 6 or 4 and say so in their encoding; they are still read) and the step s = 2^(1 - bits), in the
coordinates of the token's own tile, where the tile spans 2:

    log sigma = s k
    atanh rho = s k
    x, y = u k, where u = max(s sigma sqrt(1 - rho^2), 2^-14) with the decoded sigma (of that axis) and rho
    texture = low + k (high - low) / (2^bits - 1)

No number is off by more than half a step. The step of a centre is a fraction of the Gaussian's reach along that axis
with the other coordinate fixed: a small token is placed as exactly for its size as a large one, whatever the size of
the picture, and no token's error depends on another token. 2^-14 is 1/128 pixel of a tile of 256. The geometry's step
is chosen so that a byte more for geometry gains as much as a byte more for texture: on photographs geometry takes a
sixth of the bytes and makes a sixth of the squared error. `tests/benchmarks/benchmark_token_files.py` measures it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from .geometry import CENTER, GEOMETRY_CHANNELS, RHO, SIGMA, merge_tile_geometry, split_tile_geometry
from .safe_files import check_format, open_safetensors, write_atomically

FILE_FORMAT = "gpstoken.tokens"
FILE_FORMAT_VERSION = 2
PLAIN_FORMAT_VERSION = 1
"""Version of files of plain tensors, which programs that know nothing of version 2 can read."""

PLAIN_DTYPES = {"float32": torch.float32, "float16": torch.float16}
ENCODINGS = (*PLAIN_DTYPES, "uint8")
"""Names that `dtype` takes, from the most bytes to the fewest."""
_BITS_OF_ENCODING = {"uint8": 8, "uint6": 6, "uint4": 4}  # that can be read

_SIZES = ("image_size", "tile_grid", "canvas_size")
_SAFETENSORS_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ADVICE = "Encode the image again."
_SMALLEST_CENTRE_STEP = 2.0**-14
_CODE_BYTES = 4
_LARGEST_CODE = 2**31 - 1
_FIELDS = (SIGMA, slice(RHO, RHO + 1), CENTER)
_LARGEST = torch.finfo(torch.float32).max
# One byte of a deflate stream becomes at most 1,032 bytes (https://zlib.net/zlib_tech.html).
_LARGEST_INFLATION = 1032
# A safetensors file begins with the length of its header, which is JSON.
_LENGTH_BYTES, _HEADER_START, _LARGEST_HEADER = 8, b'{"__metadata__":{', 100_000_000


Tokens = TypeVar("Tokens")
"""GPSTokens, which the module `tokens` defines: it imports this one."""


def save_tokens(
    tokens: Tokens, path: str | os.PathLike, metadata: Mapping[str, str] | None = None, dtype: str | None = None
) -> None:
    """What [`GPSTokens.save`] does."""
    write_atomically(path, _file_bytes(tokens, metadata or {}, dtype))


def encoded_size(tokens: Tokens, dtype: str | None = None) -> int:
    """Bytes of the file that `tokens.save(path, dtype=dtype)` would write, header and all pictures included.

    Raises:
        ValueError: as [`GPSTokens.save`] does.
    """
    return len(_file_bytes(tokens, {}, dtype))


def load_tokens(path: str | os.PathLike, kind: type[Tokens]) -> Tokens:
    """What [`GPSTokens.load`] does; `kind` is the class of the result."""
    header, tensors = _read(path, with_tensors=True)
    try:
        sizes = {name: json.loads(header[name]) for name in _SIZES}
        if _is_plain(header):
            return kind(tensors["geometry"], _own_texture(tensors["texture"]), **sizes).validate()
        shape = _shape(json.loads(header["shape"]))
        bits = _BITS_OF_ENCODING.get(header["encoding"])
        if bits is None:
            raise ValueError(f"their encoding reads {header['encoding']!r}, not uint8")
        codes, texture_codes, ranges = _unpack(tensors["payload"], shape)
        # Tensors without numbers, to check that the tile grid fits the shape before it is used.
        blank = (torch.empty(*shape[:2], channels, device="meta") for channels in (GEOMETRY_CHANNELS, shape[2]))
        geometry = _decode_geometry(codes, bits, kind(*blank, **sizes).tile_grid)
        return kind(geometry, _own_texture(_decode_texture(texture_codes, ranges, bits)), **sizes).validate()
    except KeyError as error:
        raise ValueError(f"{path}: the tokens lack {error}. {_ADVICE}") from error
    except (ValueError, TypeError, RecursionError) as error:  # RecursionError: JSON nested a thousand levels deep
        raise ValueError(f"{path}: the tokens are damaged: {error}. {_ADVICE}") from error


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """What [`GPSTokens.read_metadata`] does: strings, `encoding` among them ("bfloat16" or one of ENCODINGS)."""
    return _read(path, with_tensors=False)[0]


def is_cut_off(path: str | os.PathLike) -> bool:
    """Whether a file is the beginning of a tokens file, and not all of it: nothing is lost when it is made anew.

    Raises OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(_LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        header = file.read(min(length, _LARGEST_HEADER))
        size = file.seek(0, os.SEEK_END)
    if len(header) < length or len(start) < _LENGTH_BYTES:  # the header itself is cut off
        return header[: len(_HEADER_START)] == _HEADER_START[: len(header)]
    try:
        entries = json.loads(header)
        ours = entries.pop("__metadata__")["format"] == FILE_FORMAT
        return ours and size < _LENGTH_BYTES + length + max(entry["data_offsets"][1] for entry in entries.values())
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _file_bytes(tokens: Tokens, metadata: Mapping[str, str], dtype: str | None) -> bytes:
    """The whole file. Raises as [`GPSTokens.save`] does, except for what the disk refuses."""
    if dtype is not None and dtype not in ENCODINGS:
        raise ValueError(f"tokens cannot be stored as {dtype!r}: choose one of {', '.join(ENCODINGS)}")
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise TypeError("metadata must map strings to strings")
    tokens.validate()
    own = tokens.detach().cpu()
    header = {"format": FILE_FORMAT, "format_version": str(PLAIN_FORMAT_VERSION)}
    header |= {name: json.dumps(getattr(own, name)) for name in _SIZES}
    if dtype == "uint8":
        header |= {"format_version": str(FILE_FORMAT_VERSION), "encoding": dtype}
        header["shape"] = json.dumps(list(own.texture.shape))
        tensors = {"payload": _pack(own, bits=8)}
    else:
        texture = own.texture if dtype is None else _cast(own.texture, dtype)
        tensors = {"geometry": own.geometry.contiguous(), "texture": texture.contiguous()}
    if taken := sorted(metadata.keys() & {*header, "encoding"}):  # read_metadata adds it where a file has none
        raise ValueError(f"these metadata keys belong to the file's own header: {', '.join(taken)}")
    return _in_order(safetensors_bytes(tensors, metadata={**metadata, **header}))


def _in_order(file: bytes) -> bytes:
    """A safetensors file with its header's strings sorted: the library writes them in another order each time."""
    stop = _LENGTH_BYTES + int.from_bytes(file[:_LENGTH_BYTES], "little")
    entries = json.loads(file[_LENGTH_BYTES:stop])
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the tensors are aligned
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header + file[stop:]


def _read(path: str | os.PathLike, with_tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a tokens file, after checking that it is one (not that its values make sense)."""
    with open_safetensors(path, advice=_ADVICE) as file:
        header = file.metadata() or {}
        names = sorted(file.keys())
        otherwise = (
            f"a safetensors file, but not of tokens: it holds {len(names)} tensors ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}). Tokens are written by GPSTokens.save and `gpstoken encode`."
        )
        check_format(header, path, FILE_FORMAT, FILE_FORMAT_VERSION, otherwise)
        if _is_plain(header) and "texture" in names:  # its header, which older programs wrote too, does not say
            stored = file.get_slice("texture").get_dtype()
            header["encoding"] = _SAFETENSORS_NAMES.get(stored, stored)
        # Copies, so that the file is not kept mapped into memory while the tokens live.
        tensors = {name: file.get_tensor(name).clone() for name in names} if with_tensors else {}
    return header, tensors


def _own_texture(texture: Tensor) -> Tensor:
    """A texture as it was stored, but none for a layout of older programs, which gave it one channel of zeros."""
    made_up = texture.ndim == 3 and texture.shape[2] == 1 and not texture.any()
    return texture[..., :0] if made_up else texture


def _is_plain(header: Mapping[str, str]) -> bool:
    return int(header["format_version"]) <= PLAIN_FORMAT_VERSION


def _cast(texture: Tensor, dtype: str) -> Tensor:
    """The texture as floating point numbers; ValueError if one leaves their range."""
    cast = texture.to(PLAIN_DTYPES[dtype])
    if not cast.isfinite().all():
        largest = texture.abs().max().item()
        raise ValueError(f"the texture reaches {largest:g}, which {dtype} cannot hold: store it as float32 or uint8")
    return cast


# Quantisation, in float64, whose rounding is far below any step


def _encode_geometry(tokens: Tokens, bits: int) -> Tensor:
    """Codes (5, B, N) int64 of validated tokens."""
    step = 2.0 ** (1 - bits)
    geometry = split_tile_geometry(tokens.geometry.double(), tokens.tile_grid).reshape(tokens.geometry.shape)
    sigma = (geometry[..., SIGMA].log() / step).round()
    rho = (geometry[..., RHO, None].atanh() / step).round()
    center = (geometry[..., CENTER] / _centre_step(sigma, rho, step)).round()
    far = center.abs().amax(-1) > _LARGEST_CODE
    if far.any():
        image, token = far.nonzero()[0].tolist()
        x, y = tokens.geometry[image, token, CENTER].tolist()
        raise ValueError(
            f"token {token} of image {image} is too small for where it lies, at ({x:g}, {y:g}), to be stored with so "
            "few bits: store the tokens as float32"
        )
    return torch.cat([sigma, rho, center], dim=-1).permute(2, 0, 1).long()


def _decode_geometry(codes: Tensor, bits: int, tile_grid: tuple[int, int]) -> Tensor:
    """(5, B, N) int64 -> (B, N, 5) float32, not yet validated."""
    step = 2.0 ** (1 - bits)
    codes = codes.permute(1, 2, 0).double()
    sigma, rho = codes[..., SIGMA], codes[..., RHO, None]
    center = codes[..., CENTER] * _centre_step(sigma, rho, step)
    geometry = torch.cat([(sigma * step).exp(), (rho * step).tanh(), center], dim=-1)
    num_tiles = tile_grid[0] * tile_grid[1]
    merged = merge_tile_geometry(geometry.unflatten(1, (num_tiles, -1)).flatten(0, 1), tile_grid)
    # Half a step can overflow float32, hence the clamp. It cannot make a sigma 0, since the smallest float32 begins at
    # half its size, nor rho 1, since atanh of a float32 below 1 is at most 8.7 and tanh rounds to 1 from 9.01 on.
    return merged.clamp(-_LARGEST, _LARGEST).float()


def _centre_step(sigma_code: Tensor, rho_code: Tensor, step: float) -> Tensor:
    """Steps of x and y (B, N, 2) from the codes of sigma (B, N, 2) and rho (B, N, 1), both float64."""
    # sqrt(1 - tanh^2 z) = 1 / cosh z, without the cancellation near |rho| = 1.
    reach = (sigma_code * step).exp() / (rho_code * step).cosh()
    return (reach * step).clamp(min=_SMALLEST_CENTRE_STEP)


def _encode_texture(texture: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(B, N, C) -> codes (C, B, N) uint8 and ranges (B, C, 2) float32."""
    texture = texture.float()
    ranges = torch.stack([texture.amin(1), texture.amax(1)], dim=-1)
    low, high = ranges.double().unbind(-1)
    # A constant channel has a step of 0; divided by 1 instead, its codes are 0 and not 0 / 0.
    step = ((high - low) / (2**bits - 1)).masked_fill(high == low, 1.0)
    codes = ((texture.double() - low[:, None]) / step[:, None]).round()
    return codes.permute(2, 0, 1).to(torch.uint8), ranges


def _decode_texture(codes: Tensor, ranges: Tensor, bits: int) -> Tensor:
    """Codes (C, B, N) uint8 and ranges (B, C, 2) float32 -> (B, N, C) float32."""
    low, high = ranges.double().unbind(-1)
    step = (high - low) / (2**bits - 1)
    return (low[:, None] + codes.permute(1, 2, 0) * step[:, None]).float()


# Entropy coding


def _pack(tokens: Tokens, bits: int) -> Tensor:
    """The payload, (bytes,) uint8."""
    codes = _encode_geometry(tokens, bits)
    texture_codes, ranges = _encode_texture(tokens.texture, bits)
    unsigned = ((codes << 1) ^ (codes >> 63)).numpy().astype(">u4")
    planes = np.moveaxis(unsigned[..., None].view(np.uint8), -1, 0)
    parts = [ranges.numpy().astype("<f4"), *(planes[:, field] for field in _FIELDS), texture_codes.numpy()]
    # Z_FILTERED: codes seldom repeat in sequence, so that a byte's frequency is worth more than a short match. On the
    # tokens of photographs zstd comes out as long as this, LZMA at 0.98 to 1.01 of it, bz2 at 1.1; an ideal range coder
    # that knew each channel's mean and standard deviation, at 0.95.
    deflate = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL + 1, zlib.Z_FILTERED)
    stream = bytearray()
    for part in parts:
        # A new block has its own Huffman code, for the frequencies of this part.
        stream += deflate.compress(part.tobytes()) + deflate.flush(zlib.Z_BLOCK)
    return torch.frombuffer(stream + deflate.flush(), dtype=torch.uint8)


def _unpack(payload: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the geometry (5, B, N) int64, of the texture (C, B, N) uint8, and ranges (B, C, 2) float32.

    Takes at most a little more memory than those need, whatever the payload would inflate to.

    Raises:
        ValueError: a payload that is not bytes, is damaged, or does not inflate to exactly what the shape needs.
    """
    if payload.dtype != torch.uint8 or payload.ndim != 1:
        raise ValueError(f"the payload must be bytes, not {payload.dtype} of the shape {tuple(payload.shape)}")
    batch, count, channels = shape
    sizes = [batch * channels * 8]
    sizes += [_CODE_BYTES * (field.stop - field.start) * batch * count for field in _FIELDS]
    sizes += [channels * batch * count]
    stream = payload.numpy().tobytes()
    mismatch = f"the payload does not hold {batch} x {count} tokens of {channels} texture channels"
    if sum(sizes) > _LARGEST_INFLATION * len(stream):
        raise ValueError(mismatch)
    inflate = zlib.decompressobj()
    try:
        # One byte more than expected lets the stream come to its end, where its checksum is.
        data = inflate.decompress(stream, sum(sizes) + 1)
    except zlib.error as error:
        raise ValueError(f"the payload does not inflate ({error})") from error
    if len(data) != sum(sizes) or not inflate.eof or inflate.unused_data:
        raise ValueError(mismatch)
    parts = np.split(np.frombuffer(data, np.uint8), np.cumsum(sizes)[:-1])
    ranges = parts[0].view("<f4").reshape(batch, channels, 2).astype(np.float32)
    planes = np.concatenate([part.reshape(_CODE_BYTES, -1, batch, count) for part in parts[1:-1]], axis=1)
    unsigned = np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view(">u4")[..., 0].astype(np.int64)
    codes = (unsigned >> 1) ^ -(unsigned & 1)
    texture_codes = parts[-1].reshape(channels, batch, count).copy()
    return torch.from_numpy(codes), torch.from_numpy(texture_codes), torch.from_numpy(ranges)


def _shape(value: Any) -> tuple[int, int, int]:
    are_ints = isinstance(value, list) and [type(size) for size in value] == [int, int, int]
    if not are_ints or min(value[:2]) < 1 or value[2] < 0:
        raise ValueError(f"their shape reads {value!r}, not [images, tokens, texture channels]")
    return tuple(value)
