"""The stages of the pipelines called apart, on tokens instead of pictures, and what callbacks see of them."""

from __future__ import annotations

import pytest
import torch
from gpstoken_diffusers.pipelines.pipeline_gpstoken_img2img import GPSTokenImg2ImgPipeline
from gpstoken_diffusers.pipelines.pipeline_gpstoken_inpaint import GPSTokenInpaintPipeline
from pipeline_zoo import LABELS, tiny_pipeline
from test_pipeline_img2img import pictures, seeded

from gpstoken_diffusers import GPSTokens
from gpstoken_diffusers.token_editing import select_by_mask

STEPS = {"num_inference_steps": 3}


@pytest.fixture(scope="module", params=[(32, 32), (40, 70)], ids=["one tile", "2 x 3 padded tiles"])
def stages(request):
    """A pipeline, two pictures, their tokens and layouts in coordinates of the whole picture."""
    pipe = GPSTokenInpaintPipeline(**tiny_pipeline().components, id2label=LABELS)
    pipe.set_progress_bar_config(disable=True)
    images = pictures(2, *request.param)
    tokens, tiles = pipe.encode(images)
    tiles = tiles.flatten(0, 1)
    return pipe, images, tokens, tokens.with_tiles(tiles, tiles)


def assert_same(ours: GPSTokens, theirs: GPSTokens, atol: float) -> None:
    assert (ours.image_size, ours.tile_grid, ours.canvas_size) == (
        theirs.image_size,
        theirs.tile_grid,
        theirs.canvas_size,
    )
    torch.testing.assert_close(ours.as_tensor(), theirs.as_tensor(), atol=atol, rtol=0)


# Layouts of several tiles are put together and taken apart again, which rounds.
ROUNDING = 2e-5


def test_regenerating_tokens_is_image_to_image(stages):
    pipe, images, tokens, layout = stages
    pipe = GPSTokenImg2ImgPipeline.from_pipe(pipe)
    expected = pipe(images, [0, 1], strength=0.5, generator=seeded(1, 2), output_type="tokens", **STEPS).tokens
    for form in (layout, layout.geometry):
        given = pipe.regenerate_tokens(tokens, form, [0, 1], strength=0.5, generator=seeded(1, 2), **STEPS)
        assert_same(given, expected, ROUNDING)


def test_regenerating_selected_tokens_is_inpainting(stages):
    pipe, images, tokens, layout = stages
    mask = torch.zeros(images.shape[-2:])
    mask[2:11, 3:14] = 1
    expected = pipe(images, mask, 2, generator=seeded(1, 2), reach_sigmas=0.5, output_type="tokens", **STEPS).tokens
    selection = select_by_mask(tokens, mask, reach_sigmas=0.5)
    given = pipe.regenerate_tokens(tokens, layout, 2, 1.0, selection, generator=seeded(1, 2), **STEPS)
    assert_same(given, expected, ROUNDING)
    kept = (given.as_tensor() == tokens.as_tensor()).all(-1)
    assert torch.equal(kept, ~selection)


def test_textures_of_a_layout_of_several_tiles_are_those_of_its_tiles():
    pipe = GPSTokenImg2ImgPipeline(**tiny_pipeline().components, id2label=LABELS)
    pipe.set_progress_bar_config(disable=True)
    tokens, tiles = pipe.encode(pictures(1, 40, 70))
    layout = tokens.with_tiles(tiles[0], tiles[0])
    whole = pipe.generate_texture(layout, 1, generator=seeded(4), **STEPS)
    assert (whole.image_size, whole.tile_grid, whole.canvas_size) == ((40, 70), (2, 3), (64, 96))
    expected = pipe(pictures(1, 40, 70), 1, strength=1.0, generator=seeded(4), output_type="tokens", **STEPS).tokens
    # Image to image at full strength leaves nothing of the old tokens; it draws its seeds once more on the way.
    assert whole.texture.shape == expected.texture.shape
    noise = torch.randn(6, 6, 9, generator=seeded(5))
    whole = pipe.generate_texture(layout, 1, latents=noise, **STEPS)
    apart = pipe.generate_texture(tiles[0], 1, latents=noise, **STEPS)
    assert_same(whole, tokens.with_tiles(apart.geometry, apart.texture), ROUNDING)


def test_tokens_as_a_layout_are_their_gaussians():
    pipe = tiny_pipeline()
    geometry = pipe.generate_layout([0, 1], generator=seeded(1, 2), num_inference_steps=2)
    expected = pipe.generate_texture(geometry, [0, 1], generator=seeded(1, 2), **STEPS)
    given = GPSTokens(geometry, torch.rand(2, 6, 7), (32, 32))
    assert torch.equal(
        pipe.generate_texture(given, [0, 1], generator=seeded(1, 2), **STEPS).as_tensor(), expected.as_tensor()
    )


# ---------------------------------------------------------------------- previews


class Previews:
    """A callback that keeps what it is shown."""

    def __init__(self):
        self.seen: list[GPSTokens] = []

    def __call__(self, pipe, step, timestep, given):
        assert set(given) == {"tokens"}
        self.seen.append(given["tokens"])
        return {}

    @property
    def options(self):
        return {"callback_on_step_end": self, "callback_on_step_end_tensor_inputs": ["tokens"]}


def test_the_last_preview_is_the_result(stages):
    pipe, _, tokens, layout = stages
    previews = Previews()
    made = pipe.generate_texture(layout, 1, generator=seeded(1, 2), **STEPS, **previews.options)
    assert len(previews.seen) == 3
    # Euler's last step goes the whole way that is left, as the expectation does.
    assert_same(previews.seen[-1], made, 1e-5)
    distances = [(seen.texture - made.texture).abs().mean() for seen in previews.seen]
    assert distances[0] > distances[1] > distances[2]


def test_previews_show_what_is_kept(stages):
    pipe, _, tokens, layout = stages
    selection = torch.zeros(tokens.num_tokens, dtype=torch.bool)
    selection[:3] = True
    previews = Previews()
    made = pipe.regenerate_tokens(
        tokens, layout, 1, 0.7, selection, generator=seeded(1, 2), **STEPS, **previews.options
    )
    for seen in previews.seen:
        assert torch.equal(seen.as_tensor()[:, 3:], tokens.as_tensor()[:, 3:])
        assert not torch.equal(seen.as_tensor()[:, :3], tokens.as_tensor()[:, :3])
    assert_same(previews.seen[-1], made, 1e-5)


def test_solvers_that_choose_their_steps_show_where_they_are():
    from gpstoken_diffusers import FlowMatchDopri5Scheduler

    pipe = tiny_pipeline(scheduler=FlowMatchDopri5Scheduler())
    geometry = pipe.generate_layout(0, generator=seeded(1), num_inference_steps=2)
    previews = Previews()
    made = pipe.generate_texture(geometry, 0, generator=seeded(1), **previews.options)
    assert_same(previews.seen[-1], made, 1e-6)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"strength": 0.0}, "strength must be greater than 0"),
        ({"class_labels": [0, 1, 2]}, "3 class labels for 2 pictures"),
        ({"class_labels": "Foood"}, "Did you mean 'Food & Drink'"),
        ({"selection": torch.zeros(3, dtype=torch.bool)}, "selection must be boolean with the shape"),
        ({"selection": torch.ones(6)}, "selection must be boolean"),
        ({"selection": torch.zeros(6, dtype=torch.bool)}, "selection is empty"),
        ({"layout": lambda layout: layout[0]}, "differ in batch_size: 2 and 1"),
        ({"layout": lambda layout: layout.geometry[:, :5]}, "differ in num_tokens: 6 and 5"),
        ({"layout": lambda layout: layout.geometry * float("nan")}, "must be finite"),
    ],
)
def test_bad_arguments(change, message):
    pipe = GPSTokenImg2ImgPipeline(**tiny_pipeline().components, id2label=LABELS)
    tokens, tiles = pipe.encode(pictures(2))
    arguments = {"layout": GPSTokens.from_geometry(tiles.flatten(0, 1), (32, 32))}
    for name, value in change.items():
        arguments[name] = value(arguments["layout"]) if callable(value) else value
    with pytest.raises(ValueError, match=message):
        pipe.regenerate_tokens(tokens, num_inference_steps=1, **arguments)


def test_bad_layouts_of_tokens():
    pipe = tiny_pipeline()
    layout = GPSTokens.from_geometry(torch.zeros(1, 6, 5), (32, 32))
    with pytest.raises(ValueError, match="greater than 0"):
        pipe.generate_texture(layout, 1)
