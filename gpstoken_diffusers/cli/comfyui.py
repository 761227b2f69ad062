"""`gpstoken comfyui install`: the nodes into a ComfyUI that has this package installed."""

from __future__ import annotations

import argparse
import secrets
import shutil
from importlib.util import find_spec
from pathlib import Path

from .. import __version__

FOLDER = "gpstoken_diffusers_nodes"
VERSION_FILE = "VERSION"
"""Tells the copied nodes which version of the package they belong to, and this command that a folder is its own."""


def install(args: argparse.Namespace) -> int:
    """Copy the nodes; the folder appears whole or not at all, and an older one stays until then."""
    target = _custom_nodes(args.path) / FOLDER
    if target.exists() and not (target / VERSION_FILE).is_file():
        raise ValueError(
            f"{target} is there, but `gpstoken comfyui install` did not make it (it has no file {VERSION_FILE}). Move "
            "it away, then try again."
        )
    nodes = Path(find_spec("gpstoken_diffusers.comfyui_nodes").origin).parent
    mark = secrets.token_hex(4)
    # ComfyUI leaves folders alone that end in .disabled.
    fresh, old = (target.with_name(f".{FOLDER}.{mark}.{end}.disabled") for end in ("tmp", "old"))
    try:
        shutil.copytree(nodes, fresh, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("example_workflows", "locales"):  # beside the nodes in a checkout, within them in a wheel
            if (nodes.parent / name).is_dir():
                shutil.copytree(nodes.parent / name, fresh / name)
        (fresh / VERSION_FILE).write_text(f"{__version__}\n", encoding="utf-8")
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    if not args.quiet:
        print(f"{target}: the nodes of gpstoken_diffusers {__version__}. Start ComfyUI again to see them.")
    return 0


def _custom_nodes(path: Path) -> Path:
    for candidate in (path / "custom_nodes", path):
        if candidate.name == "custom_nodes" and candidate.is_dir():
            return candidate
    raise ValueError(
        f"{path} has no folder custom_nodes, so it is not where ComfyUI keeps its nodes. Give ComfyUI's own folder, or "
        "the one that it was started with as --base-directory."
    )
