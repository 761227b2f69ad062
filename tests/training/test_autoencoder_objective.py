"""What an autoencoder is trained for: its losses, the critic and its schedule, recipes, parts that are not trained."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
from model_zoo import SMALL_CONFIG, load_golden, noise_images, tiny_model
from perceptual_zoo import build
from safetensors.torch import load_file, save_file
from training_runs import curve, load_script, make_photographs, train_here, weights

from gpstoken_diffusers import AutoencoderGPSToken
from gpstoken_diffusers.evaluation.metrics import psnr
from gpstoken_diffusers.training.autoencoder_objective import AutoencoderObjective, add_loss_arguments
from gpstoken_diffusers.training.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("photographs") / "x")


@pytest.fixture(scope="module")
def script():
    return load_script()


def objective_of(model, *line: str, perceptual=None, features=None) -> AutoencoderObjective:
    parser = argparse.ArgumentParser()
    add_loss_arguments(parser)
    return AutoencoderObjective(
        parser.parse_args(list(line)),
        perceptual,
        features,
        model.decoder.conv_out.weight,
        mean=lambda tensor: tensor,
        validation=[],
        judge=None,
        write_card=lambda folder, state: None,
    )


def batch_of(model) -> dict[str, torch.Tensor]:
    pixels = noise_images(2, 32, 32)
    encoded = model.encode(pixels)
    return {"pixel_values": pixels, "regions": encoded.regions, "geometry": encoded.initial_tokens.geometry}


def squared(a, b):
    return (a - b).square().mean(dim=(1, 2, 3))


def test_the_loss_is_the_sum_that_the_docstring_names():
    torch.manual_seed(0)
    model = tiny_model("lattice")
    line = ["--l1_weight", "2", "--l2_weight", "3", "--perceptual_weight", "0.5", "--feature_weight", "0.25"]
    line += ["--psnr_weight", "0.02", "--adversarial_weight", "0.1", "--critic_channels", "4"]
    objective = objective_of(model, *line, perceptual=squared, features=lambda a, b: 4 * squared(a, b))
    batch = batch_of(model)
    output = objective.forward(model, batch)
    numbers = objective.model_loss(output, batch, step=0)
    difference = output - batch["pixel_values"]
    l1, l2 = difference.abs().mean(), difference.square().mean()
    judged = -objective.critic.network(output).mean()
    decibels = psnr(output, batch["pixel_values"]).mean()
    compared = 2 * l1 + 3 * l2 - 0.02 * decibels + 0.5 * l2
    # The adaptive weight by hand: norms of the two gradients at the last layer.
    norms = [
        torch.autograd.grad(loss, model.decoder.conv_out.weight, retain_graph=True)[0].norm()
        for loss in (compared, judged)
    ]
    weight = norms[0] / (norms[1] + 1e-4)
    expected = compared + 0.25 * 4 * l2 + 0.1 * weight * judged
    assert numbers["loss"].item() == pytest.approx(expected.item(), rel=1e-4)  # float32 sums, and the limit at 60 dB
    assert numbers["adaptive_weight"].item() == pytest.approx(weight.item(), rel=1e-5)
    assert not numbers["adaptive_weight"].requires_grad


def test_the_models_loss_leaves_no_gradient_in_the_critic_and_the_critics_none_in_the_model():
    model = tiny_model("lattice")
    objective = objective_of(model, "--adversarial_weight", "1", "--critic_channels", "4")
    batch = batch_of(model)
    output = objective.forward(model, batch)
    objective.model_loss(output, batch, step=0)["loss"].backward()
    assert all(parameter.grad is None for parameter in objective.critic.network.parameters())
    assert all(parameter.requires_grad for parameter in objective.critic.network.parameters())
    before = [parameter.grad.clone() for parameter in model.parameters()]
    objective.critic.loss(objective.critic.network, output.detach(), batch)["critic_loss"].backward()
    # That of the last bias may vanish: real and fake pull it apart.
    assert all(parameter.grad.abs().sum() > 0 for parameter in list(objective.critic.network.parameters())[:-1])
    assert all(torch.equal(parameter.grad, old) for parameter, old in zip(model.parameters(), before, strict=True))


def test_turns_of_model_and_critic():
    model = tiny_model("lattice")
    alone = objective_of(model)
    assert alone.critic is None and [alone.trains(step) for step in (0, 9)] == [(True, False)] * 2
    both = objective_of(model, "--adversarial_weight", "1", "--critic_start", "2")
    assert [both.trains(step) for step in range(4)] == [(True, False)] * 2 + [(True, True)] * 2
    line = ["--adversarial_weight", "1", "--critic_start", "2", "--critic_schedule", "alternating"]
    official = objective_of(model, *line)
    assert [official.trains(step) for step in range(5)] == [
        (True, False), (True, False), (True, False), (False, True), (True, False),
    ]  # fmt: skip
    batch = batch_of(model)
    output = official.forward(model, batch)
    assert "adversarial" not in official.model_loss(output, batch, step=1)
    assert "adversarial" in official.model_loss(output, batch, step=2)


def test_hinge_loss_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))


def test_the_adaptive_weight_is_bounded_and_one_for_a_frozen_layer():
    layer = torch.nn.Parameter(torch.ones(3))
    strong, weak = (1e9 * layer).sum(), (1e-9 * layer).sum()
    assert adaptive_weight(strong, weak, layer, lambda tensor: tensor) == 1e4
    assert adaptive_weight(weak, strong, layer, lambda tensor: tensor) < 1e-9
    layer.requires_grad_(False)
    assert adaptive_weight(strong, weak, layer, lambda tensor: tensor) == 1


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_critic_judges_patches(norm):
    torch.manual_seed(0)
    critic = PatchDiscriminator(channels=8, norm=norm)
    pictures = noise_images(2, 64, 96)
    judged = critic(pictures)
    assert judged.shape == (2, 1, 6, 10)
    moved = pictures.clone()
    moved[:, :, :, 90:] += 1.0
    moved_away = critic.eval()(moved) - critic(pictures)
    if norm == "batch":  # fixed statistics: a judgement of 70 x 70 pixels does not see what lies outside
        assert moved_away[:, :, :, 0].abs().max() == 0 and moved_away[:, :, :, -1].abs().max() > 0
    alone = torch.cat([critic(picture[None]) for picture in pictures])
    # Convolutions of other batch sizes add up in another order.
    assert torch.allclose(critic(pictures), alone, atol=1e-5)
    with pytest.raises(ValueError, match="norm must be one of group, batch"):
        PatchDiscriminator(norm="none")


def test_the_official_recipe_is_what_the_official_code_does(script):
    args = script.parse_args(["--recipe", "official", "--train_dir", "x", "--output_dir", "y", "--batch_size", "4"])
    assert (args.optimizer, args.learning_rate, args.adam_betas) == ("adam", 5e-5, (0.5, 0.9))
    assert (args.l1_weight, args.l2_weight, args.perceptual_weight, args.feature_weight) == (0, 1, 1, 1)
    assert (args.critic_start, args.adversarial_weight, args.critic_schedule) == (600_000, 0.3, "alternating")
    assert args.feature_network == "inception-official"
    assert args.batch_size == 4  # what is given wins
    assert script.parse_args(["--train_dir", "x", "--output_dir", "y"]).optimizer == "muon"


def test_the_perceptual_loss_begins_at_its_step():
    model = tiny_model("lattice")
    objective = objective_of(model, "--perceptual_weight", "1", "--perceptual_start", "2", perceptual=squared)
    batch = batch_of(model)
    output = objective.forward(model, batch)
    before, after = (objective.model_loss(output, batch, step=step) for step in (1, 2))
    assert "perceptual" not in before
    assert after["loss"].item() == pytest.approx((before["loss"] + after["perceptual"]).item(), rel=1e-5)  # float32 sum


def test_the_paper_recipe_is_what_the_text_says(script):
    line = ["--recipe", "paper", "--train_dir", "x", "--output_dir", "y"]
    args = script.parse_args(line)
    assert (args.batch_size, args.learning_rate, args.ema_decay) == (96, 5e-5, 0.9999)
    assert (args.perceptual_start, args.critic_start) == (600_000, 600_000)
    for preset, blocks in (("s64", 60), ("m128", 30), ("l256", 30)):
        with torch.device("meta"):
            config = script.build_model(script.parse_args([*line, "--preset", preset])).config
        assert (config.support, config.min_region_size, config.num_layers) == (5, 4, blocks)
    official = script.parse_args(["--recipe", "official", "--preset", "s64", "--train_dir", "x", "--output_dir", "y"])
    with torch.device("meta"):
        config = script.build_model(official).config
    assert (config.support, config.min_region_size, config.num_layers) == (3, 8, 30)


def test_released_sizes_can_be_trained(script, tmp_path, monkeypatch):
    """Their layers are made without weights, which would take long; sizes and tiles are what counts."""
    for preset, tokens, channels in (("s64", 64, 16), ("m128", 128, 16), ("l256", 256, 32)):
        args = script.parse_args(["--preset", preset, "--train_dir", "x", "--output_dir", "y", "--resolution", "128"])
        with torch.device("meta"):
            model = script.build_model(args)
        assert (model.config.num_tokens, model.config.texture_channels) == (tokens, channels)
        assert (model.config.sample_size, model.config.map_size) == (128, 32)
        assert len(model.refiner.layers if hasattr(model.refiner, "layers") else model.refiner.blocks) == 30


@pytest.mark.parametrize("line, message", [
    ([], "--train_dir or --dataset_name"),
    (["--train_dir", "x", "--dataset_name", "y"], "--train_dir or --dataset_name"),
    (["--train_dir", "x", "--token_jitter", "1"], "token_jitter"),
    (["--train_dir", "x", "--lora_rank", "4", "--freeze", "decoder"], "--lora_rank"),
])  # fmt: skip
def test_bad_command_lines(script, capsys, line, message):
    with pytest.raises(SystemExit):
        script.parse_args([*line, "--output_dir", "z"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_frozen_parts_stay_as_they_were(photographs, tmp_path, part):
    more = ("--max_train_steps", 2, "--freeze", part, "--adversarial_weight", 0.1, "--critic_channels", 4)
    train_here(photographs, tmp_path / "first", "--max_train_steps", 1, "--config", tmp_path / "config.json")
    train_here(photographs, tmp_path / "run", *more, "--pretrained", tmp_path / "first" / "model")
    before, after = weights(tmp_path / "first"), weights(tmp_path / "run")
    for name in before:
        frozen = name.startswith("decoder.") == (part == "decoder")
        assert torch.equal(before[name], after[name]) == frozen, name


def test_adapters_are_trained_alone_saved_apart_and_merged(photographs, tmp_path):
    pytest.importorskip("peft")
    train_here(photographs, tmp_path / "first", "--max_train_steps", 1)
    more = ("--max_train_steps", 3, "--lora_rank", 2, "--checkpointing_steps", 2, "--optimizer", "adamw")
    more += ("--learning_rate", 0.05, "--pretrained", tmp_path / "first" / "model")
    train_here(photographs, tmp_path / "run", *more)
    before, after = weights(tmp_path / "first"), weights(tmp_path / "run")
    assert before.keys() == after.keys()  # a plain model
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("refiner.") and ".to_" in name for name in changed)
    adapters = load_file(tmp_path / "run" / "model" / "lora" / "pytorch_lora_weights.safetensors")
    assert len(adapters) == 2 * len(changed)
    # The adapters on the first model are the merged one.
    first = AutoencoderGPSToken.from_pretrained(tmp_path / "first" / "model")
    name = "pytorch_lora_weights.safetensors"
    first.load_lora_adapter(tmp_path / "run" / "model" / "lora", prefix=None, weight_name=name)
    merged = AutoencoderGPSToken.from_pretrained(tmp_path / "run" / "model")
    pixels = noise_images(1, 32, 32)
    with torch.no_grad():
        # B A x beside W x and (W + B A) x round differently.
        assert torch.allclose(first(pixels).sample, merged(pixels).sample, atol=1e-4)
    # And a stopped run of adapters goes on.
    train_here(photographs, tmp_path / "run", *more, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")


def test_official_files_can_be_fine_tuned(photographs, tmp_path):
    """Read by their own names; at another resolution the tile changes, not the weights."""
    official = load_golden("ae_small_weights.safetensors")
    save_file(official, tmp_path / "official.safetensors")
    (tmp_path / "small.json").write_text(json.dumps(SMALL_CONFIG))
    more = ("--pretrained", tmp_path / "official.safetensors", "--config", tmp_path / "small.json")
    train_here(photographs, tmp_path / "run", *more, "--max_train_steps", 1, "--freeze", "decoder")
    trained = AutoencoderGPSToken.from_pretrained(tmp_path / "run" / "model")
    assert trained.config.sample_size == 32
    before = AutoencoderGPSToken.from_single_file(tmp_path / "official.safetensors", config=SMALL_CONFIG)
    assert torch.equal(trained.decoder.conv_in.weight, before.decoder.conv_in.weight)
    assert not torch.equal(trained.stem.conv_in.weight, before.stem.conv_in.weight)


def test_validation_reports_a_network_that_was_not_trained_on(photographs, tmp_path, monkeypatch):
    objective = objective_of(tiny_model("lattice"))
    objective.validation, objective.judge = [noise_images(3, 32, 32)], squared
    objective.args.mixed_precision, objective.args.output_dir = "no", str(tmp_path)
    figures = objective.validate(tiny_model("lattice").eval(), step=1)
    assert set(figures) == {"psnr", "ssim", "judge"}
    # 10 log10(4 / mean squared error), of single pictures: by Jensen's inequality at least that of the mean
    assert figures["psnr"] >= 10 * np.log10(4 / figures["judge"]) - 1e-4


def test_a_config_file_replaces_parts_of_a_preset(script, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"hidden_size": 64, "num_layers": 1}))
    line = ["--train_dir", "x", "--output_dir", "y", "--config", str(tmp_path / "c.json"), "--num_tokens", "32"]
    model = script.build_model(script.parse_args(line))
    assert (model.config.hidden_size, model.config.num_layers, model.config.roi_size) == (64, 1, 4)
    assert (model.config.num_tokens, model.config.sample_size) == (32, 256)


def test_a_model_keeps_its_tile_unless_another_is_asked_for(script, tmp_path):
    torch.manual_seed(0)
    small = {**SMALL_CONFIG, "sample_size": 24, "map_size": 6, "num_tokens": 5}
    AutoencoderGPSToken(**small).save_pretrained(tmp_path / "model")
    before = AutoencoderGPSToken.from_pretrained(tmp_path / "model").state_dict()
    for options, expected in (((), (24, 6, 5)), (("--resolution", "64", "--num_tokens", "9"), (64, 16, 9))):
        line = ["--train_dir", "x", "--output_dir", "y", "--pretrained", str(tmp_path / "model"), *options]
        model = script.build_model(script.parse_args(line))
        assert (model.config.sample_size, model.config.map_size, model.config.num_tokens) == expected
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="--resolution must be a multiple of 4 .* got 30"):
        script.build_model(script.parse_args([*line[:6], "--resolution", "30"]))


def test_the_curve_of_a_sharp_recipe(photographs, tmp_path):
    """Every loss at once, through the networks that CI fetches."""
    for name in ("efficientnet-lite0", "stlpips-alex", "stlpips-vgg"):
        build(name)  # or the test is skipped
    train_here(
        photographs, tmp_path / "run", "--recipe", "sharp", "--feature_network", "stlpips-alex", "--feature_weight",
        0.1, "--judge", "stlpips-vgg", "--critic_start", 1, "--critic_channels", 4, "--max_train_steps", 2,
        "--validation_dir", photographs, "--resolution", 64, "--batch_size", 2,
    )  # fmt: skip
    (row,) = curve(tmp_path / "run")
    assert {"perceptual", "features", "adversarial", "critic_loss", "judge"} <= row.keys()
    assert all(np.isfinite(value) for value in row.values())
