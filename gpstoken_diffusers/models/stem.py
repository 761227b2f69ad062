"""The convolutional stem: pixels -> the feature map that regions are read from."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .norms import GroupNorm


class StemBlock(nn.Module):
    """Residual block of two GroupNorm - SiLU - 3x3 convolution steps; (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = GroupNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = GroupNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        hidden_states = self.conv1(self.norm1(hidden_states, silu=True))
        # In place: at full resolution, fresh memory takes longer than the sum.
        return self.conv2(self.norm2(hidden_states, silu=True)).add_(residual)


class ImageStem(nn.Module):
    """Pixels to features that RoIAlign reads.

    Args:
        in_channels: image channels.
        channels: feature channels, a multiple of 32.
        patch_size: pixels per feature along each axis. The released checkpoints work at full resolution (1);
            larger values fold `patch_size` x `patch_size` pixels into channels first.
        num_layers: residual blocks.

    Shapes: (B, in_channels, H, W) -> (B, channels, H / patch_size, W / patch_size).
    """

    def __init__(self, in_channels: int, channels: int, patch_size: int, num_layers: int):
        super().__init__()
        self.patch_size = patch_size
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, channels, 3, padding=1)
        self.blocks = nn.ModuleList(StemBlock(channels) for _ in range(num_layers))
        self.gradient_checkpointing = False

    def forward(self, pixel_values: Tensor) -> Tensor:
        if self.patch_size > 1:
            pixel_values = F.pixel_unshuffle(pixel_values, self.patch_size)
        hidden_states = self.conv_in(pixel_values)
        for block in self.blocks:
            if self.gradient_checkpointing and hidden_states.requires_grad:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        return hidden_states
