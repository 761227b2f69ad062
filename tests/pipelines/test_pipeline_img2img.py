"""GPSTokenImg2ImgPipeline: what is kept, how much noise, and who decides about a tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpstoken_diffusers.pipelines.pipeline_gpstoken_img2img import GPSTokenImg2ImgPipeline
from model_zoo import noise_images
from PIL import Image
from pipeline_zoo import LABELS, tiny_pipeline

from gpstoken_diffusers import GPSTokens
from gpstoken_diffusers.layouts.bank import LayoutBank
from gpstoken_diffusers.schedulers.presets import make_sampler
from gpstoken_diffusers.token_matching import match_tokens

SAMPLERS = ["euler", "heun", "unipc", "dpm++", "sde", "official-sde", "official-ode"]


def img2img(**components) -> GPSTokenImg2ImgPipeline:
    pipe = GPSTokenImg2ImgPipeline(**tiny_pipeline(**components).components, id2label=LABELS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return img2img()


def pictures(count=1, height=32, width=32, seed=0) -> torch.Tensor:
    return noise_images(count, height, width, seed) / 2 + 0.5


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators[0] if len(seeds) == 1 else generators


def spied(pipe, velocity=None) -> list[tuple[float, torch.Tensor]]:
    """Puts another network in the transformer's place; what it was asked is noted as (time, latents)."""
    seen = []

    def network(layout):
        def of(noisy, time, labels):
            seen.append((time[0].item(), noisy.clone()))
            return torch.zeros_like(noisy) if velocity is None else velocity(noisy, time)

        return of

    pipe.texture_network = network
    return seen


def test_full_strength_is_the_main_pipeline_with_the_layout_of_the_picture(pipe):
    image = pictures(2)
    options = {"num_inference_steps": 4, "output_type": "pt"}
    expected = tiny_pipeline()([1, "food"], layout=image, generator=seeded(1, 2), **options)
    output = pipe(image, [1, "food"], strength=1, generator=seeded(1, 2), **options)
    assert torch.equal(output.images, expected.images) and torch.equal(output.layout, expected.layout)
    expected = tiny_pipeline()(0, generator=seeded(3), **options)
    output = pipe(image[0], 0, strength=1, keep="texture", generator=seeded(3), **options)
    assert torch.equal(output.images, expected.images) and torch.equal(output.layout, expected.layout)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_the_noise_is_that_of_the_time_at_which_the_steps_begin(sampler, strength):
    scheduler, steps = make_sampler(sampler, None if sampler == "official-ode" else 20)
    pipe = img2img(scheduler=scheduler)
    seen = spied(pipe)
    tokens, layout = pipe.encode(pictures())
    data = pipe.transformer.to_latents(layout.flatten(0, 1), *tokens.split_tiles())
    options = {"num_inference_steps": steps or 1, "guidance_scale": 1.0, "output_type": "tokens"}
    pipe(pictures(), strength=1, generator=seeded(5), **options)
    time, noisy = seen[0]
    noise = (noisy - time * data) / (1 - time)
    assert time < 2e-3 and noise.std() == pytest.approx(1, abs=0.3)
    seen.clear()
    pipe(pictures(), strength=strength, generator=seeded(5), **options)
    time, noisy = seen[0]
    assert time == pytest.approx(1 - strength, abs=0.05)
    torch.testing.assert_close(noisy, time * data + (1 - time) * noise, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "official-sde"])  # its last step leaves noise
def test_a_network_that_knows_the_picture_gives_it_back(sampler):
    scheduler, steps = make_sampler(sampler, None if sampler == "official-ode" else 10)
    pipe = img2img(scheduler=scheduler)
    tokens, layout = pipe.encode(pictures(1, 32, 64))
    data = pipe.transformer.to_latents(layout.flatten(0, 1), *tokens.split_tiles())
    spied(pipe, lambda noisy, time: (data - noisy) / (1 - time.clamp(max=0.999)).view(-1, 1, 1))
    options = {"num_inference_steps": steps or 1, "guidance_scale": 1.0, "generator": seeded(0)}
    output = pipe(pictures(1, 32, 64), strength=0.6, output_type="tokens", **options)
    torch.testing.assert_close(output.tokens.texture, tokens.texture, atol=0.02, rtol=0.01)
    torch.testing.assert_close(output.tokens.geometry, tokens.geometry, atol=0.01, rtol=0.01)
    torch.testing.assert_close(
        output.layout, GPSTokens.merge_tiles(layout[0], layout[0], (1, 2), (32, 64)).geometry, atol=0, rtol=0
    )


def test_weaker_changes_are_nearer_to_the_picture(pipe):
    image = pictures()
    tokens, _ = pipe.encode(image)
    options = {"num_inference_steps": 20, "generator": seeded(0), "output_type": "tokens"}
    error = []
    for strength in (0.05, 0.3, 1.0):
        made = pipe(image, 0, strength=strength, **options | {"generator": seeded(0)}).tokens
        error.append((made.texture - tokens.texture).square().mean().item())
    assert error[0] < error[1] / 3 and error[1] < error[2]


def test_textures_go_to_the_nearest_gaussians_of_another_layout():
    pipe = img2img()
    spied(pipe)  # with a velocity of zero, what the steps start from comes out
    image, other = pictures(seed=1), pictures(seed=2)
    tokens, layout = pipe.encode(image)
    new = pipe.prepare_layout(other)[:, [3, 0, 5, 1, 4, 2]]
    options = {"num_inference_steps": 1000, "strength": 0.001, "output_type": "tokens", "keep": "texture"}
    output = pipe(image, 0, layout=new, generator=seeded(0), **options)
    assert torch.equal(output.layout, new)
    same_size = {"image_size": (32, 32)}
    matching = match_tokens(GPSTokens(new, new, **same_size), GPSTokens(layout[0], layout[0], **same_size))
    assert sorted(matching[0].tolist()) == list(range(6)) and matching[0].tolist() != list(range(6))
    torch.testing.assert_close(output.tokens.texture, tokens.texture[:, matching[0]], atol=0.02, rtol=0.01)
    # The Gaussians keep how they differ from their layout.
    residual = pipe.transformer.to_latents(layout[0], tokens.geometry, tokens.texture)[..., :5]
    moved = pipe.transformer.to_latents(new, output.tokens.geometry, output.tokens.texture)[..., :5]
    torch.testing.assert_close(moved, residual[:, matching[0]], atol=0.02, rtol=0.01)


def test_other_layouts_of_every_kind(pipe):
    image = pictures(2)
    options = {"keep": "texture", "num_inference_steps": 2, "output_type": "pt"}
    layout = pipe.prepare_layout(pictures(2, seed=3), 9)
    given = pipe(image, [0, 1], layout=layout, generator=seeded(1, 2), **options)
    assert torch.equal(given.layout, layout) and given.tokens.num_tokens == 9
    bank = LayoutBank(layout[:, :6], torch.tensor([0, 1]), LABELS)
    assert torch.equal(pipe(image, [1, 0], layout=bank, **options).layout, layout[[1, 0], :6])
    assert torch.equal(pipe(image, 0, layout=layout[0], **options).layout, layout[[0, 0]])
    assert pipe(image, [0, 1], num_tokens=5, **options).tokens.num_tokens == 5


def test_pictures_of_several_tiles(pipe):
    image = pictures(2, 40, 70)
    output = pipe(image, 1, strength=0.5, num_inference_steps=2, generator=seeded(1, 2), output_type="pt")
    assert output.images.shape == (2, 3, 40, 70)
    assert output.tokens.tile_grid == (2, 3) and output.tokens.canvas_size == (64, 96)
    assert output.layout.shape == (2, 36, 5) and output.layout[..., 3:].abs().max() < 1
    alone = pipe(image[1], 1, strength=0.5, num_inference_steps=2, generator=seeded(2), output_type="pt")
    torch.testing.assert_close(alone.images[0], output.images[1], atol=1e-4, rtol=0)
    # Tiles have noise of their own: equal tiles become different.
    tile = pictures(seed=4)
    tokens = pipe(torch.cat([tile, tile], 3), 1, strength=1, num_inference_steps=2, generator=seeded(0)).tokens
    left, right = tokens.split_tiles()[1]
    assert (left - right).abs().max() > 0.1


def test_one_picture_and_several_labels(pipe):
    options = {"num_inference_steps": 2, "output_type": "pt", "strength": 0.5}
    three = pipe(pictures(), [0, 1, 3], generator=seeded(1, 2, 3), **options)
    alone = pipe(pictures(), 1, generator=seeded(2), **options)
    torch.testing.assert_close(three.images[1:2], alone.images, atol=1e-4, rtol=0)
    assert pipe(pictures(3), None, **options).images.shape[0] == 3


def test_output_types(pipe):
    options = {"num_inference_steps": 2, "strength": 0.5, "return_dict": False}
    shown = [pipe(pictures(), 0, generator=seeded(0), output_type=kind, **options)[0] for kind in ("pil", "np", "pt")]
    np.testing.assert_array_equal(shown[1][0], shown[2][0].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(np.asarray(shown[0][0]), (shown[1][0] * 255).round().astype(np.uint8))
    (tokens,) = pipe(shown[0][0], 0, output_type="tokens", **options)
    assert isinstance(tokens, GPSTokens) and isinstance(shown[0][0], Image.Image)


def test_callbacks_see_the_steps_that_are_left(pipe):
    seen = []

    def stop(pipeline, step, timestep, tensors):
        seen.append((step, float(timestep), tuple(tensors["latents"].shape)))
        pipeline._interrupt = step == 1
        return tensors

    options = {"num_inference_steps": 10, "strength": 0.5, "callback_on_step_end": stop}
    pipe(pictures(1, 32, 64), 0, **options)
    assert seen == [(0, pytest.approx(500), (2, 6, 9)), (1, pytest.approx(400), (2, 6, 9))]


def test_components_are_shared_and_keep_their_precision():
    main = tiny_pipeline().to(torch.bfloat16)
    pipe = GPSTokenImg2ImgPipeline.from_pipe(main)
    assert pipe.transformer is main.transformer and pipe.transformer.dtype == torch.bfloat16
    assert pipe.id2label == LABELS
    pipe.set_progress_bar_config(disable=True)
    output = pipe(pictures(), "food", num_inference_steps=2, output_type="pt")
    assert output.images.isfinite().all() and output.tokens.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0}, "strength must be greater than 0 and at most 1, got 0"),
        ({"strength": 1.01}, "at most 1, got 1.01"),
        ({"strength": float("nan")}, "strength must be"),
        ({"keep": "colour"}, 'keep must be "layout" or "texture"'),
        ({"layout": torch.full((6, 5), 0.1)}, 'set keep="texture"'),
        ({"layout": torch.full((3, 6, 5), 0.1), "keep": "texture"}, "3 layouts for 2 pictures"),
        ({"layout": torch.full((6, 5), 0.1), "keep": "texture", "num_tokens": 7}, "has 6 tokens, but num_tokens is 7"),
        ({"image": pictures(1, 33, 32), "keep": "texture"}, "up to 32 pixels a side, got 33 x 32"),
        ({"class_labels": [0, 1, 2]}, "3 class labels for 2 pictures"),
        ({"class_labels": "fool"}, "no class 'fool'"),
        ({"image": torch.full((3, 32, 32), float("nan"))}, "NaN"),
        ({"image": torch.full((3, 32, 32), 2.0)}, r"in \[0, 1\]"),
        ({"image": []}, "no image"),
        ({"output_type": "jpg"}, "output_type must be one of"),
        ({"num_inference_steps": 0}, "num_inference_steps must be"),
        ({"num_tokens": 1000}, "1000"),
        ({"generator": [torch.Generator()] * 3}, "a list of 2, one per sample, got 3"),
    ],
)
def test_bad_arguments(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"image": pictures(2), "class_labels": [0, 1], "num_inference_steps": 2} | arguments)


def test_arguments_of_another_type(pipe):
    with pytest.raises(TypeError, match="got str"):
        pipe("picture.png")


def test_without_a_layout_model():
    pipe = img2img(layout_model=None, layout_scheduler=None)
    with pytest.raises(ValueError, match="no layout model. Give a layout"):
        pipe(pictures(), keep="texture")
    assert len(pipe(pictures(), num_inference_steps=1).images) == 1
