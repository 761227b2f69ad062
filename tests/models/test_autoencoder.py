"""AutoencoderGPSToken: shapes, tiles, formats, and the conventions of diffusers."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from model_zoo import noise_images, tiny_model

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokens

KINDS = ("map", "lattice")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (64, 32), (37, 50), (20, 90), (16, 16), (31, 33)])
@torch.no_grad()
def test_any_size_comes_back_at_its_size(kind, size):
    model, images = tiny_model(kind), noise_images(2, *size)
    tokens = model.encode(images).tokens
    rows, cols = -(-size[0] // 32), -(-size[1] // 32)
    assert tokens.tile_grid == (rows, cols)
    assert tokens.geometry.shape == (2, 6 * rows * cols, 5)
    assert tokens.canvas_size == (32 * rows, 32 * cols)
    tokens.validate()
    output = model(images)
    assert isinstance(output, DecoderOutput)
    assert output.sample.shape == images.shape
    assert torch.equal(output.sample, model.decode(tokens).sample)
    assert torch.equal(model(images, return_dict=False)[0], output.sample)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(kind):
    """The official merge mixes up the tiles of several images."""
    model, images = tiny_model(kind), noise_images(3, 64, 32)
    together = model(images).sample
    apart = torch.cat([model(image[None]).sample for image in images])
    # Batched matrix products may sum in another order: rounding only.
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_slicing_changes_nothing(kind):
    model, images = tiny_model(kind), noise_images(3, 32, 32)
    expected = model(images).sample
    model.enable_slicing()
    torch.testing.assert_close(model(images).sample, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tiling_chooses_tile_by_tile():
    model, images = tiny_model("map", decode_mode="merge"), noise_images(1, 64, 64)
    tokens = model.encode(images).tokens
    by_tile, merged = (model.decode(tokens, mode=mode).sample for mode in ("tile", "merge"))
    assert (by_tile - merged).abs().max() > 1e-3
    assert torch.equal(model.decode(tokens).sample, merged)
    model.enable_tiling()
    assert torch.equal(model.decode(tokens).sample, by_tile)
    # Tile by tile is what each tile gives by itself.
    geometry, texture = tokens.split_tiles()
    alone = model.decode(GPSTokens(geometry[3:], texture[3:], (32, 32))).sample
    torch.testing.assert_close(by_tile[..., 32:, 32:], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_large_merged_pictures_are_decoded_in_windows():
    """More tiles than a window holds: each window sees its neighbours, so that only distant statistics differ."""
    model = tiny_model("map", decode_mode="merge")
    tokens = model.encode(noise_images(1, 32 * 7, 64)).tokens
    whole = model.decoder(model.decoder.paint(tokens.geometry, tokens.texture, tokens.tile_grid), tokens.tile_grid)
    windows = model.decode(tokens).sample
    assert windows.shape == whole.shape
    error = (windows - whole).abs()
    # The last normalisation is over the window instead of the picture, which scales it by some percent; a window that
    # was put in the wrong place would be off by the size of the values.
    assert error.mean() < 0.15 * whole.std()


@pytest.mark.parametrize("kind, mode", [("map", "tile"), ("map", "merge"), ("lattice", None)])
@torch.no_grad()
def test_progress_is_heard_of_piece_by_piece(kind, mode):
    model, images = tiny_model(kind), noise_images(2, 32 * 7, 40)
    heard = []
    tokens = model.encode(images, progress=heard.append).tokens
    assert heard == pytest.approx([4 / 28, 8 / 28, 12 / 28, 16 / 28, 20 / 28, 24 / 28, 1])
    heard.clear()
    sample = model.decode(tokens, mode=mode, progress=heard.append).sample
    assert len(heard) >= 4 and heard == sorted(set(heard)) and 0 < heard[0] < 0.4 and heard[-1] == 1
    assert torch.equal(sample, model.decode(tokens, mode=mode).sample)

    def stop(share):
        raise KeyboardInterrupt

    for work in (lambda: model.encode(images, progress=stop), lambda: model.decode(tokens, mode=mode, progress=stop)):
        with pytest.raises(KeyboardInterrupt):
            work()


@torch.no_grad()
def test_lattice_windows_are_exact():
    """A lattice decoder is local: decoding windows gives the picture that one pass gives."""
    model = tiny_model("lattice")
    tokens = model.encode(noise_images(2, 96, 100)).tokens
    whole = model.decoder(model.decoder.paint(tokens.geometry, tokens.texture, (24, 32)))[..., :96, :100]
    # 3 x 4 tiles are more than are decoded at once. Convolutions of other sizes may sum in another order.
    torch.testing.assert_close(model.decode(tokens).sample, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_token_count_is_free(kind):
    model, images = tiny_model(kind), noise_images(1, 32, 32)
    for count in (1, 3, 16):
        tokens = model.encode(images, num_tokens=count).tokens
        assert tokens.num_tokens == count
        assert model.decode(tokens).sample.shape == images.shape
    with pytest.raises(ValueError, match="16"):
        model.encode(images, num_tokens=17)


@torch.no_grad()
def test_tokens_are_a_set():
    """The order of tokens does not matter, neither encoding nor decoding."""
    model, images = tiny_model("map"), noise_images(1, 32, 32)
    output = model.encode(images)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled = model.encode(images, output.initial_tokens.geometry[:, order], output.regions[:, order]).tokens
    torch.testing.assert_close(shuffled.as_tensor(), output.tokens.as_tensor()[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.decode(shuffled).sample, model.decode(output.tokens).sample, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_importance_draws_tokens():
    model, images = tiny_model("map"), noise_images(1, 64, 64)
    importance = torch.zeros(64, 64)
    importance[:16, :16] = 1
    count = {}
    for strength in (0.0, 50.0):
        output = model.encode(images, importance=importance, importance_strength=strength)
        regions = output.regions[0]  # the first tile
        count[strength] = int(((regions[:, 2] < 16) & (regions[:, 3] < 16)).sum())
    assert count[50.0] > count[0.0]
    with pytest.raises(ValueError, match="height and width"):
        model.encode(images, importance=importance[:40])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(kind, dtype):
    model, images = tiny_model(kind), noise_images(1, 64, 32)
    expected = model.encode(images).tokens
    picture = model.decode(expected).sample
    model = model.to(dtype)
    tokens = model.encode(images.to(dtype)).tokens
    assert tokens.geometry.dtype == torch.float32
    assert tokens.texture.dtype == dtype
    # A few layers of 8-bit (bfloat16) or 11-bit mantissas; geometry goes through one sigmoid less steep than 1.
    torch.testing.assert_close(tokens.geometry, expected.geometry, rtol=0, atol=0.05)
    sample = model.decode(tokens).sample
    assert sample.dtype == dtype
    assert (sample.float() - picture).abs().mean() < 0.1 * picture.std()


def test_save_variant_shards_and_dtype(tmp_path):
    model = tiny_model("map")
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoencoderGPSToken.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert loaded.dtype == torch.float16
    torch.testing.assert_close(loaded.stem.conv_in.weight, model.stem.conv_in.weight.half())


def test_a_folder_without_all_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model("map").save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["refiner.token_embedding"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises((OSError, ValueError), match="token_embedding"):
        AutoencoderGPSToken.from_pretrained(tmp_path)


def test_presets():
    with torch.device("meta"):
        model = AutoencoderGPSToken.from_preset("m128")
    assert model.config.num_tokens == 128
    assert model.config.decode_mode == "merge"
    with pytest.raises(ValueError, match="s64, m128, l256"):
        AutoencoderGPSToken.from_preset("xl")


def test_initial_residual_is_zero():
    """A fresh model refines nothing: its heads start at zero."""
    torch.manual_seed(0)
    model = AutoencoderGPSToken(**{**copy.copy(tiny_model("map").config), "sample_size": 32})
    with torch.no_grad():
        output = model.encode(noise_images(1, 32, 32))
    torch.testing.assert_close(output.tokens.geometry, output.initial_tokens.geometry, rtol=0, atol=1e-6)


BAD_CALLS = {
    "three dimensions": (lambda m: m.encode(torch.zeros(3, 32, 32)), ValueError, r"\(B, 3, H, W\)"),
    "gray": (lambda m: m.encode(torch.zeros(1, 1, 32, 32)), ValueError, r"\(B, 3, H, W\)"),
    "uint8": (lambda m: m.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), TypeError, "floating point"),
    "NaN": (lambda m: m.encode(torch.full((1, 3, 32, 32), torch.nan)), ValueError, "(?i)nan|finite"),
    "no tokens": (lambda m: m.encode(torch.zeros(1, 3, 32, 32), num_tokens=0), ValueError, "num_tokens"),
    "regions of another batch": (
        lambda m: m.encode(torch.zeros(1, 3, 32, 32), regions=torch.zeros(2, 6, 4, dtype=torch.int32)),
        ValueError,
        "regions must have the shape",
    ),
    "geometry without regions": (
        lambda m: m.encode(torch.zeros(1, 3, 32, 32), torch.zeros(1, 6, 5)),
        ValueError,
        "regions they came from",
    ),
    "count beside regions": (
        lambda m: m.encode(
            torch.zeros(1, 3, 32, 32), regions=torch.tensor([[[0, 0, 31, 31]]], dtype=torch.int32), num_tokens=3
        ),
        ValueError,
        "regions were given",
    ),
    "another model's tokens": (lambda m: m.decode(torch.rand(1, 6, 5 + 7)), ValueError, "4 texture channels"),
    "another tile": (
        lambda m: m.decode(GPSTokens(torch.rand(1, 6, 5), torch.rand(1, 6, 4), (48, 48))),
        ValueError,
        "canvas",
    ),
    "no image": (lambda m: m.encode(torch.zeros(0, 3, 32, 32)), ValueError, r"no image: their shape is \(0, 3, 32, 32"),
    "tokens of no image": (lambda m: m.decode(torch.rand(0, 6, 9)), ValueError, "the batch is empty"),
    "mode": (lambda m: m.decode(torch.rand(1, 6, 9), mode="seamless"), ValueError, '"merge" or "tile"'),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_was_expected(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call(tiny_model("map"))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"decoder_type": "unet"}, '"map", "lattice" or "patch"'),
        ({"decode_mode": "blend"}, '"merge" or "tile"'),
        ({"map_size": 24}, "multiple of map_size"),
        ({"map_size": 8}, "enlarge a map"),
        ({"num_attention_heads": 3}, "multiple of the number of heads"),
    ],
)
def test_bad_configurations(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_model("map", **overrides)


def test_other_models_and_pickles_are_refused(tmp_path):
    model = tiny_model("map")
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    assert str(tmp_path) not in config.read_text()
    loaded = AutoencoderGPSToken.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save(model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        AutoencoderGPSToken.from_pretrained(tmp_path)
    config.write_text(config.read_text().replace("AutoencoderGPSToken", "AutoencoderKL"))
    with pytest.raises(ValueError, match="class AutoencoderKL, not AutoencoderGPSToken"):
        AutoencoderGPSToken.from_pretrained(tmp_path)
