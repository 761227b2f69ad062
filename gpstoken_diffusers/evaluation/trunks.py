"""The convolutions of VGG-16 and AlexNet, plain and shift-tolerant, up to the five depths that LPIPS compares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

TRUNKS = ("vgg", "alex")
CHANNELS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
"""Of the five depths."""


class Trunk(nn.Module):
    """Convolutions whose maps at some depths are compared.

    Args:
        layers: in order; their weights are named `features.N.weight` and `features.N.bias`, as torchvision's.
        depths: numbers of the layers whose outputs are compared.
    """

    def __init__(self, layers: list[nn.Module], depths: list[int]):
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
    """torchvision's VGG-16 or AlexNet up to the last pooling, its weights not set.

    Args:
        name: "vgg" or "alex".
        shift_tolerant: the networks of Ghildyal and Liu (2022), arXiv 2207.13686: poolings take their maximum at
            every pixel, and a [`BlurPool`] after them halves the maps, as Zhang (2019), arXiv 1904.11486, proposed.
            AlexNet's first convolution has no stride either, and a blur pool follows it before the ReLU; together
            they halve the picture once, where the plain network quarters it.

    Raises:
        ValueError: another name.
    """
    check_trunk(name)
    with torch.device("meta"):  # most of the weights are the classifier's, which is not needed
        network = (torchvision.models.vgg16 if name == "vgg" else torchvision.models.alexnet)(weights=None)
    *source, _ = network.features
    layers: list[nn.Module] = []
    depths = []
    channels = 3
    for layer in source:
        blurred = False
        if isinstance(layer, nn.MaxPool2d):
            if name == "vgg":
                depths.append(len(layers) - 1)  # the ReLU before it
            blurred = shift_tolerant
        elif isinstance(layer, nn.Conv2d):
            channels = layer.out_channels
            blurred = shift_tolerant and layer.stride != (1, 1)
        elif name == "alex":
            depths.append(len(layers))  # every ReLU
        if blurred:
            layer.stride = 1 if isinstance(layer, nn.MaxPool2d) else (1, 1)
        layers.append(layer.to_empty(device="cpu"))
        if blurred:
            layers.append(BlurPool(channels))
    return Trunk(layers, depths if name == "alex" else [*depths, len(layers) - 1])


def check_trunk(name: str) -> None:
    """Raises ValueError: not one of `TRUNKS`."""
    if name not in TRUNKS:
        raise ValueError(f"the trunk must be one of {', '.join(TRUNKS)}, not {name!r}")
