"""Find the chosen photographs in an unpacked package, each with its licence."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath

from .licences import KRANK, Licence, debian_licence, kde_licence, readme_licence
from .qt_resources import QtResources
from .sources import Source

# A photograph that the list of licences spells differently from the file itself.
_README_SPELLING = {"germany/aulaPalatina.webp": "germany/audaPalatina.webp"}


@dataclass(frozen=True)
class Photograph:
    """A chosen photograph; `read` gives the file as the package has it."""

    member: str  # its path in the package
    name: str  # file name to store it under, without suffix
    read: Callable[[], bytes]
    licence: Licence


def select_photographs(source: Source, folder: Path) -> Iterator[Photograph]:
    """Yield the photographs of `source`, whose package was unpacked below `folder`, sorted by path.

    Raises:
        ValueError: a damaged resource file, or a photograph without a licence.
    """
    root = folder / source.root
    copyright_text = (folder / "usr/share/doc" / source.package / "copyright").read_text("utf-8")
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root).as_posix()
        if path.is_symlink() or not path.is_file():
            continue  # links only repeat a picture under another size
        if path.suffix == ".rcc":
            if any(pattern.startswith(f"{relative}!") for pattern in source.include):
                yield from _select_from_resources(source, relative, QtResources(path.read_bytes()))
        elif _chosen(source, relative):
            if source.licences == "kde":
                # WALLPAPER/contents/images/SIZE.jpg; the list lies in WALLPAPER.
                licence = kde_licence((path.parents[2] / "metadata.json").read_text("utf-8"))
            elif source.licences == "krank":
                licence = KRANK
            else:
                licence = debian_licence(copyright_text, source.debian_prefix + relative)
            yield Photograph(f"{source.root}/{relative}", _name(source, relative), path.read_bytes, licence)


def _select_from_resources(source: Source, rcc: str, resources: QtResources) -> Iterator[Photograph]:
    names = resources.names()
    for name in sorted(names):
        if not _chosen(source, f"{rcc}!{name}"):
            continue
        # The list of licences lies in the picture's folder or in one above it.
        list_folder = next(parent for parent in PurePosixPath(name).parents if f"{parent}/README" in names)
        listed = PurePosixPath(name).relative_to(list_folder).as_posix()
        licence = readme_licence(
            resources.read(f"{list_folder}/README").decode("utf-8"), _README_SPELLING.get(listed, listed)
        )
        yield Photograph(
            f"{source.root}/{rcc}!{name}",
            _name(source, f"{rcc.removesuffix('.rcc')}/{listed}"),
            partial(resources.read, name),
            licence,
        )


def _chosen(source: Source, relative: str) -> bool:
    return any(fnmatchcase(relative, p) for p in source.include) and not any(
        fnmatchcase(relative, p) for p in source.exclude
    )


def _name(source: Source, relative: str) -> str:
    """`package-folder-file`, in characters that every file system and shell takes."""
    stem = PurePosixPath(relative).with_suffix("").as_posix().replace("/", "-")
    return re.sub(r"[^A-Za-z0-9._-]", "_", f"{source.package}-{stem}")
