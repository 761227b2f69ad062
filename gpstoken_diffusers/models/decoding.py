"""Tokens to pictures: at their own size or another, tile by tile or merged, in windows where the canvas is large."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from ..ops.splat import splat_gaussians
from ..tiling import join_tiles
from ..tokens import GPSTokens
from .lattice_decoder import Size, map_geometry

# Tiles that pass through the networks at once when an image has several, and the side, in tiles, of the window that a
# merged or a local decoding covers at once. Together they bound the memory, whatever the image's size. At another
# size, these are so many tiles' worth of map pixels.
TILES_AT_ONCE = 4
MERGED_WINDOW_TILES = 4
LOCAL_WINDOW_TILES = 2


class DecodingMixin:
    """The decoding half of [`AutoencoderGPSToken`]; reads its `config`, `decoder`, `use_slicing` and `use_tiling`."""

    @apply_forward_hook
    def decode(
        self,
        tokens: GPSTokens | Tensor,
        *,
        mode: str | None = None,
        size: Size | None = None,
        return_dict: bool = True,
    ) -> DecoderOutput | tuple[Tensor]:
        """Turns tokens into images.

        Args:
            tokens: the tokens, or a tensor (B, N, 5 + texture_channels) that stands for images of one tile.
            mode: "merge" or "tile" for images of several tiles, see the class; None takes the configured one, or
                "tile" after `enable_tiling()`.
            size: (height, width) in pixels of the result, each at least 1, in any ratio; None is the pictures' own
                size. See below.
            return_dict: whether to return a `DecoderOutput` or a tuple.

        Returns: `sample` (B, out_channels, height, width) around [-1, 1], not clamped.

        Raises:
            ValueError: another number of texture channels, a canvas that is not whole tiles, an unknown mode, or a
                size below 1.
            TypeError: a size that is not two ints.

        Another size: Gaussians have no pixels, so they are splatted onto a feature map that is larger or smaller by
        the same ratio, rounded to whole map pixels, and the same convolutions draw the picture. A decoder of type
        "map" rounds each tile by itself, so that the map still consists of equal tiles: its statistics and its
        attention then cover the same parts of the picture as at its own size. What rounding leaves to the size asked
        for is resampled (bicubic with antialiasing); where it leaves nothing, nothing is.

        The convolutions were trained at one size, and fine texture comes out otherwise at another. A picture decoded
        at its own size and then resampled is closer to the resampled original: with gpstoken-mini by 2 dB at twice
        the size and by 6 dB at half of it. Time and memory go with the pixels of the result (the attention of a "map"
        decoder takes time with the square of a tile's), so that a small picture is cheaper here.
        """
        config = self.config
        if isinstance(tokens, Tensor):
            tokens = GPSTokens.from_tensor(tokens, (config.sample_size, config.sample_size))
        if tokens.texture_channels != config.texture_channels:
            raise ValueError(
                f"This model's tokens have {config.texture_channels} texture channels, these have "
                f"{tokens.texture_channels}. They come from another model."
            )
        mode = mode or ("tile" if self.use_tiling else config.decode_mode)
        if mode not in ("merge", "tile"):
            raise ValueError(f'mode must be "merge" or "tile", got {mode!r}.')
        rows, cols = tokens.tile_grid
        if tokens.canvas_size != (rows * config.sample_size, cols * config.sample_size):
            raise ValueError(
                f"A canvas of {rows} x {cols} tiles of this model has {rows * config.sample_size} x "
                f"{cols * config.sample_size} pixels, the tokens have {tokens.canvas_size}."
            )
        size = tokens.image_size if size is None else _checked_size(size)
        scale = tuple(Fraction(wanted, own) for wanted, own in zip(size, tokens.image_size, strict=True))
        if config.decoder_type == "lattice":
            canvas = self._decode_local(tokens, scale)
        else:
            canvas = self._decode_map(tokens, mode, scale)
        sample = _fit(canvas, tokens.canvas_size, scale, size)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def render(self, tokens: GPSTokens, tile_size: Size | None = None) -> Tensor:
        """Splats texture onto the feature map of the whole canvas; for `decoder_type="map"`.

        tile_size: (height, width) of a tile in map pixels; None is what the model was trained with.

        Returns: (B, texture_channels, rows height, cols width) in the tokens' dtype, accumulated in float32.
        """
        own = tuple(tiles * self.config.map_size for tiles in tokens.tile_grid)
        geometry, size = tokens.geometry, own
        if tile_size is not None:
            size = tuple(tiles * side for tiles, side in zip(tokens.tile_grid, tile_size, strict=True))
        if size != own:
            # The coordinates end at the centres of the first and last map pixel, which lie elsewhere in a finer map.
            geometry = map_geometry(geometry, own, size)
        return splat_gaussians(geometry, tokens.texture, *size, self.config.support)

    def _decode_map(self, tokens: GPSTokens, mode: str, scale: tuple[Fraction, Fraction]) -> Tensor:
        config, grid = self.config, tokens.tile_grid
        tile_size = _scaled((config.map_size, config.map_size), scale)
        if mode == "tile" or grid == (1, 1):
            geometry, texture = tokens.split_tiles()
            canvas_size = (config.sample_size, config.sample_size)
            tiles = []
            for chunk in self._chunks(len(geometry), grid, tile_size):
                feature_map = self.render(GPSTokens(geometry[chunk], texture[chunk], canvas_size), tile_size)
                tiles.append(self.decoder(feature_map.to(self.dtype, memory_format=torch.channels_last)))
            return join_tiles(torch.cat(tiles), grid)
        window_tiles = min(MERGED_WINDOW_TILES, max(1, MERGED_WINDOW_TILES * config.map_size // max(tile_size)))
        if max(grid) <= window_tiles + 2:
            feature_map = self.render(tokens, tile_size).to(self.dtype, memory_format=torch.channels_last)
            return self.decoder(feature_map, grid)
        return self._decode_merged_windows(tokens, tile_size, window_tiles)

    def _decode_merged_windows(self, tokens: GPSTokens, tile_size: Size, window_tiles: int) -> Tensor:
        """Merged decoding of a large canvas, a window of tiles at a time with one tile around it.

        Statistics of distant tiles do not reach a window, so this is not bit for bit what one pass would give, but its
        memory does not grow with the image.

        tile_size: (height, width) of a tile in map pixels.
        """
        (rows, cols), (map_height, map_width) = tokens.tile_grid, tile_size
        upscale = self.config.sample_size // self.config.map_size
        height, width = map_height * upscale, map_width * upscale
        feature_map = self.render(tokens, tile_size)
        canvas = feature_map.new_empty(
            (tokens.batch_size, self.config.out_channels, rows * height, cols * width), dtype=self.dtype
        )
        for row in range(0, rows, window_tiles):
            for col in range(0, cols, window_tiles):
                bottom, right = min(row + window_tiles, rows), min(col + window_tiles, cols)
                top_halo, left_halo = max(row - 1, 0), max(col - 1, 0)
                bottom_halo, right_halo = min(bottom + 1, rows), min(right + 1, cols)
                window = feature_map[
                    ...,
                    top_halo * map_height : bottom_halo * map_height,
                    left_halo * map_width : right_halo * map_width,
                ]
                grid = (bottom_halo - top_halo, right_halo - left_halo)
                picture = self.decoder(window.to(self.dtype, memory_format=torch.channels_last), grid)
                top, left = (row - top_halo) * height, (col - left_halo) * width
                canvas[..., row * height : bottom * height, col * width : right * width] = picture[
                    ..., top : top + (bottom - row) * height, left : left + (right - col) * width
                ]
        return canvas

    def _decode_local(self, tokens: GPSTokens, scale: tuple[Fraction, Fraction]) -> Tensor:
        """Decodes with the lattice decoder: painted once, convolved window by window where the canvas is large."""
        tile = self.config.map_size
        map_size = _scaled(tuple(tiles * tile for tiles in tokens.tile_grid), scale)
        large = map_size[0] * map_size[1] > TILES_AT_ONCE * tile**2
        parts = []
        for chunk in self._chunks(tokens.batch_size, (1, 1), map_size):
            geometry, texture = tokens.geometry[chunk], tokens.texture[chunk].to(self.dtype)
            decode = self._decode_local_windows if large else self.decoder
            parts.append(decode(geometry, texture, map_size, tokens.canvas_size))
        return torch.cat(parts)

    def _decode_local_windows(self, geometry: Tensor, texture: Tensor, map_size: Size, canvas_size: Size) -> Tensor:
        """Window by window with as much of the map around it as the convolutions look at: the same picture."""
        decoder, (height, width) = self.decoder, map_size
        halo, upscale, side = decoder.receptive_px, decoder.upscale, LOCAL_WINDOW_TILES * self.config.map_size
        feature_map = decoder.paint(geometry, texture, map_size, canvas_size).to(self.dtype)
        canvas = feature_map.new_empty(len(geometry), self.config.out_channels, height * upscale, width * upscale)
        for top in range(0, height, side):
            for left in range(0, width, side):
                bottom, right = min(top + side, height), min(left + side, width)
                y0, x0 = max(top - halo, 0), max(left - halo, 0)
                window = feature_map[..., y0 : bottom + halo, x0 : right + halo]
                picture = decoder.render(window.contiguous(memory_format=torch.channels_last))
                canvas[..., top * upscale : bottom * upscale, left * upscale : right * upscale] = picture[
                    ...,
                    (top - y0) * upscale : (bottom - y0) * upscale,
                    (left - x0) * upscale : (right - x0) * upscale,
                ]
        return canvas

    def _chunks(self, count: int, tile_grid: tuple[int, int], map_size: Size | None = None) -> Iterator[slice]:
        """Splits a batch of tiles: all at once for images of one tile, a few at a time for larger ones.

        map_size: (height, width) of each in map pixels, if larger than usual: then fewer at a time.
        """
        if self.use_slicing:
            step = 1
        else:
            step = count if tile_grid == (1, 1) else TILES_AT_ONCE
        if map_size is not None and tile_grid != (1, 1):
            step = max(1, min(step, TILES_AT_ONCE * self.config.map_size**2 // (map_size[0] * map_size[1])))
        return (slice(start, start + step) for start in range(0, count, step))


def _checked_size(size: Size) -> Size:
    # bool is an int to Python, but never a number of pixels.
    if not isinstance(size, (tuple, list)) or [type(side) is int for side in size] != [True, True]:
        raise TypeError(f"size must be two ints (height, width), got {size!r}.")
    if min(size) < 1:
        raise ValueError(f"size must be at least 1 px along both axes (height, width), got {tuple(size)}.")
    return (size[0], size[1])


def _scaled(map_size: Size, scale: tuple[Fraction, Fraction]) -> Size:
    """(height, width) of a map enlarged by `scale`, in whole map pixels."""
    return tuple(max(1, round(side * ratio)) for side, ratio in zip(map_size, scale, strict=True))


def _fit(canvas: Tensor, canvas_size: Size, scale: tuple[Fraction, Fraction], size: Size) -> Tensor:
    """Cuts the picture out of its scaled canvas, resampling first where the canvas is not exactly of its scale.

    Args:
        canvas: (B, C, h, w), the whole canvas as it was decoded.
        canvas_size: (height, width) in pixels of the canvas at its own size.
        scale: how much larger the picture is to be, vertically and horizontally.
        size: (height, width) of the picture, the canvas's top left part.
    """
    wanted = tuple(side * ratio for side, ratio in zip(canvas_size, scale, strict=True))  # exact, maybe no integers
    if canvas.shape[-2:] != wanted:
        # By factors rather than to a size, so that places are exact although a padded canvas may end within a pixel.
        # The length is the floor of length times factor, in float64: a little more keeps an integer from falling.
        factors = tuple(
            float(length / side) * (1 + 1e-12) for length, side in zip(wanted, canvas.shape[-2:], strict=True)
        )
        resampled = F.interpolate(canvas.float(), scale_factor=factors, mode="bicubic", antialias=True)
        canvas = resampled.to(canvas.dtype)
    return canvas[..., : size[0], : size[1]]
