"""Guiders of diffusers in place of the built-in guidance, in every pipeline and both stages."""

from __future__ import annotations

import pytest
import torch
from diffusers import LayerSkipConfig, guiders
from model_zoo import smooth_picture
from pipeline_zoo import tiny_pipeline

from gpstoken_diffusers import GPSTokenImg2ImgPipeline, GPSTokenInpaintPipeline, GPSTokenPipeline
from gpstoken_diffusers.schedulers.guidance import guider_velocity
from gpstoken_diffusers.schedulers.presets import make_sampler

# Made anew for each run: a guider keeps what it needs of the last one.
GUIDERS = {
    "cfg": lambda: guiders.ClassifierFreeGuidance(guidance_scale=3.0),
    "late": lambda: guiders.ClassifierFreeGuidance(guidance_scale=3.0, start=0.5),
    "auto": lambda: guiders.AutoGuidance(3.0, auto_guidance_config=LayerSkipConfig([1])),
    "skip": lambda: guiders.SkipLayerGuidance(
        3.0, skip_layer_config=LayerSkipConfig([1]), skip_layer_guidance_stop=1.0
    ),
    "apg": lambda: guiders.AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5),
    "apg mix": lambda: guiders.AdaptiveProjectedMixGuidance(3.0),
    "zero star": lambda: guiders.ClassifierFreeZeroStarGuidance(3.0),
    "magnitude": lambda: guiders.MagnitudeAwareGuidance(3.0),
    "tangential": lambda: guiders.TangentialClassifierFreeGuidance(3.0),
}
# Sums in another order: conditions go through the network one by one.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def drawn(pipe, **options):
    options = {"num_inference_steps": 4, "layout_num_inference_steps": 4, "output_type": "tokens"} | options
    output = pipe(["food", 0], generator=torch.Generator().manual_seed(3), **options)
    return torch.cat([output.tokens.geometry, output.tokens.texture], -1), output.layout


def test_diffusers_own_classifier_free_guidance_is_the_built_in_one(pipe):
    own, layout = drawn(pipe, guidance_scale=3.0, layout_guidance_scale=2.0)
    guided = {"guider": GUIDERS["cfg"](), "layout_guider": guiders.ClassifierFreeGuidance(2.0)}
    tokens, where = drawn(pipe, guidance_scale=1.0, layout_guidance_scale=1.0, **guided)
    torch.testing.assert_close(where, layout)
    torch.testing.assert_close(tokens, own, **CLOSE)
    # The same ones as the pipeline's own, which go along to another pipeline.
    for holder in (GPSTokenPipeline(**pipe.components, **guided), tiny_pipeline(**guided)):
        other = GPSTokenPipeline.from_pipe(holder)
        other.set_progress_bar_config(disable=True)
        torch.testing.assert_close(drawn(other)[0], tokens, **CLOSE)


@pytest.mark.parametrize("name", GUIDERS)
def test_every_guider_guides_both_stages(pipe, name):
    plain, layout = drawn(pipe, guidance_scale=1.0, layout_guidance_scale=1.0)
    tokens, where = drawn(pipe, guider=GUIDERS[name](), layout_guidance_scale=1.0)
    assert tokens.isfinite().all() and torch.equal(where, layout) and not torch.allclose(tokens, plain, atol=1e-3)
    guided = pipe.generate_layout(1, generator=torch.Generator().manual_seed(0), guider=GUIDERS[name]())
    assert guided.isfinite().all()
    # Nothing is left in the models, and another run of the same guider is another run.
    again, _ = drawn(pipe, guidance_scale=1.0, layout_guidance_scale=1.0)
    assert torch.equal(again, plain)
    guider = GUIDERS[name]()
    assert torch.equal(drawn(pipe, guider=guider)[0], drawn(pipe, guider=guider)[0])


def test_a_sample_does_not_depend_on_its_companions(pipe):
    guider = GUIDERS["apg"]()
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = pipe([1, 0], generator=generators, num_inference_steps=3, output_type="tokens", guider=guider).tokens
    alone = pipe(0, generator=generators[1].manual_seed(2), num_inference_steps=3, output_type="tokens", guider=guider)
    torch.testing.assert_close(alone.tokens.texture[0], both.texture[1], **CLOSE)


@pytest.mark.parametrize("name", ["euler", "heun", "sde"])
def test_start_and_stop_count_evaluations(name):
    """Of 2 n evaluations under start = 0.5 the second half sees two conditions, whatever their flow times."""
    scheduler, seen = make_sampler(name)[0], []
    pipe = tiny_pipeline(scheduler=scheduler)
    pipe.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2].tolist()))
    drawn(pipe, guider=GUIDERS["late"](), num_inference_steps=4)
    null, evaluations = pipe.transformer.null_class, len(scheduler.timesteps)
    assert len(seen) == evaluations + (evaluations - evaluations // 2)
    assert seen[: evaluations // 2] == [[1, 0]] * (evaluations // 2) and seen[-1] == [null, null]


def test_autoguidance_asks_for_the_label_in_its_weak_branch(pipe):
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2].tolist()))
    drawn(pipe, guider=GUIDERS["auto"](), num_inference_steps=2)
    handle.remove()
    assert seen == [[1, 0]] * 4


def test_picture_pipelines_take_guiders(pipe):
    picture = smooth_picture(0, (32, 32))
    mask = torch.zeros(32, 32)
    mask[8:24, 8:24] = 1
    options = {"num_inference_steps": 3, "output_type": "tokens"}
    for kind, arguments in (
        (GPSTokenImg2ImgPipeline, {"image": picture}),
        (GPSTokenImg2ImgPipeline, {"image": picture, "keep": "texture", "layout_guider": GUIDERS["cfg"]()}),
        (GPSTokenInpaintPipeline, {"image": picture, "mask": mask}),
    ):
        other = kind.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        textures = [
            other(class_labels=1, generator=torch.Generator().manual_seed(0), **arguments, **options, **choice).tokens
            for choice in ({"guidance_scale": 3.0}, {"guider": GUIDERS["cfg"]()}, {"guider": GUIDERS["auto"]()})
        ]
        torch.testing.assert_close(textures[0].texture, textures[1].texture, **CLOSE)
        assert not torch.allclose(textures[0].texture, textures[2].texture, atol=1e-3)


@pytest.mark.parametrize("options, error, message", [
    ({"guider": 3.0}, TypeError, "guider must be one of diffusers.guiders, .* got float"),
    ({"layout_guider": guiders.ClassifierFreeGuidance}, TypeError, "got type"),
    ({"guider": guiders.SmoothedEnergyGuidance(seg_guidance_layers=[1])}, ValueError, "cannot guide tokens"),
])  # fmt: skip
def test_what_is_no_guider_of_tokens(pipe, options, error, message):
    with pytest.raises(error, match=message):
        drawn(pipe, **options)


def test_adaptive_samplers_refuse_guiders():
    with pytest.raises(ValueError, match="counts steps, and FlowMatchDopri5Scheduler has none"):
        drawn(tiny_pipeline(scheduler=make_sampler("official-ode")[0]), guider=GUIDERS["cfg"]())


def test_a_failed_run_leaves_no_hook(pipe):
    def fails(latents, time, labels):
        if pipe.transformer.blocks[1]._diffusers_hook.hooks:
            raise RuntimeError("halfway")
        return latents

    pipe.scheduler.set_timesteps(2)
    pipe.scheduler.set_begin_index(0)
    velocity = guider_velocity(GUIDERS["auto"](), pipe.transformer, fails, torch.tensor([0]), 3, pipe.scheduler)
    drawn(pipe, guider=GUIDERS["auto"](), num_inference_steps=2)
    with pytest.raises(RuntimeError, match="halfway"):
        velocity(torch.zeros(1, 6, 9), 0.0)
    assert not pipe.transformer.blocks[1]._diffusers_hook.hooks
