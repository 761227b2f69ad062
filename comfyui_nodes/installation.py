"""Whether the package that the nodes call can be used, said in the page's own error box."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

conflict: str | None = None
"""Set by the door of a clone that found another copy of the package already loaded."""

_HERE = Path(__file__).resolve().parent
_NEEDED = ("safetensors", "tqdm", "transformers", "accelerate", "diffusers", "gpstoken_diffusers")


def check() -> None:
    """Raises RuntimeError, with the command to run, if the package is missing, of another version or cannot work."""
    if conflict is not None:
        raise RuntimeError(conflict)
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise RuntimeError(
                f"GPSToken's nodes need the package {name}, which does not load here ({error}). Install it into "
                f"ComfyUI's own Python, then start ComfyUI again:\n{install_command()}"
            ) from error
    # `gpstoken comfyui install` leaves it beside its copy of the nodes.
    version_file = _HERE / "VERSION"
    if version_file.is_file():
        expected = version_file.read_text(encoding="utf-8").strip()
        found = sys.modules["gpstoken_diffusers"].__version__
        if found != expected:
            raise RuntimeError(
                f"These nodes belong to gpstoken_diffusers {expected}, but version {found} is installed. Bring them "
                f"together, then start ComfyUI again:\n"
                f'"{sys.executable}" -m gpstoken_diffusers comfyui install "{_HERE.parents[1]}"'
            )


def install_command() -> str:
    """The command that installs what the nodes need."""
    requirements = _HERE.parent / "requirements.txt"
    if requirements.is_file():  # a clone in custom_nodes
        return f'"{sys.executable}" -m pip install -r "{requirements}"'
    return f'"{sys.executable}" -m pip install -U gpstoken_diffusers'
