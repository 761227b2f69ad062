"""How much memory encoding and decoding may work in, and how many tiles and which windows that leaves room for."""

from __future__ import annotations

import math
import re

from ..layouts import of_pictures as tile_partition
from .windows import Size

# What is done without a budget. Tiles that pass through the networks at once when an image has several; the side, in
# tiles, of the window that a merged or a local decoding covers at once. At another size, these are so many tiles'
# worth of map pixels.
TILES_AT_ONCE = 4
MERGED_WINDOW_TILES = 4
LOCAL_WINDOW_TILES = 2

# Estimates count the tensors that are alive at the worst moment. The rest (norm statistics, scratch of threads, what
# the allocator rounds up) is this share more, and so many bytes whatever the size: the first convolutions of a process
# leave some 15 MB behind.
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


class MemoryBudgetMixin:
    """How an autoencoder divides its work; reads its `config`, `decoder`, `dtype` and `use_slicing`."""

    _memory_budget: int | None = None

    @property
    def memory_budget(self) -> int | None:
        """Bytes that encoding and decoding may work in; None is no budget. See [`set_memory_budget`]."""
        return self._memory_budget

    def set_memory_budget(self, budget: int | str | None) -> None:
        """Sets how much memory `encode` and `decode` may work in, whatever the size of a picture.

        Counted is what they need beside the weights, what they are given, and what they return (tokens, or the sample
        and the canvas that it is cut from). From it follow how many tiles pass through the networks at once and how
        large the windows of a large picture are (`models/work_plan.py`).
        It holds for this object until it is set again; it is not part of the configuration, and is not saved.
        What depends on it: speed, because small windows have relatively more around them that is computed twice.
        Tokens do not, nor do pictures of a lattice decoder, nor those decoded tile by tile, but for the rounding of
        sums in another order. Pictures of a "map" decoder in mode "merge" do: its last normalisation is over a window,
        and its windows are never larger than without a budget, but smaller where the budget has no room for them. A
        budget with room for the usual windows gives the usual picture.

        It is an estimate for inference with the native libraries, on the high side: gradients keep all activations,
        the plain PyTorch splat takes some 200 MB for itself, and so may the workspaces of cuDNN. A picture decoded
        at another size whose canvas has to be resampled (see `decode`) is held once more, and in float32.

        Args:
            budget: bytes, or text such as "800MB", "1.5GB" or "1GiB"; None, as at the start, takes no more than four
                tiles of a large picture at once, and all pictures of a batch of one tile each.

        Raises:
            TypeError: neither an int nor text nor None.
            ValueError: text that is no size, or too little to encode one tile and to decode the smallest window; it
                says the least that works. The number of tokens, the dtype and the size of a picture matter too, so
                `encode` and `decode` raise the same error where the budget is too small for a call of theirs.
        """
        if budget is None:
            self._memory_budget = None
            return
        budget = parse_memory(budget)
        tile = (self.config.map_size, self.config.map_size)
        if self.config.decoder_type == "lattice":
            density = self.config.num_tokens / self.config.map_size**2
            decoding = self._local_bytes((2 * self.decoder.cell_px, 2 * self.decoder.cell_px), density)
        else:
            decoding = self._map_bytes(1, tile)
        _check_room(budget, max(self._encoding_bytes(1, self.config.num_tokens), decoding), "this model")
        self._memory_budget = budget

    # Encoding

    def _encoding_bytes(self, tiles: int, num_tokens: int) -> int:
        """Bytes that so many tiles of `num_tokens` tokens take while they are encoded."""
        config, item = self.config, self.dtype.itemsize
        pixels = config.in_channels * config.sample_size**2
        features = config.stem_channels * (config.sample_size // config.stem_patch_size) ** 2
        # A tile is cut out, cast, and unshuffled. A block of the stem holds its input, a norm and two convolutions.
        stem = pixels * (FLOAT32 + 2 * item) + 4 * features * item
        # RoIAlign's cells, and what they are arranged to for the layer that reads them.
        cells = num_tokens * config.stem_channels * config.roi_size**2
        reading = (features + 2 * cells) * item
        layers = config.num_layers if config.region_reading == "pool" else 1
        hidden = num_tokens * config.hidden_size * item
        # A reading for each layer with its product before the bias, then a block: its input, norm, a feed-forward of
        # four times the width before and after its activation, and attention, which takes less.
        refining = features * item + num_tokens * layers * config.stem_channels * item + hidden * (2 * layers + 12)
        return int(tiles * max(stem, reading, refining) * MARGIN) + FIXED_BYTES

    def _partition_tiles(self) -> int:
        """How many tiles are partitioned at once."""
        if self._memory_budget is None:
            return tile_partition.TILES_AT_ONCE
        # A tile's pixels, sums of its channels, and its importance, in float32 and float64.
        each = FLOAT32 * (self.config.in_channels + 8) * self.config.sample_size**2
        return max(1, min(tile_partition.TILES_AT_ONCE, (self._memory_budget - FIXED_BYTES) // each))

    def _encoding_tiles(self, count: int, tile_grid: tuple[int, int], num_tokens: int) -> int:
        """How many of `count` tiles pass through the encoder at once."""
        budget = self._memory_budget
        if budget is not None:
            _check_room(budget, self._encoding_bytes(1, num_tokens), f"encoding tiles of {num_tokens} tokens")
        if self.use_slicing:
            return 1
        if budget is None:
            return max(1, count) if tile_grid == (1, 1) else TILES_AT_ONCE
        return (budget - FIXED_BYTES) // (self._encoding_bytes(1, num_tokens) - FIXED_BYTES)

    # Decoding with a "map" decoder

    def _map_bytes(self, tiles: int, tile_size: Size) -> int:
        """Bytes that so many tiles of `tile_size` map pixels take while a "map" decoder draws them."""
        config, item = self.config, self.dtype.itemsize
        widths = config.decoder_block_out_channels
        pixels = tile_size[0] * tile_size[1]
        worst = 0
        for level, width in enumerate(widths):  # finest first
            before = widths[min(level + 1, len(widths) - 1)]
            # The first block of a resolution holds its input, that normed, the shortcut and a convolution. In half
            # precision, convolutions of so many channels take as much again for themselves (on a CPU, measured).
            channels = 2 * before + 2 * width
            worst = max(worst, channels * FLOAT32 * pixels * 4 ** (len(widths) - 1 - level))
        # Attention over a tile's map pixels holds maps alone: its weights come and go in blocks.
        attention = pixels * item * 8 * widths[-1]
        painted = config.texture_channels * (FLOAT32 + 2 * item) * pixels
        return int(tiles * (max(worst, attention) + painted) * MARGIN) + FIXED_BYTES

    def _map_tiles(self, count: int, tile_grid: tuple[int, int], tile_size: Size) -> int:
        """How many of `count` tiles a "map" decoder draws at once, each by itself."""
        budget = self._memory_budget
        if budget is not None:
            _check_room(budget, self._map_bytes(1, tile_size), f"decoding a tile at {_pixels(tile_size)}")
        if self.use_slicing:
            return 1
        if budget is not None:
            return (budget - FIXED_BYTES) // (self._map_bytes(1, tile_size) - FIXED_BYTES)
        if tile_grid == (1, 1):
            return max(1, count)
        usual = TILES_AT_ONCE * self.config.map_size**2 // (tile_size[0] * tile_size[1])
        return max(1, min(TILES_AT_ONCE, usual))

    def _merged_window(self, tile_grid: tuple[int, int], tile_size: Size) -> int | None:
        """Side in tiles of the windows of a merged decoding, without the tile around each; None is all in one pass."""
        usual = min(MERGED_WINDOW_TILES, max(1, MERGED_WINDOW_TILES * self.config.map_size // max(tile_size)))

        def needed(side: int) -> int:
            return self._map_bytes(math.prod(min(length, side + 2) for length in tile_grid), tile_size)

        whole = max(tile_grid) <= usual + 2
        if self._memory_budget is None:
            return None if whole else usual
        if whole and needed(usual) <= self._memory_budget:
            return None
        what = f'decoding tiles at {_pixels(tile_size)} with mode="merge" (mode="tile" needs less)'
        _check_room(self._memory_budget, needed(1), what)
        return max(side for side in range(1, usual + 1) if needed(side) <= self._memory_budget)

    # Decoding with a "lattice" decoder

    def _local_pixel_bytes(self, tokens_per_pixel: float) -> float:
        """Bytes per map pixel of a window that a lattice decoder draws."""
        config, item = self.config, self.dtype.itemsize
        fine, coarse = config.decoder_block_out_channels
        map_channels = config.lattice_channels + 1
        # A residual block holds its input, two norms or convolutions on the way, and its result; the finer resolution
        # has four pixels to a map pixel.
        drawing = 4 * item * max(4 * fine, coarse) + map_channels * (FLOAT32 + item)
        # The perceptron's two layers before and after the activation, what the lattice's points paint, once for all
        # and once by cells, and the points' geometry. Cells share tokens, and are filled up to the fullest.
        points = config.lattice_size**2
        token = 4 * coarse * item + points * config.lattice_channels * item + points * FLOAT32 * (3 * map_channels + 10)
        painting = 2 * token * tokens_per_pixel + 3 * FLOAT32 * map_channels
        return max(drawing, painting) * MARGIN

    def _local_bytes(self, map_size: Size, tokens_per_pixel: float) -> int:
        """Bytes that a window of `map_size` map pixels takes, by how densely tokens lie on the map."""
        return int(map_size[0] * map_size[1] * self._local_pixel_bytes(tokens_per_pixel)) + FIXED_BYTES

    def _local_images(self, count: int, map_size: Size, tokens_per_pixel: float) -> int:
        """How many of `count` pictures a lattice decoder draws at once, where it draws each in one pass."""
        if self.use_slicing:
            return 1
        if self._memory_budget is None:
            return max(1, count)
        each = self._local_bytes(map_size, tokens_per_pixel) - FIXED_BYTES
        return max(1, (self._memory_budget - FIXED_BYTES) // each)

    def _local_window(self, map_size: Size, tokens_per_pixel: float) -> int | None:
        """Longest side in map pixels of a painted window of one picture; None where one window covers the map."""
        budget, at_once = self._memory_budget, self._is_painted_at_once(map_size)
        if budget is None:
            return None if at_once else LOCAL_WINDOW_TILES * self.config.map_size + self.decoder.cell_px
        if at_once and self._local_bytes(map_size, tokens_per_pixel) <= budget:
            return None
        painted = 0
        if at_once:  # the map of all windows stays
            painted = 2 * FLOAT32 * (self.config.lattice_channels + 1) * map_size[0] * map_size[1]
        least = 2 * self.decoder.cell_px
        smallest = (min(least, map_size[0]), min(least, map_size[1]))
        needed = painted + self._local_bytes(smallest, tokens_per_pixel)
        _check_room(budget, needed, f"decoding a map of {_pixels(map_size)}")
        room = (budget - painted - FIXED_BYTES) / self._local_pixel_bytes(tokens_per_pixel)
        # A map that is short along one axis leaves more for the other.
        return max(least, int(max(math.sqrt(room), room / min(map_size))))

    def _is_painted_at_once(self, map_size: Size) -> bool:
        """Whether a lattice decoder paints the whole map in one go, whatever the windows that it is drawn in.

        By the map's size alone, so that a picture does not depend on the budget.
        """
        return map_size[0] * map_size[1] <= TILES_AT_ONCE * self.config.map_size**2


def _check_room(budget: int, needed: int, what: str) -> None:
    if budget < needed:
        raise ValueError(
            f"A memory budget of {_megabytes(budget)} is too small for {what}: it takes at least {_megabytes(needed)}."
        )


def _megabytes(size: int) -> str:
    # Upwards, so that what is advised is enough.
    return f"{math.ceil(size / 1e5) / 10:g} MB"


def _pixels(map_size: Size) -> str:
    return f"{map_size[0]} x {map_size[1]} map pixels"
