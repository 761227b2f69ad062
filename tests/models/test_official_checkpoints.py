"""Official files: recognised, converted, or refused with a message that helps."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from golden_files import golden
from model_zoo import SMALL_CONFIG, load_golden
from safetensors.torch import load_file, save_file

from gpstoken_diffusers import AutoencoderGPSToken
from gpstoken_diffusers.models import official_checkpoints as convert


def texture_head(channels: int) -> dict[str, torch.Tensor]:
    return {"refiner.texture_head.weight": torch.empty(channels, 1)}


class Malicious:
    """A pickle that would leave a mark if it were ever opened."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.fixture
def official():
    return load_golden("ae_small_weights.safetensors")


def load(tensors, tmp_path, **kwargs):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return AutoencoderGPSToken.from_single_file(path, **{"config": SMALL_CONFIG, **kwargs})


@pytest.mark.parametrize("preset", ["s64", "m128", "l256"])
def test_every_official_name_is_converted(preset):
    """Names and shapes of the released files against the models of the presets, without any weight."""
    shapes = json.loads(golden(f"official_autoencoder_keys_{preset}.json").read_text())["keys"]
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        model = AutoencoderGPSToken.from_preset(preset)
        converted = convert.convert_autoencoder(tensors, "file")
    convert.check_against_model(converted, {n: t.shape for n, t in model.state_dict().items()}, "file")


def test_averaged_weights_are_taken_and_companions_left(official, tmp_path):
    crowd = {f"ema_model.{name}": tensor for name, tensor in official.items()}
    crowd |= {f"model.{name}": tensor + 1 for name, tensor in official.items()}
    crowd["discriminator.weight"] = torch.zeros(3)
    model = load(crowd, tmp_path)
    assert torch.equal(model.stem.conv_in.weight, official["preprocess_img.0.weight"])


def test_config_from_a_file_and_dtype(official, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SMALL_CONFIG))
    model = load(official, tmp_path, config=config, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_single_file_to_folder_is_exact(official, tmp_path):
    model = load(official, tmp_path)
    model.save_pretrained(tmp_path / "folder")
    loaded = AutoencoderGPSToken.from_pretrained(tmp_path / "folder")
    for (name, before), after in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(before, after), name


def test_every_difference_is_listed(official, tmp_path):
    del official["to_gps.0.bias"]
    official["decoder.conv_out.weight"] = torch.zeros(3, 32, 5, 5)
    with pytest.raises(ValueError) as caught:
        load(official, tmp_path)
    assert "2 differences" in str(caught.value)
    assert "missing: refiner.geometry_head.bias [5]" in str(caught.value)
    assert "shape of decoder.conv_out.weight: expected [3, 32, 3, 3], file has [3, 32, 5, 5]" in str(caught.value)


def test_extra_names_are_listed(official, tmp_path):
    official["decoder.quantizer.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=re.escape("decoder.quantizer.weight")):
        load(official, tmp_path)


def test_a_full_size_preset_refuses_a_small_file(official, tmp_path):
    with pytest.raises(ValueError, match="does not fit the model"):
        load(official, tmp_path, config=None, preset="m128")


@pytest.mark.parametrize(
    "channels, name, preset, expected",
    [
        (32, "x.safetensors", None, "l256"),
        (16, "gpstoken_s64.safetensors", None, "s64"),
        (16, "M128-ema.safetensors", None, "m128"),
        (16, "anything.safetensors", "s64", "s64"),
    ],
)
def test_presets_are_recognised(channels, name, preset, expected):
    assert convert.recognise_preset(texture_head(channels), name, preset)[0] == expected


@pytest.mark.parametrize(
    "channels, name, preset, message",
    [
        (16, "model.safetensors", None, "s64 and m128"),
        (16, "s64-or-m128.safetensors", None, "s64 and m128"),
        (24, "model.safetensors", None, "no preset"),
        (16, "model.safetensors", "l256", "32 texture channels"),
        (16, "model.safetensors", "xl", "must be one of"),
    ],
)
def test_presets_that_cannot_be_told(channels, name, preset, message):
    with pytest.raises(ValueError, match=message):
        convert.recognise_preset(texture_head(channels), name, preset)


def test_refused_files(official, tmp_path):
    mark = tmp_path / "mark"
    files = {
        "pickle.safetensors": (pickle.dumps(Malicious(mark)), "Python pickle"),
        "text.safetensors": (b"not a model at all, just a long enough line of text", "not a safetensors file"),
        "empty.safetensors": (b"", "0 bytes"),
    }
    save_file(official, tmp_path / "whole.safetensors")
    files["cut.safetensors"] = ((tmp_path / "whole.safetensors").read_bytes()[:-1000], "truncated")
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            AutoencoderGPSToken.from_single_file(tmp_path / name)
    torch.save(official, tmp_path / "zip.safetensors")
    with pytest.raises(ValueError, match="Python pickle"):
        AutoencoderGPSToken.from_single_file(tmp_path / "zip.safetensors")
    assert not mark.exists()
    with pytest.raises(FileNotFoundError, match="No checkpoint"):
        AutoencoderGPSToken.from_single_file(tmp_path / "absent.safetensors")


def test_other_models_are_named(tmp_path):
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no GPSToken autoencoder.*conv.weight"):
        AutoencoderGPSToken.from_single_file(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="generator"):
        AutoencoderGPSToken.from_single_file(golden("sit_small_weights.safetensors"))


def test_bad_configs(official, tmp_path):
    with pytest.raises(ValueError, match="does not fit AutoencoderGPSToken"):
        load(official, tmp_path, config={"gps_num": 64})
    with pytest.raises(ValueError, match="either a preset or a config"):
        load(official, tmp_path, preset="s64")
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="JSON object"):
        load(official, tmp_path, config=tmp_path / "config.json")
    assert load_file(tmp_path / "model.safetensors").keys() == official.keys()
