"""What the commands that go through a folder share: its pictures, and how they tell what is done already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..image_processor import IMAGE_SUFFIXES
from .codec import Codec

Record = dict[str, Any]


def find_pictures(path: Path, output: Path, recursive: bool) -> dict[str, Path]:
    """The picture at `path`, or those of the folder: by name within it (with forward slashes), sorted.

    Hidden files, and what lies in the folder `output`, are left out.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no picture is, or the output folder is the folder itself.
    """
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise FileNotFoundError(f"no picture or folder at {path}.")
    skipped = output.resolve()
    if skipped == path.resolve():
        raise ValueError(f"the output folder {output} is the input folder itself. Choose another one.")
    sources = {}
    for file in sorted(path.rglob("*") if recursive else path.iterdir()):
        name = file.relative_to(path)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or file.suffix.lower() not in IMAGE_SUFFIXES or not file.is_file():
            continue
        if skipped not in file.resolve().parents:  # results of an earlier run, where OUT lies below PATH
            sources[name.as_posix()] = file
    if not sources:
        hint = "" if recursive else " (folders below it are searched with --recursive)"
        raise ValueError(f"no pictures in {path}{hint}. Known suffixes: {', '.join(IMAGE_SUFFIXES)}.")
    return sources


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


def picture_state(source: Path) -> Record:
    """Tells whether a picture has changed since something was made of it."""
    status = source.stat()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
