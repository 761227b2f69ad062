"""Where training pictures come from: folders, tar shards as WebDataset writes them, datasets of the Hub."""

from __future__ import annotations

import glob
import io
import itertools
import logging
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

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
        self._classes: dict[tuple[int, str], tuple[int, int]] = {}  # shard, name up to its suffix: offset, bytes
        endings = image_suffixes()
        for number, shard in enumerate(self.shards):
            try:
                with tarfile.open(shard, "r:") as archive:
                    for member in filter(tarfile.TarInfo.isfile, archive):
                        name = member.name
                        if name.lower().endswith(endings) and not is_ignored(name.removeprefix("./")):
                            self.members.append((number, name, member.offset_data, member.size))
                        elif name.endswith(".cls"):
                            self._classes[number, _key(name)] = member.offset_data, member.size
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
        return read_picture(self.open(index), self.name(index), upright_rgb)

    def open(self, index: int) -> io.BytesIO:
        """The file of a picture."""
        shard, _, offset, size = self.members[index]
        return io.BytesIO(self._read(shard, offset, size))

    def classes(self) -> list[str] | None:
        """Per picture what the `.cls` file of the same name says, as WebDataset's have it; None without any of them.

        Raises ValueError: some pictures have one, this one has none.
        """
        if not self._classes:
            return None
        found = []
        for index, (shard, name, *_) in enumerate(self.members):
            if (place := self._classes.get((shard, _key(name)))) is None:
                raise ValueError(f"Expected a .cls file beside every picture or none, but {self.name(index)} has none.")
            found.append(self._read(shard, *place).decode("utf-8", errors="replace").strip())
        return found

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        with self.shards[shard].open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _key(name: str) -> str:
    """A file's name up to its suffixes: what the files of a sample have in common."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.split('.')[0]}"


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
        rows = load_rows(name, split, config)
        if column not in rows.column_names:
            raise ValueError(f"{name} has no column {column!r}; it has {', '.join(rows.column_names)}.")
        import datasets  # it is there: it has read the rows

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


def load_rows(name: str, split: str, config: str | None = None) -> Any:
    """A split of a dataset of the package `datasets`: what it saved on disk, a folder or pattern of parquet files, or a
    name that it loads.

    Raises:
        ImportError: it is not installed.
        ValueError: no such split.
        OSError: no such dataset.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{name} is read by the package `datasets`: pip install datasets") from error
    if is_saved_dataset(Path(name)):
        rows = datasets.load_from_disk(name)
        if isinstance(rows, datasets.DatasetDict) and split not in rows:
            raise ValueError(f"Expected a split of {name}: {', '.join(rows)}, got {split}. Give one of them.")
        return rows[split] if isinstance(rows, datasets.DatasetDict) else rows
    if name.endswith(".parquet"):
        return datasets.load_dataset("parquet", data_files={split: match_files(name)}, split=split)
    return datasets.load_dataset(name, config, split=split)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of the package `datasets` wrote a folder: of one split, or of several."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def match_files(pattern: str) -> list[str]:
    """The files that a pattern means: "*", "?", "[ab]" as a shell takes them, "{00..12}", "{a,b}" as WebDataset does.

    Raises ValueError: nothing, or nothing for one of the alternatives.
    """
    if os.path.isfile(pattern):
        return [pattern]
    parts = [
        [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)] if low else choices.split(",")
        for low, high, choices in re.findall(r"\{(?:(\d+)\.\.(\d+)|([^{}]*))\}", pattern)
    ]
    fixed = re.split(r"\{[^{}]*\}", pattern)
    found = []
    for choice in itertools.product(*parts):
        one = "".join(itertools.chain(*itertools.zip_longest(fixed, choice, fillvalue="")))
        found += [one] if os.path.isfile(one) else sorted(glob.glob(one)) or [None]
        if found[-1] is None:
            break
    if not found or found[-1] is None:
        kind = "tar shard" if pattern.endswith(".tar") else "file"
        raise ValueError(f"No {kind} matches {one if found else pattern}.")
    return found


def find_shards(place: str | os.PathLike) -> list[str]:
    """The tar archives in a folder, or those that a pattern means, see [`match_files`]; empty for other places."""
    text = str(place)
    if os.path.isdir(text):
        return sorted(glob.glob(os.path.join(glob.escape(text), "*.tar")))
    return match_files(text) if text.endswith(".tar") else []


def open_pictures(place: str | os.PathLike) -> Pictures:
    """The pictures of a folder, or of tar shards, see [`find_shards`].

    Raises ValueError: nothing there.
    """
    shards = find_shards(place)
    return TarPictures(shards) if shards else FolderPictures(place)
