"""GPSTokenPipeline: both stages, their arguments, and what a seed means."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from model_zoo import noise_images, tiny_model
from pipeline_zoo import LABELS, tiny_layout_model, tiny_pipeline, tiny_transformer

from gpstoken_diffusers import GPSTokenInpaintPipeline, GPSTokenPipeline, GPSTokens, partition_image
from gpstoken_diffusers.layouts.bank import LayoutBank
from gpstoken_diffusers.schedulers.presets import SAMPLER_PRESETS, make_sampler


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators[0] if len(seeds) == 1 else generators


def real_layout(count=1, num_tokens=6):
    return partition_image(noise_images(count, 32, 32), num_tokens, min_region_size=8).geometry


def counted(model):
    """Makes a model count the samples that pass through it."""
    model.batches = []
    model.register_forward_pre_hook(lambda module, inputs: module.batches.append(len(inputs[0])))
    return model


def test_labels_to_pictures(pipe):
    output = pipe(["food", 0], num_inference_steps=3, generator=seeded(3))
    assert [image.size for image in output.images] == [(32, 32)] * 2
    assert output.tokens.geometry.shape == (2, 6, 5)
    output.tokens.validate()
    # The layout is a partition's: widths and heights of the regions cover the picture.
    widths, heights = (output.layout[..., axis] * 1.5 * 32 + 1 for axis in (0, 1))
    torch.testing.assert_close((widths * heights).sum(1), torch.full((2,), 1024.0))


def test_output_types(pipe):
    pictures = {}
    for kind in ("pil", "np", "pt"):
        (pictures[kind],) = pipe(1, num_inference_steps=2, generator=seeded(0), output_type=kind, return_dict=False)
    assert pictures["pt"].shape == (1, 3, 32, 32)
    np.testing.assert_array_equal(pictures["np"][0], pictures["pt"][0].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(np.asarray(pictures["pil"][0]), (pictures["np"][0] * 255).round().astype(np.uint8))
    (tokens,) = pipe(1, num_inference_steps=2, generator=seeded(0), output_type="tokens", return_dict=False)
    assert isinstance(tokens, GPSTokens)
    torch.testing.assert_close(pipe.decode(tokens, "pt"), pictures["pt"], atol=0, rtol=0)
    assert pipe(1, num_inference_steps=1, output_type="tokens").images is None
    # diffusers' name for what is not decoded.
    latent = pipe(1, num_inference_steps=2, generator=seeded(0), output_type="latent")
    assert torch.equal(latent.images.texture, tokens.texture) and latent.images is latent.tokens


# ---------------------------------------------------------------------- what users of diffusers expect


@pytest.mark.parametrize(
    "labels", [np.array([1, 2]), np.array(["food", "tench"]), [np.int64(1), 2], torch.tensor([1, 2])]
)
def test_labels_may_be_arrays(pipe, labels):
    assert pipe.label_ids(labels) == [1, 2]
    assert pipe.label_ids(labels[0]) == [1]


def test_the_processor_takes_return_tensors(pipe):
    picture = noise_images(1, 32, 32)[0].add(1).div(2).clamp(0, 1)
    features = pipe.image_processor(picture, return_tensors="pt")
    assert torch.equal(features["geometry"], pipe.image_processor(picture)["geometry"])
    with pytest.raises(ValueError, match="return_tensors must be \"pt\", got 'np'"):
        pipe.image_processor(picture, return_tensors="np")


@pytest.mark.parametrize("sampler, steps, expected", [("euler", 3, 3), ("heun", 3, 5), ("official-sde-heun", 3, 5)])
def test_num_timesteps_is_known_from_the_first_step_on(sampler, steps, expected):
    pipe, seen = tiny_pipeline(scheduler=make_sampler(sampler)[0]), []

    def callback(pipe, number, timestep, given):
        seen.append(pipe.num_timesteps)
        return {}

    pipe(0, layout=real_layout(), num_inference_steps=steps, callback_on_step_end=callback, output_type="tokens")
    assert seen == [expected] * expected
    pipe.scheduler = make_sampler("official-ode")[0]
    seen.clear()
    pipe(0, layout=real_layout(), num_inference_steps=steps, callback_on_step_end=callback, output_type="tokens")
    assert seen == list(range(1, pipe.num_timesteps + 1))


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), IPNDMScheduler(), UniPCMultistepScheduler()])
def test_schedulers_of_another_diffusion_are_refused(scheduler):
    with pytest.raises(ValueError, match=f"{type(scheduler).__name__} .*predict the velocity of a flow"):
        tiny_pipeline(scheduler=scheduler)(0, layout=real_layout(), num_inference_steps=2)


def test_a_pipeline_of_the_same_components_knows_the_classes(pipe):
    for again in (GPSTokenPipeline(**pipe.components), GPSTokenInpaintPipeline(**pipe.components)):
        assert again.id2label == pipe.id2label == LABELS
        assert again.label_ids("food") == [1]
    assert GPSTokenPipeline(**tiny_pipeline(id2label=None).components).id2label == {}


@pytest.mark.parametrize("parts, message", [
    ({"transformer": tiny_transformer(texture_channels=5, latents_std=None)}, "5 texture channels, the autoencoder"),
    ({"layout_model": tiny_layout_model(num_classes=2)}, "knows 3 classes, the layout model 2"),
    ({"id2label": {3: "nothing in particular"}}, "from 0 to 2, those of the transformer, got 3"),
    ({"id2label": {-1: "before all"}}, "from 0 to 2, those of the transformer, got -1"),
])  # fmt: skip
def test_parts_that_do_not_belong_together(parts, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(**parts)
    pipe = tiny_pipeline()
    for name, part in parts.items():
        if name != "id2label":
            setattr(pipe, name, part)  # one after the other, so that the next run can tell only
            with pytest.raises(ValueError, match=message):
                pipe(0, num_inference_steps=1)


# ---------------------------------------------------------------------- seeds


@pytest.mark.parametrize("sampler", SAMPLER_PRESETS)
def test_a_picture_depends_on_its_own_seed_alone(sampler):
    steps = None if sampler == "official-ode" else 4
    scheduler, steps = make_sampler(sampler, steps)
    pipe = tiny_pipeline(scheduler=scheduler)
    options = {"num_inference_steps": steps or 1, "output_type": "pt", "layout_num_inference_steps": 3}
    together = pipe([0, 1, 2], generator=seeded(5, 6, 7), **options)
    swapped = pipe([2, 0], generator=seeded(7, 5), **options)
    alone = pipe(1, generator=seeded(6), **options)
    # Sums of another batch size are rounded otherwise; an adaptive solver also chooses its steps by the whole batch.
    tolerance = 5e-2 if sampler == "official-ode" else 1e-4
    torch.testing.assert_close(together.layout[1:2], alone.layout, atol=0, rtol=0)
    torch.testing.assert_close(together.images[1:2], alone.images, atol=tolerance, rtol=0)
    torch.testing.assert_close(together.images[[2, 0]], swapped.images, atol=tolerance, rtol=0)
    again = pipe([0, 1, 2], generator=seeded(5, 6, 7), **options)
    torch.testing.assert_close(together.images, again.images, atol=0, rtol=0)
    assert (together.images[0] - together.images[1]).abs().max() > 1e-2


def test_one_generator_serves_a_batch(pipe):
    options = {"num_inference_steps": 2, "output_type": "pt"}
    three = pipe(0, num_images_per_label=3, generator=seeded(9), **options).images
    one = pipe(0, generator=seeded(9), **options).images
    torch.testing.assert_close(three[:1], one, atol=1e-4, rtol=0)
    assert (three[0] - three[1]).abs().max() > 1e-2


def test_stages_apart_are_the_whole(pipe):
    whole = pipe([0, 2], num_inference_steps=3, generator=seeded(1, 2), output_type="pt")
    again = pipe([0, 2], num_inference_steps=3, generator=seeded(1, 2), output_type="pt", layout=whole.layout)
    torch.testing.assert_close(whole.images, again.images, atol=0, rtol=0)
    layout = pipe.generate_layout([0, 2], generator=seeded(1, 2))
    tokens = pipe.generate_texture(layout, [0, 2], num_inference_steps=3, generator=seeded(3, 4))
    assert pipe.decode(tokens, "np").shape == (2, 32, 32, 3)


def test_guidance_costs_nothing_where_it_is_off():
    pipe = tiny_pipeline(transformer=counted(tiny_transformer()))
    options = {"num_inference_steps": 10, "layout": real_layout(2), "generator": seeded(0, 1), "output_type": "pt"}
    batches = pipe.transformer.batches

    def run(**settings):
        batches.clear()
        return pipe([0, 1], **options, **settings).images

    guided = run(guidance_scale=2.0)
    assert batches == [4] * 10
    plain = run(guidance_scale=1.0)
    assert batches == [2] * 10
    assert (guided - plain).abs().max() > 1e-3
    # Ten Euler steps begin at 0, 0.1, ... 0.9; both ends of the interval count.
    run(guidance_scale=2.0, guidance_interval=(0.35, 0.75))
    assert batches == [2] * 4 + [4] * 4 + [2] * 2
    batches.clear()
    pipe(None, **options | {"generator": seeded(0)}, guidance_scale=2.0)
    assert set(batches) == {2}


def test_guidance_is_the_formula():
    pipe = tiny_pipeline()
    layout, noise = real_layout(1), torch.randn(1, 6, 9, generator=seeded(0))
    options = {"num_inference_steps": 1, "latents": noise, "layout": layout, "output_type": "tokens"}
    label, null = torch.tensor([1]), torch.tensor([3])
    with torch.no_grad():
        network = pipe.texture_network(layout)
        zero = torch.zeros(1)
        conditional, unconditional = network(noise, zero, label), network(noise, zero, null)
    # One Euler step goes all the way: data = noise + velocity.
    data = noise + unconditional + 3 * (conditional - unconditional)
    geometry, texture = pipe.transformer.from_latents(layout, data)
    tokens = pipe(1, guidance_scale=3.0, **options).tokens
    torch.testing.assert_close(tokens.texture, texture, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokens.geometry, geometry, atol=1e-5, rtol=1e-4)


def test_layouts_of_every_kind(pipe):
    options = {"num_inference_steps": 2, "output_type": "pt"}
    layout = real_layout(2)
    from_tensor = pipe([0, 1], layout=layout, generator=seeded(1, 2), **options)
    torch.testing.assert_close(from_tensor.layout, layout, atol=0, rtol=0)
    tokens = GPSTokens(layout, torch.zeros(2, 6, 4), (32, 32))
    assert torch.equal(pipe([0, 1], layout=tokens, generator=seeded(1, 2), **options).images, from_tensor.images)
    picture = noise_images(1, 32, 32)[0] / 2 + 0.5
    from_picture = pipe(0, layout=picture, **options).layout
    torch.testing.assert_close(from_picture, partition_image(picture[None] * 2 - 1, 6).geometry)
    assert pipe([0, 1, 2], layout=layout[0], **options).images.shape[0] == 3
    assert pipe(0, layout=layout, **options).images.shape[0] == 2
    bank = LayoutBank(layout, torch.tensor([0, 1]), LABELS)
    drawn = pipe([1] * 5, layout=bank, generator=seeded(0), **options).layout
    assert torch.equal(drawn, layout[1:].expand(5, -1, -1))
    anything = pipe([3] * 8, layout=bank, generator=seeded(0), **options).layout
    assert {tuple(one.flatten().tolist()) for one in anything} == {tuple(one.flatten().tolist()) for one in layout}
    with pytest.raises(ValueError, match="no layout of class 2"):
        pipe(2, layout=bank)


def test_another_number_of_tokens_works(pipe):
    assert pipe(0, num_tokens=9, num_inference_steps=1).tokens.num_tokens == 9
    assert pipe(0, layout=real_layout(1, 11), num_inference_steps=1).tokens.num_tokens == 11


def test_labels_by_number_and_name(pipe):
    assert pipe.label_ids("Food & Drink") == pipe.label_ids("FOOD") == pipe.label_ids(1) == [1]
    assert pipe.label_ids(["tench", 0, "tinca tinca"]) == [2, 0, 2]
    assert pipe.label_ids(None) == [3]
    assert pipe.label_ids(torch.tensor([2, 1])) == [2, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_labels": "Foot"}, "There is no class 'Foot'. Did you mean 'Food & Drink'"),
        ({"class_labels": 4}, "from 0 to 2"),
        ({"class_labels": -1}, "from 0 to 2"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1"),
        ({"layout_num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1"),
        ({"guidance_interval": (0.8, 0.2)}, "first <= last"),
        ({"guidance_interval": (0.2, 1.2)}, "first <= last"),
        ({"guidance_scale": -1.0}, "guidance_scale must be at least 0"),
        ({"num_tokens": 0}, "num_tokens must be at least 1"),
        ({"num_tokens": 17}, "16"),
        ({"num_images_per_label": 0}, "at least 1"),
        ({"output_type": "jpg"}, "pil, np, pt, tokens"),
        ({"generator": [torch.Generator()]}, "a list of 2, one per sample, got 1"),
        ({"latents": torch.zeros(2, 6, 21)}, r"must have the shape \(2, 6, 9\), got \(2, 6, 21\)"),
        ({"layout": torch.zeros(2, 6, 4)}, r"\(2, 6, 4\)"),
        ({"layout": torch.zeros(3, 6, 5) + 0.1}, "2 class labels for 3 pictures"),
        ({"layout": torch.full((2, 6, 5), float("nan"))}, "finite"),
        ({"layout": torch.zeros(2, 6, 5)}, "greater than 0"),
        ({"layout": torch.zeros(2, 0, 5)}, "shape"),
        ({"layout": real_layout(2), "num_tokens": 7}, "has 6 tokens, but num_tokens is 7"),
        ({"layout": torch.rand(3, 64, 32)}, "32 x 32 pixels, got 64 x 32"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "latents, tokens, got noise"),
    ],
)
def test_bad_arguments(pipe, arguments, message):
    arguments = {"class_labels": [0, 1], "num_inference_steps": 1, "layout_num_inference_steps": 1} | arguments
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize("arguments", [{"class_labels": 1.5}, {"class_labels": [True]}, {"generator": 7}])
def test_arguments_of_another_type(pipe, arguments):
    with pytest.raises(TypeError):
        pipe(**{"class_labels": 0} | arguments)


def test_without_a_layout_model():
    pipe = tiny_pipeline(layout_model=None, layout_scheduler=None)
    with pytest.raises(ValueError, match="no layout model. Give a layout"):
        pipe(0)
    assert len(pipe(0, layout=real_layout(), num_inference_steps=1).images) == 1


def test_components_that_do_not_belong_together():
    with pytest.raises(ValueError, match="draws 4 texture channels, the autoencoder decodes 8"):
        tiny_pipeline(autoencoder=tiny_model("lattice", texture_channels=8))


def test_callbacks_see_and_change_the_latents(pipe):
    seen = []

    def stop_early(pipeline, step, timestep, tensors):
        seen.append((step, float(timestep)))
        pipeline._interrupt = step == 2
        return {"latents": tensors["latents"] * 0}

    output = pipe(0, num_inference_steps=5, callback_on_step_end=stop_early, generator=seeded(0))
    assert [step for step, _ in seen] == [0, 1, 2]
    assert [timestep for _, timestep in seen] == pytest.approx([1000, 800, 600], abs=1e-3)
    assert len(output.images) == 1
    # The next call starts afresh.
    seen.clear()
    pipe(0, num_inference_steps=2, callback_on_step_end=lambda p, s, t, k: seen.append((s, t)) or k)
    assert len(seen) == 2


def test_an_exception_in_a_step_leaves_the_pipeline_usable(pipe):
    def fail(pipeline, step, timestep, tensors):
        raise KeyboardInterrupt

    before = pipe(0, num_inference_steps=2, generator=seeded(4), output_type="pt").images
    with pytest.raises(KeyboardInterrupt):
        pipe(0, num_inference_steps=2, callback_on_step_end=fail)
    after = pipe(0, num_inference_steps=2, generator=seeded(4), output_type="pt").images
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    "make",
    [
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
        lambda: UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        lambda: make_sampler("official-ode")[0],
    ],
)
def test_schedulers_agree_on_where_the_flow_leads(make):
    """With a network whose velocity is the same everywhere, every solver of the flow is exact."""
    model = tiny_transformer()
    with torch.no_grad():
        model.head.proj.weight.zero_()
        model.head.modulation.weight.zero_()
        model.head.proj.bias.copy_(torch.linspace(-1, 1, 9))
    pipe = tiny_pipeline(transformer=model, scheduler=make())
    noise = torch.randn(1, 6, 9, generator=seeded(0))
    layout = real_layout()
    tokens = pipe(0, layout=layout, latents=noise, num_inference_steps=5, guidance_scale=1.0).tokens
    _, texture = pipe.transformer.from_latents(layout, noise + torch.linspace(-1, 1, 9))
    torch.testing.assert_close(tokens.texture, texture, atol=2e-4, rtol=1e-4)


def test_half_precision(pipe):
    layout_model, transformer = tiny_layout_model(), tiny_transformer()
    half = tiny_pipeline(layout_model=layout_model, transformer=transformer).to(torch.bfloat16)
    options = {"layout": real_layout(), "generator": seeded(3), "num_inference_steps": 4, "output_type": "pt"}
    exact = pipe(0, **options | {"generator": seeded(3)}).images
    rough = half(0, **options).images
    assert rough.dtype == torch.float32
    # bfloat16 keeps 8 bits; the tiny random decoder amplifies that to some hundredths of the range.
    assert (exact - rough).abs().mean() < 0.05


def test_numbers_of_numpy_are_numbers(pipe):
    """`for steps in np.arange(...)` gives them, and saved JSON takes Python's own alone."""
    asked = {"num_inference_steps": 2, "layout_num_inference_steps": 2, "num_tokens": 5, "num_images_per_label": 2}
    plain, other = (
        pipe(
            1,
            **{name: kind(number) for name, number in asked.items()},
            guidance_scale=kind(2),
            generator=seeded(0, 1),
            output_type="tokens",
        ).tokens
        for kind in (int, np.int64)
    )
    assert torch.equal(plain.texture, other.texture)
    sized = GPSTokens(plain.geometry, plain.texture, tuple(np.array(plain.image_size)), (np.int64(1), np.int64(1)))
    assert json.loads(json.dumps(sized.image_size)) == [32, 32] and len(sized[np.int64(1)]) == 1
    assert LayoutBank(plain.geometry, [0, 1], {np.int64(1): "bee"}).id2label == {1: "bee"}


@pytest.mark.parametrize("name", ["num_tokens", "num_images_per_label"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True, float("nan")])
def test_numbers_that_are_no_count(pipe, name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1 and an integer, got"):
        pipe(1, **{name: value}, num_inference_steps=1)
