"""The official files as a pipeline, as README shows it, with the reference's small models in their place."""

from __future__ import annotations

import pickle

import pytest
import torch
from golden_files import golden
from model_zoo import SMALL_CONFIG, load_golden, noise_images, small_model
from pipeline_zoo import SMALL_GENERATOR, tiny_pipeline, tiny_transformer

from gpstoken_diffusers import (
    GPSTokenImageProcessor,
    GPSTokenImg2ImgPipeline,
    GPSTokenInpaintPipeline,
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


@pytest.fixture(scope="module")
def layouts():
    return partition_image(noise_images(3, 256, 256), 128).geometry


@pytest.fixture
def released(tmp_path, layouts, monkeypatch):
    """What the release consists of, small: a generator, an autoencoder, and layouts as lists of arrays by class."""
    monkeypatch.setitem(convert.GENERATOR_PRESETS, "xl", {**convert.GENERATOR_PRESETS["xl"], **SMALL_GENERATOR})
    monkeypatch.setitem(convert.PRESETS, "m128", {**SMALL_CONFIG, "num_tokens": 128})
    (tmp_path / "generator.safetensors").symlink_to(golden("sit_small_weights.safetensors"))
    (tmp_path / "gpstoken_m128.safetensors").symlink_to(golden("ae_small_weights.safetensors"))
    # Of the columns the first five count.
    content = {label: [torch.cat([layouts[label], layouts[label]], dim=-1).numpy()] for label in range(3)}
    (tmp_path / "initg.pickle").write_bytes(pickle.dumps(content))
    return tmp_path


def draw(pipe, labels=(2, 0), **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe(list(labels), generator=torch.Generator().manual_seed(0), output_type="pt", **options)


def test_official_files_make_a_pipeline(released, layouts):
    names = ("generator.safetensors", "gpstoken_m128.safetensors", "initg.pickle")
    pipe = GPSTokenPipeline.from_official(*(released / name for name in names))
    by_hand = official_pipeline("official-sde")
    bank = LayoutBank.from_official_pickle(released / "initg.pickle")
    steps = {"num_inference_steps": 3}
    expected = draw(by_hand, layout=bank, guidance_scale=1.5, guidance_interval=(0.2, 1.0), **steps)
    drawn = draw(pipe, **steps)
    assert torch.equal(drawn.layout, layouts[[2, 0]])
    assert torch.equal(drawn.tokens.texture, expected.tokens.texture)
    assert drawn.images.shape == (2, 3, 256, 256)
    drawn.tokens.validate()
    assert pipe.image_processor.num_tokens == 128
    assert torch.equal(pipe.generate_layout([1, 0]), layouts[[1, 0]])

    pipe.save_pretrained(released / "pipeline")
    again = GPSTokenPipeline.from_pretrained(released / "pipeline", dtype=torch.bfloat16)
    assert torch.equal(again.layout_bank.layouts, layouts)  # in full precision
    again = GPSTokenPipeline.from_pretrained(released / "pipeline")
    assert torch.equal(draw(again, **steps).tokens.texture, drawn.tokens.texture)
    assert GPSTokenImg2ImgPipeline.from_pipe(again).config.sampling_defaults == again.config.sampling_defaults


def test_the_settings_of_the_release_are_the_defaults(released):
    pipe = GPSTokenPipeline.from_official(
        released / "generator.safetensors", small_model(), LayoutBank(torch.full((1, 6, 5), 0.25), [1])
    )
    expected = {"num_inference_steps": 250, "guidance_scale": 1.5, "guidance_interval": (0.2, 1.0)}
    for saved in range(2):
        settings = pipe._texture_settings(None, None, None)
        assert {name: getattr(settings, name) for name in expected} == expected
        assert pipe._texture_settings(7, 2.0, None).num_inference_steps == 7
        assert type(pipe.scheduler) is type(make_sampler("official-sde")[0])
        if not saved:
            pipe.save_pretrained(released / "pipeline")
            pipe = GPSTokenPipeline.from_pretrained(released / "pipeline")
            expected["guidance_interval"] = [0.2, 1.0]
    seen = []
    pipe.set_progress_bar_config(disable=True)
    pipe(1, callback_on_step_end=lambda pipe, step, time, given: seen.append(step) or given, output_type="tokens")
    assert len(seen) == 250


def test_pipelines_of_the_same_components_have_the_same_settings():
    """By `from_pipe` and by `**components`, diffusers' two idioms; also with another transformer than at first."""
    defaults = {"num_inference_steps": 3, "guidance_interval": (0.2, 1.0)}
    names = {0: "ant", 1: "bee"}

    def settings(pipe):
        chosen = pipe._texture_settings(None, None, None)
        return chosen.num_inference_steps, chosen.guidance_scale, tuple(chosen.guidance_interval), pipe.id2label

    kinds = (GPSTokenPipeline, GPSTokenImg2ImgPipeline, GPSTokenInpaintPipeline)
    pipe = tiny_pipeline(sampling_defaults=defaults, id2label=names)
    for change in (lambda: None, lambda: setattr(pipe, "transformer", tiny_transformer(seed=5))):
        change()
        for kind in kinds:
            for again in (kind(**pipe.components), kind.from_pipe(pipe), kind.from_pipe(kind(**pipe.components))):
                assert settings(again) == (3, 3.0, (0.2, 1.0), names)
    other = GPSTokenPipeline(**pipe.components, sampling_defaults={"guidance_scale": 2.0}, id2label={})
    assert settings(other) == (20, 2.0, (0.0, 1.0), {})
    assert settings(GPSTokenPipeline(**other.components, sampling_defaults={})) == (20, 3.0, (0.0, 1.0), {})
    # Each pipeline hands on its own, although they share one transformer.
    assert settings(GPSTokenPipeline(**pipe.components)) == (3, 3.0, (0.2, 1.0), names)


def test_class_names_of_imagenet(layouts):
    """By way of known numbers of the 1,000 classes; each name leads to its class."""
    transformer = GPSTokenTransformerModel(
        texture_channels=16, num_tokens=8, hidden_size=8, num_layers=1, num_attention_heads=1
    )
    pipe = GPSTokenPipeline.from_official(transformer, small_model(), LayoutBank(layouts, [207, 360, 3]))
    assert len(pipe.id2label) == 1000
    known = {207: "golden retriever", 360: "otter", 0: "tench", 999: "toilet tissue", 517: "crane", 134: "crane bird"}
    assert pipe.label_ids(list(known.values())) == list(known)
    assert pipe.label_ids(list(pipe.id2label.values())) == list(range(1000))


def test_what_does_not_belong_to_the_release(released, layouts):
    with pytest.raises(ValueError, match="layouts of class 10"):
        GPSTokenPipeline.from_official(
            released / "generator.safetensors", small_model(), LayoutBank(layouts, [1, 2, 10])
        )
    with pytest.raises(ValueError, match="looks like a GPSToken autoencoder"):
        GPSTokenPipeline.from_official(released / "gpstoken_m128.safetensors", small_model())
    with pytest.raises(FileNotFoundError, match="initg"):
        GPSTokenPipeline.from_official(
            released / "generator.safetensors", small_model(), released / "other_initg.pickle"
        )
    with pytest.raises(ValueError, match="sampling_defaults can say .*not 'steps'"):
        tiny_pipeline(sampling_defaults={"steps": 3})
    pipe = GPSTokenPipeline.from_official(released / "generator.safetensors", small_model())
    with pytest.raises(ValueError, match="Give a layout"):
        pipe(0)
