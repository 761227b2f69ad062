"""Where training pictures come from: folders, tar shards as WebDataset writes them, datasets of the Hub."""

from __future__ import annotations

import glob
import io
import logging
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from ..folder_files import find_files, is_ignored
from ..picture_files import image_suffixes, read_picture, upright_rgb

logger = logging.getLogger(__name__)


class Pictures(Protocol):
    """A numbered collection of pictures, read one at a time and in any order."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call a picture in messages."""

    def load(self, index: int) -> Image.Image:
        """The picture, upright, in RGB, on white.

        Raises any Exception if it cannot be read: a caller takes it for that picture's error.
        """


def list_images(folder: str | os.PathLike) -> list[Path]:
    """All image files below a folder, sorted by path, as [`find_files`] finds them. What it leaves out is logged.

    Raises ValueError: no such folder, or no image in it.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder of images.")
    found = find_files(folder, image_suffixes())
    for line in found.skipped_lines():
        logger.warning("%s: %s", folder, line)
    if not found.files:
        raise ValueError(f"{folder} holds no image ({', '.join(image_suffixes())}).")
    return list(found.files.values())


class FolderPictures:
    """The image files below a folder.

    Raises ValueError: no such folder, or no image in it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.paths = list_images(folder)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def load(self, index: int) -> Image.Image:
        return read_picture(self.paths[index], self.name(index), upright_rgb)


class TarPictures:
    """The image files in tar archives, such as WebDataset shards.

    The archives' tables are read once, when this is made; then each picture is read by itself, wherever it lies, so
    that a run can be shuffled as a whole and resumed exactly. They must be uncompressed, as WebDataset's are.

    Args:
        shards: the archives.

    Raises:
        ValueError: an archive that is damaged, compressed or none, or no image in any of them.
        OSError: one cannot be opened.
    """

    def __init__(self, shards: Sequence[str | os.PathLike]):
        self.shards = [Path(shard) for shard in shards]
        self.members: list[tuple[int, str, int, int]] = []  # shard, name, offset, bytes
        endings = image_suffixes()

        def is_picture(name: str) -> bool:
            return name.lower().endswith(endings) and not is_ignored(name.removeprefix("./"))

        for number, shard in enumerate(self.shards):
            try:
                with tarfile.open(shard, "r:") as archive:
                    self.members += [
                        (number, member.name, member.offset_data, member.size)
                        for member in archive
                        if member.isfile() and is_picture(member.name)
                    ]
            except tarfile.TarError as error:
                raise ValueError(
                    f"{shard}: not an uncompressed tar archive, or a damaged one ({error}). WebDataset shards are "
                    "plain .tar files; unpack compressed ones first."
                ) from error
        if not self.members:
            raise ValueError(f"No image ({', '.join(endings)}) in {len(self.shards)} archives: {self.shards[0]}, ...")

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        shard, name, _, _ = self.members[index]
        return f"{self.shards[shard]}:{name}"

    def load(self, index: int) -> Image.Image:
        shard, _, offset, size = self.members[index]
        with self.shards[shard].open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        return read_picture(io.BytesIO(data), self.name(index), upright_rgb)


class DatasetPictures:
    """A column of a dataset of the `datasets` library, of the Hub or of a folder that `save_to_disk` wrote.

    Args:
        name: repository, folder, or builder such as "imagefolder".
        split: such as "train".
        column: the column that holds the pictures.
        config: the dataset's configuration, where it has several.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: no such column.
    """

    def __init__(self, name: str, split: str = "train", column: str = "image", config: str | None = None):
        try:
            import datasets
        except ImportError as error:
            raise ImportError("Datasets of the Hub are read by the package datasets: pip install datasets") from error
        if Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            rows = datasets.load_dataset(name, config, split=split)
        if column not in rows.column_names:
            raise ValueError(f"{name} has no column {column!r}; it has {', '.join(rows.column_names)}.")
        # Undecoded, so that a damaged picture is ours to skip.
        self.rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.title, self.column = f"{name} ({split})", column

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.title}, row {index}"

    def load(self, index: int) -> Image.Image:
        stored = self.rows[index][self.column]
        source = io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]
        return read_picture(source, self.name(index), upright_rgb)


def open_pictures(place: str | os.PathLike) -> Pictures:
    """The pictures of a folder, of tar shards in a folder, or of the tar shards that a pattern such as "x/*.tar" means.

    Raises ValueError: nothing there.
    """
    text = str(place)
    shards = sorted(glob.glob(os.path.join(glob.escape(text), "*.tar"))) if os.path.isdir(text) else []
    if text.endswith(".tar"):
        shards = sorted(glob.glob(text))
        if not shards:
            raise ValueError(f"No tar shard matches {text}.")
    return TarPictures(shards) if shards else FolderPictures(text)
