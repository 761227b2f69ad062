"""The official files as a pipeline, as README shows it, with the reference's small models in their place."""

from __future__ import annotations

import pickle

import pytest
import torch
from golden_files import golden
from model_zoo import load_golden, noise_images, small_model
from pipeline_zoo import SMALL_GENERATOR

from gpstoken_diffusers import (
    GPSTokenImageProcessor,
    GPSTokenPipeline,
    GPSTokenTransformerModel,
    LayoutBank,
    make_sampler,
    partition_image,
)
from gpstoken_diffusers.models import official_checkpoints as convert


def official_pipeline(sampler) -> GPSTokenPipeline:
    scale = {name: convert.GENERATOR_PRESETS["xl"][name] for name in ("latents_mean", "latents_std")}
    pipe = GPSTokenPipeline(
        autoencoder=small_model(),
        transformer=GPSTokenTransformerModel.from_single_file(
            golden("sit_small_weights.safetensors"), config={**SMALL_GENERATOR, **scale}
        ),
        scheduler=make_sampler(sampler)[0],
        image_processor=GPSTokenImageProcessor(num_tokens=128),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("sampler, steps, tolerance", [("official-ode", 10, 1e-3), ("official-ode-euler", 9, 1e-4)])
def test_the_released_samplers_give_the_released_tokens(sampler, steps, tolerance):
    """From the same noise, through the whole pipeline; texture is in units of its standard deviation, about 3."""
    trace = load_golden("sit_small_sampling.safetensors")
    options = {"num_inference_steps": steps, "guidance_scale": 1.5, "guidance_interval": (0.2, 1.0)}
    noise = trace["z_cond"][..., 0].transpose(1, 2)
    tokens = official_pipeline(sampler).generate_texture(trace["g_init"], trace["y"][:2], latents=noise, **options)
    name = "ode_dopri5" if sampler == "official-ode" else "ode_euler"
    made = torch.cat([tokens.geometry, tokens.texture], dim=-1)
    torch.testing.assert_close(made, trace[f"{name}.tokens"], atol=3 * tolerance, rtol=0)


def test_official_files_make_a_pipeline(tmp_path):
    pipe = official_pipeline("official-sde")
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
