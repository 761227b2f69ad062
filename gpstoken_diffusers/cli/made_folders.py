"""The folders that a command makes, of which none stays empty."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_made: list[Path] = []


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where they are missing. Raises OSError."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    _made.extend(reversed(missing))


@contextlib.contextmanager
def empty_ones_removed() -> Iterator[None]:
    """At the end of the block, removes those that `make_folder` made in it and that hold nothing.

    After Ctrl-C they stay: the run is going to be resumed.
    """
    _made.clear()
    try:
        yield
    except KeyboardInterrupt:
        _made.clear()
        raise
    finally:
        for folder in sorted(_made, key=lambda folder: len(folder.parts), reverse=True):
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
