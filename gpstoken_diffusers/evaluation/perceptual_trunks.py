"""The convolutions of VGG-16 and AlexNet, plain and shift-tolerant, up to the five depths that LPIPS compares."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRUNKS = ("vgg", "alex")
CHANNELS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
"""Of the five depths."""

# VGG-16 (Simonyan and Zisserman 2015, table 1, column D): widths of the convolutions between two poolings.
_VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Trunk(nn.Module):
    """Convolutions whose maps at some depths are compared.

    Args:
        layers: in order; their weights are named `features.N.weight` and `features.N.bias`, as torchvision's.
        depths: numbers of the layers whose outputs are given out.
    """

    def __init__(self, layers: list[nn.Module], depths: tuple[int, ...]):
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.depths = frozenset(depths)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised -> (B, C, h, w) at each depth."""
        maps = []
        for number, layer in enumerate(self.features):
            pixels = layer(pixels)
            if number in self.depths:
                maps.append(pixels)
        return maps


class BlurPool(nn.Module):
    """Every second pixel after a blur by 1-2-1 along both axes: (B, C, H, W) -> (B, C, (H + 3) // 2, (W + 3) // 2).

    Two pixels are mirrored at every edge, one more than the blur needs, as in the networks of ST-LPIPS. H and W must
    be at least 3.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        # Not saved: it is not learned.
        self.register_buffer("blur", (line[:, None] * line).expand(channels, 1, 3, 3).contiguous(), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        return F.conv2d(F.pad(maps, (2, 2, 2, 2), mode="reflect"), self.blur, stride=2, groups=maps.shape[1])


def build_trunk(name: str, shift_tolerant: bool = False) -> Trunk:
    """VGG-16 or AlexNet with random weights.

    Args:
        name: "vgg" or "alex" (Krizhevsky 2014, arXiv 1404.5997, as torchvision has it).
        shift_tolerant: the networks of Ghildyal and Liu (2022), arXiv 2207.13686: poolings take their maximum at
            every pixel and leave the halving to a [`BlurPool`], as Zhang (2019), arXiv 1904.11486, proposed. In
            AlexNet the first convolution has no stride either, and a blur pool follows it, before the ReLU; together
            they halve the picture once, where the plain network quarters it.

    Raises:
        ValueError: another name.
    """
    if name not in TRUNKS:
        raise ValueError(f"the trunk must be one of {', '.join(TRUNKS)}, not {name!r}")
    layers = list((_vgg_layers if name == "vgg" else _alex_layers)(shift_tolerant))
    return Trunk([layer for layer, _ in layers], tuple(i for i, (_, compared) in enumerate(layers) if compared))


Layer = tuple[nn.Module, bool]
"""A layer, and whether its output is compared."""


def _pooling(window: int, channels: int, shift_tolerant: bool) -> Iterator[Layer]:
    yield nn.MaxPool2d(window, stride=1 if shift_tolerant else 2), False
    if shift_tolerant:
        yield BlurPool(channels), False


def _vgg_layers(shift_tolerant: bool) -> Iterator[Layer]:
    channels = 3
    for stage, widths in enumerate(_VGG_STAGES):
        if stage > 0:
            yield from _pooling(2, channels, shift_tolerant)
        for place, width in enumerate(widths):
            yield nn.Conv2d(channels, width, 3, padding=1), False
            yield nn.ReLU(inplace=True), place == len(widths) - 1
            channels = width


def _alex_layers(shift_tolerant: bool) -> Iterator[Layer]:
    yield nn.Conv2d(3, 64, 11, stride=1 if shift_tolerant else 4, padding=2), False
    if shift_tolerant:
        yield BlurPool(64), False
    yield nn.ReLU(inplace=True), True
    yield from _pooling(3, 64, shift_tolerant)
    yield nn.Conv2d(64, 192, 5, padding=2), False
    yield nn.ReLU(inplace=True), True
    yield from _pooling(3, 192, shift_tolerant)
    for before, after in ((192, 384), (384, 256), (256, 256)):
        yield nn.Conv2d(before, after, 3, padding=1), False
        yield nn.ReLU(inplace=True), True
