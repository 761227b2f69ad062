"""Folders of pipelines that are incomplete, damaged, another's or from a later version: and what our classes say."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from pipeline_zoo import tiny_pipeline
from safetensors.torch import load_file, save_file

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenPipeline, GPSTokenSDEScheduler

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    tiny_pipeline(scheduler=GPSTokenSDEScheduler()).save_pretrained(path)
    return path


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def change_json(path: Path, **entries) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


# ---------------------------------------------------------------------- missing and damaged files


@pytest.mark.parametrize("name", ["autoencoder", "transformer", "layout_model", "scheduler", "image_processor"])
def test_a_missing_component(folder, name):
    shutil.rmtree(folder / name)
    with pytest.raises(OSError, match=f"The component {name} .* is missing: .*copy has no folder of that name"):
        GPSTokenPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["autoencoder", "transformer", "layout_model"])
def test_missing_weights(folder, name):
    (folder / name / WEIGHTS).unlink()
    with pytest.raises(OSError, match=f"copy/{name}"):
        GPSTokenPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "file",
    [
        "image_processor/preprocessor_config.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "model_index.json",
    ],
)
def test_a_missing_configuration(folder, file):
    (folder / file).unlink()
    with pytest.raises(OSError, match=rf"(?s)(?=.*{Path(file).name})(?=.*{(folder / file).parent})"):
        GPSTokenPipeline.from_pretrained(folder)


def test_some_weights_are_missing(folder):
    path = folder / "transformer" / WEIGHTS
    weights = load_file(path)
    name = next(iter(weights))
    del weights[name]
    save_file(weights, path)
    with pytest.raises(OSError, match=f"copy/transformer lacks 1 of the model's weights .{name}"):
        GPSTokenPipeline.from_pretrained(folder)


def test_a_shard_is_missing(folder):
    GPSTokenPipeline.from_pretrained(folder).save_pretrained(folder / "shards", max_shard_size="40KB")
    shard = sorted((folder / "shards" / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        GPSTokenPipeline.from_pretrained(folder / "shards")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "pickle"])
def test_damaged_weights(folder, damage):
    path = folder / "transformer" / WEIGHTS
    content, pickled = path.read_bytes(), io.BytesIO()
    torch.save(load_file(path), pickled)
    damaged = {"truncated": content[:-100], "garbage": os.urandom(5000), "empty": b"", "pickle": pickled.getvalue()}
    path.unlink()
    path.write_bytes(damaged[damage])
    with pytest.raises(OSError, match=f"copy/transformer/{WEIGHTS}"):
        GPSTokenPipeline.from_pretrained(folder)


def test_weights_that_git_did_not_fetch(folder):
    (folder / "transformer" / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(OSError, match="git-lfs"):
        GPSTokenPipeline.from_pretrained(folder)


def test_a_damaged_index(folder):
    path = folder / "model_index.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(OSError, match="model_index.json' is not a valid JSON"):
        GPSTokenPipeline.from_pretrained(folder)


def test_pickles_are_never_read(folder):
    path = folder / "transformer" / WEIGHTS
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    for asked in ({}, {"use_safetensors": False}):
        with pytest.raises(OSError, match="copy/transformer"):
            GPSTokenPipeline.from_pretrained(folder, **asked)


@pytest.mark.parametrize("path", ["no/such/folder", "./folder", "/no/folder"])
def test_no_such_folder(path):
    with pytest.raises(OSError, match=f"There is no folder {path}"):
        GPSTokenPipeline.from_pretrained(path)


def test_a_required_component_that_is_none(folder):
    change_json(folder / "model_index.json", transformer=[None, None])
    with pytest.raises(ValueError, match="transformer"):
        GPSTokenPipeline.from_pretrained(folder)


# ---------------------------------------------------------------------- another's, and a later version's


@pytest.mark.parametrize("name", ["DiTPipeline", ["pipeline", "GPSTokenHologramPipeline"], "GPSTokens"])
def test_another_pipeline(folder, name):
    change_json(folder / "model_index.json", _class_name=name)
    class_name = name if isinstance(name, str) else name[1]
    with pytest.raises(ValueError, match=f"the folder of a {class_name}, which GPSTokenPipeline cannot load"):
        GPSTokenPipeline.from_pretrained(folder)


def test_another_model_in_a_component(folder):
    shutil.copy(folder / "layout_model" / "config.json", folder / "transformer")
    with pytest.raises(ValueError, match="GPSTokenLayoutModel"):
        GPSTokenPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "file, entries, message",
    [
        ("model_index.json", {"_gpstoken_format": 2}, "saved by a later version .*format 2.*pip install -U"),
        ("model_index.json", {"guide": ["gpstoken_diffusers", "Guide"]}, "guide"),
        ("model_index.json", {"depth": 3}, "does not know: depth.*pip install -U"),
        ("model_index.json", {"transformer": ["gpstoken_diffusers", "GPSToken3D"]}, "GPSToken3D.*pip install -U"),
        ("transformer/config.json", {"experts": 8, "depth": 3}, "does not know: depth, experts.*pip install -U"),
        ("layout_model/config.json", {"depth": 3}, "GPSTokenLayoutModel .*does not know: depth"),
    ],
)
def test_a_later_version(folder, file, entries, message):
    change_json(folder / file, **entries)
    with pytest.raises(ValueError, match=message):
        GPSTokenPipeline.from_pretrained(folder)


def test_settings_that_diffusers_itself_adds_are_no_later_version(folder):
    change_json(folder / "transformer" / "config.json", auto_map={"AutoModel": "model.Model"}, _later="private")
    GPSTokenPipeline.from_pretrained(folder)


def test_what_a_training_noted_is_left_out_with_a_warning(folder, tmp_path, caplog):
    """diffusers' EMAModel writes its own state into config.json; other scripts write theirs."""
    model = GPSTokenPipeline.from_pretrained(folder).transformer
    averaged = EMAModel(model.parameters(), decay=0.9, model_cls=type(model), model_config=model.config)
    averaged.save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", global_step=7, learning_rate=1e-3)
    loaded = type(model).from_pretrained(tmp_path)
    assert "left out decay, global_step, inv_gamma, learning_rate" in caplog.text
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), loaded.parameters(), strict=True))
    assert EMAModel.from_pretrained(tmp_path, type(model)).decay == 0.9
    change_json(tmp_path / "config.json", depth=3)
    with pytest.raises(ValueError, match="does not know: depth[.]"):
        type(model).from_pretrained(tmp_path)


def test_a_model_alone_refuses_settings_of_a_later_version_too(folder):
    change_json(folder / "autoencoder" / "config.json", hemispheres=2)
    with pytest.raises(ValueError, match="AutoencoderGPSToken .*does not know: hemispheres.*pip install -U"):
        AutoencoderGPSToken.from_pretrained(folder / "autoencoder")


# ---------------------------------------------------------------------- saving


def test_pickles_are_not_written(whole, tmp_path):
    pipe = GPSTokenPipeline.from_pretrained(whole)
    for part in (pipe, pipe.autoencoder, pipe.transformer, pipe.layout_model):
        with pytest.raises(ValueError, match="safetensors only"):
            part.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_index_whole(folder, monkeypatch):
    pipe, before = GPSTokenPipeline.from_pretrained(folder), (folder / "model_index.json").read_bytes()
    replace = os.replace

    def full(source, target):
        if Path(target).name == "model_index.json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        pipe.save_pretrained(folder)
    assert (folder / "model_index.json").read_bytes() == before
    assert not list(folder.rglob("*.tmp"))


def test_a_file_in_place_of_the_folder(whole, tmp_path):
    path = tmp_path / "file"
    path.write_text("keep me")
    with pytest.raises(OSError):
        GPSTokenPipeline.from_pretrained(whole).save_pretrained(path)
    assert path.read_text() == "keep me"


def test_saving_over_the_folder_it_came_from(whole, folder):
    GPSTokenPipeline.from_pretrained(folder).save_pretrained(folder)
    for file in whole.rglob("*.*"):
        assert (folder / file.relative_to(whole)).read_bytes() == file.read_bytes()


def test_compiled_models_are_saved_as_themselves(whole, tmp_path):
    pipe = GPSTokenPipeline.from_pretrained(whole)
    pipe.transformer = torch.compile(pipe.transformer)
    pipe.save_pretrained(tmp_path)
    for file in whole.rglob("*.*"):
        assert (tmp_path / file.relative_to(whole)).read_bytes() == file.read_bytes()


def test_local_paths_do_not_leak(folder, tmp_path):
    pipe = GPSTokenPipeline.from_pretrained(folder)
    assert pipe.name_or_path == str(folder)
    pipe.save_pretrained(tmp_path / "again")
    for file in (tmp_path / "again").rglob("*.*"):
        assert str(tmp_path).encode() not in file.read_bytes(), file
        assert b'"_name_or_path"' not in file.read_bytes(), file  # diffusers has other names that end so
