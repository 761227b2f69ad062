"""Memory budgets: what they are given as, what they refuse, and that results stay what they are."""

from __future__ import annotations

import pytest
import torch
from model_zoo import noise_images, tiny_model

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokens
from gpstoken_diffusers.models import lattice_painter
from gpstoken_diffusers.models import work_plan as memory
from gpstoken_diffusers.models.work_plan import parse_memory

KINDS = (("map", "tile"), ("map", "merge"), ("lattice", "merge"), ("patch", "merge"))


def least_budget(model: AutoencoderGPSToken) -> int:
    """What the error of a budget of one byte advises, in bytes."""
    with pytest.raises(ValueError, match="at least") as refused:
        model.set_memory_budget(1)
    assert model.memory_budget is None
    return parse_memory(str(refused.value).split("at least ")[1].rstrip("."))


@pytest.mark.parametrize(
    "text, size",
    [
        (123, 123),
        ("123", 123),
        ("800MB", 800 * 10**6),
        ("1GB", 10**9),
        (" 1.5 gb ", 1_500_000_000),
        ("1GiB", 2**30),
        ("0.5MiB", 2**19),
        ("64k", 64_000),
        ("2T", 2 * 10**12),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "1 gigabyte", "-1GB", "1e9", "1,5GB", "0", "0.0001k", 0, -5])
def test_text_that_is_no_size(text):
    with pytest.raises(ValueError, match="memory budget"):
        parse_memory(text)


@pytest.mark.parametrize("value", [1.5, True, None, [1]])
def test_other_types(value):
    with pytest.raises(TypeError, match="memory budget"):
        parse_memory(value)


@pytest.mark.parametrize("kind, mode", KINDS)
@torch.no_grad()
def test_the_least_that_an_error_names_works(kind, mode):
    model, images = tiny_model(kind), noise_images(1, 32, 32)
    expected = model.encode(images).tokens
    picture = model.decode(expected, mode=mode).sample
    least = least_budget(model)
    model.set_memory_budget(least)
    assert model.memory_budget == least
    tokens = model.encode(images).tokens
    assert torch.equal(tokens.geometry, expected.geometry)
    torch.testing.assert_close(model.decode(tokens, mode=mode).sample, picture, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="at least"):
        model.set_memory_budget(least // 2)
    assert model.memory_budget == least  # a refused one changes nothing
    model.set_memory_budget(None)
    assert model.memory_budget is None


@torch.no_grad()
def test_a_call_that_needs_more_says_so():
    """More tokens, a merged decoding, a larger tile: each has a least budget of its own, and it works."""
    model = tiny_model("map", num_tokens=1, roi_size=16)
    images = noise_images(1, 96, 96)
    model.set_memory_budget(least_budget(model))
    tokens = model.encode(images).tokens
    calls = {
        "encoding tiles of 16 tokens": lambda: model.encode(images, num_tokens=16),
        'mode="merge"': lambda: model.decode(tokens, mode="merge"),
        "64 x 64 map pixels": lambda: model.decode(tokens, size=(384, 384)),
    }
    for what, call in calls.items():
        model.set_memory_budget(least_budget_before(model))
        with pytest.raises(ValueError, match="too small for") as refused:
            call()
        assert what in str(refused.value)
        model.set_memory_budget(str(refused.value).split("at least ")[1].rstrip("."))
        call()


def least_budget_before(model: AutoencoderGPSToken) -> int:
    model.set_memory_budget(None)
    return least_budget(model)


def test_a_budget_is_not_part_of_the_model(tmp_path):
    model = tiny_model("lattice")
    model.set_memory_budget("1GB")
    model.save_pretrained(tmp_path)
    assert "budget" not in (tmp_path / "config.json").read_text()
    assert AutoencoderGPSToken.from_pretrained(tmp_path).memory_budget is None


@pytest.mark.parametrize("kind", ["map", "lattice"])
@torch.no_grad()
def test_tokens_do_not_depend_on_the_budget(kind, monkeypatch):
    model, images = tiny_model(kind), noise_images(2, 70, 90)
    expected = model.encode(images)
    batches = []
    forward = model.stem.forward
    monkeypatch.setattr(model.stem, "forward", lambda tiles: batches.append(len(tiles)) or forward(tiles))
    for tiles, sizes in ((1, [1] * 18), (10, [10, 8]), (1000, [18])):
        batches.clear()
        model.set_memory_budget(max(model.work_plan.encoding_bytes(tiles, 6), least_budget_before(model)))
        if tiles == 1:
            model.enable_slicing()
        found = model.encode(images)
        model.disable_slicing()
        assert batches == sizes
        # Batched matrix products may sum in another order: rounding only.
        for name in ("tokens", "initial_tokens"):
            own, other = getattr(found, name), getattr(expected, name)
            torch.testing.assert_close(own.as_tensor(), other.as_tensor(), rtol=1e-4, atol=1e-5)
            assert (own.image_size, own.tile_grid, own.canvas_size) == ((70, 90), (3, 3), (96, 96))
        assert torch.equal(found.regions, expected.regions)


@torch.no_grad()
def test_importance_is_cut_with_the_tiles():
    model, images = tiny_model("lattice"), noise_images(2, 70, 90)
    importance = torch.zeros(70, 90, dtype=torch.bool)
    importance[:20, 60:] = True
    expected = model.encode(images, importance=importance, importance_strength=20.0)
    assert not torch.equal(expected.regions, model.encode(images).regions)
    model.set_memory_budget(least_budget(model))
    found = model.encode(images, importance=importance, importance_strength=20.0)
    assert torch.equal(found.regions, expected.regions)


@pytest.mark.parametrize(
    "image, size", [((128, 128), None), ((256, 250), None), ((300, 400), None), ((100, 90), (400, 470))], ids=str
)
@torch.no_grad()
def test_lattice_pictures_do_not_depend_on_the_budget(image, size, monkeypatch):
    """Map pixels are painted the same bit for bit; convolutions of other sizes may sum in another order."""
    model = tiny_model("lattice", sample_size=128, map_size=32)
    tokens = model.encode(noise_images(2, *image)).tokens
    expected = model.decode(tokens, size=size).sample
    windows, render = [], model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda given: windows.append(given.shape[-2:]) or render(given))
    counts, least = [], least_budget(model)
    beside = least - memory.FIXED_BYTES
    for budget in (least + beside // 4, least + 3 * beside, 10**12):
        windows.clear()
        model.set_memory_budget(budget)
        sample = model.decode(tokens, size=size).sample
        torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-4)
        counts.append(len(windows))
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] in (1, 2)  # both pictures in one pass, or one after the other
    if image != (128, 128):
        assert counts[0] > counts[1] > counts[2]


@torch.no_grad()
def test_tokens_are_looked_through_some_at_a_time(monkeypatch):
    model = tiny_model("lattice")
    tokens = model.encode(noise_images(1, 120, 150)).tokens
    expected = model.decode(tokens).sample
    painter, asked = model.decoder.unfold_texture, []
    reaches = painter.reaches
    monkeypatch.setattr(painter, "reaches", lambda g, *rest: asked.append(len(g)) or reaches(g, *rest))
    monkeypatch.setattr(lattice_painter, "TOKENS_AT_ONCE", 50)
    assert torch.equal(model.decode(tokens).sample, expected)
    assert tokens.num_tokens == 120 and asked[:3] == [50, 50, 20]


@torch.no_grad()
def test_tiles_are_decoded_as_many_at_once_as_there_is_room_for(monkeypatch):
    model = tiny_model("map", decode_mode="tile")
    tokens = model.encode(noise_images(2, 64, 90)).tokens
    expected = model.decode(tokens).sample
    batches, forward = [], model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda x: batches.append(len(x)) or forward(x))
    for tiles, sizes in ((5, [5, 5, 2]), (1000, [12])):
        batches.clear()
        model.set_memory_budget(model.work_plan.map_bytes(tiles, (16, 16)))
        torch.testing.assert_close(model.decode(tokens).sample, expected, rtol=1e-5, atol=1e-5)
        assert batches == sizes


@torch.no_grad()
def test_merged_windows_are_smaller_where_there_is_no_room_for_the_usual_ones(monkeypatch):
    """And never larger: a generous budget gives the usual picture bit for bit."""
    model = tiny_model("map", decode_mode="merge")
    tokens = model.encode(noise_images(2, 32 * 7, 64)).tokens
    expected = model.decode(tokens).sample
    whole = model.decoder(model.decoder.paint(tokens.geometry, tokens.texture, tokens.tile_grid), tokens.tile_grid)
    grids, forward = [], model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda x, grid: grids.append(grid) or forward(x, grid))
    model.set_memory_budget("1TB")
    assert torch.equal(model.decode(tokens).sample, expected)
    assert grids == [(5, 2), (4, 2)] * 2
    for side, sizes in ((2, [(3, 2), (4, 2), (4, 2), (2, 2)]), (1, [(2, 2)] * 2 + [(3, 2)] * 10 + [(2, 2)] * 2)):
        grids.clear()
        model.set_memory_budget(model.work_plan.map_bytes((side + 2) * 2, (16, 16)))
        sample = model.decode(tokens).sample
        assert grids == sizes * 2
        # The last normalisation is over the window, as in the test of the usual windows.
        assert (sample - whole).abs().mean() < 0.4 * whole.std()
    # Six rows or fewer are one pass, where a budget has room for it; then one picture comes after the other.
    short = GPSTokens(tokens.geometry[:, :24], tokens.texture[:, :24], (64, 64), (2, 2))
    model.set_memory_budget(model.work_plan.map_bytes(4, (16, 16)))
    grids.clear()
    model.decode(short)
    assert grids == [(2, 2)] * 2
