"""The stages as diffusers' modular blocks: the same pictures as the pipeline's, from the same folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_zoo import smooth_picture
from pipeline_zoo import tiny_pipeline

from gpstoken_diffusers import GPSTokenPipeline, assets

modular = pytest.importorskip(
    "gpstoken_diffusers.modular", reason="diffusers is too old for blocks", exc_type=ImportError
)
MINI = Path(assets.__file__).parent / "gpstoken-mini"
OUTPUTS = ["images", "layout", "tokens"]
STEPS = {"num_inference_steps": 3, "layout_num_inference_steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def pipe(folder):
    blocks = modular.GPSTokenBlocks().init_pipeline(folder)
    blocks.load_components()
    blocks.set_progress_bar_config(disable=True)
    return blocks


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def same(made: dict, expected) -> None:
    assert torch.equal(made["layout"], expected.layout)
    for part in ("geometry", "texture"):
        assert torch.equal(getattr(made["tokens"], part), getattr(expected.tokens, part))
    assert [image.tobytes() for image in made["images"]] == [image.tobytes() for image in expected.images]


CASES = {
    "classes": lambda: {"class_labels": ["food", 0], "generator": seeded(3, 4)},
    "several of each": lambda: {"class_labels": 1, "num_images_per_label": 2, "generator": seeded(3)[0]},
    "a given layout": lambda: {
        "layout": smooth_picture(0, (32, 32)),
        "class_labels": [0, 1],
        "generator": seeded(1)[0],
    },
    "guidance": lambda: {"class_labels": 0, "guidance_scale": 1.0, "generator": seeded(1)[0]},
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_draw_what_the_pipeline_draws(folder, pipe, name):
    whole = GPSTokenPipeline.from_pretrained(folder)
    whole.set_progress_bar_config(disable=True)
    same(pipe(**CASES[name](), **STEPS, output=OUTPUTS), whole(**CASES[name](), **STEPS))


def test_a_picture_gives_its_layout_and_can_be_decoded_alone(folder, pipe):
    picture = smooth_picture(0, (32, 32))
    expected = pipe(layout=picture, class_labels=0, generator=seeded(1)[0], **STEPS, output=OUTPUTS)
    made = pipe(image=picture, class_labels=0, generator=seeded(1)[0], **STEPS, output=OUTPUTS)
    assert torch.equal(made["layout"], expected["layout"])
    assert torch.equal(made["tokens"].texture, expected["tokens"].texture)
    stages = {"encode": modular.GPSTokenEncodeBlock(), "decode": modular.GPSTokenDecodeBlock()}
    codec = modular.SequentialPipelineBlocks.from_blocks_dict(stages).init_pipeline(folder)
    codec.load_components()
    (image,) = codec(image=smooth_picture(0, (40, 70)), output="images")
    assert image.size == (40, 70)


def test_a_callback_ends_a_stage(pipe):
    steps = []

    def stop(inner, step, timestep, given):
        steps.append(step)
        inner._interrupt = step == 1
        return given

    pipe(
        class_labels=0, num_inference_steps=5, layout_num_inference_steps=2, callback_on_step_end=stop, output="tokens"
    )
    assert steps == [0, 1]


FRESH = """
import json, sys, torch
from diffusers import DiffusionPipeline, ModularPipeline
if sys.argv[1] == "modular":
    pipe = ModularPipeline.from_pretrained(sys.argv[2], trust_remote_code=True)
    pipe.load_components()
    layout = pipe(class_labels="food", generator=torch.Generator().manual_seed(5), output="layout")
else:
    pipe = DiffusionPipeline.from_pretrained(sys.argv[2], trust_remote_code=True)
    layout = pipe("food", generator=torch.Generator().manual_seed(5)).layout
print(json.dumps(layout.tolist()))
"""


def test_one_folder_opens_in_both_ways_in_a_fresh_process(folder, tmp_path):
    """With nothing imported before, and with the environment's own cache of code left alone."""
    found = []
    for way in ("modular", "plain"):
        environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", FRESH, way, folder]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert ran.returncode == 0, ran.stderr
        found.append(json.loads(ran.stdout.splitlines()[-1]))
    assert found[0] == found[1]


def test_what_is_saved_for_the_hub_names_the_repository(tmp_path):
    pipe = tiny_pipeline(layout_model=None, layout_scheduler=None)
    pipe.save_pretrained(tmp_path, repo_id="owner/name")
    index = json.loads((tmp_path / "modular_model_index.json").read_text())
    assert index["transformer"][2]["pretrained_model_name_or_path"] == "owner/name" and "layout_model" not in index
    blocks = modular.GPSTokenBlocks().init_pipeline(str(tmp_path))
    blocks.load_components()  # from the folder all the same
    assert blocks.transformer is not None and blocks.layout_model is None


def test_parts_that_were_never_loaded_are_named():
    pipe = modular.GPSTokenBlocks().init_pipeline()
    with pytest.raises(ValueError, match=r"has no autoencoder: make it by from_pretrained\(folder\)"):
        pipe(class_labels=0)


def test_the_file_for_mellon_is_that_of_the_blocks():
    utils = pytest.importorskip("diffusers.modular_pipelines.mellon_node_utils")
    made = utils.MellonPipelineConfig.from_custom_block(modular.GPSTokenBlocks()).to_dict()
    assert made == json.loads((MINI / "mellon_pipeline_config.json").read_text(encoding="utf-8"))


def test_mini_has_what_its_pipeline_would_write(tmp_path):
    GPSTokenPipeline.from_pretrained(MINI).save_config(tmp_path)
    for name in ("block.py", "modular_config.json", "modular_model_index.json"):
        assert (tmp_path / name).read_text("utf-8") == (MINI / name).read_text("utf-8")
