"""The official files as a pipeline, as README shows it, with the reference's small models in their place."""

from __future__ import annotations

import pickle

import torch
from conftest import golden
from model_zoo import noise_images, small_model
from test_transformer_gpstoken import SMALL_CONFIG

from gpstoken_diffusers import (
    GPSTokenImageProcessor,
    GPSTokenPipeline,
    GPSTokenTransformerModel,
    LayoutBank,
    make_sampler,
    partition_image,
)
from gpstoken_diffusers.models import official_checkpoints as convert


def test_official_files_make_a_pipeline(tmp_path):
    scale = {name: convert.GENERATOR_PRESETS["xl"][name] for name in ("latents_mean", "latents_std")}
    pipe = GPSTokenPipeline(
        autoencoder=small_model(),
        transformer=GPSTokenTransformerModel.from_single_file(
            golden("sit_small_weights.safetensors"), config={**SMALL_CONFIG, **scale}
        ),
        scheduler=make_sampler("official-sde")[0],
        image_processor=GPSTokenImageProcessor(num_tokens=128),
    )
    pipe.set_progress_bar_config(disable=True)
    layouts = partition_image(noise_images(3, 256, 256), 128).geometry
    # What initg.pickle holds: lists of arrays by class, with columns of which the first five count.
    content = {label: [torch.cat([layouts[label], layouts[label]], dim=-1).numpy()] for label in range(3)}
    (tmp_path / "initg.pickle").write_bytes(pickle.dumps(content))
    bank = LayoutBank.from_official_pickle(tmp_path / "initg.pickle")

    def draw(pipe):
        options = {"num_inference_steps": 3, "guidance_scale": 1.5, "guidance_interval": (0.2, 1.0)}
        return pipe([2, 0], layout=bank, generator=torch.Generator().manual_seed(0), output_type="pt", **options)

    drawn = draw(pipe)
    assert torch.equal(drawn.layout, layouts[[2, 0]])
    assert drawn.images.shape == (2, 3, 256, 256)
    drawn.tokens.validate()
    pipe.save_pretrained(tmp_path / "pipeline")
    again = GPSTokenPipeline.from_pretrained(tmp_path / "pipeline")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again).tokens.texture, drawn.tokens.texture)
