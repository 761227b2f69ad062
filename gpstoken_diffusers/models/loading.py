"""How models are loaded: presets, official single files, folders of `save_pretrained`."""

from __future__ import annotations

import inspect
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin
from diffusers import __version__ as diffusers_version
from torch import Tensor

from .. import __version__
from . import official_checkpoints
from .hub_files import RELEASES, HubOptions, hub_file

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

logger = logging.getLogger(__name__)

# What tells `from_pretrained` where a folder or a Hub repository is.
LOCATION_ARGUMENTS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
)  # fmt: skip


# What diffusers writes into a config.json beside the arguments of the constructor.
_OTHER_SETTINGS = {"auto_map", "quantization_config"}
# What diffusers' EMAModel writes into it beside the arguments, and words of what training scripts note there: how the
# weights came to be does not change what they draw.
_OF_AVERAGING = {
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
}  # fmt: skip
_WORDS_OF_TRAINING = {
    "author", "batch", "checkpoint", "comment", "dataset", "date", "description", "ema", "epoch", "epochs", "global",
    "learning", "license", "loss", "lr", "notes", "optimizer", "seed", "train", "trained", "training", "wandb",
}  # fmt: skip


def refuse_unknown_settings(owner: type, config: dict[str, Any], file: str | os.PathLike) -> None:
    """Raises ValueError for settings in `file` that the class `owner` does not know, and warns of notes of a training.

    diffusers drops both with a warning; without a setting of a later version the pictures would come out wrong.
    """
    unknown = {name for name in config if not name.startswith("_")} - owner._get_init_keys(owner) - _OTHER_SETTINGS
    notes = {name for name in unknown if name in _OF_AVERAGING or _WORDS_OF_TRAINING & set(name.lower().split("_"))}
    if notes:
        logger.warning("%s: left out %s, which a training script wrote.", file, ", ".join(sorted(notes)))
    if unknown - notes:
        raise ValueError(
            f"{file} has settings that {owner.__name__} of gpstoken_diffusers {__version__} does not know: "
            f"{', '.join(sorted(unknown - notes))}. A later version may have saved it: pip install -U "
            "gpstoken-diffusers."
        )


def with_dtype(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` with `dtype` or `torch_dtype` under the name that this diffusers knows."""
    name = "dtype" if tuple(map(int, diffusers_version.split(".")[:2])) >= (0, 40) else "torch_dtype"
    return {name if key in ("dtype", "torch_dtype") else key: value for key, value in arguments.items()}


def align_weights(model: torch.nn.Module) -> None:
    """Copies weights that lie within a file to memory of their own, at addresses that are multiples of 64 bytes.

    In a safetensors file they lie at any multiple of their size. At uneven addresses a CPU's matrix library sums in
    another order, so a loaded model would differ in the last bit from the one that was saved. Copies also do not
    change when the file does. Quantised weights and those on other devices stay as they are.
    """
    for weight in model.parameters():
        if type(weight.data) is torch.Tensor and weight.device.type == "cpu" and weight.is_floating_point():
            if weight.data_ptr() % 64:
                weight.data = weight.data.clone()


class FolderLoadingMixin:
    """Stands before `ModelMixin`: adds checks that diffusers leaves out, and clean configurations."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """Loads a folder or Hub repository that `save_pretrained` wrote; arguments as in diffusers' `ModelMixin`.

        Safetensors only: diffusers would fall back to a pickle where there is no safetensors file.

        Raises:
            ValueError: the folder holds another class of model, or settings of a later version.
            OSError: no such folder, no configuration or weights in it, or weights that the model needs are missing
                (diffusers only warns, and leaves them empty).
        """
        kwargs = {**with_dtype(kwargs), "use_safetensors": True}
        where = {key: kwargs[key] for key in LOCATION_ARGUMENTS if key in kwargs}
        config = cls.load_config(pretrained_model_name_or_path, **where)
        class_name = config.get("_class_name")
        if class_name != cls.__name__:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of class {class_name}, not {cls.__name__}."
            )
        refuse_unknown_settings(cls, config, Path(pretrained_model_name_or_path) / cls.config_name)
        model = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        loaded = model[0] if isinstance(model, tuple) else model
        empty = [name for name, parameter in loaded.named_parameters() if parameter.is_meta]
        if empty:
            raise OSError(
                f"{pretrained_model_name_or_path} lacks {len(empty)} of the model's weights ({', '.join(empty[:10])}"
                f"{', ...' if len(empty) > 10 else ''}). The folder is incomplete, or its config.json belongs to "
                "another model."
            )
        align_weights(loaded)
        return model

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args, safe_serialization: bool = True, **kwargs
    ) -> None:
        """Saves weights and configuration; arguments as in diffusers.

        Raises ValueError: `safe_serialization=False`; `from_pretrained` could not load the pickle.
        """
        if not safe_serialization:
            raise ValueError(
                f"{type(self).__name__} saves safetensors only, as it loads nothing else: leave out safe_serialization."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    # diffusers' pipelines hand on only what they find among a model's parameters, such as `variant`.
    save_pretrained.__signature__ = inspect.signature(ModelMixin.save_pretrained)

    def to_json_string(self) -> str:
        """The configuration as it is saved, without the local path that diffusers would add."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


class SingleFileLoadingMixin(FolderLoadingMixin):
    """Adds presets and official single files, whose format a model names in `_official`."""

    _official: official_checkpoints.OfficialFormat

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> Self:
        """A freshly initialised model in the size of a released one.

        Raises ValueError, naming the presets, for another name.
        """
        return cls(**{**cls._official.presets[cls._known(preset)], **overrides})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *, preset: str | None = None, **kwargs
    ) -> Self:
        """Loads a folder or Hub repository that `save_pretrained` wrote, or with `preset` an official file in it.

        Args:
            preset: the released size whose file lies in the folder or repository under its official name, as in
                `from_pretrained("xtudbxk/GPSToken", preset="l256")`; the other arguments are then those of
                `from_single_file`.

        Raises as [`FolderLoadingMixin.from_pretrained`] and `from_single_file`.
        """
        if preset is None:
            try:
                return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            except OSError as error:
                if cls.config_name not in str(error):
                    raise
                sizes = " or ".join(f'"{name}"' for name in cls._official.presets)
                raise OSError(f"{error}\nWhere it holds an official file, say which: preset={sizes}.") from error
        name = cls._official.file_name.format(preset=cls._known(preset))
        parts = (os.fspath(pretrained_model_name_or_path), kwargs.pop("subfolder", None) or "", name)
        if os.path.isdir(parts[0]):
            return cls.from_single_file(Path(*parts), preset=preset, **kwargs)
        return cls.from_single_file("/".join(filter(None, parts)), preset=preset, **kwargs)

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | os.PathLike | dict[str, Tensor],
        *,
        preset: str | None = None,
        config: dict | str | os.PathLike | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **hub: Unpack[HubOptions],
    ) -> Self:
        """Loads an official GPSToken file as it is, from this machine or from the Hub.

        Args:
            pretrained_model_link_or_path_or_dict: a `.safetensors` file of the research code (pickles are refused), or
                its tensors. A path; else `OWNER/REPO/FILE` or an address of the Hub such as
                `https://huggingface.co/OWNER/REPO/blob/main/FILE`; else the short name of a released tokenizer: "s64",
                "m128", "l256". A `pathlib.Path` is always a path.
            preset: the released size, as for `from_preset`. None recognises it by its shapes, or by the file's name
                where shapes do not tell (S64 and M128 of the autoencoder). The log says which was taken.
            config: constructor arguments (a dict, or a JSON file) for a model of other sizes; replaces the preset.
            dtype: of the loaded weights; None keeps float32. `torch_dtype` is its older name.
            hub: `cache_dir`, `force_download`, `proxies`, `token`, `local_files_only` and `revision`, as in diffusers.
                Names and shapes of a file on the Hub are checked before it is downloaded.

        Raises:
            FileNotFoundError: no such file; the message says where it was looked for.
            ValueError: not a whole safetensors file, another model's, or tensors that are missing, left over or
                misshapen (all are listed).
            OSError: the cache cannot be written to, or the Hub refuses.
        """
        where = pretrained_model_link_or_path_or_dict
        if isinstance(where, dict):
            tensors, source = where, "The dict"
        else:
            path, source, preset = cls._located(where, preset, config, hub)
            tensors = official_checkpoints.read_safetensors(path)
        model, converted, reason = cls._fitted(tensors, source, preset, config)
        if reason:
            logger.warning("Loading %s as the preset %s.", Path(source).name, reason)
        # Always a copy, see `align_weights`.
        dtype = dtype or torch_dtype or torch.float32
        converted = {name: tensor.to(dtype, copy=True) for name, tensor in converted.items()}
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        model.load_state_dict(converted, assign=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        return model.eval()

    @classmethod
    def download_single_file(
        cls,
        location: str | os.PathLike,
        *,
        preset: str | None = None,
        config: dict | str | os.PathLike | None = None,
        **hub: Unpack[HubOptions],
    ) -> Path:
        """The local path of an official file, after a download where it takes one; all as in `from_single_file`."""
        return cls._located(location, preset, config, hub)[0]

    @classmethod
    def _located(
        cls, location: str | os.PathLike, preset: str | None, config: dict | str | os.PathLike | None, hub: HubOptions
    ) -> tuple[Path, str, str | None]:
        """Local path of an official file, its name for messages, and its preset where that is known."""
        if unknown := set(hub) - HubOptions.__annotations__.keys():
            raise TypeError(f"from_single_file has no argument {sorted(unknown)[0]!r}.")
        text = os.fspath(location)
        file = None if os.path.exists(text) or isinstance(location, os.PathLike) else hub_file(text)
        if file is None:
            return Path(text), text, preset
        if text in RELEASES and preset is None and config is None:
            preset = text
        path = file.fetch(lambda header: cls._fitted(header, str(file), preset, config), hub)
        return path, str(file), preset

    @classmethod
    def _fitted(
        cls,
        tensors: dict[str, Tensor],
        source: str,
        preset: str | None,
        config: dict | str | os.PathLike | None,
    ) -> tuple[Self, dict[str, Tensor], str | None]:
        """The model without weights, the tensors in its names, and which preset for what reason."""
        converted, reason = cls._official.convert(tensors, source), None
        if config is None:
            preset, why = cls._official.recognise_preset(converted, source, preset)
            config, reason = cls._official.presets[preset], f"{preset} ({why})"
        elif preset is not None:
            raise ValueError("Give either a preset or a config, not both.")
        elif not isinstance(config, dict):
            config = official_checkpoints.read_config_file(config)
        try:
            with torch.device("meta"):
                model = cls(**{key: value for key, value in config.items() if not key.startswith("_")})
        except TypeError as error:
            raise ValueError(f"The configuration does not fit {cls.__name__}: {error}.") from error
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        official_checkpoints.check_against_model(converted, expected, source)
        return model, converted, reason

    @classmethod
    def _known(cls, preset: str) -> str:
        if preset not in cls._official.presets:
            raise ValueError(f"preset must be one of {', '.join(cls._official.presets)}, got {preset!r}.")
        return preset
