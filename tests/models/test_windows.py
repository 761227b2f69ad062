"""Windows of a map: how an axis is divided, geometry as a window sees it, and who paints into it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import tiny_model
from torch import Tensor

from gpstoken_diffusers.models.windows import (
    Window,
    cells_along,
    map_geometry,
    touches,
    window_geometry,
    windows_on_cells,
)
from gpstoken_diffusers.ops.splat import splat_gaussians


def gaussians(count: int, seed: int = 0, widest: float = 0.2) -> Tensor:
    """(count, 5): many small, some large, some outside the picture, some thin."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.rand(count, 5, generator=generator)
    sigma = 0.002 * (widest / 0.002) ** random[:, :2]
    return torch.cat([sigma, 1.98 * random[:, 2:3] - 0.99, 2.6 * random[:, 3:] - 1.3], dim=1)


@given(
    length=st.integers(1, 3000),
    cell=st.integers(1, 20).map(lambda half: 2 * half),
    cells=st.integers(2, 12),
    more=st.integers(0, 39),
)
@settings(max_examples=300, deadline=None)
def test_an_axis_is_covered_once_with_halo(length, cell, cells, more):
    longest = cell * cells + more % cell
    found = cells_along(length, longest, cell)
    assert found[0][0] == 0 and found[-1][1] == length
    assert all(before[1] == after[0] for before, after in zip(found, found[1:], strict=False))
    for start, stop, painted_start, painted_stop in found:
        assert start < stop
        assert painted_stop - painted_start <= longest
        assert painted_start % cell == 0 and (painted_stop % cell == 0 or painted_stop == length)
        # What the convolutions look at: half a cell, or as much as there is.
        assert start - painted_start >= min(cell // 2, start)
        assert painted_stop - stop >= min(cell // 2, length - stop)


def test_windows_are_about_equally_large():
    """A last sliver would cost almost as much as a whole window."""
    lengths = [stop - start for start, stop, _, _ in cells_along(192, 5 * 32, 32)]
    assert lengths == [112, 80]


def test_a_stretch_of_one_cell_is_refused():
    with pytest.raises(ValueError, match="two cells of 32"):
        cells_along(100, 63, 32)


@pytest.mark.parametrize("map_size", [(1000, 700), (1, 50), (50, 1)])
@pytest.mark.parametrize("window", [Window(0, 0, 32, 32), Window(320, 224, 352, 256), Window(0, 16, 1, 40)], ids=str)
def test_window_coordinates_keep_places_in_pixels(map_size, window):
    """Against float64: 2^-25 of the map's half and a few more roundings of the window's own, in map pixels."""
    geometry = gaussians(500)
    moved = window_geometry(geometry, map_size, window).double()
    for axis, (length, start, samples) in enumerate(
        zip(reversed(map_size), (window.left, window.top), reversed(window.size), strict=True)
    ):
        span, own_span = max(samples - 1, 1), max(length - 1, 1)
        wanted = (geometry[:, 3 + axis].double() + (length > 1)) * own_span / 2 - start
        place = (moved[:, 3 + axis] + (samples > 1)) * span / 2
        near = (place - span / 2).abs() < 2 * span
        torch.testing.assert_close(place[near], wanted[near], rtol=0, atol=max(length, 64) * 2**-23)
        sigma = geometry[:, axis].double() * own_span / 2
        torch.testing.assert_close(moved[:, axis] * span / 2, sigma, rtol=1e-6, atol=0)
    assert torch.equal(moved[:, 2], geometry[:, 2].double())


@pytest.mark.parametrize("map_size", [(90, 70), (1, 70), (90, 1)])
def test_tokens_that_are_left_out_paint_nothing(map_size):
    """And few of those that are kept do: the search is worth something."""
    geometry = gaussians(400, seed=1)
    texture = torch.randn(400, 3, generator=torch.Generator().manual_seed(2))
    whole = splat_gaussians(geometry[None], texture[None], *map_size)
    for window in (Window(0, 0, min(20, map_size[0]), min(30, map_size[1])), Window(64, 48, 90, 70)):
        if window.bottom > map_size[0] or window.right > map_size[1]:
            continue
        own = window_geometry(geometry, map_size, window)
        near = touches(own, 3.0, 0.0, window.size)
        painted = splat_gaussians(own[None, near], texture[None, near], *window.size)
        expected = whole[..., window.top : window.bottom, window.left : window.right]
        # Thin tokens: places are off by 1e-5 map pixels, a sigma may be a tenth of one.
        torch.testing.assert_close(painted, expected, rtol=1e-3, atol=1e-3)
        others = splat_gaussians(own[None, ~near], texture[None, ~near], *window.size)
        assert not others.any()
        assert near.float().mean() < 0.9


def test_tokens_that_are_not_finite_touch_nothing():
    geometry = torch.tensor([[0.1, 0.1, 0.0, torch.nan, 0.0], [torch.nan, 0.1, 0.0, 0.0, 0.0]])
    assert not touches(geometry, 3.0, 0.0, (8, 8)).any()


def lattice_scene(map_size: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return gaussians(count, seed=4, widest=0.05), torch.randn(count, 4, generator=generator)


@torch.no_grad()
def test_a_map_pixel_does_not_depend_on_its_window():
    """So pictures do not depend on the memory budget.

    Places are the same to the bit. The perceptron's matrix product may sum in another order for another number of
    tokens, which is some 1e-6; places that were rounded otherwise would show as 1e-4 and more.
    """
    decoder, map_size = tiny_model("lattice").decoder, (100, 83)
    geometry, texture = lattice_scene(map_size, 300)
    whole = decoder.unfold_texture.paint_window(geometry, texture, map_size, Window(0, 0, *map_size))
    assert whole.shape == (1, 9, *map_size)
    for longest in (2 * decoder.cell_px, 3 * decoder.cell_px, 1000):
        for row in windows_on_cells(map_size, longest, decoder.cell_px):
            for _, window in row:
                painted = decoder.unfold_texture.paint_window(geometry, texture, map_size, window)
                expected = whole[..., window.top : window.bottom, window.left : window.right]
                torch.testing.assert_close(painted, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("map_size", [(100, 83), (1, 200), (200, 2)])
@torch.no_grad()
def test_cells_paint_what_one_pass_paints(map_size):
    """Apart from map pixels on the very end of a lattice point's box, which rounding may move over their centre.

    None of these 4,800 boxes' ends does. A weight there is exp(-4.5), 1% of the point's middle.
    """
    decoder = tiny_model("lattice").decoder
    geometry, texture = lattice_scene(map_size, 300)
    canvas = tuple(side * decoder.upscale for side in map_size)
    expected = decoder.paint(geometry[None], texture[None], map_size, canvas)
    moved = map_geometry(geometry, canvas, map_size)
    painted = decoder.unfold_texture.paint_window(moved, texture, map_size, Window(0, 0, *map_size))
    torch.testing.assert_close(painted, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_window_without_tokens_is_background():
    decoder = tiny_model("lattice").decoder
    window = Window(0, 0, decoder.cell_px, 2 * decoder.cell_px)
    empty = torch.zeros(0, 5), torch.zeros(0, 4)
    far = torch.tensor([[0.01, 0.01, 0.0, 0.9, 0.9]]), torch.ones(1, 4)
    for geometry, texture in (empty, far):
        painted = decoder.unfold_texture.paint_window(geometry, texture, (100, 100), window)
        assert painted.shape == (1, 9, decoder.cell_px, 2 * decoder.cell_px)
        assert not painted[:, :-1].any()
        torch.testing.assert_close(painted[:, -1], torch.full_like(painted[:, -1], 0.1).log())


def test_gradients_go_through_cells():
    decoder, map_size = tiny_model("lattice").decoder, (40, 40)
    geometry, texture = (tensor.requires_grad_() for tensor in lattice_scene(map_size, 60))
    canvas = (40 * decoder.upscale, 40 * decoder.upscale)
    weights = torch.randn(9, *map_size, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(
        (decoder.paint(geometry[None], texture[None], map_size, canvas)[0] * weights).sum(), (geometry, texture)
    )
    painted = decoder.unfold_texture.paint_window(
        map_geometry(geometry, canvas, map_size), texture, map_size, Window(0, 0, *map_size)
    )
    found = torch.autograd.grad((painted[0] * weights).sum(), (geometry, texture))
    for own, expected in zip(found, wanted, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(own, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().mean()))
