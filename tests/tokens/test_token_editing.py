"""Editing tokens: what is selected, where it goes, and which pixels change."""

from __future__ import annotations

import math

import pytest
import torch
from model_zoo import noise_images, tiny_model
from token_zoo import SIZE, assert_same, centers_px, every, random_tokens

from gpstoken_diffusers import GPSTokens, splat_gaussians
from gpstoken_diffusers.token_editing import (
    compact_tokens,
    delete_tokens,
    deleted_tokens,
    duplicate_tokens,
    flip_tokens,
    merge_tokens,
    move_tokens,
    retile_tokens,
    rotate_tokens,
    scale_tokens,
    select_by_box,
    select_by_mask,
    select_by_size,
    transform_tokens,
)


def some(tokens: GPSTokens) -> torch.Tensor:
    """Every third token of the first image, every second of the others."""
    index = torch.arange(tokens.num_tokens)
    return torch.stack([index % 3 == 0, *[index % 2 == 0] * (tokens.batch_size - 1)])


def weights_px(tokens: GPSTokens, points: torch.Tensor) -> torch.Tensor:
    """Weight of each Gaussian (B, N) at points (B, N, P, 2) in pixels, straight from the definition."""
    height, width = tokens.canvas_size
    half = torch.tensor([width - 1, height - 1]) / 2
    offset = (points - centers_px(tokens)[:, :, None]) / (tokens.geometry[:, :, None, :2] * half)
    rho = tokens.geometry[..., 2, None]
    u, v = offset.unbind(-1)
    return torch.exp(-(u * u - 2 * rho * u * v + v * v) / (2 * (1 - rho * rho)))


# Selections


def test_a_token_is_selected_where_its_box_reaches_the_mask():
    """By its definition, pixel by pixel: the splat of a token is not zero on the mask."""
    tokens = random_tokens(batch=1, count=40)
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[16:30, 20:60] = mask[0, 0] = True
    nearly_flat = tokens.geometry[0].clone()
    nearly_flat[:, 2] = 0  # the box does not depend on rho, and without it no weight in it rounds to zero
    painted = splat_gaussians(nearly_flat[:, None], torch.ones(40, 1, 1), *SIZE, 3.0)[:, 0]
    expected = (painted * mask).flatten(1).amax(1) > 0
    assert 4 < expected.sum() < 36
    assert torch.equal(select_by_mask(tokens, mask)[0], expected)
    assert (select_by_mask(tokens, mask, reach_sigmas=1.0) <= select_by_mask(tokens, mask)).all()


def test_centers_are_looked_up_in_the_mask():
    tokens = random_tokens(count=40)
    masks = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(1)) > 0.5
    x, y = centers_px(tokens).round().long().unbind(-1)
    expected = torch.stack([masks[image, y[image], x[image]] for image in range(2)])
    assert torch.equal(select_by_mask(tokens, masks, "center"), expected)
    assert torch.equal(select_by_mask(tokens, masks * 0.75, "center"), expected)
    assert not select_by_mask(tokens, masks * 0.5, "center").any()


def test_padding_is_not_part_of_the_picture():
    """Pixels are those of the picture, though coordinates span the padded canvas."""
    tokens = random_tokens(count=64, tile_grid=(1, 2), image_size=(40, 50), canvas_size=(40, 80))
    selected = select_by_mask(tokens, torch.ones(40, 50), "center")
    assert torch.equal(selected, centers_px(tokens)[..., 0] < 49.5)
    assert 0 < selected.sum() < 128


def test_boxes_and_sizes():
    tokens = random_tokens()
    x, y = centers_px(tokens).unbind(-1)
    inside = (x >= 10) & (x <= 50) & (y >= 5) & (y <= 30)
    assert torch.equal(select_by_box(tokens, (10, 5, 50, 30)), inside) and inside.any()
    size = (tokens.geometry[..., :2] * torch.tensor([79 / 2, 47 / 2])).prod(-1).sqrt()
    middle = size.median().item()
    assert torch.equal(select_by_size(tokens, largest_px=middle), size <= middle)
    assert torch.equal(select_by_size(tokens, middle), size >= middle)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: select_by_mask(t, torch.ones(48, 81)), r"shape \(48, 80\) or \(2, 48, 80\).*got \(48, 81\)"),
        (lambda t: select_by_mask(t, torch.ones(3, 48, 80)), "got .3, 48, 80"),
        (lambda t: select_by_mask(t, torch.full(SIZE, math.nan)), "mask has NaN"),
        (lambda t: select_by_mask(t, torch.ones(SIZE), "centre"), "criterion must be"),
        (lambda t: move_tokens(t, torch.ones(12), 1), r"boolean with the shape \(2, 12\) or \(12,\)"),
        (lambda t: move_tokens(t, torch.ones(13).bool(), 1), "selection must be boolean"),
        (lambda t: move_tokens(t, torch.ones(1, 12).bool(), 1), "selection must be boolean"),
        (lambda t: select_by_box(t, (5, 0, 4, 9)), "box_px must be"),
        (lambda t: scale_tokens(t, every(t), 0), "factor must be greater than 0, got 0"),
        (lambda t: flip_tokens(t, every(t), "diagonal"), "direction must be"),
        (lambda t: transform_tokens(t, every(t), torch.eye(3)), r"must have the shape \(2, 2\), got \(3, 3\)"),
        (lambda t: transform_tokens(t, every(t), torch.tensor([[1.0, 2.0], [2.0, 4.0]])), "must have an inverse"),
        (lambda t: merge_tokens(t, random_tokens(image_size=(48, 81)), torch.ones(SIZE)), "differ in image_size"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_tokens())


# Moving and reshaping

EDITS = [
    lambda tokens, selection: move_tokens(tokens, selection, 3, -2),
    lambda tokens, selection: scale_tokens(tokens, selection, 1.5),
    lambda tokens, selection: rotate_tokens(tokens, selection, 30),
    lambda tokens, selection: flip_tokens(tokens, selection),
    delete_tokens,
]


@pytest.mark.parametrize("edit", EDITS, ids=["move", "scale", "rotate", "flip", "delete"])
def test_only_the_selected_tokens_change_and_never_in_place(edit):
    tokens = random_tokens()
    before, selection = tokens.clone(), some(tokens)
    edited = edit(tokens, selection).validate()
    assert_same(tokens, before)
    unchanged = (edited.geometry == tokens.geometry).all(-1)
    assert torch.equal(unchanged, ~selection)
    assert_same(edit(tokens, torch.zeros(12, dtype=torch.bool)), tokens)


def test_moves_are_in_pixels():
    tokens = random_tokens()
    moved = move_tokens(tokens, every(tokens), 7, torch.tensor(-3.0))
    torch.testing.assert_close(centers_px(moved) - centers_px(tokens), torch.tensor([7.0, -3.0]).expand(2, 12, 2))
    assert torch.equal(moved.geometry[..., :3], tokens.geometry[..., :3])


MATRICES = {
    "scale": (lambda t, s, about: scale_tokens(t, s, 1.7, about), [[1.7, 0.0], [0.0, 1.7]]),
    # Counter-clockwise on a screen, whose y points downwards: what was to the right is above.
    "rotate": (lambda t, s, about: rotate_tokens(t, s, 90, about), [[0.0, 1.0], [-1.0, 0.0]]),
    "horizontal": (lambda t, s, about: flip_tokens(t, s, "horizontal", about), [[-1.0, 0.0], [0.0, 1.0]]),
    "vertical": (lambda t, s, about: flip_tokens(t, s, "vertical", about), [[1.0, 0.0], [0.0, -1.0]]),
    "shear": (lambda t, s, about: transform_tokens(t, s, torch.tensor([[1, 0.8], [0.1, 0.6]]), about), None),
}


@pytest.mark.parametrize("name", MATRICES)
def test_gaussians_go_where_their_pixels_go(name):
    """The weight of the new Gaussian at M p is that of the old one at p, for any point p."""
    edit, matrix = MATRICES[name]
    matrix = torch.tensor(matrix or [[1, 0.8], [0.1, 0.6]])
    tokens, about = random_tokens(), torch.tensor([30.0, 11.0])
    edited = edit(tokens, every(tokens), about.tolist())
    offsets = 4 * torch.randn(2, 12, 20, 2, generator=torch.Generator().manual_seed(0))
    points = centers_px(tokens)[:, :, None] + offsets
    torch.testing.assert_close(
        weights_px(edited, about + (points - about) @ matrix.mT), weights_px(tokens, points), atol=1e-4, rtol=1e-3
    )


def test_the_middle_of_the_painted_area_stays():
    """Each image turns about the mean of its selected centres, weighted by the areas of the ellipses."""
    tokens = random_tokens(batch=3)
    selection = some(tokens)
    selection[2] = False
    about = []
    for image in range(2):
        chosen = tokens.geometry[image][selection[image]]
        area = chosen[:, 0] * chosen[:, 1] * (1 - chosen[:, 2] ** 2).sqrt()
        about.append((centers_px(tokens)[image][selection[image]] * area[:, None]).sum(0) / area.sum())
    turned = rotate_tokens(tokens, selection, 65)
    for image in range(2):
        alone = rotate_tokens(tokens[image], selection[image], 65, about[image].tolist())
        torch.testing.assert_close(turned[image].geometry, alone.geometry, atol=1e-5, rtol=1e-5)
    assert_same(turned[2], tokens[2])


@pytest.mark.parametrize(("degrees", "times"), [(360, 1), (90, 4), (-120, 3), (36, 10)])
def test_a_full_turn_changes_nothing(degrees, times):
    tokens = turned = random_tokens()
    for _ in range(times):
        turned = rotate_tokens(turned, every(tokens), degrees)
    torch.testing.assert_close(turned.geometry, tokens.geometry, atol=5e-6, rtol=1e-5)


def test_opposite_edits_undo_each_other():
    tokens, about = random_tokens(), (20.0, 20.0)
    selection = some(tokens)
    there = flip_tokens(rotate_tokens(tokens, selection, 25, about), selection, about_px=about)
    there = scale_tokens(there, selection, 3)
    back = flip_tokens(scale_tokens(there, selection, 1 / 3), selection, about_px=about)
    back = rotate_tokens(back, selection, -25, about)
    torch.testing.assert_close(back.geometry, tokens.geometry, atol=2e-5, rtol=1e-4)


def test_gaussians_stay_possible_under_extreme_edits():
    tokens = random_tokens()
    tokens.geometry[0, :4, 2] = torch.tensor([0.9999, -0.9999, 0.99, -0.99])
    for edited in (
        scale_tokens(tokens, every(tokens), 1e-6),
        scale_tokens(tokens, every(tokens), 50.0),
        rotate_tokens(tokens, every(tokens), 45),
        transform_tokens(tokens, every(tokens), torch.tensor([[1.0, 0.0], [1000.0, 1.0]])),
    ):
        edited.validate()
        assert (edited.geometry[..., :2] >= 1e-5).all() and (edited.geometry[..., 2].abs() <= 1 - 1e-6).all()


def test_edits_are_differentiable():
    tokens = random_tokens(batch=1, count=5)
    numbers = torch.tensor([1.5, -2.0, 1.2, 20.0], requires_grad=True)
    geometry = tokens.geometry.requires_grad_()
    edited = move_tokens(tokens, every(tokens), numbers[0], numbers[1])
    edited = rotate_tokens(scale_tokens(edited, every(tokens), numbers[2]), every(tokens), numbers[3])
    edited.geometry.square().sum().backward()
    assert (numbers.grad != 0).all() and numbers.grad.isfinite().all()
    assert (geometry.grad != 0).all() and geometry.grad.isfinite().all()


# Taking away, adding, recomposing


@pytest.mark.parametrize("kind", ["map", "lattice"])
@pytest.mark.parametrize("tiles", [1, 2])
@torch.no_grad()
def test_deleted_tokens_paint_nothing(kind, tiles):
    model = tiny_model(kind)
    size = (32, 32 * tiles)
    tokens = random_tokens(1, 8 * tiles, 4, image_size=size, tile_grid=(1, tiles))
    selection = torch.arange(8 * tiles) % 4 == 1
    left = tokens.geometry[:, ~selection], tokens.texture[:, ~selection]
    removed = GPSTokens(*left, image_size=size, tile_grid=(1, tiles))
    deleted = delete_tokens(tokens, selection).validate()
    assert torch.equal(deleted_tokens(deleted)[0], selection)
    for mode in ("merge", "tile"):
        expected = model.decode(removed, mode=mode).sample
        assert torch.equal(model.decode(deleted, mode=mode).sample, expected)
        assert not torch.allclose(model.decode(tokens, mode=mode).sample, expected, atol=1e-3)
    assert_same(compact_tokens(deleted), removed)


def test_deleted_tokens_stay_deleted():
    """Shrinking everything about the picture's middle would bring them back onto the canvas."""
    tokens = delete_tokens(random_tokens(), torch.arange(12) < 5)
    for edit in EDITS[:-1]:
        assert torch.equal(deleted_tokens(edit(tokens, every(tokens))), deleted_tokens(tokens))
    assert not (select_by_size(tokens) & deleted_tokens(tokens)).any()
    assert not (select_by_mask(tokens, torch.ones(SIZE)) & deleted_tokens(tokens)).any()
    middle = rotate_tokens(tokens, every(tokens), 180).geometry[:, 5:]
    torch.testing.assert_close(middle, rotate_tokens(compact_tokens(tokens), every(tokens)[5:], 180).geometry)


def test_duplicates_are_added_beside_the_originals_in_every_tile():
    tokens = random_tokens(tile_grid=(1, 2))
    selection = torch.zeros(2, 12, dtype=torch.bool)
    selection[0, [1, 2, 8]] = selection[1, 0] = True
    doubled = duplicate_tokens(tokens, selection, 5, 4)
    assert doubled.tokens_per_tile == 8  # two more, the most that any tile needs
    geometry, moved = doubled.geometry, move_tokens(tokens, every(tokens), 5, 4).geometry
    assert torch.equal(geometry[:, :6], tokens.geometry[:, :6])
    assert torch.equal(geometry[:, 8:14], tokens.geometry[:, 6:])
    assert torch.equal(geometry[0, 6:8], moved[0, 1:3]) and torch.equal(geometry[0, 14], moved[0, 8])
    assert torch.equal(doubled.texture[0, 6:8], tokens.texture[0, 1:3])
    assert deleted_tokens(doubled).nonzero().tolist() == [[0, 15], [1, 7], [1, 14], [1, 15]]
    # Places of deleted tokens are used again.
    assert duplicate_tokens(delete_tokens(tokens, selection), ~selection & (torch.arange(12) == 3)).num_tokens == 12


def test_recomposing_takes_each_picture_where_it_belongs():
    outside, inside = random_tokens(seed=1), random_tokens(count=20, seed=2)
    mask = torch.zeros(2, *SIZE)
    mask[0, :, :40] = mask[1, :10] = 1
    merged = merge_tokens(outside, inside, mask)
    for image in range(2):
        expected = torch.cat(
            [
                outside.geometry[image][~select_by_mask(outside, mask, "center")[image]],
                inside.geometry[image][select_by_mask(inside, mask, "center")[image]],
            ]
        )
        assert torch.equal(merged.geometry[image][: len(expected)], expected)
        assert deleted_tokens(merged)[image][len(expected) :].all()
    assert_same(merge_tokens(outside, inside, torch.zeros(SIZE)), outside)
    assert_same(merge_tokens(outside, inside, torch.ones(SIZE)), inside)


@torch.no_grad()
def test_a_token_in_another_tile_needs_retiling_to_be_decoded_by_tile():
    model = tiny_model("map")
    tokens = random_tokens(1, 16, 4, image_size=(32, 64), tile_grid=(1, 2))
    tokens = retile_tokens(tokens)
    moved = move_tokens(tokens, every(tokens), 16, 0)
    retiled = retile_tokens(moved)
    live = ~deleted_tokens(retiled)[0].reshape(2, -1)
    first, second = centers_px(retiled)[0, :, 0].reshape(2, -1)
    assert live[0].any() and (first[live[0]] < 31.5).all() and (second[live[1]] >= 31.5).all()
    merged = [model.decode(each, mode="merge").sample for each in (moved, retiled)]
    torch.testing.assert_close(*merged, atol=1e-4, rtol=1e-4)
    by_tile = [model.decode(each, mode="tile").sample[..., 32:] for each in (moved, retiled)]
    assert not torch.allclose(*by_tile, atol=1e-2)


def test_encoded_pictures_can_be_edited():
    """Tokens of several tiles and of a padded canvas go through every edit and through the decoder."""
    model = tiny_model("lattice")
    with torch.no_grad():
        tokens = model.encode(noise_images(2, 40, 70)).tokens
        selection = select_by_mask(tokens, torch.ones(40, 70))
        for edit in (*EDITS, duplicate_tokens, lambda t, s: compact_tokens(delete_tokens(t, s))):
            assert model.decode(edit(tokens, selection)).sample.isfinite().all()
