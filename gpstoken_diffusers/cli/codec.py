"""A model with its image processor on its device: pictures to tokens and tokens to pictures."""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import disable_progress_bars
from PIL import Image

from .. import __version__
from ..assets import MINI_PIPELINE
from ..evaluation.metrics import psnr, ssim
from ..image_processor import GPSTokenImageProcessor
from ..models.autoencoder_gpstoken import AutoencoderGPSToken
from ..models.canvas import Progress
from ..models.hub_files import fetch_tokenizer_folder, is_repository
from ..ops.partition import max_tokens
from ..tokens import GPSTokens
from .sources import Record, picture_of, read_source

AUTOENCODER_FOLDER = "autoencoder"  # of a pipeline
SMALLEST_FOR_SSIM = 11  # px, the side of its window


@dataclass(frozen=True)
class Encoded:
    """A picture and its tokens.

    Attributes:
        picture: what the model saw, as an 8-bit RGB picture.
        initial_tokens: the Gaussians of the partition.
        tokens: the refined ones; both on the CPU.
        source: the record of the file, see [`read_source`].
    """

    picture: Image.Image
    initial_tokens: GPSTokens
    tokens: GPSTokens
    source: Record


@dataclass(frozen=True)
class Codec:
    """A loaded model and its processor.

    Attributes:
        name: of the model, for people.
        model: on its device, in eval mode.
        processor: makes its inputs.
    """

    name: str
    model: AutoencoderGPSToken
    processor: GPSTokenImageProcessor

    @torch.inference_mode()
    def encode(
        self,
        path: Path,
        num_tokens: int | None = None,
        importance: Path | None = None,
        importance_strength: float = 1.0,
        polish_steps: int = 0,
        progress: Progress | None = None,
    ) -> Encoded:
        """Read a picture, and turn it into tokens; arguments as of `AutoencoderGPSToken.encode`.

        Raises:
            FileNotFoundError: no such picture or mask.
            ValueError: a file that is no picture, a mask of another size, too many tokens or too few.
        """
        data, source = read_source(path)
        picture = picture_of(data, path, self.processor.background)
        mask = None if importance is None else self.processor.load_mask(importance)
        features = self.processor(
            picture, num_tokens=num_tokens, importance=mask, importance_strength=importance_strength
        )
        output = self.model.encode(**features.to(self.model.device), polish_steps=polish_steps, progress=progress)
        return Encoded(
            picture=self.processor.postprocess(features["pixel_values"])[0],
            initial_tokens=output.initial_tokens.cpu(),
            tokens=output.tokens.cpu(),
            source=source,
        )

    @torch.inference_mode()
    def decode(self, tokens: GPSTokens, mode: str | None = None, size: tuple[int, int] | None = None) -> Image.Image:
        """The picture that tokens stand for (the first, if there are several), rounded to 8 bits.

        size: (height, width) in pixels; None is the picture's own.

        Raises:
            ValueError: tokens that do not fit the model.
        """
        sample = self.model.decode(tokens[0].to(self.model.device, self.model.dtype), mode=mode, size=size).sample
        return self.processor.postprocess(sample)[0]

    def check_num_tokens(self, num_tokens: int | None) -> None:
        """Raises ValueError for a number of tokens that no tile can be divided into."""
        side = self.processor.tile_size
        largest = max_tokens(side, side, self.processor.min_region_size)
        if num_tokens is not None and not 1 <= num_tokens <= largest:
            raise ValueError(
                f"--num-tokens {num_tokens}: a tile of {side} x {side} px gives 1 to {largest} tokens here."
            )

    def metadata(self) -> dict[str, str]:
        """What a tokens file says of who made it."""
        return {"model": self.name, "software": f"gpstoken_diffusers {__version__}"}

    def weights_checksum(self) -> str:
        """Eight hexadecimal digits that change with any weight and its precision."""
        checksum = 0
        for tensor in self.model.state_dict().values():
            checksum = zlib.crc32(tensor.detach().cpu().flatten().view(torch.uint8).numpy(), checksum)
        return f"{checksum:08x}"


def load_codec(args: argparse.Namespace) -> Codec:
    """Load what `--model`, `--preset`, `--device` and `--dtype` ask for, to work in `--memory-budget`.

    Raises:
        OSError: no such model, or an incomplete or damaged one.
        ValueError: a model of another kind, a device that is not there, options that do not go together, a memory
            budget that is no size or too small.
    """
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    path, name = find_model(args)
    if (path / AUTOENCODER_FOLDER / "config.json").is_file():
        path = path / AUTOENCODER_FOLDER  # a whole pipeline: its tokenizer
    if path.is_dir():
        if args.preset is not None:
            raise ValueError(f"--preset is for official files; the folder {path} holds its own configuration.")
        model = _load_folder(path, dtype)
    else:
        model = AutoencoderGPSToken.from_single_file(path, preset=args.preset, dtype=dtype)
    model.set_memory_budget(args.memory_budget)
    processor = processor_for(model, path)
    return Codec(name, model.to(device).eval(), processor)


def find_model(args: argparse.Namespace) -> tuple[Path, str]:
    """Where `--model` is on this machine, after a download where it takes one, and its name for people.

    Raises:
        OSError: no such model, here or on the Hub, or the Hub cannot be reached.
        ValueError: an official file that does not fit.
    """
    if args.quiet:
        disable_progress_bars()
    place = args.model or str(MINI_PIPELINE)
    path = Path(place)
    if path.exists():
        return path, path.resolve().name
    if args.model is None:
        raise FileNotFoundError(f"the shipped model is not at {path}. Install the package again, or give --model.")
    if is_repository(place):
        return fetch_tokenizer_folder(place), path.name
    path = AutoencoderGPSToken.download_single_file(place, preset=args.preset)
    if not path.is_file():
        raise FileNotFoundError(
            f"no model at {path}. Give s64, m128, l256, a folder, or an official .safetensors file, here or on the Hub."
        )
    return path, path.name


def processor_for(model: AutoencoderGPSToken, path: Path) -> GPSTokenImageProcessor:
    """The processor that lies beside the model, or one with the settings of the model's configuration."""
    if (path / "preprocessor_config.json").is_file():
        return GPSTokenImageProcessor.from_pretrained(path)
    return GPSTokenImageProcessor.for_autoencoder(model.config)


def quality(original: Image.Image, picture: Image.Image) -> dict[str, float | None]:
    """PSNR in dB (infinite if nothing differs) and SSIM (None below 11 px) between 8-bit RGB pictures."""
    a, b = (
        torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1 for image in (original, picture)
    )
    small = min(picture.size) < SMALLEST_FOR_SSIM
    return {"psnr": psnr(a, b).item(), "ssim": None if small else ssim(a, b).item()}


def quality_text(values: Mapping[str, Any]) -> str:
    """Such as "PSNR 25.31 dB   SSIM 0.7812"."""
    parts = []
    if values["psnr"] is not None:
        parts.append("PSNR inf" if math.isinf(values["psnr"]) else f"PSNR {values['psnr']:.2f} dB")
    if values["ssim"] is not None:
        parts.append(f"SSIM {values['ssim']:.4f}")
    return "   ".join(parts)


def _load_folder(path: Path, dtype: torch.dtype) -> AutoencoderGPSToken:
    config_file = path / "config.json"
    if config_file.is_file():  # where it is missing, from_pretrained says so
        try:
            kind = json.loads(config_file.read_text(encoding="utf-8")).get("_class_name")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{config_file} is not a model's configuration ({error}).") from error
        if kind != AutoencoderGPSToken.__name__:
            raise ValueError(f"{path} holds a model of the class {kind}, not AutoencoderGPSToken.")
    # Pickled weights could run code, so only safetensors are read; and a local folder needs no network.
    return AutoencoderGPSToken.from_pretrained(path, dtype=dtype, use_safetensors=True, local_files_only=True)


def choose_device(name: str) -> torch.device:
    """What `--device` asks for. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            without = torch.version.cuda is None
            why = "this PyTorch was built without CUDA" if without else "PyTorch finds no usable GPU"
            raise ValueError(f"--device {name}: {why}. Use --device cpu or auto.")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: PyTorch finds no Apple GPU here. Use --device cpu or auto.")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """What `--dtype` asks for on this device."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return torch.bfloat16
    return torch.float32
