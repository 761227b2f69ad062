"""The convolutional decoder of the released checkpoints: texture is splatted onto a map, convolutions draw it."""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from einops import rearrange
from torch import Tensor, nn

from ..ops.splat import splat_gaussians
from ..tokens import GPSTokens
from .canvas import Canvas, Progress, Scale, scaled
from .enlarging_conv import EnlargingConv2d
from .norms import GroupNorm, TileGroupNorm
from .windows import Grid, Size, Window, map_geometry, touches, window_geometry, windows_of_tiles
from .work_plan import WorkPlan


class DecoderBlock(nn.Module):
    """Residual block of two steps, TileGroupNorm with SiLU and a 3x3 convolution; (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = TileGroupNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = TileGroupNorm(out_channels)
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
        self.norm = GroupNorm(channels)
        self.to_q = nn.Conv2d(channels, channels, 1)
        self.to_k = nn.Conv2d(channels, channels, 1)
        self.to_v = nn.Conv2d(channels, channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, tile_grid: Grid) -> Tensor:
        rows, cols = tile_grid
        # Channels stay innermost, as they come: on a CPU, attention that does not hold all its weights wants that of
        # its inputs, and at 512 channels it is nine times faster than attention that does.
        tiles = rearrange(x, "b c (rows h) (cols w) -> (b rows cols) h w c", rows=rows, cols=cols)
        normed = self.norm(rearrange(tiles, "n h w c -> n c h w"))
        # One head over (tiles, pixels, 1, C). The backend is the native one: 512 channels in one head are more than
        # the specialised attention kernels take.
        query, key, value = (
            rearrange(projection(normed), "n c h w -> n (h w) 1 c") for projection in (self.to_q, self.to_k, self.to_v)
        )
        mixed = dispatch_attention_fn(query, key, value, backend="native")
        mixed = rearrange(mixed, "n (h w) 1 c -> n c h w", h=tiles.shape[1])
        tiles = tiles + rearrange(self.to_out(mixed), "n c h w -> n h w c")
        # In two steps: one would put the channels outermost.
        pixels = rearrange(tiles, "(b rows cols) h w c -> b (rows h) (cols w) c", rows=rows, cols=cols)
        return rearrange(pixels, "b h w c -> b c h w")


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
        return x if self.conv_up is None else self.conv_up(x)


class MapDecoder(nn.Module):
    """Tokens to picture as in VQGAN's decoder (section "Decoder" of the paper).

    `paint` splats the tokens' texture onto a map, `forward` draws the picture of a map, `draw` does both for pictures
    of any size.

    Args:
        in_channels: texture channels of a token, and channels of the map.
        out_channels: image channels.
        block_out_channels: width of each resolution, finest first (as diffusers lists them); the map is enlarged
            by two between neighbours.
        num_layers: residual blocks per resolution.
        map_size: side of a tile's map, in map pixels, that the decoder is trained at.
        upscale: image pixels per map pixel along each axis, 2^(resolutions - 1).
        support: reach of a Gaussian when splatted, in sigmas.

    Shapes: map (B, in_channels, h, w) -> picture (B, out_channels, h upscale, w upscale). The map may hold `tile_grid`
    (rows, cols) tiles, which are decoded as one picture: normalisation statistics per tile (the last one over the whole
    picture), attention within each tile, convolutions across.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, ...],
        num_layers: int,
        map_size: int,
        upscale: int,
        support: float,
    ):
        super().__init__()
        enlarged = 2 ** (len(block_out_channels) - 1)
        if enlarged != upscale:
            raise ValueError(
                f"{len(block_out_channels)} decoder resolutions enlarge a map {enlarged} times, but "
                f"sample_size / map_size is {upscale}."
            )
        self.map_size, self.upscale, self.support = map_size, upscale, support
        widths = list(reversed(block_out_channels))
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block_1 = DecoderBlock(widths[0], widths[0])
        self.mid_attention = MapAttention(widths[0])
        self.mid_block_2 = DecoderBlock(widths[0], widths[0])
        self.stages = nn.ModuleList(
            DecoderStage(before, after, num_layers, upsample=level + 1 < len(widths))
            for level, (before, after) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True))
        )
        self.norm_out = TileGroupNorm(widths[-1])
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

    def paint(
        self, geometry: Tensor, texture: Tensor, tile_grid: Grid = (1, 1), tile_size: Size | None = None
    ) -> Tensor:
        """Splats texture onto the map of a whole canvas.

        Args:
            geometry: (B, N, 5) float32 in coordinates of the canvas.
            texture: (B, N, in_channels).
            tile_grid: (rows, cols) of the canvas.
            tile_size: (height, width) of a tile in map pixels; None is what the decoder is trained at.

        Returns: (B, in_channels, rows height, cols width) in the dtype of `texture`, accumulated in float32.
        """
        geometry, map_size = self._on_map(geometry, tile_grid, tile_size or (self.map_size, self.map_size))
        return splat_gaussians(geometry, texture, *map_size, self.support)

    def draw(
        self, tokens: GPSTokens, scale: Scale, mode: str, plan: WorkPlan, progress: Progress | None = None
    ) -> Tensor:
        """Draws the whole canvas of tokens: -> (B, out_channels, height, width).

        Each tile's map is enlarged by `scale` and rounded to whole map pixels by itself, so that the map still
        consists of equal tiles: statistics and attention then cover the same parts of the picture as at its own size.

        Args:
            tokens: of whole images.
            scale: how much larger than its own size the canvas is to be.
            mode: "tile", each tile by itself, or "merge", all tiles as one picture.
            plan: how many tiles are drawn at once, and in which dtype.
            progress: hears of each part, where there are several.
        """
        tile_size = scaled((self.map_size, self.map_size), scale)
        if mode == "tile" or tokens.tile_grid == (1, 1):
            return self._draw_tiles(tokens, tile_size, plan, progress)
        side = plan.merged_window(tokens.tile_grid, tile_size)
        if side is not None:
            return self._draw_windows(tokens, tile_size, side, plan, progress)
        feature_map = self.paint(tokens.geometry, tokens.texture, tokens.tile_grid, tile_size)
        return self(_laid_out(feature_map, plan), tokens.tile_grid)

    def least_bytes(self, plan: WorkPlan) -> int:
        """The memory in which something can be drawn: one tile of the usual size."""
        return plan.map_bytes(1, (self.map_size, self.map_size))

    def _draw_tiles(self, tokens: GPSTokens, tile_size: Size, plan: WorkPlan, progress: Progress | None) -> Tensor:
        """Tile by tile, some at a time. tile_size: (height, width) of a tile in map pixels."""
        geometry, texture = tokens.split_tiles()
        _, map_size = self._on_map(tokens.geometry, tokens.tile_grid, tile_size)
        canvas = Canvas(tokens.batch_size, map_size, self.upscale, progress)
        places = [place.inner for place in windows_of_tiles(tokens.tile_grid, tile_size, side=1, halo=0)]
        step = plan.map_tiles(len(geometry), tokens.tile_grid, tile_size)
        for start in range(0, len(geometry), step):
            chunk = slice(start, start + step)
            feature_map = self.paint(geometry[chunk], texture[chunk], tile_size=tile_size)
            tiles = self(_laid_out(feature_map, plan))
            if len(tiles) == tokens.batch_size and len(places) == 1:
                return tiles
            for number, tile in enumerate(tiles, start):
                image, place = divmod(number, len(places))
                canvas.put(image, tile, places[place], places[place])
        return canvas.pictures

    def _draw_windows(
        self, tokens: GPSTokens, tile_size: Size, side: int, plan: WorkPlan, progress: Progress | None
    ) -> Tensor:
        """Merged decoding of a large canvas, a window of `side` x `side` tiles at a time with one tile around it.

        Statistics of distant tiles do not reach a window, so the result differs a little from that of one pass. In
        exchange, memory does not grow with the image.
        """
        geometry, map_size = self._on_map(tokens.geometry, tokens.tile_grid, tile_size)
        canvas = Canvas(tokens.batch_size, map_size, self.upscale, progress)
        for image in range(tokens.batch_size):
            for inner, painted in windows_of_tiles(tokens.tile_grid, tile_size, side, halo=1):
                feature_map = self._paint_window(geometry[image], tokens.texture[image], map_size, painted)
                grid = (painted.size[0] // tile_size[0], painted.size[1] // tile_size[1])
                canvas.put(image, self(_laid_out(feature_map, plan), grid)[0], inner, painted)
        return canvas.pictures

    def _paint_window(self, geometry: Tensor, texture: Tensor, map_size: Size, window: Window) -> Tensor:
        """What [`paint`] splats in a window, by the tokens that reach it: (1, in_channels, window's h, w).

        geometry: (N, 5) in coordinates of the map of `map_size`; texture: (N, in_channels).
        """
        own = window_geometry(geometry, map_size, window)
        near = touches(own, self.support, 0.0, window.size)
        return splat_gaussians(own[near][None], texture[near][None], *window.size, self.support)

    def _on_map(self, geometry: Tensor, tile_grid: Grid, tile_size: Size) -> tuple[Tensor, Size]:
        """Geometry in coordinates of a map of tiles of `tile_size`, and that map's (height, width)."""
        own = tuple(tiles * self.map_size for tiles in tile_grid)
        map_size = tuple(tiles * side for tiles, side in zip(tile_grid, tile_size, strict=True))
        # The coordinates end at the centres of the first and last map pixel, which lie elsewhere in a finer map.
        return geometry if map_size == own else map_geometry(geometry, own, map_size), map_size


def _laid_out(feature_map: Tensor, plan: WorkPlan) -> Tensor:
    return feature_map.to(plan.dtype, memory_format=torch.channels_last)
