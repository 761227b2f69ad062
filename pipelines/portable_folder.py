"""Folders of pipelines that load anywhere: by plain diffusers, by our own classes, from a disk or from the Hub.

diffusers knows the classes of other packages only by files of code beside the weights, and runs those only where the
user trusts the folder. So a folder gets such files, an import line each; our own classes never run them.
"""

from __future__ import annotations

import json
import os
import typing
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import gpstoken_diffusers
from gpstoken_diffusers.models.loading import refuse_unknown_settings, with_dtype
from gpstoken_diffusers.safe_files import write_atomically

if TYPE_CHECKING:
    from typing_extensions import Self

_PACKAGE = "gpstoken_diffusers"
_INSTALL = "pip install -U gpstoken-diffusers"

# Raise it when a folder is written that older versions would load wrongly without noticing.
_FORMAT = 1
_FORMAT_KEY = "_gpstoken_format"
# One class for all networks, as AutoModel reads it here and not in the networks' own folders.
_AUTO_MAP = {"AutoModel": f"{_PACKAGE}.GPSTokenAutoModel"}
_PRIVATE_KEYS = ("_class_name", "_diffusers_version", _FORMAT_KEY)

_PIPELINE_CODE = '''\
"""Run by DiffusionPipeline.from_pretrained(<this folder>, trust_remote_code=True)."""

try:
    from {package} import {pipeline}
except ImportError as error:
    message = f"This model needs the package {package} ({{error}}): {install}"
    raise ImportError(message) from error
'''

# The same for every component: diffusers copies them all to one place, and Python takes a file that has the size of the
# one before it there, and was written in the same second, for that one.
_COMPONENT_CODE = '''\
"""Tells diffusers where the class of this component is. The package itself lies elsewhere."""

if __name__ == "{package}":
    raise ImportError("This file hides the package {package}: start Python in another folder.")
try:
    import {package}
except ImportError as error:
    message = f"This model needs the package {package} ({{error}}): {install}"
    raise ImportError(message) from error


def __getattr__(name):
    return getattr({package}, name)
'''

_BLOCKS_CODE = '"""Run by ModularPipeline.from_pretrained(<this folder>, trust_remote_code=True)."""\n\n' + (
    "from gpstoken_diffusers.modular import GPSTokenBlocks\n"
)


class PortableFolderMixin:
    """Stands before `DiffusionPipeline`: what it saves, diffusers alone can load, and what it loads is checked.

    After `pipe.save_pretrained(folder)`, there are two ways back, for a local folder as for a repository of the Hub:

    - the pipeline's own class, `GPSTokenPipeline.from_pretrained(folder)`, with installed code only;
    - `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`, with nothing imported before.

    and a third, into blocks: `ModularPipeline.from_pretrained(folder, trust_remote_code=True)`, see
    `gpstoken_diffusers.modular`.

    A network alone comes by `diffusers.AutoModel.from_pretrained(folder, subfolder="transformer",
    trust_remote_code=True)`.
    """

    # ------------------------------------------------------------------ saving

    _repository: str | None = None  # of the Hub, that the folder being written is for

    def save_pretrained(self, save_directory: str | os.PathLike, safe_serialization: bool = True, **kwargs) -> None:
        """Saves all components and what finds them again; arguments as in diffusers.

        Raises ValueError: `safe_serialization=False`; a pickle could not be loaded again.
        """
        if not safe_serialization:
            raise ValueError(
                f"{type(self).__name__} saves safetensors only, as it loads nothing else: leave out safe_serialization."
            )
        self._repository = kwargs.get("repo_id")
        super().save_pretrained(save_directory, **kwargs)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json`, and the files of code that lead diffusers to this package."""
        folder = Path(save_directory)
        index = self._portable_index()
        for name in self.components:
            if index[name][0] == _PACKAGE:
                (folder / name).mkdir(parents=True, exist_ok=True)
                code = _COMPONENT_CODE.format(package=_PACKAGE, install=_INSTALL)
                write_atomically(folder / name / f"{_PACKAGE}.py", code.encode())
        if isinstance(index["_class_name"], list):
            module, pipeline = index["_class_name"]
            code = _PIPELINE_CODE.format(package=_PACKAGE, install=_INSTALL, pipeline=pipeline)
            write_atomically(folder / f"{module}.py", code.encode())
            for name, text in self._modular_files(index).items():
                write_atomically(folder / name, text.encode())
        super().save_config(save_directory, push_to_hub, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes `model_index.json` in its portable form, whole or not at all."""
        text = json.dumps(self._portable_index(), indent=2, sort_keys=True) + "\n"
        write_atomically(json_file_path, text.encode())

    def _portable_index(self) -> dict[str, Any]:
        """`model_index.json` without local paths, and with public names for the classes of this package."""
        index = json.loads(self.to_json_string())
        index = {key: value for key, value in index.items() if not key.startswith("_") or key in _PRIVATE_KEYS}
        for name in self.components:
            module, class_name = index[name]
            component = _public_class(class_name)
            if component is not None and component.__module__ == module:
                index[name] = [_PACKAGE, class_name]
        # A subclass that a user has made is not ours to find again.
        if _public_class(type(self).__name__) is type(self):
            index["_class_name"] = ["pipeline", type(self).__name__]
        return {**index, "auto_map": _AUTO_MAP, _FORMAT_KEY: _FORMAT}

    def _modular_files(self, index: dict[str, Any]) -> dict[str, str]:
        """What `ModularPipeline.from_pretrained` reads beside the components, see `gpstoken_diffusers.modular`."""
        blocks = {"_class_name": "GPSTokenBlocks", "auto_map": {"ModularPipelineBlocks": "block.GPSTokenBlocks"}}
        parts = {
            name: [None, None, {
                "type_hint": index[name],
                "pretrained_model_name_or_path": self._repository,  # diffusers puts a local folder in its place
                "subfolder": name,
                "variant": None,
                "revision": None,
            }]
            for name in self.components
            if index[name][0] is not None
        }  # fmt: skip
        settings = {name: index[name] for name in ("id2label", "sampling_defaults") if name in index}
        # diffusers makes pipelines of this name alone; the blocks come from auto_map.
        modular = {"_class_name": "ModularPipeline", "_blocks_class_name": "GPSTokenBlocks", **parts, **settings}
        files = {"modular_config.json": blocks, "modular_model_index.json": modular}
        return {"block.py": _BLOCKS_CODE} | {
            name: json.dumps(content, indent=2, sort_keys=True) + "\n" for name, content in files.items()
        }

    def __setattr__(self, name: str, value: Any) -> None:
        """As in diffusers, which, however, never saves an optional component that was None at first."""
        super().__setattr__(name, value)
        if name in self._optional_components and value is not None and self.config[name][0] is None:
            self.register_modules(**{name: value})

    # ------------------------------------------------------------------ loading

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """Loads a folder or Hub repository that `save_pretrained` wrote; arguments as in diffusers.

        Runs no code of the folder, and reads safetensors only. A folder that another pipeline of this package saved
        will do.

        Raises:
            ValueError: the folder holds another kind of pipeline, or was saved by a later version.
            OSError: no such folder, or a component, its configuration or its weights are missing or damaged.
        """
        kwargs = {**with_dtype(kwargs), "use_safetensors": True}
        name = os.fspath(pretrained_model_name_or_path)
        folder = Path(name) if os.path.isdir(name) else cls._download(name, kwargs)
        cls._check_components(folder, passed=kwargs)
        pipe = super().from_pretrained(str(folder), **kwargs)
        pipe.register_to_config(_name_or_path=name)
        return pipe

    @classmethod
    def _download(cls, repository: str, settings: dict[str, Any]) -> Path:
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise OSError(
                f"There is no folder {repository}, and a repository of the Hub has a name such as owner/name."
            ) from error
        return Path(cls.download(repository, **settings))

    @classmethod
    def _check_components(cls, folder: Path, passed: dict[str, Any]) -> None:
        """Raises OSError for a missing component, ValueError for a folder of a later version."""
        index = cls.load_config(folder)
        cls._check_index(index)
        for name, entry in index.items():
            if not isinstance(entry, list) or entry[0] is None or name in passed or name not in cls._get_init_keys(cls):
                continue
            if not (folder / name).is_dir():
                raise OSError(
                    f"The component {name} ({entry[1]}) is missing: {folder} has no folder of that name. Download or "
                    f"copy the model again, or give the component: from_pretrained(..., {name}=...)."
                )

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike, **kwargs) -> dict[str, Any]:
        # With the list in place, diffusers would take the folder's pipeline.py for the pipeline, and ask for trust.
        index = super()._dict_from_json_file(json_file, **kwargs)
        if isinstance(index.get("_class_name"), list):
            index["_class_name"] = index["_class_name"][1]
        return index

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple]:
        # As in diffusers, which before 0.41 does not read annotations that are text.
        hints = typing.get_type_hints(cls.__init__)
        return {name: typing.get_args(hint) if isinstance(hint, UnionType) else (hint,) for name, hint in hints.items()}

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> tuple[dict, dict, dict]:
        """As in diffusers, which calls it on whichever way it loads a pipeline, after checks.

        Raises ValueError: the configuration of another pipeline, or of a later version.
        """
        cls._check_index(config_dict)
        located = {name: _locate(entry) for name, entry in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(located, **kwargs)

    @classmethod
    def _check_index(cls, index: dict[str, Any]) -> None:
        """Raises ValueError for the folder of another pipeline, or of a later version."""
        class_name = index.get("_class_name")
        class_name = class_name[1] if isinstance(class_name, list) else class_name
        if class_name != cls.__name__ and not issubclass(_public_class(class_name) or object, PortableFolderMixin):
            raise ValueError(
                f"This is the folder of a {class_name}, which {cls.__name__} cannot load. If that is a pipeline of a "
                f"later version of {_PACKAGE} than {gpstoken_diffusers.__version__}: {_INSTALL}."
            )
        if index.get(_FORMAT_KEY, _FORMAT) > _FORMAT:
            raise ValueError(
                f"This folder was saved by a later version of {_PACKAGE} (format {index[_FORMAT_KEY]}; version "
                f"{gpstoken_diffusers.__version__} reads up to {_FORMAT}): {_INSTALL}."
            )
        if class_name == cls.__name__:
            refuse_unknown_settings(cls, index, cls.config_name)


def _public_class(name: str | None) -> type | None:
    found = getattr(gpstoken_diffusers, name) if name in gpstoken_diffusers.__all__ else None
    return found if isinstance(found, type) else None


def _locate(entry: Any) -> Any:
    """A component [package, class] as [module, class]: diffusers looks for base classes in the module that it names."""
    if not isinstance(entry, list) or entry[:1] != [_PACKAGE]:
        return entry
    component = _public_class(entry[1])
    if component is None:
        raise ValueError(
            f"This folder has a component of class {entry[1]}, which {_PACKAGE} {gpstoken_diffusers.__version__} does "
            f"not have. If it comes from a later version: {_INSTALL}."
        )
    return [component.__module__, entry[1]]
