"""A small, strictly local decoder: tokens paint a lattice of features, convolutions draw the picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tokens import GPSTokens
from .canvas import Canvas, Progress, Scale, scaled
from .lattice_painter import LatticePainter
from .norms import PixelNorm
from .windows import Size, Window, windows_on_cells
from .work_plan import WorkPlan

# Blocks at twice the map's resolution: four times the memory traffic of one below, and little left to decide.
NUM_FINE_LAYERS = 1


class LocalBlock(nn.Module):
    """Residual block of two steps, PixelNorm and a 3x3 convolution; (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = PixelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = PixelNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.conv1(self.norm1(x))
        return self.conv2(self.norm2(x)).add_(residual)  # in place, as in the stem


class LatticeDecoder(nn.Module):
    """Tokens to picture by local steps alone, so that any window of a picture can be decoded by itself.

    `paint` splats the tokens as lattices of features ([`LatticePainter`]). `forward` draws the picture of a painted
    map: residual convolutions at the map's resolution, then at twice that, then a pixel shuffle. `draw` does both for
    pictures of any size.

    There is no attention and no statistic over the map, and a token's place matters only through where it paints. A
    token's influence ends within [`receptive_px`] map pixels of what it paints: tiles merge without seams, editing a
    token leaves distant pixels exactly as they were, and memory is bounded by the window.

    Args:
        in_channels: texture channels of a token.
        out_channels: image channels.
        block_out_channels: (channels at twice the map's resolution, channels at the map's resolution).
        num_layers: residual blocks at the map's resolution; one follows at twice that.
        map_size: side of a tile's map, in map pixels.
        upscale: image pixels per map pixel along each axis, even.
        support: reach of a painted Gaussian, in sigmas.
        lattice_size: lattice points per token along each axis.
        lattice_channels: channels that each point paints.

    Shapes: painted map (B, lattice_channels + 1, h, w) -> picture (B, out_channels, h upscale, w upscale).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, int],
        num_layers: int,
        map_size: int,
        upscale: int,
        support: float,
        lattice_size: int,
        lattice_channels: int,
    ):
        super().__init__()
        if len(block_out_channels) != 2 or upscale % 2:
            raise ValueError(
                "A lattice decoder has two resolutions and enlarges its map an even number of times, got "
                f"decoder_block_out_channels={tuple(block_out_channels)} and sample_size / map_size = {upscale}."
            )
        fine, coarse = block_out_channels
        self.upscale, self.map_size = upscale, map_size
        # How many map pixels around an output block the convolutions look at.
        self.receptive_px = 2 + 2 * num_layers + (2 + 2 * NUM_FINE_LAYERS) // 2
        self.cell_px = 2 * self.receptive_px
        self.unfold_texture = LatticePainter(
            in_channels, 2 * coarse, lattice_size, lattice_channels, support, self.cell_px
        )
        self.conv_in = nn.Conv2d(lattice_channels + 1, coarse, 3, padding=1)
        self.blocks = nn.ModuleList(LocalBlock(coarse) for _ in range(num_layers))
        self.norm_mid = PixelNorm(coarse)
        self.conv_mid = nn.Conv2d(coarse, 4 * fine, 3, padding=1)
        self.fine_blocks = nn.ModuleList(LocalBlock(fine) for _ in range(NUM_FINE_LAYERS))
        self.norm_out = PixelNorm(fine)
        self.conv_out = nn.Conv2d(fine, out_channels * (upscale // 2) ** 2, 3, padding=1)
        self.gradient_checkpointing = False
        self.is_compiled = False

    def compile(self, *args, **kwargs) -> None:
        """Compiles the painter and the convolutions, each in place; arguments as of `torch.compile`."""
        super().compile(*args, **kwargs)
        self.unfold_texture.compile(*args, **kwargs)
        self.is_compiled = True

    def forward(self, feature_map: Tensor) -> Tensor:
        x = self.conv_in(feature_map)
        x = self._run(self.blocks, x)
        x = F.pixel_shuffle(self.conv_mid(self.norm_mid(x)), 2)
        x = self._run(self.fine_blocks, x)
        return F.pixel_shuffle(self.conv_out(self.norm_out(x)), self.upscale // 2)

    def _run(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        return x

    def paint(self, geometry: Tensor, texture: Tensor, map_size: Size, canvas_size: Size | None = None) -> Tensor:
        """Splats the tokens' lattices onto a whole map, see [`LatticePainter`].

        canvas_size: (height, width) in pixels of the canvas whose coordinates the geometry is in; None is the size of
        the picture that the map gives.

        Returns: (B, lattice_channels + 1, h, w), channels innermost, in the dtype of `texture`.
        """
        height, width = map_size
        painted = self.unfold_texture(
            geometry, texture, map_size, canvas_size or (height * self.upscale, width * self.upscale)
        )
        if self.is_compiled:  # its memory is the graph's, which the next graph may use
            painted = painted.clone()
        return painted.to(texture.dtype, memory_format=torch.channels_last)

    def draw(
        self, tokens: GPSTokens, scale: Scale, mode: str, plan: WorkPlan, progress: Progress | None = None
    ) -> Tensor:
        """Draws the whole canvas of tokens: -> (B, out_channels, height, width).

        In one pass, or window by window where the canvas is large.

        Args:
            tokens: of whole images.
            scale: how much larger than its own size the canvas is to be; its map is rounded to whole map pixels.
            mode: "tile" or "merge", which are the same here: the decoder is local, so tiles always merge.
            plan: how many pictures and which windows are drawn at once, and in which dtype.
            progress: hears of each part, where there are several.
        """
        map_size = scaled(tuple(tiles * self.map_size for tiles in tokens.tile_grid), scale)
        tokens = tokens.to(plan.dtype)
        density = tokens.num_tokens / (map_size[0] * map_size[1])
        longest = plan.local_window(map_size, density, self.cell_px)
        if longest is not None:
            return self._draw_windows(tokens, map_size, longest, plan, progress)
        step = plan.local_images(tokens.batch_size, map_size, density)
        canvas = Canvas(tokens.batch_size, map_size, self.upscale, progress)
        whole = Window(0, 0, *map_size)
        for start in range(0, tokens.batch_size, step):
            part = tokens[start : start + step]
            pictures = self(self.paint(part.geometry, part.texture, map_size, tokens.canvas_size))
            if len(pictures) == tokens.batch_size:
                return pictures
            for image, picture in enumerate(pictures, start):
                canvas.put(image, picture, whole, whole)
        return canvas.pictures

    def least_bytes(self, plan: WorkPlan) -> int:
        """The memory in which something can be drawn: the smallest window, with tokens as densely as usual."""
        return plan.local_bytes((2 * self.cell_px, 2 * self.cell_px), plan.config.num_tokens / self.map_size**2)

    def _draw_windows(
        self, tokens: GPSTokens, map_size: Size, longest: int, plan: WorkPlan, progress: Progress | None
    ) -> Tensor:
        """Window by window with as much of the map around it as the convolutions look at: the same picture.

        longest: side of a painted window, in map pixels.
        """
        painter = self.unfold_texture
        canvas = Canvas(tokens.batch_size, map_size, self.upscale, progress)
        for image in range(tokens.batch_size):
            own = tokens[image]
            whole = near = None
            if plan.is_painted_at_once(map_size):
                whole = self.paint(own.geometry, own.texture, map_size, tokens.canvas_size)
            for row in windows_on_cells(map_size, longest, self.cell_px):
                if whole is None:
                    # Found once for a row of windows, so that the search does not grow with the picture squared.
                    strip = Window(row[0].painted.top, 0, row[0].painted.bottom, map_size[1])
                    near = painter.tokens_near(own.geometry[0], own.texture[0], tokens.canvas_size, map_size, strip)
                for inner, window in row:
                    if whole is None:
                        feature_map = painter.paint_window(*near, map_size, window, tokens.canvas_size).to(plan.dtype)
                    else:
                        feature_map = whole[..., window.top : window.bottom, window.left : window.right]
                    # `forward`, not a call: windows have many sizes, and each would be compiled anew.
                    picture = self.forward(feature_map.contiguous(memory_format=torch.channels_last))
                    canvas.put(image, picture[0], inner, window)
        return canvas.pictures
