"""Decoding at another size than the picture's own: sizes, places, windows, precision, and what it is worth."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from model_zoo import noise_images, tiny_model
from torch import Tensor

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor, GPSTokens
from gpstoken_diffusers.assets import DEMO_PHOTOGRAPH, MINI
from gpstoken_diffusers.evaluation.metrics import psnr
from gpstoken_diffusers.models import work_plan as memory
from gpstoken_diffusers.models.canvas import cut_picture
from gpstoken_diffusers.models.lattice_painter import BACKGROUND_WEIGHT
from gpstoken_diffusers.models.windows import map_geometry

KINDS = (("map", "tile"), ("map", "merge"), ("lattice", "merge"), ("patch", "merge"))


def tiny_tokens(model: AutoencoderGPSToken, height: int, width: int, batch_size: int = 1) -> GPSTokens:
    with torch.no_grad():
        return model.encode(noise_images(batch_size, height, width)).tokens


@pytest.mark.parametrize("kind, mode", KINDS)
@pytest.mark.parametrize("image", [(32, 32), (64, 96), (40, 70)])
@torch.no_grad()
def test_the_own_size_is_bit_for_bit_the_plain_decode(kind, mode, image):
    model = tiny_model(kind)
    tokens = tiny_tokens(model, *image)
    assert torch.equal(model.decode(tokens, mode=mode, size=image).sample, model.decode(tokens, mode=mode).sample)


@pytest.mark.parametrize("kind, mode", KINDS)
@pytest.mark.parametrize(
    "image, size",
    [
        ((32, 32), (64, 64)),
        ((32, 32), (16, 16)),
        ((32, 32), (48, 20)),
        ((32, 32), (17, 17)),
        ((32, 32), (1, 1)),  # a map of one pixel
        ((32, 32), (1, 100)),
        ((64, 64), (67, 131)),  # no multiples of what the decoder enlarges by
        ((40, 70), (80, 140)),  # padded
        ((40, 70), (17, 23)),
        ((40, 70), (41, 71)),
    ],
)
@torch.no_grad()
def test_any_size(kind, mode, image, size):
    model = tiny_model(kind)
    tokens = tiny_tokens(model, *image, batch_size=2)
    sample = model.decode(tokens, mode=mode, size=list(size)).sample
    assert sample.shape == (2, 3, *size)
    assert sample.isfinite().all()
    # Batched matrix products may sum in another order: rounding only.
    alone = model.decode(tokens[1], mode=mode, size=size).sample
    torch.testing.assert_close(sample[1:], alone, rtol=1e-4, atol=1e-4)


def spots(canvas: tuple[int, int], places: list[tuple[float, float]], sigma_px: float) -> Tensor:
    """(1, N, 5) round Gaussians at pixel places (x, y) of a canvas (height, width)."""
    height, width = canvas
    rows = [(2 * sigma_px / (width - 1), 2 * sigma_px / (height - 1), 0.0, 2 * x / (width - 1) - 1,
             2 * y / (height - 1) - 1) for x, y in places]  # fmt: skip
    return torch.tensor([rows])


def centroid(plane: Tensor) -> tuple[float, float]:
    """(x, y) of a bright spot in (H, W), as shares of the width and height: pixel centres lie at (i + 1/2) / n."""
    height, width = plane.shape
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return float((plane * x).sum() / plane.sum()), float((plane * y).sum() / plane.sum())


@pytest.mark.parametrize("scale", [(2, 2), (1.5, 3), (0.75, 1)])
@pytest.mark.parametrize("place", [(5.0, 7.0), (40.0, 20.0)])
@torch.no_grad()
def test_gaussians_keep_their_places_and_extents(scale, place):
    """On the map of a "map" decoder; the lattice decoder carries its coordinates over by the same function."""
    model = tiny_model("map")
    # A tile's map has 16 map pixels to 32; two rows and two columns.
    tokens = GPSTokens(spots((64, 64), [place] * 4, 2.0), torch.ones(1, 4, 4), (64, 64), (2, 2))
    tile_size = tuple(round(16 * ratio) for ratio in scale)
    own, scaled = (
        model.decoder.paint(tokens.geometry, tokens.texture, tokens.tile_grid, size)[0, 0] for size in (None, tile_size)
    )
    assert scaled.shape == (2 * tile_size[0], 2 * tile_size[1])
    # 2e-3: a fifteenth of a map pixel (1 / 32 of the side); the support's box cuts the spots a little unevenly.
    torch.testing.assert_close(centroid(scaled), centroid(own), rtol=0, atol=2e-3)
    # A spot's sum grows with its area in map pixels; 5%: it is sampled at 1 map pixel of sigma, cut off at 3.
    assert float(scaled.sum()) == pytest.approx(float(own.sum()) * scale[0] * scale[1], rel=0.05)


@torch.no_grad()
def test_a_lattice_keeps_its_place():
    """What a token paints off the middle, at the own size and on a map of twice the pixels."""
    decoder = tiny_model("lattice").decoder
    geometry = spots((32, 32), [(9.0, 22.0)], 2.0)
    own, double = (
        decoder.paint(geometry, torch.ones(1, 1, 4), size, (32, 32))[0, -1].exp() - BACKGROUND_WEIGHT
        for size in ((8, 8), (16, 16))
    )
    # Coordinates of the larger picture in place of the canvas's own would move it by 0.003 and more.
    torch.testing.assert_close(centroid(double), centroid(own), rtol=0, atol=1e-3)


def test_a_map_of_one_pixel_lies_at_zero():
    """The splat has the only sample of an axis at 0, so the middle of the picture has to go there."""
    geometry = torch.tensor([[0.1, 0.1, 0.0, 0.0, 0.0], [0.1, 0.1, 0.0, 1.0, -1.0]])
    moved = map_geometry(geometry, (32, 32), (1, 1))
    torch.testing.assert_close(moved[0, 3:], torch.zeros(2))
    # The last pixel's centre is 31/32 of half the picture from its middle; a map pixel is 2 wide.
    torch.testing.assert_close(moved[1, 3:], torch.tensor([31 / 32, -31 / 32]))


@torch.no_grad()
def test_the_canvas_is_cut_and_resampled_in_place():
    """A ramp is resampled to a ramp: each pixel's value says where it lies, for padded pictures too."""
    height, width = 24, 40  # of a canvas as decoded, standing for 32 x 64 px, of which 20 x 50 are the picture
    ramp = (torch.arange(width) + 0.5).expand(1, 1, height, width) / width * 64
    scale = Fraction(31, 20), Fraction(33, 50)
    sample = cut_picture(ramp, (32, 64), scale, (31, 33))
    assert sample.shape == (1, 1, 31, 33)
    expected = (torch.arange(33) + 0.5) / 33 * 50
    # Bicubic interpolation is exact on a ramp away from the left edge, which it repeats; float32 rounding.
    torch.testing.assert_close(sample[0, 0, 10, 3:], expected[3:], rtol=1e-4, atol=1e-4)
    # Nothing to resample: the very numbers.
    doubled = cut_picture(ramp, (12, 20), (Fraction(2), Fraction(2)), (24, 39))
    assert torch.equal(doubled, ramp[..., :39])


@torch.no_grad()
def test_only_what_shows_is_resampled():
    """The rest of a canvas makes no difference, and is not touched: 1 px of 64 x 64 at 3000 px would be 37 GB."""
    canvas = torch.randn(1, 3, 60, 64, generator=torch.Generator().manual_seed(0))
    for size, scale in (((33, 50), (Fraction(33, 20), Fraction(50, 31))), ((9, 8), (Fraction(9, 20), Fraction(8, 31)))):
        factors = [float(64 * ratio / side) * (1 + 1e-12) for ratio, side in zip(scale, (60, 64), strict=True)]
        whole = F.interpolate(canvas, scale_factor=factors, mode="bicubic", antialias=True)
        expected = whole[..., : size[0], : size[1]]
        # Rounding of float32 alone.
        torch.testing.assert_close(cut_picture(canvas, (64, 64), scale, size), expected, rtol=0, atol=1e-5)
    enlarged = cut_picture(canvas, (64, 64), (Fraction(3000), Fraction(3000)), (3000, 3000))
    assert enlarged.shape == (1, 3, 3000, 3000)


@pytest.mark.parametrize("kind, mode", KINDS)
@torch.no_grad()
def test_what_is_drawn_goes_with_the_pixels_of_the_result(kind, mode, monkeypatch):
    """Of a small picture most of the canvas is padding."""
    model = tiny_model(kind)
    drawn, draw = [], type(model.decoder).draw

    def recording(self, *args):
        canvas = draw(self, *args)
        drawn.append(canvas.shape[-2] * canvas.shape[-1])
        return canvas

    monkeypatch.setattr(type(model.decoder), "draw", recording)
    for image, size in (((6, 6), (100, 100)), ((1, 1), (90, 70)), ((1, 30), (10, 300)), ((33, 40), (60, 90))):
        sample = model.decode(tiny_tokens(model, *image), mode=mode, size=size).sample
        assert sample.shape == (1, 3, *size) and sample.isfinite().all()
        # At most three times the picture's pixels, rounded to map pixels, or as much as at its own size.
        assert drawn[-1] <= 1.2 * max(3 * size[0] * size[1], 64 * 64), (image, size)


@pytest.mark.parametrize("kind, mode", KINDS)
@torch.no_grad()
def test_padding_stays_outside(kind, mode):
    """The picture of padded tokens is the scaled canvas's corner, where both are whole pixels."""
    model = tiny_model(kind)
    tokens = tiny_tokens(model, 40, 48)
    whole = GPSTokens(tokens.geometry, tokens.texture, (64, 64), (2, 2))
    sample = model.decode(tokens, mode=mode, size=(60, 72)).sample
    assert torch.equal(sample, model.decode(whole, mode=mode, size=(96, 96)).sample[..., :60, :72])


@pytest.mark.parametrize("size", [(150, 100), (200, 260)])
@torch.no_grad()
def test_local_windows_are_exact_at_any_size(monkeypatch, size):
    """Windows are by pixels of the scaled map: an image of one tile has several where it is drawn large."""
    model = tiny_model("lattice")
    tokens = tiny_tokens(model, 32, 30, batch_size=2)
    windows = []
    render = model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda given: windows.append(given.shape[-2:]) or render(given))
    sample = model.decode(tokens, size=size).sample
    assert len(windows) > 1
    # Two tiles of 8 map pixels and what the convolutions look at on both sides.
    assert max(max(window) for window in windows) <= 16 + 2 * model.decoder.receptive_px
    monkeypatch.setattr(memory, "TILES_AT_ONCE", 10**6)
    windows.clear()
    whole = model.decode(tokens, size=size).sample
    assert len(windows) == 1
    # Convolutions of other sizes may sum in another order.
    torch.testing.assert_close(sample, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_merged_windows_at_another_size(monkeypatch):
    """Twice the size halves the window's side in tiles, so that it holds as many map pixels."""
    model = tiny_model("map", decode_mode="merge")
    tokens = tiny_tokens(model, 32 * 7, 64)
    windows = []
    forward = model.decoder.forward

    def recorded(x: Tensor, grid: tuple[int, int]) -> Tensor:
        windows.append((tuple(x.shape[-2:]), grid))
        return forward(x, grid)

    monkeypatch.setattr(model.decoder, "forward", recorded)
    sample = model.decode(tokens, size=(448, 128)).sample
    assert sample.shape == (1, 3, 448, 128)
    assert len(windows) == 4
    assert all(grid[0] <= 2 + 2 for _, grid in windows)  # with one tile around it
    windows.clear()
    monkeypatch.setattr(memory, "MERGED_WINDOW_TILES", 100)
    whole = model.decode(tokens, size=(448, 128)).sample
    assert windows == [((224, 64), (7, 2))]
    # The last normalisation is over a window of this rough noise instead of the picture, which scales its contrast (27%
    # of the deviation, measured); what it shows stays: windows correlate by 0.77 and more, windows
    # that are moved by 0.48 at most.
    for window in range(4):
        rows = slice(128 * window, min(128 * (window + 1), 448))
        pair = torch.stack([sample[..., rows, :].flatten(), whole[..., rows, :].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.6


@torch.no_grad()
def test_tiles_of_a_large_size_go_a_few_at_a_time(monkeypatch):
    model = tiny_model("map", decode_mode="tile")
    tokens = tiny_tokens(model, 64, 64)
    batches = []
    forward = model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda x: batches.append(len(x)) or forward(x))
    for size in ((64, 64), (128, 64), (128, 128), (256, 256)):
        model.decode(tokens, size=size)
    assert batches == [4, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("kind, mode", KINDS)
@torch.no_grad()
def test_half_precision(kind, mode):
    model = tiny_model(kind)
    tokens = tiny_tokens(model, 40, 64)
    expected = model.decode(tokens, mode=mode, size=(61, 90)).sample
    sample = model.bfloat16().decode(tokens.to(torch.bfloat16), mode=mode, size=(61, 90)).sample
    assert sample.dtype == torch.bfloat16
    # A few layers of 8-bit mantissas, as at the own size.
    assert (sample.float() - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize("kind, mode", KINDS)
@pytest.mark.parametrize("size", [(50, 41), (200, 200)])
def test_gradients_reach_the_tokens(kind, mode, size):
    model = tiny_model(kind)
    tokens = tiny_tokens(model, 40, 64)
    geometry, texture = tokens.geometry.clone().requires_grad_(), tokens.texture.clone().requires_grad_()
    given = GPSTokens(geometry, texture, tokens.image_size, tokens.tile_grid, tokens.canvas_size)
    model.decode(given, mode=mode, size=size).sample.square().mean().backward()
    for grad in (geometry.grad, texture.grad):
        assert grad.isfinite().all()
        assert grad.abs().amax(-1).gt(0).any()


BAD_SIZES = {
    (0, 32): ValueError,
    (32, -1): ValueError,
    (32.0, 32): TypeError,
    (True, 32): TypeError,
    (32,): TypeError,
    (32, 32, 3): TypeError,
    32: TypeError,
    "32x32": TypeError,
}


@pytest.mark.parametrize("size", BAD_SIZES, ids=str)
def test_bad_sizes_say_what_was_expected(size):
    with pytest.raises(BAD_SIZES[size], match=r"size must be .*\(height, width\), got"):
        tiny_model("map").decode(torch.rand(1, 6, 9), size=size)


@pytest.fixture(scope="module")
def kingfisher() -> tuple[AutoencoderGPSToken, Tensor, GPSTokens]:
    """The shipped model, the middle of the shipped photograph in 256 x 384 px, its tokens."""
    model = AutoencoderGPSToken.from_pretrained(MINI).eval()
    processor = GPSTokenImageProcessor.from_pretrained(MINI)
    features = processor(processor.load_image(DEMO_PHOTOGRAPH).crop((192, 128, 576, 384)))
    with torch.no_grad():
        return model, features["pixel_values"], model.encode(**features).tokens


@pytest.mark.parametrize("size, floor", [((128, 192), 23.6), ((512, 768), 24.0)])
@torch.no_grad()
def test_a_photograph_at_another_size(kingfisher, size, floor):
    """Against the photograph itself, reduced or enlarged: it is the same picture, in the same place.

    Measured: 24.30 dB at half the size, 24.37 dB at twice, 25.32 dB at its own. Moved by a single pixel of the result
    the pictures have 21.97 and 23.39 dB, so the floors lie between.
    """
    model, pixels, tokens = kingfisher
    expected = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
    assert psnr(model.decode(tokens, size=size).sample.clamp(-1, 1), expected).item() > floor
