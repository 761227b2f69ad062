"""The shipped pipeline: small, complete, repeatable, and drawing what it was trained on."""

from __future__ import annotations

import json

import pytest
import torch

from gpstoken_diffusers import GPSTokenPipeline, calibrate_layout
from gpstoken_diffusers.assets import MINI_PIPELINE


@pytest.fixture(scope="module")
def pipe():
    pipe = GPSTokenPipeline.from_pretrained(MINI_PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def drawn(pipe):
    return draw(pipe)


def draw(pipe):
    """One picture for each of eight seeds."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    labels = ["Food", "Smileys", "Animals", "Food"] * 2
    options = {"num_inference_steps": 10, "layout_num_inference_steps": 10, "output_type": "pt"}
    return pipe(labels, generator=generators, **options)


def test_it_is_small_complete_and_says_where_it_comes_from():
    sizes = {path: path.stat().st_size for path in MINI_PIPELINE.rglob("*") if path.is_file()}
    # Installing compiles the few lines of code among them.
    sizes = {path: size for path, size in sizes.items() if path.suffix != ".pyc"}
    assert sum(sizes.values()) <= 64e6
    assert {path.suffix for path in sizes} <= {".json", ".safetensors", ".py", ".md", ".png", ".jpg"}
    index = json.loads((MINI_PIPELINE / "model_index.json").read_text(encoding="utf-8"))
    assert {"autoencoder", "transformer", "layout_model", "scheduler", "image_processor"} <= index.keys()
    card = (MINI_PIPELINE / "README.md").read_text(encoding="utf-8")
    for part in ("Fluent Emoji", "MIT", "train_texture.py", "evaluate_generation.py", "KID"):
        assert part in card
    for path in sizes:
        if path.suffix == ".json":
            assert '"_name_or_path"' not in path.read_text(encoding="utf-8"), path


def test_layouts_are_partitions(pipe, drawn):
    again = calibrate_layout(drawn.layout).geometry
    assert torch.equal(again, drawn.layout)
    assert drawn.layout.shape == (8, pipe.transformer.config.num_tokens, 5)


def test_pictures_look_like_what_it_was_trained_on(drawn):
    """Things in the middle of a white ground."""
    images = drawn.images
    corners = torch.stack([images[..., y, x] for y in (4, 251) for x in (4, 251)])
    assert corners.mean() > 0.9
    middle = images[..., 64:192, 64:192]
    assert middle.std() > 0.1 and middle.mean() < 0.9


def test_a_seed_is_a_picture(pipe, drawn):
    options = {"num_inference_steps": 10, "layout_num_inference_steps": 10, "output_type": "pt"}
    alone = pipe("Animals", generator=torch.Generator().manual_seed(2), **options)
    # Sums of another batch size are rounded otherwise, ten steps carry that on.
    torch.testing.assert_close(alone.images, drawn.images[2:3], atol=5e-3, rtol=0)


def test_a_seed_is_the_same_picture_in_bfloat16(drawn):
    pipe = GPSTokenPipeline.from_pretrained(MINI_PIPELINE, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    with torch.autocast("cpu", torch.bfloat16):  # it rounds no layout either
        rough = draw(pipe)
    # Roundings of layouts would now and then give other regions.
    torch.testing.assert_close(rough.layout, drawn.layout)
    differences = (rough.images - drawn.images).pow(2).mean((1, 2, 3))
    psnr = -10 * differences.log10()
    assert psnr.min() >= 30 and psnr.median() >= 40
