"""The convolutional decoder of the released checkpoints: splatted feature map -> picture."""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from .enlarging_conv import EnlargingConv2d
from .group_norm import GroupNorm, TileGroupNorm
from .stem import GROUP_NORM_EPS, GROUPS

Grid = tuple[int, int]


class DecoderBlock(nn.Module):
    """Residual block of two steps, TileGroupNorm with SiLU and a 3x3 convolution; (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = TileGroupNorm(GROUPS, in_channels, GROUP_NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = TileGroupNorm(GROUPS, out_channels, GROUP_NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, tile_grid: Grid) -> Tensor:
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        x = self.conv1(self.norm1(x, tile_grid))
        # In place: at full resolution, fresh memory takes longer than the sum.
        return self.conv2(self.norm2(x, tile_grid)).add_(residual)


class MapAttention(nn.Module):
    """Single-head self-attention over the pixels of each tile; (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = GroupNorm(GROUPS, channels, eps=GROUP_NORM_EPS)
        self.to_q = nn.Conv2d(channels, channels, 1)
        self.to_k = nn.Conv2d(channels, channels, 1)
        self.to_v = nn.Conv2d(channels, channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, tile_grid: Grid) -> Tensor:
        rows, cols = tile_grid
        batch_size, channels, height, width = x.shape
        tile_height, tile_width = height // rows, width // cols
        # Channels stay innermost, as they come: attention that never holds all its weights wants that of its inputs,
        # on a CPU at 512 channels nine times faster than the one that does.
        pixels = x.permute(0, 2, 3, 1)
        tiles = pixels.reshape(batch_size, rows, tile_height, cols, tile_width, channels).transpose(2, 3)
        tiles = tiles.reshape(-1, tile_height, tile_width, channels)
        normed = self.norm(tiles.permute(0, 3, 1, 2))
        # One head over (tiles, pixels, 1, C). The backend is the native one: 512 channels in one head are more than
        # the specialised attention kernels take.
        query, key, value = (
            projection(normed).permute(0, 2, 3, 1).reshape(len(tiles), -1, 1, channels)
            for projection in (self.to_q, self.to_k, self.to_v)
        )
        mixed = dispatch_attention_fn(query, key, value, backend="native")
        tiles = tiles + self.to_out(mixed.reshape(tiles.shape).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        tiles = tiles.reshape(batch_size, rows, cols, tile_height, tile_width, channels).transpose(2, 3)
        return tiles.reshape(pixels.shape).permute(0, 3, 1, 2)


class DecoderStage(nn.Module):
    """Residual blocks at one resolution, then nearest enlargement by two and a convolution unless it is the last."""

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, upsample: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.blocks = nn.ModuleList(DecoderBlock(a, b) for a, b in pairwise(widths))
        self.conv_up = EnlargingConv2d(out_channels, out_channels) if upsample else None

    def forward(self, x: Tensor, tile_grid: Grid) -> Tensor:
        for block in self.blocks:
            x = block(x, tile_grid)
        if self.conv_up is not None:
            x = self.conv_up(x)
        return x


class MapDecoder(nn.Module):
    """Feature map to picture, as in VQGAN's decoder (section "Decoder" of the paper).

    Args:
        in_channels: texture channels of the map.
        out_channels: image channels.
        block_out_channels: width of each resolution, finest first (as diffusers lists them); the map is enlarged
            by two between neighbours.
        num_layers: residual blocks per resolution.

    Shapes: map (B, in_channels, h, w) -> picture (B, out_channels, h f, w f), f = 2^(resolutions - 1); the map may hold
    `tile_grid` (rows, cols) tiles, which are decoded as one picture: normalisation statistics per tile (but the last,
    which is over the whole picture), attention within each tile, convolutions across.
    """

    def __init__(self, in_channels: int, out_channels: int, block_out_channels: tuple[int, ...], num_layers: int):
        super().__init__()
        widths = list(reversed(block_out_channels))
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block_1 = DecoderBlock(widths[0], widths[0])
        self.mid_attention = MapAttention(widths[0])
        self.mid_block_2 = DecoderBlock(widths[0], widths[0])
        self.stages = nn.ModuleList(
            DecoderStage(before, after, num_layers, upsample=level + 1 < len(widths))
            for level, (before, after) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True))
        )
        self.norm_out = TileGroupNorm(GROUPS, widths[-1], GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, feature_map: Tensor, tile_grid: Grid = (1, 1)) -> Tensor:
        x = self.conv_in(feature_map)
        for layer in (self.mid_block_1, self.mid_attention, self.mid_block_2, *self.stages):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(layer, x, tile_grid)
            else:
                x = layer(x, tile_grid)
        return self.conv_out(self.norm_out(x))
