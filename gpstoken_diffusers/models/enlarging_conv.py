"""Nearest enlargement by two and a 3x3 convolution in one step, without multiplying copies of a pixel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EnlargingConv2d(nn.Module):
    """`conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)`, with 4 products for each 9.

    Of the nine pixels that a kernel covers on the enlarged map, several are copies of one pixel, so their weights can
    be added first. Which ones are copies depends on whether row and column are even: four cases, which are the four
    2x2 kernels of a transposed convolution of stride 2. The weights are added up at every call, which takes a hundredth
    of its time and keeps the sums up to date. In bfloat16 and float16 the sums are rounded once more.

    Args:
        in_channels, out_channels: channels of the map.

    Attributes:
        weight: (out_channels, in_channels, 3, 3), as of `torch.nn.Conv2d`, and like it at the start.
        bias: (out_channels,).

    Shapes: (B, in_channels, H, W) -> (B, out_channels, 2 H, 2 W).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight and bias as `torch.nn.Conv2d` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        out_channels, in_channels = self.weight.shape[:2]
        # Along one axis the kernel's four positions take the weights (2), (1, 2), (0, 1) and (0). This 4x3 matrix of
        # zeros and ones is made where the weights are: a copy from the host would break a CUDA graph.
        lines = torch.eye(4, 3, dtype=self.weight.dtype, device=self.weight.device)
        lines = (lines + lines.roll(1, 0)).flip(0)
        # All sums by one matrix product, which rounds each once.
        kernel = self.weight.reshape(-1, 9) @ torch.kron(lines, lines).T
        kernel = kernel.view(out_channels, in_channels, 4, 4).transpose(0, 1)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)

    def extra_repr(self) -> str:
        out_channels, in_channels = self.weight.shape[:2]
        return f"{in_channels}, {out_channels}"
