"""The Inception-v3 of 2015-12-05 that Frechet distances are computed with, differentiable in its picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weight_files import load_exactly

SIDE = 299
"""Side in pixels of the pictures that the network was trained on."""
BATCH_NORM_EPSILON = 1e-3


class Convolution(nn.Module):
    """A convolution and a ReLU. The batch norm between them is merged into the convolution by [`merge_norms`]."""

    def __init__(self, channels: int, width: int, kernel: int | tuple[int, int], stride: int = 1, same: bool = True):
        super().__init__()
        rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (rows // 2, columns // 2) if same else 0
        self.conv = nn.Conv2d(channels, width, (rows, columns), stride, padding)

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.conv(maps), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, whose maps are joined.

    Args:
        channels: of the input.
        branches: each a row of steps. A step is (name, width, kernel) or, where it also halves the maps, (name, width,
            kernel, 2); "average" or "max", a pooling of 3 x 3 at stride 1; "halve", a maximum at stride 2; or a list
            of such convolutions, which read the same map and whose outputs are joined.
    """

    def __init__(self, channels: int, branches: list[list]):
        super().__init__()
        self.branches: list[list] = []
        self.width = 0
        for branch in branches:
            steps, width = [], channels
            for step in branch:
                if isinstance(step, str):
                    steps.append(step)
                    continue
                fork = step if isinstance(step, list) else [step]
                for name, wide, kernel, *stride in fork:
                    halving = bool(stride)
                    self.add_module(name, Convolution(width, wide, kernel, 2 if halving else 1, same=not halving))
                steps.append([name for name, *_ in fork])
                width = sum(wide for _, wide, *_ in fork)
            self.branches.append(steps)
            self.width += width

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([self._run(branch, maps) for branch in self.branches], dim=1)

    def _run(self, branch: list, maps: Tensor) -> Tensor:
        for step in branch:
            if step == "average":
                # TensorFlow divides by the number of pixels inside the map.
                maps = F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)
            elif step == "max":
                maps = F.max_pool2d(maps, 3, stride=1, padding=1)
            elif step == "halve":
                maps = F.max_pool2d(maps, 3, stride=2)
            else:
                maps = torch.cat([self.get_submodule(name)(maps) for name in step], dim=1)
        return maps


def _at_35(pooled: int) -> list[list]:
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["average", ("branch_pool", pooled, 1)],
    ]


def _at_17(inner: int) -> list[list]:
    long = [(1, inner, 1), (2, inner, (7, 1)), (3, inner, (1, 7)), (4, inner, (7, 1)), (5, 192, (1, 7))]
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", inner, 1), ("branch7x7_2", inner, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        [(f"branch7x7dbl_{number}", width, kernel) for number, width, kernel in long],
        ["average", ("branch_pool", 192, 1)],
    ]


def _at_8(pooling: str) -> list[list]:
    def fork(name: str) -> list:
        return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]

    return [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), fork("branch3x3_2")],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")],
        [pooling, ("branch_pool", 192, 1)],
    ]


_TO_17 = [
    [("branch3x3", 384, 3, 2)],
    [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
    ["halve"],
]
_TO_8 = [
    [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
    [
        ("branch7x7x3_1", 192, 1),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, 3, 2),
    ],
    ["halve"],
]
_BLOCKS = {
    "Mixed_5b": _at_35(32),
    "Mixed_5c": _at_35(64),
    "Mixed_5d": _at_35(64),
    "Mixed_6a": _TO_17,
    "Mixed_6b": _at_17(128),
    "Mixed_6c": _at_17(160),
    "Mixed_6d": _at_17(160),
    "Mixed_6e": _at_17(192),
    "Mixed_7a": _TO_8,
    "Mixed_7b": _at_8("average"),
    # The published network takes a maximum here, unlike in the block before.
    "Mixed_7c": _at_8("max"),
}


class InceptionV3(nn.Module):
    """Inception-v3 up to its last average: Szegedy et al. (2015), arXiv 1512.00567, as TensorFlow's 2015-12-05 graph.

    It differs from torchvision's in its averages, in one pooling and in its weights. Names are those of the files
    that torch-fidelity and pytorch-fid publish. Weights are random until [`load`](InceptionV3.load).
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, same=False)
        width = 192
        for name, branches in _BLOCKS.items():
            block = Mixed(width, branches)
            self.add_module(name, block)
            width = block.width

    def load(self, weights: dict[str, Tensor], source: str) -> None:
        """Take the weights of a file; the classifier's and the counters of its batch norms are not needed.

        Raises:
            ValueError: another network's weights.
        """
        load_exactly(self, merge_norms({k: v for k, v in weights.items() if not k.startswith("fc.")}), source)

    def forward(self, levels: Tensor) -> Tensor:
        """(B, 3, H, W), 0 to 255, of any size -> (B, 2048), at least 0."""
        # TensorFlow's graph subtracts 128 and divides by 128.
        maps = (resize_like_tensorflow(levels, SIDE) - 128) / 128
        maps = maps.contiguous(memory_format=torch.channels_last)
        maps = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(maps)))
        maps = F.max_pool2d(maps, 3, stride=2)
        maps = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(maps))
        maps = F.max_pool2d(maps, 3, stride=2)
        for name in _BLOCKS:
            maps = self.get_submodule(name)(maps)
        return maps.mean(dim=(2, 3), dtype=torch.promote_types(maps.dtype, torch.float32))


def merge_norms(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convolutions with the batch norms after them: NAME.conv.weight and NAME.bn.* -> NAME.conv.weight and .bias.

    Weights without a batch norm of their name stay as they are.
    """
    merged = {k: v for k, v in weights.items() if ".bn." not in k}
    for name in weights:
        layer = name.removesuffix(".bn.weight")
        parts = [f"{layer}.bn.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        kernel = f"{layer}.conv.weight"
        if layer == name or kernel not in weights or not all(part in weights for part in parts):
            continue
        gain, offset, mean, variance = (weights[part].double() for part in parts)
        scale = gain / (variance + BATCH_NORM_EPSILON).sqrt()
        merged[kernel] = (weights[kernel].double() * scale[:, None, None, None]).to(weights[kernel].dtype)
        merged[f"{layer}.conv.bias"] = (offset - mean * scale).to(weights[kernel].dtype)
    return merged


def resize_like_tensorflow(pictures: Tensor, side: int) -> Tensor:
    """Bilinear (B, C, H, W) -> (B, C, side, side) as TensorFlow 1 did: pixel 0 stays, nothing is smoothed before.

    Pixel i of the result lies at i * H / side, without the half pixel that PyTorch accounts for.
    """
    # Matrix products: unlike those of an indexing their gradients are the same on every run. In bfloat16 they would
    # lose the levels' last digits.
    with torch.autocast(pictures.device.type, enabled=False):
        rows, columns = (_bilinear(length, side).to(pictures) for length in pictures.shape[-2:])
        return rows @ (pictures @ columns.T)


def _bilinear(length: int, side: int) -> Tensor:
    """(side, length), what each pixel of a line contributes to each of the resized one."""
    # In float32, as TensorFlow counts: in more digits some places come to lie between other pixels.
    places = torch.arange(side, dtype=torch.float32) * torch.tensor(length / side, dtype=torch.float32)
    low = places.long()
    share = places - low
    matrix = torch.zeros(side, length)
    matrix.scatter_add_(1, low[:, None], (1 - share)[:, None])
    matrix.scatter_add_(1, (low + 1).clamp(max=length - 1)[:, None], share[:, None])
    return matrix
