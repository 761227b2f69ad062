"""Pictures with class labels, from folders or from datasets of the package `datasets`, and small changes of them."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..folder_files import SEARCHED_ALREADY, FoundFiles, find_files, is_ignored
from ..picture_files import image_suffixes, open_picture, upright
from .pictures import TarPictures, find_shards, is_saved_dataset, load_rows

logger = logging.getLogger(__name__)

# Kinds of columns of a dataset, and the option that names one.
_KINDS = {"Image": "--image_column", "ClassLabel": "--label_column"}
_SYSTEM_IS_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_LABEL_NAMES = ("label", "labels", "class", "cls")
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
        self._sizes = [path.stat().st_size if path.is_file() else -1 for path in self.paths]  # -1: gone meanwhile
        numbers = {name: label for label, name in self.id2label.items()}
        self.labels = [numbers[name.partition("/")[0]] if classes else 0 for name in files]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Path:
        return self.paths[index]

    def is_there(self) -> bool:
        """Whether any of the pictures is still there; else their disk may be gone."""
        return any(path.exists() for path in self.paths)

    def fingerprint(self) -> str:
        """Changes with the names, classes and sizes of the files."""
        digest = hashlib.sha256()
        for name, size in zip(self.names, self._sizes, strict=True):
            digest.update(os.fsencode(f"{name}\0{size}\n"))
        return digest.hexdigest()


class LabelledShards:
    """The pictures of tar shards, of the classes that their `.cls` files say; one class where there are none.

    Args:
        shards: the archives, see [`TarPictures`].
        title: what to call the only class.

    Raises: as `TarPictures`, and ValueError where some pictures have a class and others none.
    """

    def __init__(self, shards: Sequence[str | os.PathLike], title: str):
        self.pictures = TarPictures(shards)
        classes = self.pictures.classes() or [title] * len(self.pictures)
        self.id2label, self.labels = _number_classes(classes)
        self.names = [f"{self.pictures.shards[shard].name}/{name}" for shard, name, *_ in self.pictures.members]

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> io.BytesIO:
        return self.pictures.open(index)

    def is_there(self) -> bool:
        """As [`ClassFolders.is_there`]."""
        return any(shard.exists() for shard in self.pictures.shards)

    def fingerprint(self) -> str:
        """Changes with the names, classes and sizes of the files."""
        digest = hashlib.sha256()
        for name, label, (*_, size) in zip(self.names, self.labels, self.pictures.members, strict=True):
            digest.update(os.fsencode(f"{name}\0{self.id2label[label]}\0{size}\n"))
        return digest.hexdigest()


def _number_classes(classes: Sequence[Any]) -> tuple[dict[int, str], list[int]]:
    """Names of classes by number, and the number of each item: in the order of numbers where all names are numbers."""
    names = sorted({str(name) for name in classes})
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    numbers = {name: number for number, name in enumerate(names)}
    return dict(enumerate(names)), [numbers[str(name)] for name in classes]


class LabelledDataset:
    """The pictures of a dataset of the package `datasets`, of the classes that a column says.

    Args:
        dataset: its rows.
        title: what to call the only class where there are none, or where all are -1, as in test splits.
        image_column: None takes the only one of pictures.
        label_column: of class labels, numbers or names; None takes the only one of class labels, else one that is
            called label, labels, class or cls.

    Raises ValueError: several columns to choose from, none of pictures, or pictures without a class among others.
    """

    def __init__(
        self, dataset: Any, title: str = "all", image_column: str | None = None, label_column: str | None = None
    ):
        features = dataset.features
        columns = {kind: [name for name in features if type(features[name]).__name__ == kind] for kind in _KINDS}
        columns["ClassLabel"] = columns["ClassLabel"] or [name for name in features if name in _LABEL_NAMES]
        given = {"Image": image_column, "ClassLabel": label_column}
        for kind, name in given.items():
            if name is not None and name not in features:
                raise ValueError(f"Expected a column of the dataset: {', '.join(features)}, got {name!r}.")
            if name is None and len(columns[kind]) > 1:
                raise ValueError(
                    f"Expected one {kind} column, got {', '.join(columns[kind])}: say by {_KINDS[kind]} which to take."
                )
        image_column = image_column or next(iter(columns["Image"]), None)
        label_column = label_column or next(iter(columns["ClassLabel"]), None)
        if image_column is None:
            raise ValueError(f"Expected a dataset with one Image column, got {', '.join(features)}.")
        labels = [-1] if label_column is None else list(dataset[label_column])
        if set(labels) == {-1}:
            self.id2label, self.labels = {0: title}, [0] * len(dataset)
        elif type(features[label_column]).__name__ == "ClassLabel":
            self.id2label, self.labels = dict(enumerate(features[label_column].names)), labels
        else:
            self.id2label, self.labels = _number_classes(labels)
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
        image = self._images[index][self._column] or {"bytes": b"", "path": None}  # a row may be without a picture
        return io.BytesIO(image["bytes"]) if image["bytes"] is not None else Path(image["path"])

    def is_there(self) -> bool:
        """As [`ClassFolders.is_there`]."""
        places = (self.open(index) for index in range(len(self)))
        return any(isinstance(place, io.BytesIO) or place.exists() for place in places)

    def fingerprint(self) -> str:
        """As `datasets` computes it from how the dataset came to be."""
        return self._fingerprint


def open_labelled(
    data: str, split: str, image_column: str | None = None, label_column: str | None = None
) -> ClassFolders | LabelledShards | LabelledDataset:
    """The pictures that --data means: a folder of pictures, of tar shards, of parquet files or of a saved dataset, a
    pattern of shards or parquet files (see [`match_files`]), or the name of a dataset.

    Raises ValueError: neither of them, or `datasets` would be needed and is missing.
    """
    folder = Path(data)
    if shards := find_shards(data):
        return LabelledShards(shards, (folder if folder.is_dir() else folder.parent).resolve().name)
    if folder.is_dir() and not is_saved_dataset(folder) and not any(folder.rglob("*.parquet")):
        return ClassFolders(folder)
    try:
        import datasets

        rows = load_rows(data, split)
    except ImportError as error:
        raise ValueError(
            f"{data} is no folder of class folders. If it is a dataset of the package `datasets`, install that first: "
            "pip install datasets"
        ) from error
    for name, feature in rows.features.items():  # files that others wrote say of pictures only that they are bytes
        if (isinstance(feature, dict) and "bytes" in feature) or getattr(feature, "dtype", "").endswith("binary"):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return LabelledDataset(rows, folder.stem, image_column, label_column)


def load_picture(file: Path | io.BytesIO) -> Image.Image:
    """A picture, upright, in sRGB: in mode RGBA where it has transparency, else RGB.

    Raises:
        ValueError: the file is no picture, or damaged.
        OSError: the system cannot read it.
    """
    try:
        with open_picture(file) as image:
            return upright(image)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError("not an image in a format that Pillow reads") from error
    except Exception as error:  # whatever Pillow raises
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not Pillow's about the content
            raise
        raise ValueError(f"damaged ({str(error) or type(error).__name__})") from error


def read_labelled(
    pictures: ClassFolders | LabelledShards | LabelledDataset, index: int
) -> tuple[Image.Image, None] | tuple[None, str]:
    """A picture as [`load_picture`] gives it and None, or None and why it cannot be read.

    Whatever a picture raises is its own error: it may be gone, damaged, or out of reach since the list was made.

    Raises OSError: no fault of this picture, as none of them is there or the process may open no more files.
    """
    try:
        return load_picture(pictures.open(index)), None
    except MemoryError:
        raise
    except OSError as error:
        if error.errno in _SYSTEM_IS_FULL:
            raise
        if not pictures.is_there():
            raise OSError(
                error.errno, "none of the pictures is there any more: is their disk there?", pictures.names[index]
            ) from error
        # Without its path: where pictures lie on this computer is private.
        return None, f"cannot be read ({error.strerror})"
    except Exception as error:
        return None, str(error) or type(error).__name__


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
