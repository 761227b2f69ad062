"""Photographs as training samples: random crops with their partition, made in the loader's workers."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..ops.partition import partition_image

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def list_images(folder: str | os.PathLike) -> list[Path]:
    """All image files below a folder, sorted by path.

    Raises ValueError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    return paths


def to_pixel_values(image: Image.Image) -> Tensor:
    """An RGB picture as (3, H, W) float32 in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of a picture at `size` pixels: shorter side to `size`, then cropped."""
    return ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)


class PhotographCrops(Dataset):
    """Random square crops of the photographs in folders, with the partition of each.

    A crop's side is drawn log-uniformly between the resolution and the photograph's shorter side, and the crop is
    scaled down to the resolution: coarse and fine detail appear equally often. Crops are mirrored half of the time.

    Args:
        folders: one or several, each searched with its subfolders. Several are drawn from equally often, however many
            photographs they hold.
        resolution: side of the samples in pixels.
        num_tokens: tokens of the partition.
        length: samples per epoch.
        seed: sample i of epoch e depends on (seed, e, i) alone, whatever the number of workers and processes.

    A sample: `pixel_values` (3, R, R) float32 in [-1, 1], `regions` (N, 4) int32, `geometry` (N, 5) float32.
    """

    def __init__(
        self,
        folders: str | os.PathLike | Sequence[str | os.PathLike],
        resolution: int,
        num_tokens: int,
        length: int,
        seed: int = 0,
    ):
        folders = [folders] if isinstance(folders, (str, os.PathLike)) else folders
        self.paths = [list_images(folder) for folder in folders]
        self.resolution, self.num_tokens, self.length, self.seed = resolution, num_tokens, length, seed
        self._decoded: dict[Path, Image.Image] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random = np.random.default_rng((self.seed, index))
        paths = self.paths[random.integers(len(self.paths))] if len(self.paths) > 1 else self.paths[0]
        image = self._load(paths[random.integers(len(paths))])
        width, height = image.size
        shorter = min(width, height)
        # Photographs below the resolution are enlarged, as there is nothing else to take from them.
        low = min(self.resolution, shorter)
        side = math.exp(random.uniform(math.log(low), math.log(shorter)))
        left, top = random.uniform(0, width - side), random.uniform(0, height - side)
        crop = image.resize(
            (self.resolution, self.resolution),
            Image.Resampling.BICUBIC,
            box=(left, top, left + side, top + side),
            reducing_gap=3,
        )
        if random.random() < 0.5:
            crop = ImageOps.mirror(crop)
        pixel_values = to_pixel_values(crop)
        regions, geometry = partition_image(pixel_values[None], self.num_tokens)
        return {"pixel_values": pixel_values, "regions": regions[0], "geometry": geometry[0]}

    def _load(self, path: Path) -> Image.Image:
        # Decoding takes longer than everything else here, and a corpus of some hundred photographs fits in memory.
        if path not in self._decoded:
            with Image.open(path) as image:
                self._decoded[path] = ImageOps.exif_transpose(image).convert("RGB")
        return self._decoded[path]
