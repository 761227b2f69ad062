"""Pictures with class labels, from folders or from datasets of the package `datasets`, and small changes of them."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .pictures import list_images

VIEW_SCALE = (0.8, 1.1)
"""How large [`change_view`] may make a picture."""
VIEW_SHIFT = 0.06
"""How far [`change_view`] may move a picture along each axis, in sides of its centre square."""


class ClassFolders:
    """Pictures in class folders, or in a folder without any, which is then the only class.

    Raises ValueError: neither a class folder nor a picture in the folder, or a class without pictures.
    """

    def __init__(self, folder: Path):
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        places = [folder / name for name in classes] or [folder]
        self.id2label = dict(enumerate(place.resolve().name for place in places))
        self.paths, self.labels = [], []
        for label, place in enumerate(places):
            found = list_images(place)
            self.paths += found
            self.labels += [label] * len(found)
        self.names = [path.relative_to(folder).as_posix() for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Path:
        return self.paths[index]

    def fingerprint(self) -> str:
        """Changes with the names, classes and sizes of the files."""
        digest = hashlib.sha256()
        for name, path in zip(self.names, self.paths, strict=True):
            digest.update(f"{name}\0{path.stat().st_size}\n".encode())
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
    """A picture, upright: in mode RGBA where it has transparency, I where it is 16-bit gray, else RGB.

    Raises:
        ValueError: the file is no picture, or damaged.
        OSError: the file cannot be read, through no fault of what is in it.
    """
    try:
        with Image.open(file) as image:
            image.load()
            mode = "RGBA" if image.has_transparency_data else "I" if image.mode.startswith("I") else "RGB"
            return ImageOps.exif_transpose(image).convert(mode)
    except UnidentifiedImageError as error:
        raise ValueError("not an image in a format that Pillow reads") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's own, not Pillow's about the content
            raise
        raise ValueError(f"damaged ({error})") from error


def change_view(image: Image.Image, size: int, name: str, view: int, flip: bool) -> Image.Image:
    """The centre square of a picture in (size, size) px, changed a little: at random, but by `name` and `view` alone.

    `image` is in a mode of [`load_picture`], and so is the result.
    """
    digest = hashlib.sha256(name.encode()).digest()
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
