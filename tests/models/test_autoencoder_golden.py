"""AutoencoderGPSToken against tensors of the official code."""

from __future__ import annotations

import json

import pytest
import torch
from golden_files import golden
from model_zoo import (
    SMALL_CONFIG,
    load_golden,
    pixel_values,
    region_pixels,
    small_model,
    weights_by_name,
)
from safetensors.torch import save_file

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokens
from gpstoken_diffusers.models.norms import tile_group_norm

# The reference states 1e-4 for the small models and measured up to 8e-5 end to end: sums of some hundred products of
# float32 in another order, through some twenty layers.
SMALL = 1e-4


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_small_model_agrees_at_every_stage():
    model, reference = small_model(), load_golden("ae_small_256.safetensors")
    images = pixel_values(reference["image_u8"])
    kept = images.clone(), reference["init_gpscodes"].clone(), region_pixels(reference["regions"])
    regions = kept[2].clone()
    close(model.stem(images)[..., ::16, ::16], reference["preprocess_features_stride16"], SMALL)
    output = model.encode(images, reference["init_gpscodes"], regions)
    close(output.tokens.as_tensor(), reference["tokens"], SMALL)
    # Inputs are the caller's: the official code overwrites the regions.
    assert torch.equal(images, kept[0])
    assert torch.equal(reference["init_gpscodes"], kept[1])
    assert torch.equal(regions, kept[2])
    given = GPSTokens.from_tensor(reference["tokens"], (256, 256))
    close(model.decoder.paint(given.geometry, given.texture), reference["rendered"], SMALL)
    close(model.decoder(reference["rendered"]), reference["decoded"], SMALL)
    close(model.decode(given).sample, reference["decoded"], SMALL)
    close(model(images, reference["init_gpscodes"], regions).sample, reference["decoded"], SMALL)


@torch.no_grad()
def test_small_model_partitions_as_the_reference_does():
    model, reference = small_model(), load_golden("ae_small_256.safetensors")
    output = model.encode(pixel_values(reference["image_u8"]))
    assert torch.equal(output.regions, region_pixels(reference["regions"]))
    close(output.initial_tokens.geometry, reference["init_gpscodes"], 1e-6)
    close(output.tokens.as_tensor(), reference["tokens"], SMALL)


@pytest.fixture(scope="module")
def large():
    return load_golden("ae_small_512.safetensors")


@torch.no_grad()
def test_four_tiles_merge_into_one_set(large):
    output = small_model().encode(pixel_values(large["image_u8"]))
    assert output.tokens.tile_grid == (2, 2)
    assert torch.equal(output.regions, region_pixels(large["regions"]))
    close(output.tokens.as_tensor(), large["merged_tokens"], SMALL)
    geometry, _ = output.tokens.split_tiles()
    close(geometry, large["tokens"][..., :5], SMALL)


@torch.no_grad()
@pytest.mark.parametrize("mode, name", [("tile", "stitched"), ("merge", "merged")])
def test_both_ways_of_decoding_tiles(large, mode, name):
    tokens = GPSTokens.from_tensor(large["merged_tokens"], (512, 512), tile_grid=(2, 2))
    sample = small_model().decode(tokens, mode=mode).sample
    # The reference's tolerance for this decoding; measured here: 3.3e-5 by tile (whose coordinates are recovered from
    # merged ones, off by a rounding) and 1.3e-5 merged.
    close(sample[..., ::2, ::2], large[f"decoded_{name}_even_pixels"], 5e-5)
    close(sample[..., 192:320, 192:320], large[f"decoded_{name}_centre_crop"], 5e-5)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["m128", "l256"])
def test_full_size_models_from_an_official_file(preset, tmp_path, caplog):
    """The whole way: a file with the official names -> tokens, map and picture, and the parameter count."""
    facts = json.loads(golden(f"official_autoencoder_keys_{preset}.json").read_text())
    path = tmp_path / f"gpstoken_{preset}.safetensors"
    save_file(weights_by_name(preset), path)
    with caplog.at_level("WARNING"):
        model = AutoencoderGPSToken.from_single_file(path)
    assert f"as the preset {preset}" in caplog.text
    unused = 2 * (128 * 512 + 128)  # the two projections that the official forward pass never uses
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["total_params"] - unused
    reference = load_golden(f"ae_full_{preset}.safetensors")
    images = pixel_values(reference["image_u8"])
    output = model.encode(images, reference["init_gpscodes"], region_pixels(reference["regions"]))
    assert torch.equal(model.encode(images).regions, output.regions)
    # Tolerances of the reference, from its distance to a double-precision run (2e-6, 1e-4, 9e-4 on the map).
    close(output.tokens.geometry, reference["tokens"][..., :5], 5e-6)
    close(output.tokens.texture, reference["tokens"][..., 5:], 2e-4)
    close(model.decoder.paint(output.tokens.geometry, output.tokens.texture), reference["rendered"], 2e-3)
    close(model.decoder(reference["rendered"]), reference["decoded"], 5e-5)
    close(model.decode(output.tokens).sample, reference["decoded"], 2e-3)


@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_tile_norm_agrees(tiles):
    reference = load_golden("patchnorm.safetensors")
    y = tile_group_norm(reference["x"], reference["weight"], reference["bias"], 32, 1e-6, (tiles, tiles))
    close(y, reference[f"y_np{tiles}"], 5e-6)


def test_tile_norm_adds_eps_to_the_deviation():
    reference = load_golden("patchnorm.safetensors")
    for name in ("tiny", "const"):
        x = reference[f"{name}_x"]
        y = tile_group_norm(x, reference["weight"], reference["bias"], 32, 1e-6)
        close(y, reference[f"{name}_y_np1"], 5e-6)


def test_tile_norm_overshoot_as_released_and_repaired():
    reference = load_golden("patchnorm.safetensors")
    x, weight, bias = reference["overshoot_x"], reference["weight"], reference["bias"]
    expected, std = reference["overshoot_y_np2"], reference["overshoot_std_map"].repeat_interleave(2, dim=1)
    far_from_zero = std.abs() > 0.02  # closer than that, the quotient amplifies rounding without bound
    assert (std < 0).any()
    released = tile_group_norm(x, weight, bias, 32, 1e-6, (2, 2), std_floor=None)
    scale = expected[far_from_zero].abs().max()
    assert (released - expected)[far_from_zero].abs().max() < 5e-6 * scale
    repaired = tile_group_norm(x, weight, bias, 32, 1e-6, (2, 2))
    # Where the interpolated deviation was sound, nothing moved; elsewhere values stay of the order of the input's
    # deviations from its mean over the smallest deviation, and keep their sign.
    smallest = tile_group_norm(x, weight, bias, 32, 1e-6, (2, 2), std_floor=1.0).abs().max()
    sound = std > 0.6 * std[std > 0].median()
    assert (repaired - released)[sound].abs().max() == 0
    assert repaired.abs().max() <= 2.5 * smallest
    assert released.abs().max() > repaired.abs().max()


def test_small_config_is_the_reference_s():
    """The configuration used above is the reference's, translated."""
    official = json.loads(golden("ae_small_config.json").read_text())["config"]
    assert SMALL_CONFIG["hidden_size"] == official["gpsconfig"]["gpsenc_c"]
    assert SMALL_CONFIG["texture_channels"] == official["gpsconfig"]["gps_c"]
    widths = tuple(official["decoderconfig"]["ch"] * factor for factor in official["decoderconfig"]["ch_mult"])
    assert SMALL_CONFIG["decoder_block_out_channels"] == widths
