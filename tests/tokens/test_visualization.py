"""Pictures of tokens: what is drawn lies where the Gaussians are."""

import numpy as np
import pytest
import torch
from golden_files import golden
from PIL import Image
from safetensors.torch import load_file

from gpstoken_diffusers.tokens import GPSTokens
from gpstoken_diffusers.visualization import ELLIPSE_LEVEL, panel, picture_grid, visualize_gaussians


def tokens_at(*gaussians, height=60, width=90, **fields) -> GPSTokens:
    """One image of Gaussians given in pixels: sigma_x, sigma_y, rho, x, y."""
    pixels = torch.tensor([gaussians], dtype=torch.float32)
    canvas_height, canvas_width = fields.get("canvas_size", (height, width))
    half = torch.tensor([(canvas_width - 1) / 2, (canvas_height - 1) / 2])
    geometry = torch.cat([pixels[..., :2] / half, pixels[..., 2:3], pixels[..., 3:] / half - 1], dim=-1)
    return GPSTokens.from_geometry(geometry, (height, width), **fields)


def light_of(picture: Image.Image) -> np.ndarray:
    """(H, W) sum of the channels, less that of the ground at the farthest corner."""
    values = np.asarray(picture).astype(float).sum(axis=-1)
    return values - values.min()


def covariance_of(light: np.ndarray) -> np.ndarray:
    y, x = np.indices(light.shape)
    return np.cov(np.stack([x.ravel(), y.ravel()]), aweights=light.ravel())


def drawn_points(picture: Image.Image) -> np.ndarray:
    """(P, 2) x, y of the pixels that differ clearly from white."""
    y, x = np.nonzero(255 - np.asarray(picture).min(axis=-1) > 100)
    return np.stack([x, y], axis=-1)


# Glow


@pytest.mark.parametrize("x", [7, 45, 80])
@pytest.mark.parametrize("y", [9, 50])
def test_glow_is_brightest_at_the_centre(x, y):
    [picture] = visualize_gaussians(tokens_at((5, 3, 0.3, x, y)))
    assert picture.size == (90, 60) and picture.mode == "RGB"
    light = light_of(picture)
    assert np.unravel_index(light.argmax(), light.shape) == (y, x)
    assert light.max() > 500 and np.median(light) < 15  # a bright light on a dark ground


@pytest.mark.parametrize(("sigma_x", "sigma_y", "rho"), [(8, 4, 0), (4, 8, 0), (6, 6, 0.8), (6, 6, -0.8)])
def test_glow_has_the_shape_of_the_gaussian(sigma_x, sigma_y, rho):
    covariance = covariance_of(light_of(visualize_gaussians(tokens_at((sigma_x, sigma_y, rho, 45, 30)))[0]))
    # Tone mapping and the three layers keep the shape, not the scale: ratios, to the accuracy of 8 bits.
    assert np.sqrt(covariance[0, 0] / covariance[1, 1]) == pytest.approx(sigma_x / sigma_y, rel=0.1)
    assert covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]) == pytest.approx(rho, abs=0.05)


def test_glow_adds_up():
    one, other = (5, 5, 0, 30, 30), (5, 5, 0, 42, 30)
    between = [light_of(visualize_gaussians(tokens_at(*g))[0])[30, 36] for g in ((one,), (other,), (one, other))]
    assert between[2] > 1.2 * max(between[:2])


def test_a_thin_gaussian_cannot_slip_between_pixels():
    [picture] = visualize_gaussians(tokens_at((0.01, 0.01, 0, 40.5, 20.5)))
    light = light_of(picture)
    assert light[20:22, 40:42].min() > 100


def test_colour_tells_the_size():
    small, large = (1.0, 1.0, 0, 15, 15), (15, 15, 0, 60, 30)
    pixels = np.asarray(visualize_gaussians(tokens_at(small, large, *[small] * 14))[0]).astype(int)
    red, _, blue = pixels[15, 17]  # beside the white core
    assert red > blue
    red, _, blue = pixels[40, 65]
    assert blue > red


def test_glow_takes_the_colours_of_the_picture():
    ground = np.full((60, 90, 3), 40, dtype=np.uint8)
    ground[:, :45, 0] = 230
    ground[:, 45:, 1] = 230
    tokens = tokens_at((5, 5, 0, 20, 30), (5, 5, 0, 70, 30))
    pixels = np.asarray(visualize_gaussians(tokens, Image.fromarray(ground))[0]).astype(int)
    assert pixels[30, 25, 0] > 2 * pixels[30, 25, 1]
    assert pixels[30, 75, 1] > 2 * pixels[30, 75, 0]


def test_glow_of_a_black_picture_can_be_seen():
    light = light_of(visualize_gaussians(tokens_at((5, 5, 0, 20, 30)), Image.new("RGB", (90, 60)))[0])
    assert light[30, 20] > 300
    assert light[30, 25] > 150  # one sigma out, beyond the white core


# Ellipses


@pytest.mark.parametrize("rho", [0.0, 0.85, -0.85])
def test_ellipses_lie_on_the_level_set(rho):
    sigma_x, sigma_y, x, y = 14.0, 9.0, 44.0, 31.0
    [picture] = visualize_gaussians(tokens_at((sigma_x, sigma_y, rho, x, y)), style="ellipses")
    offset = (drawn_points(picture) - [x, y]) / [sigma_x, sigma_y]
    squared = (offset[:, 0] ** 2 - 2 * rho * offset[:, 0] * offset[:, 1] + offset[:, 1] ** 2) / (1 - rho**2)
    # A line one pixel wide spreads by a pixel, which is most in sigmas across the short axis of the ellipse.
    short_axis = np.sqrt(
        np.linalg.eigvalsh([[sigma_x**2, rho * sigma_x * sigma_y], [rho * sigma_x * sigma_y, sigma_y**2]])[0]
    )
    assert np.abs(np.sqrt(squared) - ELLIPSE_LEVEL).max() < 1 / short_axis
    angles = np.sort(np.arctan2(offset[:, 1], offset[:, 0]))
    assert np.diff(angles, append=angles[0] + 2 * np.pi).max() < 0.5  # closed
    assert len(offset) > 60


def test_the_ellipse_of_an_initial_gaussian_touches_its_region():
    data = load_file(golden("partition.safetensors"))
    for token in (0, 20, 63):
        geometry = data["camera.n64.gpscodes"][token].reshape(1, 1, 5)
        points = drawn_points(visualize_gaussians(geometry, style="ellipses", size=(256, 256))[0])
        region = (data["camera.n64.regions"][token].numpy() + 1) / 2 * 255
        # Half a line's width, and the 1/256 by which the initial sigma falls short of the region.
        assert np.abs(np.concatenate([points.min(axis=0), points.max(axis=0)]) - region).max() < 1.5


def test_ellipses_leave_the_rest_of_the_picture_alone():
    generator = np.random.default_rng(0)
    ground = Image.fromarray(generator.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    inside = tokens_at((10, 6, 0, 30, 30))
    outside = tokens_at((10, 6, 0, 3000, 30))  # draws nothing
    drawn, empty = (np.asarray(visualize_gaussians(t, ground, "ellipses")[0]).astype(int) for t in (inside, outside))
    changed = np.abs(drawn - empty).max(axis=-1) > 0
    y, x = np.nonzero(changed)
    distance = np.hypot((x - 30) / 10, (y - 30) / 6)
    # The dark rim makes the line 2.4 pixels wide; it and its smoothing reach 2 pixels across the short axis.
    assert changed.any() and np.abs(distance - ELLIPSE_LEVEL).max() < 2.1 / 6
    # Dimmed evenly: every value is a fixed share of the picture's own, up to rounding.
    values = np.asarray(ground)[..., 0].ravel()
    share = empty[..., 0].ravel()[values > 200] / values[values > 200]
    assert share.std() < 0.005 and 0.5 < share.mean() < 0.9


def test_small_ellipses_are_drawn_over_large_ones():
    small, large, elsewhere = (4, 4, 0, 30, 30), (12, 4, 0, 30, 30), (12, 4, 0, 3000, 30)
    pictures = [
        np.asarray(visualize_gaussians(tokens_at(*gaussians), style="ellipses")[0])
        for gaussians in ((small, large), (large, small), (small, elsewhere), (elsewhere, large))
    ]
    assert np.array_equal(pictures[0], pictures[1])
    # Both ellipses pass through (30, 24), one pixel wide.
    assert np.array_equal(pictures[0][23:26, 30], pictures[2][23:26, 30])
    assert not np.array_equal(pictures[2][23:26, 30], pictures[3][23:26, 30])


# Both


@pytest.mark.parametrize("style", ["glow", "ellipses"])
@pytest.mark.parametrize("zoom", [0.5, 1, 3])
def test_size_scales_the_whole_picture(style, zoom):
    size = (round(60 * zoom), round(90 * zoom))
    [picture] = visualize_gaussians(tokens_at((5, 5, 0, 60.5, 22.5)), style=style, size=size)
    assert picture.size == (size[1], size[0])
    light = light_of(picture) if style == "glow" else -np.asarray(picture).astype(float).sum(axis=-1) + 765
    y, x = np.indices(light.shape)
    # Pixel 60.5 of 90 is 61 pixel widths from the left edge, at any zoom. Lines are drawn to a quarter pixel.
    assert (light * x).sum() / light.sum() == pytest.approx(61 * zoom - 0.5, abs=0.2)
    assert (light * y).sum() / light.sum() == pytest.approx(23 * zoom - 0.5, abs=0.2)


@pytest.mark.parametrize("style", ["glow", "ellipses"])
def test_padding_of_the_canvas_is_not_shown(style):
    plain = tokens_at((8, 5, 0.4, 50, 20))
    padded = tokens_at((8, 5, 0.4, 50, 20), canvas_size=(128, 192))
    pictures = [np.asarray(visualize_gaussians(t, style=style)[0]).astype(int) for t in (plain, padded)]
    assert pictures[1].shape == (60, 90, 3)
    # The same Gaussian up to float32 rounding of its coordinates: one step of 255 in the glow, and at an edge
    # of a line one or two of the 16 points that a pixel is drawn with.
    assert np.abs(pictures[0] - pictures[1]).max() <= (1 if style == "glow" else 32)


@pytest.mark.parametrize("style", ["glow", "ellipses"])
def test_batches_and_every_kind_of_picture(style):
    tokens = GPSTokens.concatenate([tokens_at((8, 5, 0.4, 50, 20)), tokens_at((4, 6, -0.4, 20, 40))])
    pixels = torch.rand(2, 3, 60, 90, generator=torch.Generator().manual_seed(0)) * 2 - 1
    as_pil = [Image.fromarray(((p + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for p in pixels]
    from_tensor = visualize_gaussians(tokens.to(torch.bfloat16), pixels, style)
    from_pil = visualize_gaussians(tokens, as_pil, style)
    alone = [visualize_gaussians(tokens[i], as_pil[i], style)[0] for i in range(2)]
    for pictures in zip(from_tensor, from_pil, alone, strict=True):
        assert len({picture.tobytes() for picture in pictures}) == 1
    assert from_pil[0].tobytes() != from_pil[1].tobytes()


@pytest.mark.parametrize("style", ["glow", "ellipses"])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (64, 1)])
def test_tiny_pictures(style, size):
    tokens = GPSTokens.from_geometry(torch.tensor([[[0.3, 0.3, 0.1, 0.0, 0.0]]]), size)
    [picture] = visualize_gaussians(tokens, style=style)
    assert picture.size == (size[1], size[0])


def test_what_cannot_be_drawn():
    tokens = tokens_at((5, 5, 0, 20, 30))
    picture = Image.new("RGB", (90, 60))
    with pytest.raises(ValueError, match="one of glow, ellipses, not 'dots'"):
        visualize_gaussians(tokens, style="dots")
    with pytest.raises(ValueError, match="1 images of tokens, but 2 pictures"):
        visualize_gaussians(tokens, [picture, picture])
    with pytest.raises(ValueError, match=r"shape \(B, 3, H, W\), not \(3, 60, 90\)"):
        visualize_gaussians(tokens, torch.zeros(3, 60, 90))
    with pytest.raises(TypeError, match="PIL image"):
        visualize_gaussians(tokens, np.zeros((60, 90, 3)))
    with pytest.raises(ValueError, match=r"give size=\(height, width\)"):
        visualize_gaussians(tokens.geometry)
    tokens.geometry[0, 0, 2] = float("nan")
    with pytest.raises(ValueError, match="geometry must be finite"):
        visualize_gaussians(tokens)


def test_drawing_changes_nothing():
    tokens = tokens_at((5, 5, 0, 20, 30))
    geometry, picture = tokens.geometry.clone(), Image.new("RGB", (90, 60), "red")
    for style in ("glow", "ellipses"):
        visualize_gaussians(tokens, picture, style)
    assert torch.equal(tokens.geometry, geometry) and picture.getextrema() == ((255, 255), (0, 0), (0, 0))


# Panel


def find(sheet: np.ndarray, picture: Image.Image) -> tuple[int, int]:
    """Row and column where the picture lies, unchanged, in the sheet."""
    content = np.asarray(picture)
    windows = np.lib.stride_tricks.sliding_window_view(sheet[..., 0], (4, 4))
    for row, column in np.argwhere((windows == content[:4, :4, 0]).all(axis=(-1, -2))):
        if np.array_equal(sheet[row : row + content.shape[0], column : column + content.shape[1]], content):
            return int(row), int(column)
    raise AssertionError("the picture is not in the sheet")


def noise(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_panel_sets_pictures_side_by_side():
    pictures = [noise(300, width, seed) for seed, width in enumerate((300, 200, 400))]
    sheet = np.asarray(panel([(f"title {i}", p) for i, p in enumerate(pictures)], "PSNR 27.31 dB"))
    places = [find(sheet, picture) for picture in pictures]
    top = places[0][0]
    lefts = [left for _, left in places]
    assert {row for row, _ in places} == {top}
    ground = sheet[0, 0]
    for picture, left in zip(pictures, lefts, strict=True):
        title = sheet[:top, left : left + picture.width].astype(int)
        assert (title - ground > 150).any()  # bright text above each picture
    gaps = [lefts[0], lefts[1] - lefts[0] - 300, lefts[2] - lefts[1] - 200, sheet.shape[1] - lefts[2] - 400]
    assert len(set(gaps)) == 1 and gaps[0] > 0
    assert (sheet[top + 300 :].astype(int) - ground > 100).any()
    without = np.asarray(panel([("title", pictures[0])]))
    assert (without[find(without, pictures[0])[0] + 300 :] == ground).all()


def test_panel_scales_to_one_height():
    tall, wide, small = noise(512, 256, 0), noise(256, 512, 1), noise(32, 32, 2)
    sheet = panel([("tall", tall), ("wide", wide), ("small", small)])
    content = np.asarray(sheet)
    find(content, tall)
    find(content, wide.resize((1024, 512), Image.Resampling.NEAREST))
    find(content, small.resize((512, 512), Image.Resampling.NEAREST))
    assert panel([("small", small)]).height > 256


def test_long_text_stays_over_its_picture():
    # So many colours that each picture is a flat block: text may not cover the margins between blocks.
    blocks = [Image.new("RGB", (256, 256), color) for color in ("#ff0000", "#00ff00")]
    title = "a title much longer than the picture below it is wide"
    sheet = np.asarray(panel([(title, blocks[0]), (title, blocks[1])], "x" * 60)).astype(int)
    top, left = find(sheet, blocks[0])
    ground = sheet[0, 0]
    gap = slice(left + 256, find(sheet, blocks[1])[1])
    assert (sheet[:, gap][:top] == ground).all()
    assert (sheet[:, :left] == ground).all()


def test_panel_takes_any_mode_but_not_nothing():
    sheet = panel([("grey", Image.new("L", (256, 256), 9)), ("alpha", Image.new("RGBA", (256, 256)))])
    assert sheet.mode == "RGB"
    with pytest.raises(ValueError, match="at least one column"):
        panel([])


def test_a_grid_is_as_square_as_it_can_be():
    pictures = [Image.new("RGB", (10, 6), color) for color in ("red", "lime", "blue", "black", "gray")]
    grid = np.asarray(picture_grid(pictures, gap=2))
    assert grid.shape == (2 * 8 + 2, 3 * 12 + 2, 3)
    assert grid[5, 5].tolist() == [255, 0, 0] and grid[5, 29].tolist() == [0, 0, 255]
    assert grid[13, 5].tolist() == [0, 0, 0] and grid[13, 29].tolist() == [255, 255, 255]
    assert picture_grid(pictures, columns=9, gap=0).size == (50, 6)
    with pytest.raises(ValueError, match="all of one size"):
        picture_grid([pictures[0], Image.new("RGB", (10, 7))])
    with pytest.raises(ValueError, match="a grid needs pictures"):
        picture_grid([])
    with pytest.raises(ValueError, match="at least one column"):
        picture_grid(pictures, columns=0)
