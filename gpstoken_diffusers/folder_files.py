"""The files of a folder and of those below it, each folder once, with what was left out and why."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_NAMES_SHOWN = 5
SEARCHED_ALREADY = "leads to a folder that was searched already"
"""Why a link, or a second name of a folder, is among the skipped."""


@dataclass(frozen=True)
class FoundFiles:
    """What [`find_files`] found, by name within the folder, with forward slashes.

    Attributes:
        files: name -> path, sorted by the parts of the name.
        skipped: name of a file or folder that was left out -> why.
        folders: names of the folders that were searched; the first is "".
    """

    files: dict[str, Path]
    skipped: dict[str, str]
    folders: tuple[str, ...] = ()

    def skipped_lines(self) -> Iterator[str]:
        """A line for each reason: how many were left out, and the first of their names."""
        names: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            names.setdefault(reason, []).append(name)
        for reason, those in names.items():
            more = f" and {len(those) - _NAMES_SHOWN:,} more" if len(those) > _NAMES_SHOWN else ""
            yield f"{len(those):,} left out ({reason}): {', '.join(those[:_NAMES_SHOWN])}{more}"


def find_files(
    folder: str | os.PathLike,
    endings: Sequence[str],
    recursive: bool = True,
    leave_out: str | os.PathLike | None = None,
) -> FoundFiles:
    """The files of a folder whose names end in one of `endings`, in any case of letters.

    Links are followed. Each folder is searched once, however many links lead to it: by its own name, or else by the
    first link. What [`is_ignored`] names is ignored. What lies in `leave_out`, such as a folder for results, is too.

    Raises OSError: the folder itself cannot be read. A folder below it that cannot be read is among the skipped.
    """
    endings, files, skipped = tuple(endings), {}, {}
    unwanted = None if leave_out is None else os.path.realpath(leave_out)
    waiting, links, seen = [""], [], {}
    while waiting or links:
        # Links come last, so that a folder keeps its own name where a link leads to it too.
        name = waiting.pop() if waiting else links.pop(0)
        place = os.path.join(folder, name)
        real = os.path.realpath(place)
        if real in seen:
            skipped[name] = SEARCHED_ALREADY
            continue
        seen[real] = name
        if real == unwanted:
            continue
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            if not name:
                raise
            skipped[name] = error.strerror or str(error)
            continue
        folders = []
        for entry in entries:
            if is_ignored(entry.name):
                continue
            below = f"{name}/{entry.name}" if name else entry.name
            reason = None
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                leads_nowhere = isinstance(error, FileNotFoundError) and entry.is_symlink()
                reason = "a link that leads nowhere" if leads_nowhere else error.strerror or str(error)
            else:
                if stat.S_ISDIR(mode):
                    if recursive:
                        (links if entry.is_symlink() else folders).append(below)
                    elif os.path.realpath(entry.path) != unwanted:
                        reason = "a folder"
                elif not entry.name.lower().endswith(endings):
                    reason = "another kind of file, by its name"
                elif not stat.S_ISREG(mode):
                    reason = "no regular file"
                else:
                    files[below] = Path(folder, below)
            if reason is not None:
                skipped[below] = reason
        waiting += reversed(folders)
    searched = tuple(seen.values())
    return FoundFiles(dict(sorted(files.items(), key=_parts)), dict(sorted(skipped.items(), key=_parts)), searched)


def is_ignored(name: str) -> bool:
    """Whether any part of a name (with forward slashes) is hidden, or a folder that archives of macOS add."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _parts(item: tuple[str, object]) -> list[str]:
    return item[0].split("/")
