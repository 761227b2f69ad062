"""What the commands that go through a folder share: its pictures, and how they tell what is done already."""

from __future__ import annotations

import logging
from pathlib import Path

from ..folder_files import find_files
from ..picture_files import image_suffixes
from .codec import Codec
from .sources import Record

logger = logging.getLogger(__name__)


def find_pictures(path: Path, output: Path, recursive: bool) -> dict[str, Path]:
    """The picture at `path`, or those of the folder: by name within it (with forward slashes), sorted.

    As [`find_files`] finds them, without those in the folder `output`. What is left out is logged.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no picture is, or the output folder is the folder itself.
    """
    if path.is_file() or path.is_fifo():
        return {path.name: path}
    if not path.is_dir():
        raise FileNotFoundError(f"no picture or folder at {path}.")
    if output.resolve() == path.resolve():
        raise ValueError(f"the output folder {output} is the input folder itself. Choose another one.")
    found = find_files(path, image_suffixes(), recursive, leave_out=output)
    for line in found.skipped_lines():
        logger.warning("%s", line)
    if not found.files:
        hint = "" if recursive else " (folders below it are searched with --recursive)"
        raise ValueError(f"no pictures in {path}{hint}. Known suffixes: {', '.join(image_suffixes())}.")
    return found.files


def model_settings(codec: Codec, num_tokens: int | None) -> Record:
    """All of the model and its inputs that tokens depend on, beside the picture."""
    return {
        "model": codec.name,
        "weights": codec.weights_checksum(),
        "dtype": str(codec.model.dtype).removeprefix("torch."),
        "num_tokens": num_tokens or codec.processor.num_tokens,
    }


def settings_difference(old: Record, new: Record) -> str:
    """In words, what of the settings has changed."""
    return ", ".join(f"{name} {old.get(name)} there, {new[name]} now" for name in new if old.get(name) != new[name])
