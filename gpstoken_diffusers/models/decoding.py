"""Tokens to pictures: at their own size or another, tile by tile or merged, in windows where the canvas is large."""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from ..ops.splat import splat_gaussians
from ..tiling import put_tiles
from ..tokens import GPSTokens
from .lattice_decoder import map_geometry
from .windows import Size, Window, touches, window_geometry, windows_on_cells

# So many are looked through at once for those that reach a window.
TOKENS_AT_ONCE = 2**15


class DecodingMixin:
    """The decoding half of [`AutoencoderGPSToken`]; uses its `config`, `decoder`, `use_tiling` and `_lasting`.

    How many tiles pass at once and how large windows are is up to [`MemoryBudgetMixin`].
    """

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
            ValueError: an empty batch, another number of texture channels, a canvas that is not whole tiles, an unknown
                mode, a size below 1, or a memory budget that is too small.
            TypeError: a size that is not two ints.

        Another size: Gaussians have no pixels, so they are splatted onto a feature map that is larger or smaller by
        the same ratio, rounded to whole map pixels, and the same convolutions draw the picture. A decoder of type
        "map" rounds each tile by itself, so that the map still consists of equal tiles: its statistics and its
        attention then cover the same parts of the picture as at its own size. What rounding leaves to the size asked
        for is resampled (bicubic with antialiasing); where it leaves nothing, nothing is.

        The convolutions were trained at one size, and fine texture comes out otherwise at another. A picture decoded
        at its own size and then resampled is closer to the resampled original: with gpstoken-mini by 2.5 dB at twice
        the size and by 10 dB at half of it. Time and memory go with the pixels of the result (the attention of a "map"
        decoder takes time with the square of a tile's), so that a small picture is cheaper here.
        """
        config = self.config
        if isinstance(tokens, Tensor):
            tokens = GPSTokens.from_tensor(tokens, (config.sample_size, config.sample_size))
        if tokens.batch_size == 0:
            raise ValueError("There are no tokens of any image to decode: the batch is empty.")
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
        tile_size = tile_size or (self.config.map_size, self.config.map_size)
        map_size = tuple(tiles * side for tiles, side in zip(tokens.tile_grid, tile_size, strict=True))
        geometry = self._geometry_on_map(tokens, map_size)
        return splat_gaussians(geometry, tokens.texture, *map_size, self.config.support)

    def _decode_map(self, tokens: GPSTokens, mode: str, scale: tuple[Fraction, Fraction]) -> Tensor:
        tile_size = _scaled((self.config.map_size, self.config.map_size), scale)
        if mode == "tile" or tokens.tile_grid == (1, 1):
            return self._decode_tiles(tokens, tile_size)
        window_tiles = self._merged_window(tokens.tile_grid, tile_size)
        if window_tiles is None:
            # A budget is for one picture in one pass; without one, all pictures of a batch go together.
            together = [tokens] if self.memory_budget is None else tokens
            maps = (self.render(part, tile_size).to(self.dtype, memory_format=torch.channels_last) for part in together)
            pictures = [self._lasting(self.decoder(feature_map, tokens.tile_grid)) for feature_map in maps]
            return pictures[0] if len(pictures) == 1 else torch.cat(pictures)
        return self._decode_merged_windows(tokens, tile_size, window_tiles)

    def _decode_tiles(self, tokens: GPSTokens, tile_size: Size) -> Tensor:
        """Tile by tile, some at a time. tile_size: (height, width) of a tile in map pixels."""
        grid, canvas_size = tokens.tile_grid, (self.config.sample_size, self.config.sample_size)
        geometry, texture = tokens.split_tiles()
        canvas = None
        step = self._map_tiles(len(geometry), grid, tile_size)
        for start in range(0, len(geometry), step):
            chunk = slice(start, start + step)
            feature_map = self.render(GPSTokens(geometry[chunk], texture[chunk], canvas_size), tile_size)
            tiles = self._lasting(self.decoder(feature_map.to(self.dtype, memory_format=torch.channels_last)))
            if grid == (1, 1) and len(tiles) == len(geometry):
                return tiles
            if canvas is None:
                map_size = (grid[0] * tile_size[0], grid[1] * tile_size[1])
                canvas = self._empty_canvas(tiles, tokens.batch_size, map_size)
            put_tiles(canvas, tiles, start, grid)
        return canvas

    def _decode_merged_windows(self, tokens: GPSTokens, tile_size: Size, window_tiles: int) -> Tensor:
        """Merged decoding of a large canvas, a window of tiles at a time with one tile around it.

        Statistics of distant tiles do not reach a window, so this is not bit for bit what one pass would give, but its
        memory does not grow with the image.

        tile_size: (height, width) of a tile in map pixels.
        """
        rows, cols = tokens.tile_grid
        map_height, map_width = tile_size
        map_size = (rows * map_height, cols * map_width)
        geometry = self._geometry_on_map(tokens, map_size)
        canvas = None
        for image in range(tokens.batch_size):
            for top in range(0, rows, window_tiles):
                for left in range(0, cols, window_tiles):
                    bottom, right = min(top + window_tiles, rows), min(left + window_tiles, cols)
                    inner, painted = (
                        Window(y0 * map_height, x0 * map_width, y1 * map_height, x1 * map_width)
                        for y0, x0, y1, x1 in (
                            (top, left, bottom, right),
                            (max(top - 1, 0), max(left - 1, 0), min(bottom + 1, rows), min(right + 1, cols)),
                        )
                    )
                    feature_map = self._render_window(geometry[image], tokens.texture[image], map_size, painted)
                    grid = (painted.size[0] // map_height, painted.size[1] // map_width)
                    picture = self.decoder(feature_map.to(self.dtype, memory_format=torch.channels_last), grid)
                    if canvas is None:
                        canvas = self._empty_canvas(picture, tokens.batch_size, map_size)
                    self._put_window(canvas[image], picture[0], inner, painted)
        return canvas

    def _render_window(self, geometry: Tensor, texture: Tensor, map_size: Size, window: Window) -> Tensor:
        """What [`render`] paints in a window, by the tokens that reach it: (1, texture_channels, window's h, w).

        geometry: (N, 5) in coordinates of the map of `map_size`; texture: (N, texture_channels).
        """
        own = window_geometry(geometry, map_size, window)
        near = touches(own, self.config.support, 0.0, window.size)
        return splat_gaussians(own[near][None], texture[near][None], *window.size, self.config.support)

    def _decode_local(self, tokens: GPSTokens, scale: tuple[Fraction, Fraction]) -> Tensor:
        """Decodes with the lattice decoder: in one pass, or window by window where the canvas is large."""
        map_size = _scaled(tuple(tiles * self.config.map_size for tiles in tokens.tile_grid), scale)
        density = tokens.num_tokens / (map_size[0] * map_size[1])
        longest = self._local_window(map_size, density)
        if longest is not None:
            return self._decode_local_windows(tokens, map_size, longest)
        step, parts = self._local_images(tokens.batch_size, map_size, density), []
        for start in range(0, tokens.batch_size, step):
            chunk = slice(start, start + step)
            texture = tokens.texture[chunk].to(self.dtype)
            picture = self.decoder(tokens.geometry[chunk], texture, map_size, tokens.canvas_size)
            parts.append(self._lasting(picture))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode_local_windows(self, tokens: GPSTokens, map_size: Size, longest: int) -> Tensor:
        """Window by window with as much of the map around it as the convolutions look at: the same picture.

        longest: side of a painted window, in map pixels.
        """
        decoder = self.decoder
        canvas = self._empty_canvas(tokens.texture.to(self.dtype), tokens.batch_size, map_size)
        for image in range(tokens.batch_size):
            geometry, texture = tokens.geometry[image], tokens.texture[image].to(self.dtype)
            whole = None
            if self._is_painted_at_once(map_size):
                whole = decoder.paint(geometry[None], texture[None], map_size, tokens.canvas_size).to(self.dtype)
            for row in windows_on_cells(map_size, longest, decoder.cell_px):
                # Tokens of a row of windows are found once, so that the search does not grow with the picture squared.
                strip = Window(row[0].painted.top, 0, row[0].painted.bottom, map_size[1])
                near = None if whole is not None else self._tokens_near(geometry, texture, tokens, map_size, strip)
                for inner, painted in row:
                    self._put_window(canvas[image], self._draw_window(whole, near, map_size, painted), inner, painted)
        return canvas

    def _tokens_near(
        self, geometry: Tensor, texture: Tensor, tokens: GPSTokens, map_size: Size, window: Window
    ) -> tuple[Tensor, Tensor]:
        """Geometry (n, 5), in coordinates of the map, and texture (n, C) of the tokens that may paint into a window.

        Some tokens at a time: a large picture has hundreds of thousands, and the search makes several copies.
        """
        found = []
        for start in range(0, len(geometry), TOKENS_AT_ONCE):
            chunk = slice(start, start + TOKENS_AT_ONCE)
            moved = map_geometry(geometry[chunk], tokens.canvas_size, map_size)
            near = self.decoder.reaches(moved, map_size, window)
            found.append((moved[near], texture[chunk][near]))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def _draw_window(
        self, whole: Tensor | None, tokens: tuple[Tensor, Tensor] | None, map_size: Size, window: Window
    ) -> Tensor:
        """The picture (out_channels, height, width) of a window, of the painted map or else of tokens near it."""
        if whole is None:
            feature_map = self.decoder.paint_window(*tokens, map_size, window)
        else:
            feature_map = whole[..., window.top : window.bottom, window.left : window.right]
        feature_map = feature_map.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.decoder.render(feature_map)[0]

    def _geometry_on_map(self, tokens: GPSTokens, map_size: Size) -> Tensor:
        own = tuple(tiles * self.config.map_size for tiles in tokens.tile_grid)
        # The coordinates end at the centres of the first and last map pixel, which lie elsewhere in a finer map.
        return tokens.geometry if map_size == own else map_geometry(tokens.geometry, own, map_size)

    def _empty_canvas(self, like: Tensor, batch_size: int, map_size: Size) -> Tensor:
        upscale = self.config.sample_size // self.config.map_size
        return like.new_empty(batch_size, self.config.out_channels, *(side * upscale for side in map_size))

    def _put_window(self, canvas: Tensor, picture: Tensor, inner: Window, painted: Window) -> None:
        """Writes the inner part of what a painted window gave to its place; both (out_channels, height, width)."""
        upscale = self.config.sample_size // self.config.map_size
        top, left, bottom, right = (side * upscale for side in inner)
        y0, x0 = painted.top * upscale, painted.left * upscale
        canvas[:, top:bottom, left:right] = picture[:, top - y0 : bottom - y0, left - x0 : right - x0]


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
