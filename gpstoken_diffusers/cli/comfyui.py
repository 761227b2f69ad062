"""`gpstoken comfyui install`: the nodes into a ComfyUI that has this package installed."""

from __future__ import annotations

import argparse
import shutil
from importlib.util import find_spec
from pathlib import Path

from .. import __version__
from ..safe_files import replace_folder

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
    with replace_folder(target) as folder:
        shutil.copytree(nodes, folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        # Beside the nodes in a checkout, within them in a wheel.
        for name in ("example_workflows", "locales", "subgraphs"):
            if (nodes.parent / name).is_dir():
                shutil.copytree(nodes.parent / name, folder / name)
        (folder / VERSION_FILE).write_text(f"{__version__}\n", encoding="utf-8")
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
