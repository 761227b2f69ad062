"""What a user can get wrong: each mistake is refused with a message that helps; nothing is left half done."""

from __future__ import annotations

import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from command_runs import photo, save_tiny_model
from PIL import Image
from safetensors.torch import save_file

from gpstoken_diffusers import (
    AutoencoderGPSToken,
    GPSTokenImageProcessor,
    GPSTokens,
    cli,
    partition_image,
    splat_gaussians,
)
from gpstoken_diffusers.cli import commands, conversion
from gpstoken_diffusers.cli import reconstruct as reconstruction


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """Of a tiny model that takes 1 to 16 tokens."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "lattice")


@pytest.fixture
def model(model_folder) -> AutoencoderGPSToken:
    return AutoencoderGPSToken.from_pretrained(model_folder)


@pytest.fixture
def image(tmp_path) -> Path:
    return photo(tmp_path / "photo.png", 32, 32)


@pytest.fixture
def refused(model_folder, tmp_path, capsys):
    """Runs the command and checks that it refuses: code 1, a line that says why, no traceback, no file."""

    def run(*argv: object, why: str, model: Path | None = model_folder) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        capsys.readouterr()
        words = [str(argument) for argument in (*argv, *(() if model is None else ("--model", model)))]
        assert cli.main(words) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert re.search(rf"^gpstoken: error: (.|\n)*{why}", err, re.MULTILINE), err
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
        return err

    return run


def tokens_file(path: Path, **geometry: float) -> Path:
    """A tokens file with the right header, whose first token has the given values."""
    values = torch.tensor([0.2, 0.2, 0.0, 0.1, 0.1]).repeat(1, 6, 1)
    for name, value in geometry.items():
        values[0, 0, ("sigma_x", "sigma_y", "rho", "x", "y").index(name)] = value
    header = {
        "format": "gpstoken.tokens", "format_version": "1",
        "image_size": "[32, 32]", "tile_grid": "[1, 1]", "canvas_size": "[32, 32]",
    }  # fmt: skip
    save_file({"geometry": values, "texture": torch.zeros(1, 6, 4)}, path, header)
    return path


class Trap:
    """Unpickling this runs code: it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# Files of weights and tokens


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_safetensors(keep, model_folder, refused, tmp_path):
    whole = {
        "tokens": tokens_file(tmp_path / "whole.safetensors").read_bytes(),
        "weights": (model_folder / "diffusion_pytorch_model.safetensors").read_bytes(),
    }
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole["tokens"][:keep])
    refused("decode", cut, "-o", tmp_path / "p.png", why=r"cut\.safetensors.*(empty|truncated|not a safetensors)")

    cut.write_bytes(whole["weights"][:keep])
    why = r"cut\.safetensors.*(empty|truncated|not a safetensors)"
    refused("convert", cut, "-o", tmp_path / "folder", model=None, why=why)
    with pytest.raises(ValueError, match="empty|truncated|not a safetensors"):
        AutoencoderGPSToken.from_single_file(cut, preset="l256")

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(whole["weights"][:keep])
    photo(tmp_path / "photo.png")
    options = (tmp_path / "photo.png", "-o", tmp_path / "t.safetensors")
    refused("encode", *options, model=folder, why="diffusion_pytorch_model")


def test_pickle_renamed_to_safetensors(model_folder, refused, image, tmp_path):
    sprung = tmp_path / "sprung"
    for name, write in {"stdlib": pickle.dump, "archive": torch.save}.items():
        renamed = tmp_path / f"{name}.safetensors"
        with renamed.open("wb") as file:
            write(Trap(sprung), file)
        refused("decode", renamed, "-o", tmp_path / "p.png", why="is a Python pickle")
        refused("convert", renamed, "-o", tmp_path / "folder", model=None, why="is a Python pickle")
        refused("encode", image, "-o", tmp_path / "t.safetensors", model=renamed, why="is a Python pickle")
        with pytest.raises(ValueError, match="is a Python pickle"):
            AutoencoderGPSToken.from_single_file(renamed)
    # A folder whose only weights are a pickle.
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    torch.save(Trap(sprung), folder / "diffusion_pytorch_model.bin")
    refused("encode", image, "-o", tmp_path / "t.safetensors", model=folder, why="safetensors")
    assert not sprung.exists()


def test_checkpoint_of_another_model(model_folder, refused, image, tmp_path):
    tensors = {
        "resnet": {"conv1.weight": torch.zeros(4, 3, 7, 7), "fc.bias": torch.zeros(10)},
        "generator": {"ema_model.blocks.0.adaLN_modulation.1.weight": torch.zeros(6, 1)},
        "misshapen": {"gps_embed.weight": torch.zeros(1, 8), "to_gps.1.weight": torch.zeros(32, 8)},
    }
    reasons = {"resnet": r"conv1\.weight", "generator": "generator", "misshapen": r"\d+ differences\):\n  missing: "}
    for name, content in tensors.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(content, path)
        refused("convert", path, "-o", tmp_path / "folder", model=None, why=reasons[name])
        refused("encode", image, "-o", tmp_path / "t.safetensors", model=path, why=reasons[name])
        with pytest.raises(ValueError, match=reasons[name]):
            AutoencoderGPSToken.from_single_file(path)
    refused("decode", tmp_path / "resnet.safetensors", "-o", tmp_path / "p.png", why="not of tokens.*conv1")

    folder = tmp_path / "vae"
    folder.mkdir()
    config = json.loads((model_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    encode = ("encode", image, "-o", tmp_path / "t.safetensors")
    refused(*encode, model=folder, why="AutoencoderKL, not AutoencoderGPSToken")
    for text in ("{", "[]"):
        (folder / "config.json").write_text(text)
        refused(*encode, model=folder, why="not a model's configuration")
    # The right class with other sizes, and without weights or configuration.
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes((model_folder / weights.name).read_bytes())
    refused(*encode, model=folder, why="expected shape")
    weights.unlink()
    refused(*encode, model=folder, why="no file named diffusion_pytorch_model")
    (folder / "config.json").unlink()
    refused(*encode, model=folder, why=r"no file named config\.json")
    refused(*encode, model=tmp_path / "nowhere", why="no model at .*nowhere")
    refused(*encode, "--preset", "l256", why="--preset is for official files")


def test_tokens_of_another_model(refused, tmp_path):
    tokens = GPSTokens(torch.full((1, 6, 5), 0.5), torch.zeros(1, 6, 7), (32, 32))
    tokens.save(tmp_path / "t.safetensors")
    refused("decode", tmp_path / "t.safetensors", "-o", tmp_path / "p.png", why="4 texture channels.* have 7")


def test_impossible_tokens(model, refused, tmp_path):
    path = tokens_file(tmp_path / "t.safetensors", sigma_x=0.0)
    refused("decode", path, "-o", tmp_path / "p.png", why="damaged.*sigma_x")
    # The values next to impossible ones are drawn, and without NaN.
    path = tokens_file(tmp_path / "t.safetensors", sigma_x=1e-30, rho=1 - 2**-24)
    with torch.no_grad():
        assert model.decode(GPSTokens.load(path)).sample.isfinite().all()
    # The op itself takes what comes out of a network in float32, saturated values included.
    saturated = torch.tensor([[[0.0, 0.2, 0.0, 0.1, 0.1], [0.2, 0.2, 1.0, 0.1, 0.1]]])
    assert splat_gaussians(saturated, torch.ones(1, 2, 3), 8, 8).isfinite().all()


# Pictures and masks


def test_pictures_that_are_none(model, refused, image, tmp_path):
    for name, content, reason in (
        ("text.png", b"dear diary", "not an image"),
        ("empty.jpg", b"", "empty"),
        ("half.png", image.read_bytes()[:-600], "damaged"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        refused("encode", path, "-o", tmp_path / "t.safetensors", why=f"{name}.*{reason}")
        refused("panel", path, "-o", tmp_path / "panel.png", why=reason)
        refused("encode", image, "-o", tmp_path / "t.safetensors", "--importance", path, why=reason)
    refused("encode", tmp_path / "nowhere.png", "-o", tmp_path / "t.safetensors", why="nowhere.png")
    refused("encode", tmp_path, "-o", tmp_path / "t.safetensors", why="must be a folder")


def test_a_broken_picture_does_not_stop_a_folder(model_folder, tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photo(photos / "a.png")
    (photos / "b.png").write_text("dear diary")
    (photos / "c.jpg").touch()
    photo(photos / "d.png", seed=1)
    argv = ["reconstruct", str(photos), "-o", str(out), "--model", str(model_folder)]
    for quiet in ([], ["--quiet"]):
        assert cli.main([*argv, *quiet]) == 1
        text = capsys.readouterr()
        assert re.search(r"gpstoken: error: b\.png: .*not an image", text.err)
        assert re.search(r"gpstoken: error: c\.jpg: .*empty", text.err)
        assert "Traceback" not in text.err
        assert ("2 reconstructed, 2 failed" in text.out) == (not quiet)
        assert {path.name for path in out.iterdir()} == {"a.png.png", "d.png.png", "metrics.csv", "metrics.json"}
        document = json.loads((out / "metrics.json").read_text())
        assert [row["file"] for row in document["pictures"]] == ["a.png", "d.png"]
        assert [row["file"] for row in document["failed"]] == ["b.png", "c.jpg"]
    photo(photos / "b.png")
    (photos / "c.jpg").unlink()
    assert cli.main(argv) == 0
    assert "1 reconstructed, 2 done before" in capsys.readouterr().out


def test_folders_without_pictures(refused, image, tmp_path):
    folder = tmp_path / "folder"
    photo(folder / "deep" / "a.png")
    refused("reconstruct", folder, "-o", tmp_path / "out", why="no pictures in .*--recursive")
    refused("reconstruct", tmp_path / "nowhere", "-o", tmp_path / "out", why="no picture or folder at")
    refused("reconstruct", folder, "-o", folder, why="is the input folder itself")
    refused("reconstruct", image, "-o", tmp_path / "out.png", why="must be a folder")


def test_nan_pixels(model):
    pixels = torch.zeros(1, 3, 32, 32)
    for value in (math.nan, math.inf):
        pixels[0, 1, 5, 7] = value
        for call in (model.encode, GPSTokenImageProcessor(tile_size=32, num_tokens=6), lambda p: partition_image(p, 4)):
            with pytest.raises(ValueError, match="NaN"):
                call(pixels)


def test_mask_of_another_size(model, refused, image, tmp_path):
    mask = photo(tmp_path / "mask.png", 32, 31)
    refused("encode", image, "-o", tmp_path / "t.safetensors", "--importance", mask, why=r"size.*32, 32.*32, 31")
    with pytest.raises(ValueError, match="size"):
        GPSTokenImageProcessor(tile_size=32)(Image.open(image), num_tokens=4, importance=np.zeros((31, 32)))
    with pytest.raises(ValueError, match="importance"):
        model.encode(torch.zeros(1, 3, 32, 32), importance=torch.zeros(31, 70))
    with pytest.raises(ValueError, match="importance"):
        partition_image(torch.zeros(32, 32), 4, importance=torch.zeros(31, 32))
    options = ("--importance", image, "--importance-strength=-1")
    refused("encode", image, "-o", tmp_path / "t.safetensors", *options, why="importance_strength")


# Numbers and devices


@pytest.mark.parametrize("num_tokens", [0, -3, 17, 10**9])
def test_impossible_numbers_of_tokens(num_tokens, model, refused, image, tmp_path):
    option = f"--num-tokens={num_tokens}"
    refused("encode", image, "-o", tmp_path / "t.safetensors", option, why="1 to 16")
    refused("panel", image, "-o", tmp_path / "p.png", option, why="1 to 16")
    # Not once per picture of the folder.
    err = refused("reconstruct", image.parent, "-o", tmp_path / "out", option, why=f"{num_tokens}: .* 1 to 16")
    assert err.count("\n") == 1
    with pytest.raises(ValueError, match="1 to 16"):
        model.encode(torch.zeros(1, 3, 32, 32), num_tokens=num_tokens)


def test_devices_that_are_not_there(refused, image, tmp_path, monkeypatch):
    encode = ("encode", image, "-o", tmp_path / "t.safetensors", "--device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refused(*encode, "cuda", why="--device cuda: .*Use --device cpu or auto")
    refused(*encode, "cuda:1", why="--device cuda:1: ")
    refused(*encode, "mps", why="--device mps: .*Use --device cpu or auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused(*encode, "cuda:2", why="--device cuda:2: there are only 2 CUDA devices")


# Outputs


def test_unwritable_output_folder(refused, image, tmp_path, monkeypatch):
    # Refused before any work: neither a model nor a picture is loaded.
    for module in (commands, reconstruction):
        monkeypatch.setattr(module, "load_codec", lambda args: pytest.fail("a model was loaded"))
    monkeypatch.setattr(conversion.AutoencoderGPSToken, "from_single_file", lambda *a, **k: pytest.fail("loaded"))
    tokens = tokens_file(tmp_path / "t.safetensors")
    below_a_file, not_a_disk = image / "out", Path("/proc/out")  # where even root cannot write
    for folder in (below_a_file, not_a_disk):
        why = f"cannot write to the output folder {folder}"
        refused("demo", "-o", folder, why=why)
        refused("encode", image, "-o", folder / "t.safetensors", why=why)
        refused("decode", tokens, "-o", folder / "p.png", why=why)
        refused("panel", image, "-o", folder / "p.png", why=why)
        refused("reconstruct", image, "-o", folder, why=why)
        refused("convert", tokens, "-o", folder / "model", model=None, why=why)


def test_outputs_that_cannot_be_meant(refused, image, tmp_path):
    folder = tmp_path / "folder.png"
    folder.mkdir()
    tokens = tokens_file(tmp_path / "t.safetensors")
    refused("panel", image, "-o", image, why="is the input itself")
    refused("panel", image, "-o", folder, why="is a folder")
    refused("decode", tokens, "-o", tmp_path / "p.xyz", why=r"must end in one of \.png")
    refused("encode", image, "-o", tmp_path / "t.png", why="must end in .safetensors")
    refused("convert", tokens, "-o", image, model=None, why="is a file")
