"""How an autoencoder divides its work: tiles at once and sizes of windows, by the memory that it may work in."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import FrozenDict

from ..layouts import of_pictures
from .region_sizes import NUM_SIZES
from .windows import Grid, Size

# Without a budget: how many tiles pass through the networks at once when an image has several, and the side, in tiles,
# of the window that a merged or a local decoding covers at once. At another size, as many map pixels as these tiles.
TILES_AT_ONCE = 4
MERGED_WINDOW_TILES = 4
LOCAL_WINDOW_TILES = 2

# Estimates count the tensors that are alive at the worst moment. The rest (norm statistics, scratch of threads, what
# the allocator rounds up) is a share of them, and a number of bytes whatever the size: the first convolutions of a
# process leave some 15 MB behind.
MARGIN = 1.2
FIXED_BYTES = 16 * 2**20
FLOAT32 = 4

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_memory(size: int | str) -> int:
    """Bytes of a size: an int, or text such as "800MB", "1.5 GB" (powers of 1000) or "1GiB" (powers of 1024).

    Raises:
        TypeError: neither an int nor text.
        ValueError: text of another form, or less than one byte.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f'a memory budget is a number of bytes or text such as "1GB", got {size!r}.')
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is None:
            raise ValueError(f'a memory budget is a number of bytes or text such as "800MB" or "1GiB", got {size!r}.')
        number, prefix, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))
    if size < 1:
        raise ValueError(f"a memory budget must be at least one byte, got {size}.")
    return size


@dataclass(frozen=True)
class WorkPlan:
    """How work is divided, at the present state of a model.

    Sizes are (height, width) in map pixels. Methods that choose a number raise ValueError where the budget is too
    small for a single tile or the smallest window; the message says the least that works.

    Attributes:
        config: of the `AutoencoderGPSToken`.
        dtype: what its networks compute in.
        budget: bytes to work in; None is no budget.
        slicing: whether tiles and pictures go one by one (`enable_slicing`).
    """

    config: FrozenDict
    dtype: torch.dtype
    budget: int | None = None
    slicing: bool = False

    def check_room(self, needed: int, what: str) -> None:
        """Raises ValueError if the budget has no room for `needed` bytes."""
        if self.budget is not None and self.budget < needed:
            raise ValueError(
                f"A memory budget of {_megabytes(self.budget)} is too small for {what}: it takes at least "
                f"{_megabytes(needed)}."
            )

    # Encoding

    def encoding_bytes(self, tiles: int, num_tokens: int) -> int:
        """Bytes that it takes to encode `tiles` tiles of `num_tokens` tokens at once."""
        config, item = self.config, self.dtype.itemsize
        pixels = config.in_channels * config.sample_size**2
        features = config.stem_channels * (config.sample_size // config.stem_patch_size) ** 2
        # A tile is cut out, cast, and unshuffled. A block of the stem holds its input, a norm and two convolutions.
        stem = pixels * (FLOAT32 + 2 * item) + 4 * features * item
        # RoIAlign's cells, and what they are arranged to for the layer that reads them.
        cells = num_tokens * config.stem_channels * config.roi_size**2
        reading = (features + 2 * cells) * item
        layers = config.num_layers + 1 if config.region_reading == "pool" else 1
        hidden = num_tokens * config.hidden_size * item
        # A reading for each layer with its product before the bias, then a block: its input, norm, a feed-forward of
        # four times the width before and after its activation, and attention, which takes less.
        refining = features * item + num_tokens * layers * config.stem_channels * item + hidden * (2 * layers + 12)
        picturing = 0
        if config.region_pixels:
            # The tile with half of its width around it, twice; each region's small picture in both dtypes; its texture
            # by each size, before and after these are weighed. The tile and all readings stay.
            pictures = num_tokens * config.in_channels * (config.region_pixels + 2 * (config.region_pixels // 4)) ** 2
            textures = 2 * FLOAT32 * num_tokens * config.texture_channels * NUM_SIZES
            kept = (pixels + features) * item + hidden * (layers + 2)
            picturing = kept + 2 * 1.5**2 * pixels * item + pictures * (FLOAT32 + item) + textures
            refining += pixels * item
        return int(tiles * max(stem, reading, refining, picturing) * MARGIN) + FIXED_BYTES

    def partition_tiles(self) -> int:
        """How many tiles are partitioned at once."""
        if self.budget is None:
            return of_pictures.TILES_AT_ONCE
        # A tile's pixels, sums of its channels, and its importance, in float32 and float64; by error, two tables of
        # 64-bit sums for each channel.
        channels, tables = self.config.in_channels, 4 * (self.config.partition_criterion == "error")
        each = FLOAT32 * (channels + 8 + tables * channels) * self.config.sample_size**2
        return max(1, min(of_pictures.TILES_AT_ONCE, (self.budget - FIXED_BYTES) // each))

    def encoding_tiles(self, count: int, tile_grid: Grid, num_tokens: int) -> int:
        """How many of `count` tiles pass through the encoder at once."""
        each = self.encoding_bytes(1, num_tokens)
        self.check_room(each, f"encoding tiles of {num_tokens} tokens")
        if self.slicing:
            return 1
        if self.budget is None:
            return max(1, count) if tile_grid == (1, 1) else TILES_AT_ONCE
        return (self.budget - FIXED_BYTES) // (each - FIXED_BYTES)

    # Decoding with a "map" decoder

    def map_bytes(self, tiles: int, tile_size: Size) -> int:
        """Bytes that it takes a "map" decoder to draw `tiles` tiles of `tile_size` at once."""
        config, item = self.config, self.dtype.itemsize
        widths = config.decoder_block_out_channels
        pixels = tile_size[0] * tile_size[1]
        worst = 0
        for level, width in enumerate(widths):  # finest first
            before = widths[min(level + 1, len(widths) - 1)]
            # The first block of a resolution holds its input, that normed, the shortcut and a convolution. In half
            # precision, wide convolutions take as much again for themselves (measured on a CPU).
            channels = 2 * before + 2 * width
            worst = max(worst, channels * FLOAT32 * pixels * 4 ** (len(widths) - 1 - level))
        # Attention over a tile's map pixels holds maps only: its weights come and go in blocks.
        attention = pixels * item * 8 * widths[-1]
        painted = config.texture_channels * (FLOAT32 + 2 * item) * pixels
        return int(tiles * (max(worst, attention) + painted) * MARGIN) + FIXED_BYTES

    def map_tiles(self, count: int, tile_grid: Grid, tile_size: Size) -> int:
        """How many of `count` tiles a "map" decoder draws at once, each by itself."""
        each = self.map_bytes(1, tile_size)
        self.check_room(each, f"decoding a tile at {_pixels(tile_size)}")
        if self.slicing:
            return 1
        if self.budget is not None:
            return (self.budget - FIXED_BYTES) // (each - FIXED_BYTES)
        if tile_grid == (1, 1):
            return max(1, count)
        usual = TILES_AT_ONCE * self.config.map_size**2 // (tile_size[0] * tile_size[1])
        return max(1, min(TILES_AT_ONCE, usual))

    def merged_window(self, tile_grid: Grid, tile_size: Size) -> int | None:
        """Side in tiles of the windows of a merged decoding, without the tile around each.

        None is all pictures of a batch in one pass, each as one window. With a budget, one picture follows the other.
        """
        usual = min(MERGED_WINDOW_TILES, max(1, MERGED_WINDOW_TILES * self.config.map_size // max(tile_size)))
        whole = max(tile_grid) <= usual + 2
        if self.budget is None:
            return None if whole else usual

        def needed(side: int) -> int:
            return self.map_bytes(math.prod(min(length, side + 2) for length in tile_grid), tile_size)

        if whole and needed(usual) <= self.budget:
            return max(tile_grid)
        self.check_room(needed(1), f'decoding tiles at {_pixels(tile_size)} with mode="merge" (mode="tile" needs less)')
        return max(side for side in range(1, usual + 1) if needed(side) <= self.budget)

    # Decoding with a "lattice" or a "patch" decoder

    @property
    def _map_channels(self) -> int:
        """Channels of a painted map."""
        config = self.config
        pixels = (config.sample_size // config.map_size) ** 2 if config.decoder_type == "patch" else 1
        return (config.lattice_channels + 1) * pixels

    def _local_pixel_bytes(self, tokens_per_pixel: float) -> float:
        """Bytes per map pixel of a window that a lattice decoder draws."""
        config, item = self.config, self.dtype.itemsize
        fine, coarse = config.decoder_block_out_channels
        map_channels = self._map_channels
        # A residual block holds its input, two norms or convolutions on the way, and its result; the finer resolution
        # has four pixels to a map pixel.
        drawing = 4 * item * max(4 * fine, coarse) + map_channels * (FLOAT32 + item)
        # The perceptron's two layers before and after the activation, what the lattice's points paint, once for all
        # and once by cells, and the points' geometry. Cells share tokens, and are filled up to the fullest.
        points = config.lattice_size**2
        painted = config.lattice_channels + 1
        token = 4 * coarse * item + points * (config.lattice_channels * item + FLOAT32 * (3 * painted + 10))
        if config.decoder_type == "patch":
            token += FLOAT32 * NUM_SIZES * (config.texture_channels + 1)
        painting = 2 * token * tokens_per_pixel + 3 * FLOAT32 * map_channels
        return max(drawing, painting) * MARGIN

    def local_bytes(self, map_size: Size, tokens_per_pixel: float) -> int:
        """Bytes that a window of `map_size` takes, by how densely tokens lie on the map."""
        return int(map_size[0] * map_size[1] * self._local_pixel_bytes(tokens_per_pixel)) + FIXED_BYTES

    def local_images(self, count: int, map_size: Size, tokens_per_pixel: float) -> int:
        """How many of `count` pictures a lattice decoder draws at once, where it draws each in one pass."""
        if self.slicing:
            return 1
        if self.budget is None:
            return max(1, count)
        return max(1, (self.budget - FIXED_BYTES) // (self.local_bytes(map_size, tokens_per_pixel) - FIXED_BYTES))

    def local_window(self, map_size: Size, tokens_per_pixel: float, cell_px: int) -> int | None:
        """Longest side of a painted window of one picture; None where one window covers the map.

        cell_px: see [`LatticePainter`]; a window has at least two cells along each axis.
        """
        at_once = self.is_painted_at_once(map_size)
        if self.budget is None:
            return None if at_once else LOCAL_WINDOW_TILES * self.config.map_size + cell_px
        if at_once and self.local_bytes(map_size, tokens_per_pixel) <= self.budget:
            return None
        painted = 0
        if at_once:  # the map of all windows stays
            painted = 2 * FLOAT32 * self._map_channels * map_size[0] * map_size[1]
        least = 2 * cell_px
        smallest = (min(least, map_size[0]), min(least, map_size[1]))
        needed = painted + self.local_bytes(smallest, tokens_per_pixel)
        self.check_room(needed, f"decoding a map of {_pixels(map_size)}")
        room = (self.budget - painted - FIXED_BYTES) / self._local_pixel_bytes(tokens_per_pixel)
        # A map that is short along one axis leaves more for the other.
        return max(least, int(max(math.sqrt(room), room / min(map_size))))

    def is_painted_at_once(self, map_size: Size) -> bool:
        """Whether a lattice decoder paints the whole map in one go, whatever the windows that it is drawn in.

        By the map's size alone, so that a picture does not depend on the budget.
        """
        return map_size[0] * map_size[1] <= TILES_AT_ONCE * self.config.map_size**2


def _megabytes(size: int) -> str:
    # Rounded up, so that the advised budget is enough.
    return f"{math.ceil(size / 1e5) / 10:g} MB"


def _pixels(map_size: Size) -> str:
    return f"{map_size[0]} x {map_size[1]} map pixels"
