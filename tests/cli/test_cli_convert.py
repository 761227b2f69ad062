"""The command `gpstoken convert`: the folder that it makes, and what it leaves alone, whatever goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_runs import names_in, photo, raising, run
from golden_files import golden
from model_zoo import SMALL_CONFIG

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor, GPSTokens
from gpstoken_diffusers.models import official_checkpoints as convert


@pytest.fixture
def small_as_l256(monkeypatch, tmp_path) -> Path:
    """The reference's small autoencoder under the name of a released one, whose presets take its sizes."""
    for preset in convert.PRESETS:
        monkeypatch.setitem(convert.PRESETS, preset, SMALL_CONFIG)
    path = tmp_path / "gpstoken_l256.safetensors"
    path.symlink_to(golden("ae_small_weights.safetensors"))
    return path


def test_convert_writes_a_folder(small_as_l256, tmp_path, capsys):
    out = tmp_path / "new" / "l256"
    assert run("convert", small_as_l256, "-o", out) == 0
    said = capsys.readouterr()
    assert "gpstoken_l256.safetensors as the preset l256 (by the file's name" in said.err
    assert "parameters in float32" in said.out
    assert names_in(out) == {"config.json", "diffusion_pytorch_model.safetensors", "preprocessor_config.json"}
    assert [path.name for path in out.parent.iterdir()] == ["l256"]
    converted = AutoencoderGPSToken.from_pretrained(out).state_dict()
    original = AutoencoderGPSToken.from_single_file(small_as_l256).state_dict()
    assert converted.keys() == original.keys()
    assert all(torch.equal(converted[name], original[name]) for name in original)
    assert GPSTokenImageProcessor.from_pretrained(out).num_tokens == SMALL_CONFIG["num_tokens"]

    image = photo(tmp_path / "photo.png", 64, 64)
    for name, model in {"folder": out, "file": small_as_l256}.items():
        assert run("encode", image, "-o", tmp_path / f"{name}.safetensors", "--model", model) == 0
    tokens = [GPSTokens.load(tmp_path / f"{name}.safetensors").as_tensor() for name in ("folder", "file")]
    assert torch.equal(*tokens)


def test_convert_takes_preset_config_and_dtype(small_as_l256, tmp_path, capsys):
    assert run("convert", small_as_l256, "-o", tmp_path / "a", "--preset", "m128", "--dtype", "bfloat16") == 0
    assert "as the preset m128 (as asked for)" in capsys.readouterr().err
    assert AutoencoderGPSToken.from_pretrained(tmp_path / "a", dtype=torch.bfloat16).dtype == torch.bfloat16
    size = (tmp_path / "a" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 0.6 * small_as_l256.stat().st_size
    (tmp_path / "config.json").write_text(json.dumps({**SMALL_CONFIG, "num_tokens": 99}))
    assert run("convert", small_as_l256, "-o", tmp_path / "b", "--config", tmp_path / "config.json") == 0
    assert AutoencoderGPSToken.load_config(tmp_path / "b")["num_tokens"] == 99
    assert (
        run(
            "convert",
            small_as_l256,
            "-o",
            tmp_path / "c",
            "--config",
            tmp_path / "config.json",
            "--preset",
            "s64",
        )
        == 1
    )
    assert not (tmp_path / "c").exists()


def test_convert_overwrites_only_its_own_and_only_when_asked(small_as_l256, tmp_path, capsys):
    out = tmp_path / "l256"
    out.mkdir()  # an empty folder is as good as none
    assert run("convert", small_as_l256, "-o", out) == 0
    assert run("convert", small_as_l256, "-o", out, "--dtype", "float16") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run("convert", small_as_l256, "-o", out, "--dtype", "float16", "--overwrite") == 0
    assert AutoencoderGPSToken.from_pretrained(out, dtype=torch.float16).dtype == torch.float16
    (out / "thesis.tex").write_text("years of work")
    assert run("convert", small_as_l256, "-o", out, "--overwrite") == 1
    assert "thesis.tex" in capsys.readouterr().err
    assert (out / "thesis.tex").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"l256", small_as_l256.name}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_convert_that_fails_leaves_what_was_there(error, small_as_l256, tmp_path, monkeypatch):
    out = tmp_path / "l256"
    assert run("convert", small_as_l256, "-o", out) == 0
    before = {name: (out / name).read_bytes() for name in names_in(out)}
    monkeypatch.setattr(GPSTokenImageProcessor, "save_pretrained", raising(error))
    options = ("--dtype", "float16", "--overwrite")
    assert run("convert", small_as_l256, "-o", out, *options) == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert run("convert", small_as_l256, "-o", tmp_path / "new") != 0
    assert {name: (out / name).read_bytes() for name in names_in(out)} == before
    assert {path.name for path in tmp_path.iterdir()} == {"l256", small_as_l256.name}
