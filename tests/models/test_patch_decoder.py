"""The patch decoder: small pictures painted at full resolution, windows, and the start from principal components."""

from __future__ import annotations

import pytest
import torch
from model_zoo import noise_images, tiny_model

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokens
from gpstoken_diffusers.models import work_plan
from gpstoken_diffusers.models.region_sizes import NUM_SIZES, size_weights, sized_linear
from gpstoken_diffusers.models.windows import Window, map_geometry, windows_on_cells
from gpstoken_diffusers.ops.roi_align import roi_align
from gpstoken_diffusers.training.linear_start import linear_parameters, linear_start, principal_start


def scene(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    uniform = torch.rand(count, 5, generator=generator)
    geometry = torch.cat([0.01 + 0.05 * uniform[:, :2], uniform[:, 2:] * 1.8 - 0.9], dim=1)
    return geometry, torch.randn(count, 4, generator=generator)


@torch.no_grad()
def without_convolutions(model: AutoencoderGPSToken) -> AutoencoderGPSToken:
    torch.nn.init.zeros_(model.decoder.conv_out.weight)
    torch.nn.init.zeros_(model.decoder.conv_out.bias)
    return model


@torch.no_grad()
def test_windows_paint_what_one_pass_paints():
    decoder, map_size = tiny_model("patch").decoder, (60, 83)
    geometry, texture = scene(300)
    canvas = tuple(side * decoder.upscale for side in map_size)
    whole = decoder.paint(geometry[None], texture[None], map_size, canvas)
    assert whole.shape == (1, 6 * 16, *map_size)
    moved = map_geometry(geometry, canvas, map_size)
    cells = decoder.unfold_texture.paint_window(moved, texture, map_size, Window(0, 0, *map_size))
    # Places are rounded by 1e-4 map pixels. Where that moves the end of a point's box over a pixel, the pixel gains or
    # loses exp(-4.5) of the point's weight: few do, and none by more.
    off = (cells - whole).abs() > 1e-3 + 1e-3 * whole.abs()
    assert off.float().mean() < 1e-3 and (cells - whole).abs().max() < 0.2
    for row in windows_on_cells(map_size, 2 * decoder.cell_px, decoder.cell_px):
        for _, window in row:
            painted = decoder.unfold_texture.paint_window(moved, texture, map_size, window)
            expected = cells[..., window.top : window.bottom, window.left : window.right]
            torch.testing.assert_close(painted, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_small_tokens_between_map_pixels_are_painted():
    """A token that reaches no map pixel's centre, but pixels beside it, on both sides of where two cells meet."""
    decoder, map_size = tiny_model("patch").decoder, (40, 40)
    places = torch.tensor([decoder.cell_px - 0.6, decoder.cell_px - 0.4])  # the cells meet at cell_px - 0.5
    geometry = torch.zeros(2, 5)
    geometry[:, :2], geometry[:, 3], geometry[:, 4] = 0.05 * 2 / 39, places * 2 / 39 - 1, places.flip(0) * 2 / 39 - 1
    texture, whole = torch.ones(2, 4), Window(0, 0, *map_size)
    painter = decoder.unfold_texture
    expected = painter._splat(geometry[None], painter._features(geometry, texture, map_size, None)[None], map_size)
    assert expected[:, :-16].any()
    torch.testing.assert_close(painter.paint_window(geometry, texture, map_size, whole), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_distant_pixels_do_not_change_at_all():
    model = tiny_model("patch", sample_size=128, map_size=32)
    geometry, texture = scene(200)
    corner = (geometry[:, 3:] < -0.6).all(-1)
    assert corner.any()
    edited = texture + corner[:, None]
    before, after = (model.decode(GPSTokens(geometry[None], own[None], (128, 128))).sample for own in (texture, edited))
    assert (before - after)[..., :32, :32].abs().max() > 1e-3
    # 22 px are the corner's end, and its tokens and the convolutions reach 60 further.
    assert torch.equal(before[..., 90:, 90:], after[..., 90:, 90:])


@pytest.mark.parametrize("size", [None, (330, 700)])
@torch.no_grad()
def test_a_picture_does_not_depend_on_its_windows(size, monkeypatch):
    model, images = tiny_model("patch", sample_size=128, map_size=32), noise_images(1, 300, 520)
    tokens = model.encode(images, num_tokens=40).tokens
    windows, render = [], model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda given: windows.append(given.shape) or render(given))
    drawn = model.decode(tokens, size=size).sample
    assert len(windows) > 1
    monkeypatch.setattr(work_plan, "TILES_AT_ONCE", 10**6)
    whole = model.decode(tokens, size=size).sample
    # The window's sums are rounded otherwise; ends of boxes as above.
    assert (drawn - whole).abs().mean() < 1e-3 * whole.std()


@pytest.mark.parametrize("size", [(128, 96), (192, 48)])
@torch.no_grad()
def test_a_token_shows_the_same_picture_at_any_size(size):
    """What is painted larger and then averaged is what is painted at the own size; convolutions add nothing here."""
    model = without_convolutions(tiny_model("patch"))
    tokens = model.encode(noise_images(1, 64, 48)).tokens
    own = model.decode(tokens).sample
    larger = torch.nn.functional.interpolate(model.decode(tokens, size=size).sample, (64, 48), mode="area")
    # Measured: 6e-5 of the variance, for the blur of points is by pixels. With weights of the larger size: 2.
    assert (larger - own).square().mean() < 1e-3 * own.var()


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model, images = tiny_model("patch"), noise_images(2, 32, 32)
    model.save_pretrained(tmp_path)
    loaded = AutoencoderGPSToken.from_pretrained(tmp_path)
    assert loaded.config.partition_criterion == "error"
    assert torch.equal(loaded.encode(images).regions, model.encode(images).regions)
    torch.testing.assert_close(loaded(images).sample, model(images).sample)


@torch.no_grad()
def test_principal_start_is_principal_components():
    images = noise_images(12, 32, 32)
    model = tiny_model("patch", texture_channels=6, num_tokens=64)
    principal_start(model, images, token_counts=(16, 64))
    encoded = without_convolutions(model).encode(images)
    tokens = encoded.tokens
    # Logarithm and back: 6e-8 of a number up to 2.
    torch.testing.assert_close(tokens.geometry, encoded.initial_tokens.geometry, rtol=0, atol=1e-6)
    pictures = roi_align(images, encoded.regions + torch.tensor([0, 0, 1, 1]), 4, 1.0).flatten(2)
    variances = torch.linalg.eigvalsh(torch.cov((pictures - pictures.mean((0, 1))).flatten(0, 1).T)).flip(0)
    # Regions of 4 px: a point for each pixel, and what is lost is what six components do not hold. Components were
    # fitted to larger regions too, and blending blurs: a fifth of that.
    error = (model.decode(tokens).sample - images).square().mean()
    assert error == pytest.approx(variances[6:].sum().item() / 48, rel=0.2)
    assert ((tokens.texture.std((0, 1)) - 1).abs() < 0.3).all()


def test_linear_start_learns_and_leaves_the_rest_alone():
    """The first picture gets better, most of all where a region has fewer numbers than its texture."""
    images = noise_images(12, 32, 32)
    model = tiny_model("patch", texture_channels=24, num_tokens=128, min_region_size=2)
    principal_start(model, images, token_counts=(16, 128))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    def error() -> float:
        with torch.no_grad():
            return (without_convolutions(model)(images).sample - images).square().mean().item()

    at_first = error()
    linear_start(model, images, (16, 128), steps=60)
    assert error() < 0.8 * at_first
    own = {id(parameter) for parameter in linear_parameters(model)}
    for name, parameter in model.named_parameters():
        if "conv_out" not in name:
            assert torch.equal(parameter, before[name]) == (id(parameter) not in own), name


def test_principal_start_refuses_other_models():
    with pytest.raises(ValueError, match='need decoder_type="patch"'):
        principal_start(tiny_model("lattice"), noise_images(1, 32, 32), (4,))
    with pytest.raises(ValueError, match="region_pixels=4, lattice_size=3"):
        principal_start(tiny_model("patch", lattice_size=3), noise_images(1, 32, 32), (4,))


def test_sizes_count_by_their_octaves():
    weights = size_weights(torch.tensor([[4.0, 4.0], [64.0, 8.0], [1.0, 1000.0], [2**2.5, 16.0]]))
    table = weights.view(4, 5, 5)
    assert table[0, 0, 0] == table[1, 4, 1] == table[2, 0, 4] == 1
    torch.testing.assert_close(table[3, :2, 2], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(weights.sum(-1), torch.ones(4))


@pytest.mark.parametrize("inputs, outputs", [(3, 7), (7, 3)])
def test_sized_linear_mixes_layers(inputs, outputs):
    generator = torch.Generator().manual_seed(0)
    x, sizes = torch.randn(2, 5, inputs, generator=generator), torch.rand(2, 5, NUM_SIZES, generator=generator)
    weight = torch.randn(NUM_SIZES, outputs, inputs, generator=generator)
    bias = torch.randn(NUM_SIZES, outputs, generator=generator)
    expected = sum(sizes[..., i, None] * (x @ weight[i].T + bias[i]) for i in range(NUM_SIZES))
    torch.testing.assert_close(sized_linear(x, weight, bias, sizes), expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_only_the_first_channels_are_kept(monkeypatch):
    """With a share of 1 every picture loses some of its last channels, never the first."""
    model, images = tiny_model("patch"), noise_images(8, 32, 32)
    seen, paint = [], model.decoder.paint
    monkeypatch.setattr(
        model.decoder, "paint", lambda g, texture, *rest: seen.append(texture) or paint(g, texture, *rest)
    )
    torch.manual_seed(0)
    model(images, nested_share=1.0)
    gone = (seen[0] == 0).all(1)  # (pictures, channels)
    assert gone[:, -1].all() and not gone[:, 0].any()
    assert len({int(row.sum()) for row in gone}) > 1
    assert (gone[:, 1:] >= gone[:, :-1]).all()


def test_colours_alone_are_refused():
    with pytest.raises(ValueError, match="lattice_channels must be more than the image's 3, got 3"):
        tiny_model("patch", lattice_channels=3)
