"""Names of files below folders, looked for again only where a folder has changed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

# Folders' times come from a clock that ticks: one that changed a moment ago may change again unseen.
_TICK_NS = 50_000_000


@dataclass(frozen=True)
class _Listing:
    names: list[str]
    changed: dict[str, int]  # when each folder that was searched last changed, in ns
    made: int

    def holds(self) -> bool:
        return all(_changed(folder) == then < self.made - _TICK_NS for folder, then in self.changed.items())


_known: dict[tuple[str, tuple[str, ...]], _Listing] = {}


def names_below(root: str, endings: Sequence[str]) -> list[str]:
    """Names of the files below a folder that end in one of `endings`, with forward slashes, sorted.

    As `find_files` of the package finds them: links are followed, each folder is searched once. A folder that is not
    there has none.
    """
    key = (root, tuple(endings))
    if key not in _known or not _known[key].holds():
        try:
            from gpstoken_diffusers.folder_files import find_files
        except ImportError:  # installation.check says so when a node runs
            return []
        if not os.path.isdir(root):
            return []
        made, found = time.time_ns(), find_files(root, endings)
        folders = [os.path.join(root, name) for name in found.folders]
        _known[key] = _Listing(sorted(found.files), {folder: _changed(folder) for folder in folders}, made)
    return list(_known[key].names)


def _changed(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return -1
