"""Autoencoders as rows of a table: what their codes cost, and which places hold one."""

from __future__ import annotations

import json

import pytest
import torch
from golden_files import golden
from model_zoo import SMALL_CONFIG, noise_images, tiny_model
from reconstruction import methods
from reconstruction.methods import (
    GPSTokenMethod,
    InitialGaussians,
    ShuffledTextures,
    check_place,
    class_of,
    in_8_bits,
    load_methods,
    parse_model,
)
from reconstruction_zoo import autoencoder_folders, tiny_autoencoders
from safetensors.torch import load_file, save_file

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokens


@torch.no_grad()
def test_bytes_of_tokens_are_those_of_files(tmp_path):
    method = GPSTokenMethod("ours", tiny_model("lattice"), 9)
    tokens = method.encode(noise_images(2, 32, 32), [0, 1])
    cost = method.cost(tokens)
    assert (cost.tokens, cost.numbers) == (9, 9 * (5 + 4))
    for name, dtype in (("coded", "uint8"), ("float16", "float16"), ("float32", "float32")):
        for index in range(2):
            tokens[index].save(tmp_path / "tokens.safetensors", dtype=dtype)
            assert cost.bytes[name][index] == (tmp_path / "tokens.safetensors").stat().st_size
    tokens[1].save(tmp_path / "tokens.safetensors", dtype="uint8")
    assert torch.equal(cost.coded.texture[1:], GPSTokens.load(tmp_path / "tokens.safetensors").texture)
    assert torch.equal(cost.coded.geometry[1:], GPSTokens.load(tmp_path / "tokens.safetensors").geometry)
    assert method.decode(cost.coded).shape == (2, 3, 32, 32)
    cost = method.cost(method.encode(noise_images(1, 64, 64), [0]))
    assert (cost.tokens, cost.numbers) == (4 * 9, 4 * 9 * 9)  # in each of four tiles


@torch.no_grad()
def test_shuffled_textures_and_initial_gaussians_change_just_that():
    model, images = tiny_model("lattice"), noise_images(2, 32, 32)
    plain = GPSTokenMethod("ours", model, 9).encode(images, [0, 1])
    shuffled = ShuffledTextures("shuffled", model, 9).encode(images, [0, 1])
    assert torch.equal(shuffled.geometry, plain.geometry)
    assert not torch.equal(shuffled.texture, plain.texture)
    assert torch.equal(shuffled.texture.sort(dim=1).values, plain.texture.sort(dim=1).values)
    # A picture's order does not depend on the pictures beside it.
    alone = ShuffledTextures("shuffled", model, 9).encode(images[1:], [1])
    torch.testing.assert_close(alone.texture, shuffled.texture[1:])
    initial = InitialGaussians("initial", model, 9).encode(images, [0, 1])
    assert torch.equal(initial.texture, plain.texture)
    assert torch.equal(initial.geometry[..., 2], torch.zeros(2, 9))  # the partition's Gaussians are upright


@torch.no_grad()
@pytest.mark.parametrize("name, channels", [("AutoencoderKL", 3), ("AutoencoderDC", 4), ("AutoencoderTiny", 2)])
def test_latents_cost_what_their_shape_says(name, channels):
    (method,) = load_methods(str(autoencoder_folders() / name), None, "cpu")
    images = noise_images(2, 32, 32)
    code = method.encode(images, [0, 1])
    cost = method.cost(code)
    numbers = 16 * 16 * channels
    assert (cost.tokens, cost.numbers) == (16 * 16, numbers)
    assert cost.bytes == {
        "coded": [numbers + 8 * channels] * 2,
        "float16": [2 * numbers] * 2,
        "float32": [4 * numbers] * 2,
    }
    assert method.decode(code).shape == method.decode(cost.coded).shape == images.shape
    assert torch.equal(method.encode(images, [0, 1]), code)  # nothing is drawn at random
    model = getattr(methods.diffusers, name).from_pretrained(autoencoder_folders() / name)
    assert method.parameters == sum(parameter.numel() for parameter in model.parameters())
    if name == "AutoencoderKL":
        torch.testing.assert_close(method.decode(code), model(images).sample)


@torch.no_grad()
def test_a_codebook_costs_its_indices():
    (method,) = load_methods(str(autoencoder_folders() / "VQModel"), None, "cpu")
    code = method.encode(noise_images(1, 32, 32), [0])
    cost = method.cost(code)
    assert (cost.tokens, cost.numbers) == (256, 256)
    assert cost.bytes == {"coded": [256 * 5 // 8]}  # 20 entries: 5 bits
    assert cost.coded is None
    # The picture holds no more than the indices do.
    entries, _, _ = method.model.quantize(code)
    torch.testing.assert_close(method.decode(entries), method.decode(code))


def test_8_bits_are_256_steps_of_each_channel():
    latents = (
        torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9, 0])[:, None, None]
    )
    rounded = in_8_bits(latents)
    spans = latents.amax((2, 3)) - latents.amin((2, 3))
    assert ((rounded - latents).abs().amax((2, 3)) <= spans / 510 * 1.001).all()
    assert all(len(channel.unique()) <= 256 for channel in rounded.flatten(0, 1))
    assert torch.equal(rounded[:, 2], latents[:, 2])  # a channel without any span


def test_places_and_numbers_of_tokens():
    assert parse_model("mini") == ("mini", None)
    assert parse_model("mini@64,128") == ("mini", [64, 128])
    assert parse_model("runs/a@b@7") == ("runs/a@b", [7])
    assert parse_model("runs/a@b") == ("runs/a@b", None)


def test_classes_are_read_from_the_configuration():
    assert class_of("mini") == "AutoencoderGPSToken"
    for folder in autoencoder_folders().iterdir():
        assert class_of(str(folder)) == folder.name


def test_rows_of_a_folder():
    place = str(autoencoder_folders() / "AutoencoderGPSToken")
    assert [method.name for method in load_methods(place, [4, 9], "cpu")] == [f"{place}@4", f"{place}@9"]
    (method,) = load_methods(place, None, "cpu")
    assert method.num_tokens == 6  # the configuration's
    for name, counts, side, most in ((place, [9, 17], 32, 16), ("mini", [1025], 256, 1024), (place, [0], 32, 16)):
        with pytest.raises(ValueError, match=f"a tile of {side} px can be divided into 1 to {most} regions"):
            check_place(name, counts)
        with pytest.raises(ValueError, match=f"a tile of {side} px can be divided into 1 to {most} regions"):
            load_methods(name, counts, "cpu")
    with pytest.raises(ValueError, match="AutoencoderKL, whose number of tokens cannot be chosen"):
        load_methods(str(autoencoder_folders() / "AutoencoderKL"), [4], "cpu")


def test_an_official_file(monkeypatch):
    path = str(golden("ae_small_weights.safetensors"))
    assert class_of(path) == "AutoencoderGPSToken"
    whole = AutoencoderGPSToken.from_single_file
    # The files that are published have a preset; this small one has not.
    monkeypatch.setattr(AutoencoderGPSToken, "from_single_file", lambda file: whole(file, config=SMALL_CONFIG))
    (method,) = load_methods(path, [32], "cpu")
    assert method.name == f"{path}@32"
    assert method.model.config.num_tokens == 64


def test_places_without_a_model_are_named(tmp_path):
    def write(name: str, text: str, file: str = "config.json") -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
        return str(tmp_path / name)

    mistakes = {
        write("other", json.dumps({"_class_name": "UNet2DModel"})): "holds a model of class UNet2DModel; known are",
        write("nameless", "{}"): "damaged or names no class",
        write("broken", "{"): "damaged or names no class",
        write("empty", "", "note.txt"): "has no config.json",
        write("pipeline", "{}", "model_index.json"): "whole pipeline: give the folder of its autoencoder",
        str(tmp_path / "empty" / "note.txt"): "a folder or an official .safetensors file is expected",
        "no such place": "no folder, no file, and no OWNER/NAME",
        "../nowhere": "no folder, no file, and no OWNER/NAME",
    }
    for place, message in mistakes.items():
        with pytest.raises(ValueError, match=message):
            class_of(place)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        class_of("missing.safetensors")


def test_the_hub_is_asked_for_what_is_no_folder(monkeypatch):
    asked = []

    def answer(pretrained_model_name_or_path, subfolder):
        asked.append((pretrained_model_name_or_path, subfolder))
        raise OSError("no such repository\nand more")

    monkeypatch.setattr(methods.diffusers.AutoencoderKL, "load_config", answer)
    for place, question in (("owner/name", ("owner/name", None)), ("owner/name/vae", ("owner/name", "vae"))):
        with pytest.raises(OSError, match=f"no folder {place} here, .* not give one: no such repository$"):
            class_of(place)
        assert asked.pop() == question


def test_weights_that_are_missing_are_an_error(tmp_path):
    tiny_autoencoders()["AutoencoderTiny"].save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights.pop(sorted(weights)[0])
    save_file(weights, path)
    with pytest.raises(OSError, match="missing_keys"):
        load_methods(str(tmp_path / "vae"), None, "cpu")
