"""Tokens stored with few bits: how far each number moves, what a picture loses, what cannot be stored."""

from __future__ import annotations

import json
import math

import pytest
import torch
from model_zoo import tiny_model
from PIL import Image
from safetensors.torch import save_file
from token_zoo import assert_same, make_tokens

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor, GPSTokens, cli
from gpstoken_diffusers.assets import DEMO_PHOTOGRAPH, MINI
from gpstoken_diffusers.cli import arguments
from gpstoken_diffusers.evaluation.metrics import psnr
from gpstoken_diffusers.geometry import CENTER, RHO, SIGMA
from gpstoken_diffusers.token_files import ENCODINGS, _pack, encoded_size

TILED = {"image_size": (250, 380), "tile_grid": (4, 6), "canvas_size": (256, 384)}
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


def stored(tokens: GPSTokens, folder, dtype: str | None = "uint8") -> GPSTokens:
    """The tokens after a file."""
    tokens.save(folder / "tokens.safetensors", dtype=dtype)
    return GPSTokens.load(folder / "tokens.safetensors")


def stored_by_the_first_release(tokens: GPSTokens, folder, bits: int) -> GPSTokens:
    """The tokens after a file of an encoding that is only read now."""
    header = {"format": "gpstoken.tokens", "format_version": "2", "encoding": f"uint{bits}"}
    header["shape"] = json.dumps(list(tokens.texture.shape))
    header |= {name: json.dumps(getattr(tokens, name)) for name in ("image_size", "tile_grid", "canvas_size")}
    save_file({"payload": _pack(tokens, bits)}, folder / "tokens.safetensors", metadata=header)
    return GPSTokens.load(folder / "tokens.safetensors")


# Round trips


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_no_number_moves_by_more_than_half_a_step(tmp_path, bits):
    tokens = make_tokens(2, 240, 3, **TILED)
    loaded = stored(tokens, tmp_path) if bits == 8 else stored_by_the_first_release(tokens, tmp_path, bits)
    assert loaded.dtype == torch.float32
    assert (loaded.image_size, loaded.tile_grid, loaded.canvas_size) == ((250, 380), (4, 6), (256, 384))
    step = 2.0 ** (1 - bits)
    before, after = (version.split_tiles()[0].double() for version in (tokens, loaded))
    # Added to each half step: the roundings of float32, 6e-8 of the number, that merging and splitting, and storing
    # a canvas coordinate below 1 that is then multiplied by 6 tiles, leave at the ends.
    error = (after - before).abs()
    assert ((after[..., SIGMA] / before[..., SIGMA]).log().abs() <= step / 2 + 1e-6).all()
    # |rho| < 0.9 here, where atanh magnifies a rounding by up to 1 / (1 - 0.9^2) = 5.3.
    assert ((after[..., RHO].atanh() - before[..., RHO].atanh()).abs() <= step / 2 + 1e-6).all()
    reach = after[..., SIGMA] * (1 - after[..., RHO, None] ** 2).sqrt()
    assert (error[..., CENTER] <= (step * reach).clamp(min=2.0**-14) / 2 + 2e-6).all()
    low, high = tokens.texture.amin(1, keepdim=True), tokens.texture.amax(1, keepdim=True)
    # The texture is below 4: its float32 is within 2.4e-7.
    assert ((loaded.texture - tokens.texture).abs() <= (high - low) / (2**bits - 1) / 2 + 2.4e-7).all()
    # The steps are used to the full: errors are spread evenly over +- half a step, whose mean is a quarter.
    assert error[..., CENTER].mean() > 0.2 * (step * reach).mean()


def test_float16_rounds_the_texture_alone(tmp_path):
    tokens = make_tokens(2, 12, 3)
    assert_same(stored(tokens, tmp_path, "float16"), tokens.to(torch.float16))
    assert_same(stored(tokens.to(torch.bfloat16), tmp_path, "float32"), tokens.to(torch.bfloat16).to(torch.float32))
    assert_same(stored(tokens.to(torch.bfloat16), tmp_path, None), tokens.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", ENCODINGS)
def test_storing_again_changes_nothing(tmp_path, dtype):
    once = stored(make_tokens(2, 240, 3, **TILED), tmp_path, dtype)
    assert_same(stored(once, tmp_path, dtype), once)


def test_a_picture_does_not_depend_on_its_batch_nor_on_the_dtype_of_its_texture(tmp_path):
    tokens = make_tokens(3, 24, 3, torch.bfloat16, tile_grid=(2, 2), canvas_size=(64, 64))
    tokens.texture[1] *= 1000
    loaded = stored(tokens, tmp_path)
    for image in range(3):
        assert_same(loaded[image], stored(tokens[image].to(torch.float32), tmp_path))


def test_a_single_token_and_constant_channels(tmp_path):
    for tokens in (make_tokens(2, 1, 5), GPSTokens.from_geometry(make_tokens(1, 6).geometry, (48, 64))):
        loaded = stored(tokens, tmp_path)
        assert torch.equal(loaded.texture, tokens.texture)  # each channel of a picture has one value: no step
        assert loaded.is_layout == tokens.is_layout
    # A rho of 0 stays exactly 0, and so does the middle of a tile.
    plain = GPSTokens(torch.tensor([[[0.3, 0.2, 0.0, 0.0, 0.0]]]), torch.ones(1, 1, 2), (8, 8))
    assert stored(plain, tmp_path).geometry[0, 0, RHO:].tolist() == [0, 0, 0]


def test_extreme_numbers(tmp_path):
    rho = 1 - 2.0**-24  # the largest float32 below 1
    values = [
        [SMALLEST, LARGEST, rho, 0.5, 0.5],
        [1e-30, 1e-6, -rho, -2.0, 100.0],
        [LARGEST, LARGEST, 0.0, LARGEST, -LARGEST],
        [3.0, 0.5, 0.999, 1e4, -1e4],
        [1.4e-45, 1.0, 0.0, 0.0, 0.0],  # the smallest positive float32 of all
        [0.2, 0.2, 0.0, 0.0, 0.0],
    ]
    texture = torch.tensor([[LARGEST, 1e-45, 0.0], [-LARGEST, 0.0, 0.0]] * 3)
    tokens = GPSTokens(torch.tensor([values]), texture[None], (64, 96), (2, 3))
    loaded = stored(tokens, tmp_path).validate()
    assert loaded.geometry[0, :2, RHO].abs().max() < 1
    assert (loaded.geometry[0, 0, RHO] > 0.99) and (loaded.geometry[0, 1, RHO] < -0.99)
    assert torch.equal(loaded.texture[0, :, 0], texture[:, 0])  # lowest and highest are codes of their own
    assert loaded.geometry[0, 4, 0] == tokens.geometry[0, 4, 0]
    ratio = loaded.geometry[..., SIGMA].double() / tokens.geometry[..., SIGMA].double()
    # Half a step of log sigma, and a rounding.
    assert ratio.log().abs().max() <= 2.0**-8 + 1e-6


# What cannot be stored


@pytest.mark.parametrize("dtype", ["int8", "uint6", "bfloat16", "", "UINT8", 8, torch.float16])
def test_there_is_no_such_encoding(tmp_path, dtype):
    with pytest.raises(ValueError, match="choose one of float32, float16, uint8$"):
        make_tokens().save(tmp_path / "a", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ENCODINGS)
@pytest.mark.parametrize(("channel", "message"), [(0, "geometry must be finite"), (6, "texture must be finite")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_stored(tmp_path, dtype, channel, message, value):
    values = torch.full((1, 6, 7), 0.5)
    values[0, 3, channel] = value
    with pytest.raises(ValueError, match=f"{message}, but token 3 of image 0"):
        GPSTokens.from_tensor(values, (8, 8)).save(tmp_path / "a", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_texture_beyond_float16(tmp_path):
    tokens = make_tokens(1, 6, 2)
    tokens.texture[0, 2, 1] = -70000
    for kind in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="texture reaches 7.*float16 cannot hold: store it as float32 or uint8"):
            tokens.to(kind).save(tmp_path / "a", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_token_too_far_away_for_its_size(tmp_path):
    tokens = make_tokens(2, 6)
    tokens.geometry[1, 4] = torch.tensor([1e-30, 0.1, 0.0, 2e5, 0.0])
    with pytest.raises(ValueError, match=r"token 4 of image 1 is too small for where it lies, at \(200000, 0\)"):
        tokens.save(tmp_path / "a", dtype="uint8")
    tokens.geometry[1, 4, 3] = 1e5  # 2^31 steps of 2^-14 are 131,072 tiles' halves
    assert stored(tokens, tmp_path).geometry[1, 4, 3] == 1e5


# Bytes


@pytest.mark.parametrize("dtype", [None, *ENCODINGS])
def test_encoded_size_is_that_of_the_file(tmp_path, dtype):
    tokens = make_tokens(2, 60, 8)
    tokens.save(tmp_path / "a", dtype=dtype)
    assert encoded_size(tokens, dtype) == (tmp_path / "a").stat().st_size
    tokens.save(tmp_path / "b", {"model": "tiny"}, dtype)
    assert GPSTokens.read_metadata(tmp_path / "b")["encoding"] == (dtype or "float32")
    assert GPSTokens.read_metadata(tmp_path / "b")["model"] == "tiny"


# Pictures


@pytest.fixture(scope="module")
def mini():
    return AutoencoderGPSToken.from_pretrained(MINI).eval()


@torch.no_grad()
def test_the_picture_that_is_left(mini, tmp_path):
    """gpstoken-mini, the middle of the photograph that ships."""
    processor = GPSTokenImageProcessor.from_pretrained(MINI)
    features = processor(processor.load_image(DEMO_PHOTOGRAPH).crop((256, 128, 512, 384)))
    tokens = mini.encode(**features).tokens
    whole = mini.decode(tokens).sample.clamp(-1, 1)
    pixels = features["pixel_values"]
    # PSNR in dB against the picture of the tokens as they were, dB lost against the photograph, and the share of a
    # float32 file's bytes. Measured here: 94.9, 64.9 dB; 0, -0.001 dB; 0.571, 0.268. The bounds allow 3 dB, the loss
    # that such noise makes, and 4% of the bytes for another release of zlib.
    for dtype, difference, loss, share in (("float16", 91.9, 0.001, 0.58), ("uint8", 61.9, 0.003, 0.28)):
        loaded = stored(tokens, tmp_path, dtype).to(torch.float32)
        sample = mini.decode(loaded).sample.clamp(-1, 1)
        assert psnr(sample, whole).item() > difference, dtype
        assert psnr(whole, pixels).item() - psnr(sample, pixels).item() < loss, dtype
        assert encoded_size(tokens, dtype) < share * encoded_size(tokens), dtype


# The command line


def test_encode_and_decode(tmp_path, capsys):
    assert arguments.ENCODINGS == ENCODINGS  # spelled out there, to import nothing
    folder, image, file = tmp_path / "tiny", tmp_path / "photo.png", tmp_path / "t.safetensors"
    tiny_model("map").save_pretrained(folder)
    Image.effect_mandelbrot((64, 32), (-2, -1, 1, 1), 20).convert("RGB").save(image)
    texts = [str(path) for path in (image, file, folder)]
    plain = ["encode", texts[0], "-o", texts[1], "--model", texts[2]]
    assert cli.main(plain) == 0
    tokens = GPSTokens.load(file)
    assert cli.main([*plain, "--encoding", "uint8"]) == 0
    assert f"; stored as uint8 in {file.stat().st_size:,} bytes" in capsys.readouterr().out
    assert_same(GPSTokens.load(file), stored(tokens, tmp_path))
    assert cli.main(["decode", texts[1], "-o", str(tmp_path / "p.png"), "--model", texts[2]]) == 0
    assert "64 x 32 px, from tokens in uint8" in capsys.readouterr().out
    assert cli.main([*plain, "--encoding", "uint6"]) == 2
    assert "invalid choice: 'uint6'" in capsys.readouterr().err
