"""Models that ComfyUI's memory manager moves, and what nodes ask of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management as memory
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

if TYPE_CHECKING:
    from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor, GPSTokenInpaintPipeline

FOLDER = "gpstoken"
SHIPPED = "gpstoken-mini (shipped)"
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Feature maps of a tile that a decoder holds at once: a rough upper bound, by which ComfyUI makes room.
_CHANNELS_IN_FLIGHT = 512
_TILES_IN_FLIGHT = 4


def list_models() -> list[str]:
    """What Load GPSToken offers: the shipped model, then folders and single files below models/gpstoken."""
    found = set()
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        if root.is_dir():
            for pattern in ("model_index.json", "config.json"):
                found |= {str(path.parent.relative_to(root)) for path in root.rglob(pattern)}
            inside = {root / name for name in found}
            files = (path for path in root.rglob("*.safetensors") if not inside & set(path.parents))
            found |= {str(path.relative_to(root)) for path in files}
    # The parts of a pipeline are no models of their own.
    parts = {name for name in found if any(str(parent) in found for parent in Path(name).parents)}
    return [SHIPPED, *sorted(found - parts - {"."})]


def find_model(name: str) -> Path:
    """The folder or file that a name of `list_models` stands for.

    Raises ValueError: no such model, or a name that leads out of the folder.
    """
    from gpstoken_diffusers.assets import MINI_PIPELINE

    if name == SHIPPED:
        return MINI_PIPELINE
    if name not in list_models():
        raise ValueError(
            f"There is no model {name!r}. Put a folder that save_pretrained wrote, or an official .safetensors file, "
            f"into {folder_paths.get_folder_paths(FOLDER)[0]}. There are: {', '.join(list_models())}."
        )
    return next(Path(root, name) for root in folder_paths.get_folder_paths(FOLDER) if Path(root, name).exists())


def model_fingerprint(name: str) -> list[tuple[str, int, int]]:
    """Changes when the files of a model do."""
    path = find_model(name)
    files = [path] if path.is_file() else sorted(path.rglob("*.*"))
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


class _Box(torch.nn.Module):
    """ModelPatcher writes `model.device`, which diffusers' models do not allow."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network


class GPSModel:
    """The networks of one folder or file, each of which ComfyUI can load, move and unload by itself."""

    def __init__(self, name: str, networks: dict[str, torch.nn.Module], processor: GPSTokenImageProcessor):
        self.name = name
        self.processor = processor
        self.load_device, self.offload_device = memory.get_torch_device(), memory.unet_offload_device()
        self._networks = networks
        self._patchers = {
            part: ModelPatcher(_Box(network), self.load_device, self.offload_device)
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

        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
        path = find_model(name)
        wanted = DTYPES[dtype] or memory.unet_dtype(supported_dtypes=[torch.bfloat16, torch.float16, torch.float32])
        if (path / "model_index.json").is_file():
            pipe = GPSTokenPipeline.from_pretrained(path, dtype=wanted, local_files_only=True)
            networks = {part: value for part, value in pipe.components.items() if isinstance(value, torch.nn.Module)}
            model = cls(name, networks, pipe.image_processor)
            model._pipeline = _managed(pipe, model.load_device)
            return model
        if path.is_dir():
            autoencoder = AutoencoderGPSToken.from_pretrained(path, dtype=wanted, local_files_only=True)
        else:
            autoencoder = AutoencoderGPSToken.from_single_file(path, dtype=wanted)
        processor = GPSTokenImageProcessor.for_autoencoder(autoencoder.config)
        return cls(name, {"autoencoder": autoencoder.eval()}, processor)

    @property
    def sample_size(self) -> int:
        """Side in pixels of a tile."""
        return self._networks["autoencoder"].config.sample_size

    def autoencoder(self) -> AutoencoderGPSToken:
        """The tokenizer, on the device that ComfyUI computes on."""
        self._load("autoencoder")
        return self._networks["autoencoder"]

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
        self._load(*parts)
        return self._pipeline

    def _load(self, *parts: str) -> None:
        tile = self.sample_size**2 * _CHANNELS_IN_FLIGHT * 4
        needed = tile * (_TILES_IN_FLIGHT if "autoencoder" in parts else 1)
        # Whole: diffusers' layers do not know how to run from weights that lie elsewhere.
        memory.load_models_gpu([self._patchers[part] for part in parts], memory_required=needed, force_full_load=True)


def _managed(pipe: object, device: torch.device) -> GPSTokenInpaintPipeline:
    """Every stage of a pipeline, which takes ComfyUI's device for its own, wherever its networks lie now."""
    from gpstoken_diffusers import GPSTokenInpaintPipeline

    class ManagedPipeline(GPSTokenInpaintPipeline):
        _execution_device = device

    return ManagedPipeline(**pipe.components, id2label=pipe.id2label)


class Progress:
    """Progress and Cancel of a node that takes steps."""

    def __init__(self, total: int):
        self._bar = comfy.utils.ProgressBar(total)
        self._done = 0

    def step(self, preview=None, total: int | None = None) -> None:
        """One step is done, of `total` if it is another than before. Raises ComfyUI's interruption on Cancel."""
        memory.throw_exception_if_processing_interrupted()
        self._done += 1
        self._bar.update_absolute(self._done, total, preview)


folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
