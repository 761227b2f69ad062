"""Editing tokens of a photograph: which pixels of the shipped model's picture change, and how."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from token_zoo import every, touched_px

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor, GPSTokens
from gpstoken_diffusers.assets import DEMO_PHOTOGRAPH, MINI
from gpstoken_diffusers.token_editing import delete_tokens, move_tokens, scale_tokens, select_by_box


@pytest.fixture(scope="module")
def mini():
    return AutoencoderGPSToken.from_pretrained(MINI).eval()


@pytest.fixture(scope="module")
def bird(mini) -> tuple[GPSTokens, torch.Tensor]:
    """A tile of the demo photograph: tokens and picture."""
    processor = GPSTokenImageProcessor.from_pretrained(MINI)
    photograph = processor.load_image(DEMO_PHOTOGRAPH).crop((128, 0, 640, 512)).resize((256, 256), Image.LANCZOS)
    with torch.no_grad():
        tokens = mini.encode(**processor(photograph, num_tokens=128)).tokens
        return tokens, mini.decode(tokens).sample


UPPER_LEFT = (40, 40, 90, 100)


@torch.no_grad()
def test_distant_pixels_stay_and_a_hole_is_where_tokens_were_deleted(mini, bird):
    tokens, picture = bird
    selection = select_by_box(tokens, UPPER_LEFT)
    deleted = delete_tokens(tokens, selection)
    change = (mini.decode(deleted).sample - picture).abs().amax(1)[0]
    reach = touched_px(mini, tokens, changed=selection)
    assert reach.float().mean() < 0.8
    assert (change[~reach] == 0).all()
    x0, y0, x1, y1 = UPPER_LEFT
    inside = change[y0:y1, x0:x1].mean()
    elsewhere = torch.ones(256, 256, dtype=torch.bool)
    elsewhere[y0 - 20 : y1 + 20, x0 - 20 : x1 + 20] = False
    assert inside > 0.2 and change[elsewhere].mean() < inside / 20


@torch.no_grad()
def test_moving_by_whole_map_pixels_moves_the_pixels(mini, bird):
    tokens, picture = bird
    moved = mini.decode(move_tokens(tokens, every(tokens), 16, 8)).sample
    # Away from the border, where the decoder saw other neighbours.
    torch.testing.assert_close(moved[..., 96:200, 96:200], picture[..., 88:192, 80:184], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_scaling_enlarges_the_picture(mini, bird):
    """Enlarged tokens show the enlarged picture, far better than the picture that was there before."""
    tokens, picture = bird
    scaled = mini.decode(scale_tokens(tokens, every(tokens), 1.25, about_px=(127.5, 127.5))).sample
    window = picture[..., 26:230, 26:230]  # 204 = 256 / 1.25 pixels
    expected = torch.nn.functional.interpolate(window, size=(256, 256), mode="bilinear")
    error = (scaled - expected)[..., 16:-16, 16:-16].square().mean()
    assert error < (picture - expected)[..., 16:-16, 16:-16].square().mean() / 4
    assert error < 0.02
