"""Pictures with class labels, from folders or from datasets of the package `datasets`, and small changes of them."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..folder_files import SEARCHED_ALREADY, FoundFiles, find_files, is_ignored
from ..picture_files import image_suffixes, open_picture, upright

logger = logging.getLogger(__name__)

VIEW_SCALE = (0.8, 1.1)
"""How large [`change_view`] may make a picture."""
VIEW_SHIFT = 0.06
"""How far [`change_view`] may move a picture along each axis, in sides of its centre square."""


class ClassFolders:
    """Pictures in class folders, or in a folder without any, which is then the only class.

    Raises ValueError: neither a class folder nor a picture in the folder, or a class without pictures.
    """

    def __init__(self, folder: Path):
        found = find_files(folder, image_suffixes())
        files, skipped = found.files, dict(found.skipped)
        classes = sorted({name.partition("/")[0] for name in files if "/" in name})
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not is_ignored(path.name) and path.name not in classes:
                reason = skipped.get(path.name, f"no file of {', '.join(image_suffixes())}")
                if reason != SEARCHED_ALREADY:  # a class that is left out would shift the numbers of others
                    raise ValueError(f"{path} holds no image: {reason}.")
        if classes:
            skipped |= {name: "outside of the class folders" for name in files if "/" not in name}
            files = {name: path for name, path in files.items() if name not in skipped}
        if not files:
            raise ValueError(f"{folder} holds no image ({', '.join(image_suffixes())}).")
        for line in FoundFiles(files, skipped).skipped_lines():
            logger.warning("%s: %s", folder, line)
        self.id2label = dict(enumerate(classes or [folder.resolve().name]))
        self.names, self.paths = list(files), list(files.values())
        numbers = {name: label for label, name in self.id2label.items()}
        self.labels = [numbers[name.partition("/")[0]] if classes else 0 for name in files]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Path:
        return self.paths[index]

    def fingerprint(self) -> str:
        """Changes with the names, classes and sizes of the files."""
        digest = hashlib.sha256()
        for name, path in zip(self.names, self.paths, strict=True):
            digest.update(os.fsencode(f"{name}\0{path.stat().st_size}\n"))
        return digest.hexdigest()


class LabelledDataset:
    """The pictures of a dataset of the package `datasets`: its only column of images, and of class labels.

    Raises ValueError: it has no such columns, or several, or pictures without a class (as test splits do).
    """

    def __init__(self, dataset: Any):
        columns = {kind: [] for kind in ("Image", "ClassLabel")}
        for name, feature in dataset.features.items():
            columns.get(type(feature).__name__, []).append(name)
        if any(len(names) != 1 for names in columns.values()):
            raise ValueError(f"Expected a dataset with one Image and one ClassLabel column, got {dataset.features}.")
        (image_column,), (label_column,) = columns["Image"], columns["ClassLabel"]
        self.id2label = dict(enumerate(dataset.features[label_column].names))
        self.labels = list(dataset[label_column])
        if strangers := set(self.labels) - self.id2label.keys():
            raise ValueError(f"Expected classes 0 to {len(self.id2label) - 1}, got {strangers}: take a labelled split.")
        # Undecoded, so that a damaged picture can be left out like one in a folder.
        undecoded = type(dataset.features[image_column])(decode=False)
        self._images = dataset.select_columns(image_column).cast_column(image_column, undecoded)
        self._column, self._fingerprint = image_column, dataset._fingerprint
        self.names = [f"{self.id2label[label]}/{index:08d}" for index, label in enumerate(self.labels)]

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> Path | io.BytesIO:
        image = self._images[index][self._column]
        return io.BytesIO(image["bytes"]) if image["bytes"] is not None else Path(image["path"])

    def fingerprint(self) -> str:
        """As `datasets` computes it from how the dataset came to be."""
        return self._fingerprint


def open_labelled(data: str, split: str) -> ClassFolders | LabelledDataset:
    """The pictures that --data means.

    Raises ValueError: neither a folder of class folders nor a dataset, or `datasets` would be needed and is missing.
    """
    folder = Path(data)
    saved = (folder / "state.json").is_file()
    if folder.is_dir() and not saved:
        return ClassFolders(folder)
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{data} is no folder of class folders. If it is a dataset of the package `datasets`, install that first: "
            "pip install datasets"
        ) from error
    return LabelledDataset(datasets.load_from_disk(data) if saved else datasets.load_dataset(data, split=split))


def load_picture(file: Path | io.BytesIO) -> Image.Image:
    """A picture, upright, in sRGB: in mode RGBA where it has transparency, else RGB.

    Raises:
        ValueError: the file is no picture, or damaged, or may not be read.
        OSError: the file cannot be read, through no fault of its own: the disk may be back later.
    """
    try:
        with open_picture(file) as image:
            return upright(image)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError("not an image in a format that Pillow reads") from error
    except Exception as error:  # whatever Pillow raises
        own = isinstance(error, OSError) and error.errno is not None  # the system's, not Pillow's about the content
        if own and not isinstance(error, PermissionError):
            raise
        raise ValueError(f"damaged ({str(error) or type(error).__name__})") from error


def change_view(image: Image.Image, size: int, name: str, view: int, flip: bool) -> Image.Image:
    """The centre square of a picture in (size, size) px, changed a little: at random, but by `name` and `view` alone.

    `image` is in a mode of [`load_picture`], and so is the result.
    """
    digest = hashlib.sha256(os.fsencode(name)).digest()
    random = np.random.default_rng([int.from_bytes(digest[:8], "big"), view])
    scale = random.uniform(*VIEW_SCALE)
    shift_x, shift_y = random.uniform(-VIEW_SHIFT, VIEW_SHIFT, size=2)
    mirrored = random.random() < 0.5
    width, height = image.size
    square = min(width, height)
    side = square / scale
    left = (width - side) / 2 + shift_x * square
    top = (height - side) / 2 + shift_y * square
    # A border as wide as the smallest scale and the largest shift can uncover.
    border = int(square * ((1 / VIEW_SCALE[0] - 1) / 2 + VIEW_SHIFT)) + 1
    pixels = np.asarray(image)
    around = [(border, border), (border, border)] + [(0, 0)] * (pixels.ndim - 2)
    padded = Image.fromarray(np.pad(pixels, around, mode="constant" if image.mode == "RGBA" else "edge"))
    box = (left + border, top + border, left + border + side, top + border + side)
    changed = padded.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return ImageOps.mirror(changed) if flip and mirrored else changed
