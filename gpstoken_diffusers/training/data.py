"""Pictures as training samples: crops with their partition, made in the loader's workers."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ..ops.partition import partition_image
from .pictures import Pictures, open_pictures

logger = logging.getLogger(__name__)

CROPS = ("scales", "center")
CACHE_BYTES = 1 << 30
"""Decoded pictures that each loading process keeps, in bytes."""
MAX_UNREADABLE = 100
"""So many unreadable pictures in a row are no accident."""


def to_pixel_values(image: Image.Image) -> Tensor:
    """An RGB picture as (3, H, W) float32 in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of a picture at `size` pixels: shorter side to `size`, then cropped."""
    return ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)


class TrainingCrops(Dataset):
    """Square crops of pictures, with the partition of each.

    Every pass over the data shows each picture once, in an order of its own. Crops are mirrored half of the time.
    Pictures that cannot be read are replaced by others, and named in the sample.

    Args:
        sources: one or several, each a place that `open_pictures` takes or a collection of pictures. Several are drawn
            from equally often, however many pictures they hold.
        resolution: side of the samples in pixels.
        num_tokens: tokens of the partition.
        length: samples in all.
        seed: sample i depends on (seed, i) alone, whatever the number of workers and processes.
        crop: "scales" draws the crop's side log-uniformly between the resolution and the picture's shorter side, and
            scales it down, so that coarse and fine detail appear equally often; "center" takes the centre square, as
            the official training does.
        token_jitter: a batch has num_tokens (1 +- this) tokens.
        token_range: (fewest, most) tokens of a batch, drawn log-uniformly, in place of num_tokens and token_jitter.
        partition: further settings of [`partition_image`].
        batch_size: samples that follow each other and share their number of tokens: those of a step on all processes.

    A sample: `pixel_values` (3, R, R) float32 in [-1, 1], `regions` (N, 4) int32, `geometry` (N, 5) float32, `skipped`,
    a list of names. `collate_crops` makes batches of them.

    Raises ValueError: a place without pictures, or settings out of range.
    """

    def __init__(
        self,
        sources: str | os.PathLike | Pictures | Sequence[str | os.PathLike | Pictures],
        resolution: int,
        num_tokens: int,
        length: int,
        seed: int = 0,
        crop: str = "scales",
        token_jitter: float = 0.0,
        batch_size: int = 1,
        token_range: tuple[int, int] | None = None,
        partition: dict[str, float | str] | None = None,
    ):
        if crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, got {crop!r}.")
        if not 0 <= token_jitter < 1:
            raise ValueError(f"token_jitter is a share in [0, 1), got {token_jitter}.")
        if token_range is not None and not 1 <= token_range[0] <= token_range[1]:
            raise ValueError(f"token_range is (fewest, most) with at least 1 token, got {tuple(token_range)}.")
        sources = sources if isinstance(sources, (list, tuple)) else [sources]
        self.sources: list[Pictures] = [
            open_pictures(source) if isinstance(source, (str, os.PathLike)) else source for source in sources
        ]
        self.resolution, self.num_tokens, self.length, self.seed = resolution, num_tokens, length, seed
        self.crop, self.token_jitter, self.batch_size = crop, token_jitter, batch_size
        self.token_range = token_range
        self.partition = partition or {}
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._decoded: dict[tuple[int, int], Image.Image] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor | list[str]]:
        random = np.random.default_rng((self.seed, index))
        image, skipped = self._draw(index, random)
        pixel_values = to_pixel_values(self._cut(image, random))
        count = self._tokens_of_batch(index // self.batch_size)
        regions, geometry = partition_image(pixel_values[None], count, **self.partition)
        return {"pixel_values": pixel_values, "regions": regions[0], "geometry": geometry[0], "skipped": skipped}

    def _tokens_of_batch(self, batch: int) -> int:
        random = np.random.default_rng((self.seed, batch, 1))
        if self.token_range is not None:
            low, high = self.token_range
            return min(high, round(math.exp(random.uniform(math.log(low), math.log(high)))))
        share = random.uniform(1 - self.token_jitter, 1 + self.token_jitter)
        return max(1, round(self.num_tokens * share))

    def _draw(self, index: int, random: np.random.Generator) -> tuple[Image.Image, list[str]]:
        """The picture of a sample, and the names of those in its place that could not be read."""
        source = int(random.integers(len(self.sources))) if len(self.sources) > 1 else 0
        place = self._place(source, index)
        skipped = []
        for _ in range(MAX_UNREADABLE):
            try:
                return self._load(source, place), skipped
            except Exception as error:  # whatever a picture raises is its own error
                name = self.sources[source].name(place)
                logger.warning("%s cannot be read and is skipped: %s", name, error)
                skipped.append(name)
                place = int(random.integers(len(self.sources[source])))
        raise OSError(
            f"{MAX_UNREADABLE} pictures in a row could not be read, the last of them {skipped[-1]}. Is this the right "
            "folder, and is its disk there?"
        )

    def _place(self, source: int, index: int) -> int:
        """Which picture of a source sample `index` shows."""
        count = len(self.sources[source])
        passes, place = divmod(index, count)
        if source not in self._orders or self._orders[source][0] != passes:
            order = np.random.default_rng((self.seed, source, passes, 2)).permutation(count)
            self._orders[source] = (passes, order)
        return int(self._orders[source][1][place])

    def _cut(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        if self.crop == "center":
            cut = center_crop(image, self.resolution)
        else:
            width, height = image.size
            shorter = min(width, height)
            # Pictures below the resolution are enlarged, as there is nothing else to take from them.
            low = min(self.resolution, shorter)
            # The exponential of a logarithm may round to more than there is.
            side = min(math.exp(random.uniform(math.log(low), math.log(shorter))), shorter)
            left, top = random.uniform(0, width - side), random.uniform(0, height - side)
            cut = image.resize(
                (self.resolution, self.resolution),
                Image.Resampling.BICUBIC,
                box=(left, top, left + side, top + side),
                reducing_gap=3,
            )
        return ImageOps.mirror(cut) if random.random() < 0.5 else cut

    def _load(self, source: int, place: int) -> Image.Image:
        # Decoding takes longer than everything else here. The first pictures that fit are kept: with an order that
        # visits all of them in turn, dropping the oldest for the newest would never find one again.
        image = self._decoded.get((source, place))
        if image is None:
            image = self.sources[source].load(place)
            size = 3 * image.width * image.height
            if self._cached_bytes + size <= CACHE_BYTES:
                self._decoded[source, place] = image
                self._cached_bytes += size
        return image


def collate_crops(samples: list[dict]) -> dict[str, Tensor | list[str]]:
    """A batch of samples of `TrainingCrops`: tensors are stacked, names of skipped pictures joined."""
    skipped = [name for sample in samples for name in sample["skipped"]]
    tensors = [{name: value for name, value in sample.items() if name != "skipped"} for sample in samples]
    return default_collate(tensors) | {"skipped": skipped}
