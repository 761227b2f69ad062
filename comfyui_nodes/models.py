"""Models that ComfyUI's memory manager moves, and what nodes ask of them."""

from __future__ import annotations

import functools
import logging
import os
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import comfy.model_management as memory
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from . import downloads
from .downloads import RELEASED
from .listing import names_below

if TYPE_CHECKING:
    from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor, GPSTokenInpaintPipeline

FOLDER = "gpstoken"
_CONFIGS = ("model_index.json", "config.json")  # of a folder that save_pretrained wrote
SHIPPED = "gpstoken-mini (shipped)"
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Feature maps of a tile that a network holds at once: a rough upper bound, by which ComfyUI makes room.
_CHANNELS_IN_FLIGHT = 512
_TILES_IN_FLIGHT = 4
GB = 10**9


def list_models() -> list[str]:
    """What Load GPSToken offers: the shipped model, released ones, then folders and files below models/gpstoken."""
    found = set()
    for root in folder_paths.get_folder_paths(FOLDER):
        names = [PurePosixPath(name) for name in names_below(root, (*_CONFIGS, ".safetensors"))]
        inside = {name.parent for name in names if name.name in _CONFIGS}
        files = {name for name in names if name.suffix.lower() == ".safetensors" and not inside & set(name.parents)}
        # The parts of a pipeline are no models of their own.
        found |= files | {folder for folder in inside if not inside & set(folder.parents)}
    return [SHIPPED, *RELEASED, *sorted(map(str, found - {PurePosixPath("."), *map(PurePosixPath, RELEASED)}))]


def find_model(name: str) -> Path:
    """The folder or file that a name of `list_models` stands for; a released one may not be there yet.

    Raises ValueError: no such model, or a name that leads out of the folder.
    """
    from gpstoken_diffusers.assets import MINI_PIPELINE

    if name == SHIPPED:
        return MINI_PIPELINE
    name = name.replace("\\", "/")  # as older workflows from Windows have it
    if name not in list_models():
        raise ValueError(
            f"There is no model {name!r}. Put a folder that save_pretrained wrote, or an official .safetensors file, "
            f"into {folder_paths.get_folder_paths(FOLDER)[0]}. There are: {', '.join(list_models())}."
        )
    places = [Path(root, name) for root in folder_paths.get_folder_paths(FOLDER)]
    return next((place for place in places if place.exists()), places[0])


def model_fingerprint(name: str) -> list[tuple[str, int, int]]:
    """Changes when the files of a model do."""
    if name in RELEASED:
        return []  # whether it is there already or not
    path = find_model(name)
    files = [path] if path.is_file() else [path / file for file in names_below(str(path), ("",))]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def network_dtype(device: torch.device, dtype: str = "auto") -> torch.dtype:
    """What networks compute in. "auto" is ComfyUI's choice, or the nearest to it in which they can compute.

    ComfyUI's launch flags name float8 and float64 too, which its own layers cast from; ours compute in what they hold.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    if dtype != "auto":
        return DTYPES[dtype]
    known = [torch.bfloat16, torch.float16, torch.float32]
    wanted = memory.unet_dtype(device, supported_dtypes=known)
    if wanted in known:
        return wanted
    if wanted.itemsize > 4:
        nearest = torch.float32
    else:  # both hold every float8 number
        nearest = torch.bfloat16 if device.type == "cpu" or memory.should_use_bf16(device) else torch.float16
    _say_once(f"GPSToken's networks cannot compute in {wanted}, which ComfyUI was started with: they take {nearest}.")
    return nearest


@functools.cache
def _say_once(text: str) -> None:
    logging.warning(text)


class _Box(torch.nn.Module):
    """ModelPatcher writes `model.device`, which diffusers' models do not allow. Logs show the name of its class."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network


def _boxed(network: torch.nn.Module) -> _Box:
    return type(type(network).__name__, (_Box,), {})(network)


class _WholePatcher(ModelPatcher):
    """Loads and unloads a network as a whole, whatever ComfyUI was started with.

    ComfyUI's layers fetch weights that lie elsewhere when they run, diffusers' do not: half a network cannot run.
    """

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        return super().load(device_to, 0, force_patch_weights, True)

    def partially_unload(self, *args, **kwargs) -> int:
        return 0  # nothing was freed: ComfyUI then unloads all of it


class GPSModel:
    """The networks of one folder or file, each of which ComfyUI can load, move and unload by itself."""

    def __init__(self, name: str, networks: dict[str, torch.nn.Module], processor: GPSTokenImageProcessor):
        self.name = name
        self.processor = processor
        self.load_device, self.offload_device = memory.get_torch_device(), memory.unet_offload_device()
        self._networks = networks
        self._patchers = {
            part: _WholePatcher(_boxed(network), self.load_device, self.offload_device)
            for part, network in networks.items()
        }
        self._pipeline: GPSTokenInpaintPipeline | None = None

    @classmethod
    def load(cls, name: str, dtype: str = "auto") -> GPSModel:
        """Reads a model of `list_models`.

        Raises:
            ValueError: no such model, or files that are not of a GPSToken model.
            OSError: files that are missing or damaged.
        """
        from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor, GPSTokenPipeline

        wanted = network_dtype(memory.get_torch_device(), dtype)
        path = find_model(name)
        if name in RELEASED and not path.exists():
            path = downloads.fetch(name, path.parent)
        if (path / "model_index.json").is_file():
            pipe = GPSTokenPipeline.from_pretrained(path, dtype=wanted, local_files_only=True)
            networks = {part: value for part, value in pipe.components.items() if isinstance(value, torch.nn.Module)}
            model = cls(name, networks, pipe.image_processor)
            model._pipeline = _managed(pipe, model.load_device)
            return model
        if path.is_dir():
            autoencoder = AutoencoderGPSToken.from_pretrained(path, dtype=wanted, local_files_only=True)
        else:
            autoencoder = AutoencoderGPSToken.from_single_file(path, dtype=wanted, preset=RELEASED.get(name))
        processor = GPSTokenImageProcessor.for_autoencoder(autoencoder.config)
        return cls(name, {"autoencoder": autoencoder.eval()}, processor)

    @property
    def sample_size(self) -> int:
        """Side in pixels of a tile."""
        return self._networks["autoencoder"].config.sample_size

    def __repr__(self) -> str:
        autoencoder = self._networks["autoencoder"]
        return f"GPSToken model {self.name}: {', '.join(self._networks)} in {str(autoencoder.dtype).split('.')[1]}"

    # ComfyUI's cache of results looks for these three where memory runs out: in older versions for the first.

    def get_ram_usage(self) -> int:
        """Bytes of all networks."""
        return sum(patcher.model_size() for patcher in self._patchers.values())

    @property
    def patcher(self) -> ModelPatcher:
        """What holds the tokenizer."""
        return self._patchers["autoencoder"]

    def get_models(self) -> list[ModelPatcher]:
        """What holds each network."""
        return list(self._patchers.values())

    def autoencoder(self) -> AutoencoderGPSToken:
        """The tokenizer, on the device that ComfyUI computes on."""
        self._load("autoencoder", needed=self._tile_bytes * _TILES_IN_FLIGHT)
        return self._networks["autoencoder"]

    @contextmanager
    def at_work(self, memory_gb: float = 0.0, tiles: int = _TILES_IN_FLIGHT, tokens: int = 0):
        """Inside, the tokenizer is on the device that ComfyUI computes on, and Cancel ends what it does.

        Args:
            memory_gb: what it may work in; 0 is what ComfyUI has free, where that is not plenty.
            tiles: how many it would take at once.
            tokens: per tile; 0 is the model's own number.

        Raises ValueError: less memory than it needs; the message says the least that works.
        """
        network = self._networks["autoencoder"]
        needed = self._tile_bytes * tiles
        budget = int(memory_gb * GB) if memory_gb else None
        network.set_memory_budget(budget)
        self._load("autoencoder", needed=budget or needed)
        if budget is None:
            free = memory.get_free_memory(self.load_device) - memory.extra_reserved_memory()
            if free < needed:
                plan = network.work_plan
                least = plan.encoding_bytes(1, tokens or network.config.num_tokens)
                network.set_memory_budget(int(max(free, least, network.decoder.least_bytes(plan))))
        hooks = [module.register_forward_pre_hook(_stop_if_cancelled) for module in network.modules()]
        try:
            yield network
        finally:
            for hook in hooks:
                hook.remove()
            network.set_memory_budget(None)

    def pipeline(self, *parts: str) -> GPSTokenInpaintPipeline:
        """The pipeline, those of its networks that are named on the device that ComfyUI computes on.

        Raises ValueError: the model is a tokenizer alone, or has no such part.
        """
        missing = [part for part in parts if part not in self._networks]
        if self._pipeline is None or missing:
            raise ValueError(
                f"{self.name} has no {missing[0] if missing else 'transformer'}: it cannot generate that. Choose a "
                f"model that can in Load GPSToken, such as {SHIPPED}"
                + (", or take a layout from a picture." if "layout_model" in missing else ".")
            )
        self._load(*parts, needed=self._tile_bytes * (_TILES_IN_FLIGHT if "autoencoder" in parts else 1))
        return self._pipeline

    @property
    def _tile_bytes(self) -> int:
        return self.sample_size**2 * _CHANNELS_IN_FLIGHT * 4

    def _load(self, *parts: str, needed: int) -> None:
        memory.load_models_gpu([self._patchers[part] for part in parts], memory_required=needed, force_full_load=True)


def _stop_if_cancelled(module: torch.nn.Module, args: tuple) -> None:
    memory.throw_exception_if_processing_interrupted()


def _managed(pipe: object, device: torch.device) -> GPSTokenInpaintPipeline:
    """Every stage of a pipeline, which takes ComfyUI's device for its own, wherever its networks lie now."""
    from gpstoken_diffusers import GPSTokenInpaintPipeline

    class ManagedPipeline(GPSTokenInpaintPipeline):
        _execution_device = device

    return ManagedPipeline(**pipe.components, id2label=pipe.id2label)


folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
