"""GPSTokenTransformerModel against the reference's generator, and as a diffusers model."""

from __future__ import annotations

import json

import pytest
import torch
from golden_files import golden
from model_zoo import load_golden
from pipeline_zoo import SMALL_GENERATOR, tiny_transformer
from safetensors.torch import load_file, save_file

from gpstoken_diffusers import GPSTokens, GPSTokenTransformerModel
from gpstoken_diffusers.models import official_checkpoints as convert


@pytest.fixture(scope="module")
def small():
    path = golden("sit_small_weights.safetensors")
    return GPSTokenTransformerModel.from_single_file(path, config=SMALL_GENERATOR)


def channels_last(latents):
    """The reference's (B, C, N, 1) as ours, (B, N, C)."""
    return latents[..., 0].transpose(1, 2)


@torch.no_grad()
def test_forward_agrees_with_the_reference(small):
    reference = load_golden("sit_small_forward.safetensors")
    latents, layout = channels_last(reference["fwd.x"]), reference["fwd.cond"]
    arguments = (latents, reference["fwd.t"], reference["fwd.y"])
    torch.testing.assert_close(small(*arguments, layout).sample, channels_last(reference["fwd.out"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(small(*arguments).sample, channels_last(reference["fwd.out_no_cond"]), atol=1e-5, rtol=0)


def test_latents_to_tokens_as_the_reference():
    """De-normalisation by the released statistics, the layout added, sigma and rho clamped."""
    reference = load_golden("sit_small_sampling.safetensors")
    scale = {name: convert.GENERATOR_PRESETS["xl"][name] for name in ("latents_mean", "latents_std")}
    path = golden("sit_small_weights.safetensors")
    released = GPSTokenTransformerModel.from_single_file(path, config={**SMALL_GENERATOR, **scale})
    for run in ("ode_euler", "ode_dopri5", "sde_em10", "sde_em50"):
        latents, expected = channels_last(reference[f"{run}.final"]), reference[f"{run}.tokens"]
        geometry, texture = released.from_latents(reference["g_init"], latents)
        torch.testing.assert_close(torch.cat([geometry, texture], dim=-1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset, name", [("xl", "SiT-XL/2-gs"), ("s", "SiT-S/2-gs")])
def test_every_official_name_and_shape_has_its_place(preset, name):
    listed = json.loads(golden("official_generator_keys.json").read_text())[name]
    official = {f"ema_model.{key}": torch.empty(shape, device="meta") for key, shape in listed["keys"].items()}
    converted = convert.convert_generator(official, "file")
    with torch.device("meta"):
        model = GPSTokenTransformerModel.from_preset(preset)
    convert.check_against_model(converted, {key: value.shape for key, value in model.state_dict().items()}, "file")
    assert sum(value.numel() for value in model.parameters()) == listed["total_params"]
    assert convert.recognise_generator_preset(converted, "file")[0] == preset


def test_official_files_that_do_not_fit(tmp_path):
    weights = load_file(golden("sit_small_weights.safetensors"))

    def refused(tensors, message, **options):
        path = tmp_path / "generator.safetensors"
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            GPSTokenTransformerModel.from_single_file(path, **options)

    small = {"config": SMALL_GENERATOR}
    refused({**weights, "ema_model.blocks.0.extra": torch.zeros(1)}, "does not have: blocks.0.extra", **small)
    missing = {name: value for name, value in weights.items() if "blocks.1.mlp.fc1.bias" not in name}
    refused(missing, "missing: blocks.1.ff.0.bias", **small)
    refused(weights, "shape of class_embedding.weight", config={**SMALL_GENERATOR, "num_classes": 12})
    refused(weights, "96 wide, which fits no preset")
    refused(weights, "'xl' is 1152 wide, but .* is 96 wide", preset="xl")
    refused(weights, "preset must be one of xl, s, got 'b'", preset="b")
    refused({"gps_embed.weight": torch.zeros(1)}, "no GPSToken generator.*looks like a GPSToken autoencoder", **small)
    # Averaged weights are taken, what a trainer keeps beside them is not looked at.
    beside = {name.replace("ema_model.", "model."): value + 1 for name, value in weights.items()}
    path = tmp_path / "both.safetensors"
    save_file({**weights, **beside}, path)
    model = GPSTokenTransformerModel.from_single_file(path, config=SMALL_GENERATOR)
    assert torch.equal(model.token_embedding.bias, weights["ema_model.x_embedder.proj.bias"])
    assert not model.positions.requires_grad and model.head.proj.weight.requires_grad


# ---------------------------------------------------------------------- as a model of diffusers


def inputs(batch_size=2, num_tokens=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch_size, num_tokens, 9, generator=generator)
    layout = torch.rand(batch_size, num_tokens, 5, generator=generator) * 0.5 + 0.1
    return latents, torch.rand(batch_size, generator=generator), torch.tensor([0, 3])[:batch_size], layout


def test_tokens_have_no_order_and_any_number():
    model = tiny_transformer(layout_frequencies=4)
    latents, time, labels, layout = inputs(num_tokens=17)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        straight = model(latents, time, labels, layout).sample
        mixed = model(latents[:, order], time, labels, layout[:, order]).sample
        one = model(latents[:, :1], time, labels, layout[:, :1]).sample
    # Sums over tokens in another order.
    torch.testing.assert_close(mixed, straight[:, order], atol=1e-5, rtol=1e-5)
    assert one.shape == (2, 1, 9)


def test_time_class_and_layout_all_matter():
    model = tiny_transformer()
    latents, time, labels, layout = inputs()
    with torch.no_grad():
        base = model(latents, time, labels, layout).sample
        for changed in ((latents, time / 2, labels, layout), (latents, time, labels.flip(0), layout)):
            assert (model(*changed).sample - base).abs().max() > 1e-3
        assert (model(latents, time, labels, layout.flip(1)).sample - base).abs().max() > 1e-3


def test_shared_modulation_is_one_matrix_for_all_blocks():
    shared = tiny_transformer(shared_modulation=True, num_layers=3)
    weights = shared.state_dict()
    matrix, bias = weights.pop("modulation.weight"), weights.pop("modulation.bias")
    for block in range(3):
        weights[f"blocks.{block}.modulation.weight"] = matrix
        weights[f"blocks.{block}.modulation.bias"] = bias + weights.pop(f"blocks.{block}.offset.bias")
    separate = tiny_transformer(num_layers=3)
    separate.load_state_dict(weights)
    # Sums in another order: a few times float32's last bit of values near 1.
    torch.testing.assert_close(shared(*inputs()).sample, separate(*inputs()).sample, rtol=0, atol=1e-5)


def test_a_fresh_model_predicts_nothing():
    model = GPSTokenTransformerModel(texture_channels=4, hidden_size=32, num_layers=2, num_attention_heads=2)
    assert model(*inputs()).sample.abs().max() == 0


def test_layerwise_casting_keeps_the_sensitive_layers():
    model = tiny_transformer()
    with torch.no_grad():
        exact = model(*inputs()).sample
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        rough = model(*inputs()).sample
    assert model.blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    assert model.time_embedding[0].weight.dtype == model.blocks[0].modulation.weight.dtype == torch.float32
    # Three bits of mantissa in the blocks' weights.
    assert 0 < (rough - exact).abs().max() < 0.2 * exact.abs().max()


def test_half_precision_takes_and_gives_the_latents_dtype():
    latents, time, labels, layout = inputs()
    with torch.no_grad():
        exact = tiny_transformer()(latents, time, labels, layout).sample
        half = tiny_transformer().bfloat16()(latents, time, labels, layout).sample
    assert half.dtype == torch.float32
    # bfloat16 has 8 bits; errors of a few roundings.
    assert (half - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"texture_channels": 3}, "a number for each of 8 channels, got 9"),
        ({"latents_std": [0.0] * 9}, "must be positive"),
        ({"geometry_residual": "affine"}, '"additive" or "relative", got .affine.'),
        ({"num_attention_heads": 3}, "multiple"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer(**change)


def test_bad_inputs():
    model = tiny_transformer()
    latents, time, labels, layout = inputs()
    with pytest.raises(ValueError, match=r"\(B, N, 9\): five geometry channels.*got \(2, 6, 8\)"):
        model(latents[..., :8], time, labels, layout)
    with pytest.raises(ValueError, match=r"\(2, 6, 5\) to go with the latents, got \(2, 5, 5\)"):
        model(latents, time, labels, layout[:, :5])
    with pytest.raises(ValueError, match="needs a layout"):
        model(latents, time, labels)
    with pytest.raises(ValueError, match="takes 6 tokens, got 4"):
        tiny_transformer(position_table=True)(latents[:, :4], time, labels)


@pytest.mark.parametrize("kind", ["additive", "relative"])
def test_latents_and_back(kind):
    model = tiny_transformer(geometry_residual=kind)
    generator = torch.Generator().manual_seed(0)
    layout = torch.rand(2, 6, 5, generator=generator) * 0.3 + 0.05
    layout[..., 2] = 0
    geometry = layout * (1 + 0.2 * torch.randn(2, 6, 5, generator=generator))
    geometry[..., 2] = torch.rand(2, 6, generator=generator) * 1.8 - 0.9
    texture = torch.randn(2, 6, 4, generator=generator) * 8
    latents = model.to_latents(layout, geometry, texture)
    back = model.from_latents(layout, latents)
    torch.testing.assert_close(back[0], geometry, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(back[1], texture, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["additive", "relative"])
def test_any_latents_give_gaussians(kind):
    model = tiny_transformer(geometry_residual=kind)
    layout = torch.rand(1, 6, 5) * 0.3 + 0.05
    for scale in (1e3, -1e3):
        geometry, texture = model.from_latents(layout, torch.full((1, 6, 9), scale))
        GPSTokens(geometry, texture, (32, 32)).validate()
