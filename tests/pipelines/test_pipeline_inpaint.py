"""GPSTokenInpaintPipeline: new tokens under the mask, everything else as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from gpstoken_diffusers.pipelines.pipeline_gpstoken_inpaint import GPSTokenInpaintPipeline
from PIL import Image
from pipeline_zoo import LABELS, tiny_pipeline, tiny_transformer
from test_pipeline_img2img import SAMPLERS, pictures, seeded, spied
from token_zoo import touched_px

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor
from gpstoken_diffusers.assets import DEMO_PHOTOGRAPH, MINI
from gpstoken_diffusers.schedulers.presets import make_sampler
from gpstoken_diffusers.token_editing import select_by_mask


def inpainting(**components) -> GPSTokenInpaintPipeline:
    pipe = GPSTokenInpaintPipeline(**tiny_pipeline(**components).components, id2label=LABELS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return inpainting()


def corner(height=32, width=32, side=10) -> torch.Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:side, :side] = True
    return mask


@torch.no_grad()
def test_far_from_the_mask_nothing_changes_at_all():
    """With the shipped tokenizer, on a photograph of two tiles; the tiny transformer draws wild textures."""
    mini, processor = AutoencoderGPSToken.from_pretrained(MINI).eval(), GPSTokenImageProcessor.from_pretrained(MINI)
    transformer = tiny_transformer(texture_channels=32, num_tokens=64, latents_std=[0.1] * 5 + [2.0] * 32)
    pipe = GPSTokenInpaintPipeline(mini, transformer, FlowMatchEulerDiscreteScheduler(), processor)
    pipe.set_progress_bar_config(disable=True)
    photograph = processor.load_image(DEMO_PHOTOGRAPH).resize((384, 256), Image.LANCZOS)
    mask = torch.zeros(256, 384)
    mask[30:60, 40:70] = 1
    tokens, _ = pipe.encode(photograph)
    before = mini.decode(tokens).sample / 2 + 0.5
    output = pipe(photograph, mask, 1, num_inference_steps=3, generator=seeded(0), output_type="pt")

    chosen = select_by_mask(tokens, mask, reach_sigmas=1.5)
    assert 0 < chosen.sum() < 32
    for ours, theirs in ((output.tokens.geometry, tokens.geometry), (output.tokens.texture, tokens.texture)):
        assert torch.equal((ours == theirs).all(-1), ~chosen)
    change = (output.images - before.clamp(0, 1)).abs().amax(1)[0]
    reach = touched_px(mini, tokens, output.tokens, changed=chosen)
    assert reach.float().mean() < 0.7
    assert (change[~reach] == 0).all()
    assert change[30:60, 40:70].mean() > 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_network_sees_kept_tokens_on_their_own_way(sampler):
    """t data + (1 - t) noise with one and the same noise, at every evaluation of every solver."""
    scheduler, steps = make_sampler(sampler, None if sampler == "official-ode" else 6)
    pipe = inpainting(scheduler=scheduler)
    seen = spied(pipe, lambda noisy, time: noisy.sin() + time.view(-1, 1, 1))
    tokens, layout = pipe.encode(pictures())
    data = pipe.transformer.to_latents(layout.flatten(0, 1), *tokens.split_tiles())[0]
    kept = ~select_by_mask(tokens, corner(), reach_sigmas=1.5)[0]
    assert 0 < kept.sum() < 6
    options = {"num_inference_steps": steps or 1, "generator": seeded(5), "output_type": "tokens"}
    output = pipe(pictures(), corner(), 1, **options)
    assert len(seen) >= 5
    time, noisy = seen[0]
    noise = (noisy[0] - time * data) / (1 - time)
    for time, noisy in seen:
        assert len(noisy) == 2  # with guidance; beyond its interval, the companions of the released solver
        expected = (time * data + (1 - time) * noise)[kept]
        torch.testing.assert_close(noisy[:, kept], expected.expand(len(noisy), -1, -1), atol=1e-4, rtol=1e-4)
    assert torch.equal(output.tokens.texture[0, kept], tokens.texture[0, kept])
    assert (output.tokens.texture[0, ~kept] - tokens.texture[0, ~kept]).abs().amax(1).min() > 0.1


def test_new_tokens_depend_on_the_kept_ones(pipe):
    """The same noise and layout under the mask, and other textures around it: attention carries that over."""
    tokens, layout = pipe.encode(pictures())
    kept = ~select_by_mask(tokens, corner(), reach_sigmas=1.5)
    encode, made = pipe.encode, []
    try:
        for change in (0.0, 3.0):
            tokens.texture[kept] += change
            pipe.encode = lambda *_: (tokens, layout)
            output = pipe(pictures(), corner(), 1, num_inference_steps=4, generator=seeded(0), output_type="tokens")
            made.append(output.tokens.texture[~kept])
    finally:
        pipe.encode = encode
    assert (made[0] - made[1]).abs().max() > 1e-3


def test_everything_masked_is_the_main_pipeline():
    options = {"num_inference_steps": 4, "output_type": "pt"}
    expected = tiny_pipeline()(1, layout=pictures(), generator=seeded(1), **options)
    output = inpainting()(pictures(), torch.ones(32, 32), 1, generator=seeded(1), **options)
    assert torch.equal(output.images, expected.images) and torch.equal(output.layout, expected.layout)


def test_the_further_the_reach_the_more_is_new(pipe):
    options = {"num_inference_steps": 2, "output_type": "tokens", "num_tokens": 16}
    tokens, _ = pipe.encode(pictures(), 16)
    changed = []
    for reach in (0.5, 1.5, 3.0):
        made = pipe(pictures(), corner(side=9), 0, reach_sigmas=reach, **options).tokens
        changed.append((made.geometry != tokens.geometry).any(-1))
        assert torch.equal(changed[-1], select_by_mask(tokens, corner(side=9), reach_sigmas=reach))
    assert 0 < changed[0].sum() < changed[1].sum() < changed[2].sum() < 16


def test_a_low_strength_stays_near_the_picture(pipe):
    tokens, _ = pipe.encode(pictures())
    error = []
    for strength in (0.05, 1.0):
        options = {"strength": strength, "num_inference_steps": 20, "generator": seeded(0), "output_type": "tokens"}
        made = pipe(pictures(), corner(), 0, **options).tokens
        error.append((made.texture - tokens.texture).square().mean().item())
    assert 0 < error[0] < error[1] / 4


def test_only_tiles_under_the_mask_are_generated():
    pipe = inpainting()
    seen = spied(pipe)
    image = pictures(2, 40, 70)  # 2 x 3 tiles each
    masks = torch.zeros(2, 40, 70)
    masks[0, 4:28, 4:28] = 1  # the first tile
    masks[1, 4:28, 10:54] = 1  # across the border of the first and second
    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "tokens", "reach_sigmas": 0.3}
    output = pipe(image, masks, [0, 1], generator=seeded(1, 2), **options)
    assert {len(noisy) for _, noisy in seen} == {3}
    tokens, _ = pipe.encode(image)
    changed = (output.tokens.geometry != tokens.geometry).any(-1).unflatten(1, (6, 6)).any(-1)
    assert changed.tolist() == [[True] + [False] * 5, [True, True] + [False] * 4]
    # A picture's noise is its own, whatever is generated beside it.
    alone = pipe(image[1], masks[1], 1, generator=seeded(2), **options)
    torch.testing.assert_close(alone.tokens.texture[0], output.tokens.texture[1], atol=1e-5, rtol=1e-5)


def test_masks_of_every_kind(pipe):
    mask = corner()
    options = {"num_inference_steps": 2, "output_type": "pt"}
    expected = pipe(pictures(2), mask, 0, generator=seeded(1, 2), **options).images
    gray = Image.fromarray(mask.numpy().astype(np.uint8) * 255)
    for same in (
        mask.float(),
        mask.to(torch.uint8) * 255,
        mask[None],
        mask.expand(2, -1, -1),
        mask.numpy(),
        mask.numpy().astype(np.float64) * 0.51,
        np.stack([mask.numpy()] * 2),
        gray,
        gray.convert("RGB"),
        gray.convert("1"),
        [gray, gray],
        [mask, mask.numpy()],
    ):
        assert torch.equal(pipe(pictures(2), same, 0, generator=seeded(1, 2), **options).images, expected)


def test_masks_are_scaled_and_cropped_as_pictures_are():
    processor = GPSTokenImageProcessor(tile_size=32, num_tokens=6, shortest_edge=32, center_crop=True)
    pipe = inpainting(image_processor=processor)
    picture = pictures(1, 64, 128)
    mask = torch.zeros(64, 128)
    mask[:20, 32:52] = 1  # the upper left corner of the square in the middle
    options = {"num_inference_steps": 2, "output_type": "tokens", "reach_sigmas": 0.5}
    made = pipe(picture, mask, 0, **options).tokens
    tokens, _ = pipe.encode(picture)
    changed = (made.geometry != tokens.geometry).any(-1)
    assert torch.equal(changed, select_by_mask(tokens, corner(), reach_sigmas=0.5)) and not changed.all()


def test_one_picture_and_several_labels(pipe):
    options = {"num_inference_steps": 2, "output_type": "pt"}
    both = pipe(pictures(), corner(), ["food", 2], generator=seeded(1, 2), **options).images
    alone = pipe(pictures(), corner(), 2, generator=seeded(2), **options).images
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=0)


def test_callbacks_cannot_change_what_is_kept(pipe):
    steps = []

    def scramble(pipeline, step, timestep, tensors):
        steps.append(step)
        return {"latents": tensors["latents"] + 100}

    tokens, _ = pipe.encode(pictures())
    options = {"num_inference_steps": 3, "output_type": "tokens", "callback_on_step_end": scramble}
    made = pipe(pictures(), corner(), 0, **options).tokens
    kept = ~select_by_mask(tokens, corner(), reach_sigmas=1.5)
    assert steps == [0, 1, 2] and torch.equal(made.texture[kept], tokens.texture[kept])


def test_components_are_shared():
    main = tiny_pipeline().to(torch.bfloat16)
    pipe = GPSTokenInpaintPipeline.from_pipe(main)
    assert pipe.autoencoder is main.autoencoder and pipe.autoencoder.dtype == torch.bfloat16
    pipe.set_progress_bar_config(disable=True)
    assert pipe(pictures(), corner(), "food", num_inference_steps=2, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": corner(33)}, r"picture's size \(height, width\) \(32, 32\), got \(33, 32\)"),
        ({"mask": torch.zeros(32, 32)}, "mask 0 is empty: no pixel is above 0.5"),
        ({"mask": torch.stack([corner(), corner(side=0)])}, "mask 1 is empty"),
        ({"mask": corner().expand(3, -1, -1)}, "3 masks for 2 pictures"),
        ({"mask": torch.full((32, 32), float("nan"))}, r"in \[0, 1\] without NaN"),
        ({"mask": corner() * 255.0}, r"in \[0, 1\] without NaN"),
        ({"mask": torch.zeros(1, 1, 32, 32)}, r"\(H, W\) or \(B, H, W\), got \(1, 1, 32, 32\)"),
        ({"mask": corner(side=1), "reach_sigmas": 0.0}, "reaches no token within 0.0 sigmas: raise reach_sigmas"),
        ({"strength": 0.0}, "strength must be greater than 0"),
        ({"strength": 1.5}, "at most 1, got 1.5"),
        ({"class_labels": [0, 1, 2]}, "3 class labels for 2 pictures"),
        ({"image": torch.full((3, 32, 32), float("nan"))}, "NaN"),
        ({"output_type": "jpeg"}, "output_type must be one of"),
    ],
)
def test_bad_arguments(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"image": pictures(2), "mask": corner(), "class_labels": [0, 1], "num_inference_steps": 1} | arguments)


def test_arguments_of_another_type(pipe):
    with pytest.raises(TypeError, match="mask must be PIL images, numpy arrays or tensors, got str"):
        pipe(pictures(), "mask.png")
    with pytest.raises(TypeError, match="got NoneType"):
        pipe(pictures(), None)
