"""What training draws of a generator is what the pipeline draws with it."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_zoo import tiny_layout_model, tiny_pipeline, tiny_transformer
from test_autoencoder_objective import objective_of
from test_generator_training import made_up_dataset

from gpstoken_diffusers import GPSTokens, make_sampler
from gpstoken_diffusers.training import previews
from gpstoken_diffusers.training.token_dataset import TokenDataset
from gpstoken_diffusers.visualization import picture_grid, visualize_gaussians


@pytest.fixture
def dataset(tmp_path) -> TokenDataset:
    return TokenDataset(made_up_dataset(tmp_path / "tokens"))


def pipeline_for(dataset):
    sampler, steps = make_sampler(previews.PREVIEW_SAMPLER, previews.PREVIEW_STEPS)
    models = {
        "transformer": tiny_transformer(num_classes=len(dataset.id2label)),
        "layout_model": tiny_layout_model(num_classes=len(dataset.id2label)),
    }
    pipe = tiny_pipeline(scheduler=sampler, layout_scheduler=sampler, id2label=dataset.id2label, **models)
    return pipe, {"num_inference_steps": steps}


def assert_same_picture(path, pictures):
    expected = np.asarray(picture_grid(pictures, previews.COLUMNS), dtype=int)
    # One level of 255: the batch is another one, which rounds otherwise.
    assert np.abs(np.asarray(Image.open(path), dtype=int) - expected).max() <= 1


def seeds():
    return [torch.Generator().manual_seed(column) for column in range(previews.COLUMNS)]


def test_textures_are_those_of_the_pipeline(dataset, tmp_path):
    pipe, options = pipeline_for(dataset)
    options["guidance_scale"] = previews.TEXTURE_GUIDANCE
    previews.save_texture_preview(pipe.transformer, pipe.autoencoder, dataset, tmp_path / "samples.png")
    pictures = []
    for label in sorted(dataset.id2label):
        items = [index for index in range(len(dataset)) if dataset.labels[index] == label][: previews.COLUMNS]
        layout = torch.stack([dataset[index]["initial_geometry"] for index in items])
        pictures += pipe.decode(pipe.generate_texture(layout, label, generator=seeds(), **options))
    assert_same_picture(tmp_path / "samples.png", pictures)


def test_layouts_are_those_of_the_pipeline(dataset, tmp_path):
    pipe, options = pipeline_for(dataset)
    options["guidance_scale"] = previews.LAYOUT_GUIDANCE
    region = pipe.autoencoder.config.min_region_size
    previews.save_layout_preview(pipe.layout_model, dataset, region, tmp_path / "layouts.png")
    pictures = []
    for label in sorted(dataset.id2label):
        layout = pipe.generate_layout([label] * previews.COLUMNS, generator=seeds(), **options)
        pictures += visualize_gaussians(GPSTokens.from_geometry(layout, dataset.image_size), style="ellipses")
    assert_same_picture(tmp_path / "layouts.png", pictures)


@pytest.mark.parametrize("draw", ["textures", "layouts", "validation"])
def test_pictures_of_a_run_are_whole_or_the_old_ones(dataset, tmp_path, monkeypatch, draw):
    """A full disk, a page that reloads or a kill while a picture is written meets no half of one."""
    path = tmp_path / {"textures": "samples.png", "layouts": "layouts.png", "validation": "validation.png"}[draw]
    Image.new("RGB", (3, 3)).save(path)
    old = path.read_bytes()

    def full(*names):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # all is written, and the disk says that it is not
    pipe, _ = pipeline_for(dataset)
    with pytest.raises(OSError, match="No space left"):
        if draw == "textures":
            previews.save_texture_preview(pipe.transformer, pipe.autoencoder, dataset, path)
        elif draw == "layouts":
            previews.save_layout_preview(pipe.layout_model, dataset, pipe.autoencoder.config.min_region_size, path)
        else:
            objective = objective_of(pipe.autoencoder)
            objective.args.output_dir, objective.args.mixed_precision = tmp_path, "no"
            objective.validation = [torch.zeros(1, 3, 32, 32)]
            objective.validate(pipe.autoencoder, 1)
    assert path.read_bytes() == old
    assert not list(tmp_path.glob(".*.tmp"))
