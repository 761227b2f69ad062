"""ComfyUI's door to a clone of this repository in `custom_nodes`; elsewhere it does nothing.

The nodes run on the clone's own copy of the package, so that updating the clone updates all of it. Nothing is put on
`sys.path`.

For ComfyUI-Manager's list of packs:
@author: gpstoken
@title: GPSToken
@nickname: GPSToken
@description: Pictures as 2D Gaussian tokens: encode, edit, generate and decode them, and move Gaussians by hand.
"""

import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_PACKAGE = "gpstoken_diffusers"


def _own_copy():
    """Imports the package from beside this file, unless another copy of it is already there; returns what is there."""
    if _PACKAGE not in sys.modules:
        folder = _HERE / _PACKAGE
        spec = importlib.util.spec_from_file_location(
            _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        package = importlib.util.module_from_spec(spec)
        sys.modules[_PACKAGE] = package
        spec.loader.exec_module(package)
    return sys.modules[_PACKAGE]


# pytest imports this file too.
if "folder_paths" in sys.modules and "comfy" in sys.modules:
    from .comfyui_nodes import WEB_DIRECTORY, comfy_entrypoint, installation  # noqa: F401

    _loaded = Path(_own_copy().__file__).resolve().parent
    if _loaded != _HERE / _PACKAGE:
        installation.conflict = (
            f"ComfyUI has loaded {_PACKAGE} from {_loaded} beside the clone in {_HERE}. Keep one of them: remove the "
            f'clone, or remove the folder gpstoken_diffusers_nodes from custom_nodes and run "{sys.executable}" -m pip '
            f"uninstall {_PACKAGE}. Then start ComfyUI again."
        )
