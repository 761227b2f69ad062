"""How work grows, counted instead of timed: in proportion to the picture, and to the tokens but for attention."""

from __future__ import annotations

import pytest
import torch
from model_zoo import noise_images, tiny_model
from roofline import pairs_in_boxes
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from gpstoken_diffusers import partition_image
from gpstoken_diffusers.models.lattice_painter import LatticePainter
from gpstoken_diffusers.models.windows import map_geometry


def operations(function, *args) -> int:
    """Of matrix products and convolutions (and attention, where no fused kernel hides it)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args)
    return counter.get_total_flops()


class AttentionOperations(TorchFunctionMode):
    """Counts multiplications and additions of attention by its shapes: two products of N x N x width."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            self.operations += 4 * query.numel() * query.shape[-2]
        return function(*args, **kwargs)


@pytest.mark.parametrize("kind", ["lattice", "map"])
def test_work_per_pixel_does_not_grow_with_the_picture(kind):
    """From 3 x 3 to 12 x 12 tiles: the same operations per pixel, but for what lies around windows at the border."""
    model = tiny_model(kind, decode_mode="tile" if kind == "map" else "merge")
    per_pixel = {}
    for side in (96, 192, 384):
        images = noise_images(1, side, side)
        with torch.no_grad():
            tokens = model.encode(images).tokens
        per_pixel[side] = [operations(model.encode, images) / side**2, operations(model.decode, tokens) / side**2]
    encode, decode = zip(*per_pixel.values(), strict=True)
    assert max(encode) == pytest.approx(min(encode), rel=1e-6)
    if kind == "map":
        # Each call of the decoder adds up weights anew, and nine tiles are fewer to a call than 144.
        assert max(decode) == pytest.approx(min(decode), rel=1e-3)
    else:
        # A window's halo is cut off at the picture's border, so that small pictures are a little cheaper; it is at
        # most what a window inside takes, (1 + 2 halos / side)^2 of its own pixels.
        decoder = model.decoder
        side = 2 * model.config.map_size
        bound = (1 + 2 * decoder.receptive_px / side) ** 2
        plain = operations(decoder, torch.zeros(1, 9, 64, 64)) / (64 * decoder.upscale) ** 2
        assert all(plain <= value <= 1.1 * bound * plain for value in decode)


def test_painting_does_not_grow_with_windows_times_tokens(monkeypatch):
    """A window paints the tokens that reach it, not all: what all windows paint grows with the picture alone.

    Windows at the border have less around them, so that small pictures come out cheaper, by half at most. If each
    window painted all tokens, each step from size to size would make it four times as much.
    """
    model, painted = tiny_model("lattice"), []
    splat = LatticePainter._splat

    def counted(self, geometry: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
        painted.append(geometry.shape[0] * geometry.shape[1])
        return splat(self, geometry, features, size)

    monkeypatch.setattr(LatticePainter, "_splat", counted)
    shares = []
    for side in (192, 384, 768):
        with torch.no_grad():
            tokens = model.encode(noise_images(1, side, side)).tokens
            painted.clear()
            model.decode(tokens)
        shares.append(sum(painted) / tokens.num_tokens)
    assert max(shares) <= 2 * min(shares)


def test_attention_is_the_only_part_that_grows_with_the_square_of_the_tokens():
    """One tile of 64 px into 64, 256 and 1,024 tokens, all stages from pixels to pixels."""
    model = tiny_model("lattice", sample_size=64, map_size=16)
    images = noise_images(1, 64, 64)
    counts, attention, rest, splat = (64, 256, 1024), [], [], []
    for count in counts:
        regions, geometry = partition_image(images, count, min_region_size=2)
        with AttentionOperations() as own, FlopCounterMode(display=False) as counter, torch.no_grad():
            refined, texture = model.refiner(model.stem(images), geometry, regions)
        attention.append(own.operations)
        with torch.no_grad():
            painted = model.decoder.paint(refined, texture, (16, 16), (64, 64))
        painting = operations(model.decoder.paint, refined, texture, (16, 16), (64, 64))
        total = counter.get_total_flops() + painting + operations(model.decoder, painted)
        # Whether the counter knows an attention kernel depends on PyTorch's version: what it knows is taken off.
        known = counter.get_flop_counts()["Global"].items()
        rest.append(total - sum(number for operator, number in known if "attention" in str(operator)))
        splat.append(pairs_in_boxes(map_geometry(refined, (64, 64), (16, 16)), 16, 16, 3.0))
    for before, after in zip(attention, attention[1:], strict=False):
        assert after == 16 * before
    for before, after in zip([*rest[:-1], *splat[:-1]], [*rest[1:], *splat[1:]], strict=True):
        assert after <= 4.01 * before
    assert rest[-1] > rest[0]
