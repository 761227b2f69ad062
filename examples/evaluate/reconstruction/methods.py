"""Ways to code a picture and to decode it again, each with what it costs: the autoencoders."""

from __future__ import annotations

import json
import re
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokens
from gpstoken_diffusers.assets import MINI
from gpstoken_diffusers.models.hub_files import RELEASES
from gpstoken_diffusers.ops.partition import max_tokens

LATENTS = {
    "AutoencoderKL": lambda output: output.latent_dist.mode(),
    "AutoencoderDC": lambda output: output.latent,
    "AutoencoderTiny": lambda output: output.latents,
}
"""Where the latents are in the output of diffusers' autoencoders."""
CLASSES = (AutoencoderGPSToken.__name__, *LATENTS, "VQModel")
"""Classes of autoencoders that can be measured."""


@dataclass(frozen=True)
class Cost:
    """What the code of a batch of pictures takes.

    Attributes:
        tokens: of a picture; None where there are none.
        numbers: of a picture; None where there are only bytes.
        bytes: of each picture, by "coded", the method's compact form, and where it has them "float16" and "float32".
        coded: the code after the compact form was decoded; None where the code is that form itself.
    """

    tokens: int | None
    numbers: int | None
    bytes: dict[str, list[int]]
    coded: Any = None


class Method(ABC):
    """Makes codes of pictures and pictures of codes.

    Attributes:
        name: of its row in a table.
        parameters: learned numbers; 0 where there are none.
    """

    name: str
    parameters: int = 0

    @abstractmethod
    def encode(self, images: Tensor, places: list[int]) -> Any:
        """(B, 3, R, R) float32 in [-1, 1], and the pictures' numbers in their folder -> a code of these pictures."""

    @abstractmethod
    def decode(self, code: Any) -> Tensor:
        """A code -> (B, 3, R, R) around [-1, 1], not clamped."""

    @abstractmethod
    def cost(self, code: Any) -> Cost:
        """What a code takes."""


class GPSTokenMethod(Method):
    """An autoencoder of this package at some number of tokens.

    Args:
        name: of the row.
        model: on its device.
        num_tokens: of each tile.

    Raises:
        ValueError: more tokens than a tile has regions.
    """

    def __init__(self, name: str, model: AutoencoderGPSToken, num_tokens: int):
        check_tokens(name, num_tokens, model.config.sample_size, model.config.min_region_size)
        self.name, self.model, self.num_tokens = name, model, num_tokens
        self.parameters = _parameters(model)

    def encode(self, images: Tensor, places: list[int]) -> GPSTokens:
        return self.model.encode(images.to(self.model.device), num_tokens=self.num_tokens).tokens

    def decode(self, code: GPSTokens) -> Tensor:
        return self.model.decode(code).sample

    def cost(self, code: GPSTokens) -> Cost:
        """Bytes are those of files with one picture each, header included; the compact form is "uint8"."""
        sizes: dict[str, list[int]] = {"coded": [], "float16": [], "float32": []}
        restored = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokens.safetensors"
            for tokens in code.cpu():
                for key in sizes:
                    tokens.save(path, dtype="uint8" if key == "coded" else key)
                    sizes[key].append(path.stat().st_size)
                    if key == "coded":
                        restored.append(GPSTokens.load(path))
        coded = GPSTokens.concatenate(restored).to(code.device)
        return Cost(code.num_tokens, code.num_floats, sizes, coded)


class ShuffledTextures(GPSTokenMethod):
    """The same with textures shuffled between a picture's tokens: what is the geometry alone worth?"""

    def encode(self, images: Tensor, places: list[int]) -> GPSTokens:
        tokens = super().encode(images, places)
        count = tokens.num_tokens
        orders = [torch.randperm(count, generator=torch.Generator().manual_seed(place)) for place in places]
        order = torch.stack(orders).to(tokens.device)[..., None]
        return _like(tokens, tokens.geometry, tokens.texture.gather(1, order.expand_as(tokens.texture)))


class InitialGaussians(GPSTokenMethod):
    """The same with the partition's Gaussians in place of the refined ones: what is refinement worth?"""

    def encode(self, images: Tensor, places: list[int]) -> GPSTokens:
        output = self.model.encode(images.to(self.model.device), num_tokens=self.num_tokens)
        return _like(output.tokens, output.initial_tokens.geometry, output.tokens.texture)


class LatentMethod(Method):
    """diffusers' AutoencoderKL (at the mode of its distribution), AutoencoderDC or AutoencoderTiny."""

    def __init__(self, name: str, model: nn.Module):
        self.name, self.model = name, model
        self.parameters = _parameters(model)
        self._latents = LATENTS[type(model).__name__]

    def encode(self, images: Tensor, places: list[int]) -> Tensor:
        """Raises ValueError: a side that an AutoencoderDC cannot halve; the others give pictures of another size."""
        factor = getattr(self.model, "spatial_compression_ratio", 1)
        if images.shape[-1] % factor:
            raise ValueError(f"{self.name} takes pictures of a multiple of {factor} px, not {images.shape[-1]}")
        return self._latents(self.model.encode(images.to(self.model.device)))

    def decode(self, code: Tensor) -> Tensor:
        return self.model.decode(code).sample

    def cost(self, code: Tensor) -> Cost:
        return latent_cost(code)


class CodebookMethod(Method):
    """diffusers' VQModel: a code is an index of its codebook at each place."""

    def __init__(self, name: str, model: nn.Module):
        self.name, self.model = name, model
        self.parameters = _parameters(model)

    def encode(self, images: Tensor, places: list[int]) -> Tensor:
        return self.model.encode(images.to(self.model.device)).latents

    def decode(self, code: Tensor) -> Tensor:
        # It takes the nearest entries of the codebook first, so the picture shows what the indices hold.
        return self.model.decode(code).sample

    def cost(self, code: Tensor) -> Cost:
        """An index is one number, of as many bits as the codebook needs."""
        count = code.shape[-2] * code.shape[-1]
        bits = max(1, (self.model.config.num_vq_embeddings - 1).bit_length())
        return Cost(count, count, {"coded": [-(-count * bits // 8)] * len(code)})


def latent_cost(latents: Tensor) -> Cost:
    """Of (B, C, h, w): h w tokens of C numbers; the compact form has 8 bits per number and each channel's range.

    Bytes are counted, nothing is written: no header, no entropy coding.
    """
    batch, channels, height, width = latents.shape
    numbers = channels * height * width
    sizes = {"coded": numbers + 8 * channels, "float16": 2 * numbers, "float32": 4 * numbers}
    by_picture = {key: [size] * batch for key, size in sizes.items()}
    return Cost(height * width, numbers, by_picture, in_8_bits(latents))


def in_8_bits(latents: Tensor) -> Tensor:
    """(B, C, h, w) rounded to 256 equal steps between the lowest and the highest value of a picture's channel."""
    low, high = latents.amin(dim=(2, 3), keepdim=True), latents.amax(dim=(2, 3), keepdim=True)
    step = ((high - low) / 255).masked_fill(high == low, 1.0)
    return low + ((latents - low) / step).round() * step


# ---------------------------------------------------------------------------------------------------- loading


def parse_model(text: str) -> tuple[str, list[int] | None]:
    """ "PLACE" or "PLACE@64,128" -> the place and the numbers of tokens, None without them."""
    match = re.fullmatch(r"(.+)@(\d+(?:,\d+)*)", text)
    return (match[1], [int(count) for count in match[2].split(",")]) if match else (text, None)


def class_of(place: str) -> str:
    """The class of the autoencoder at a place, without loading it.

    Args:
        place: "mini", an official .safetensors file of ours, a folder, or OWNER/NAME or OWNER/NAME/FOLDER of the Hub.

    Raises:
        ValueError: no model there, or one of another class.
        OSError: no such file, or the Hub does not answer or does not know it.
    """
    path = MINI if place == "mini" else Path(place)
    if _is_released(place):
        return AutoencoderGPSToken.__name__
    if path.is_file() or path.suffix == ".safetensors":
        if path.suffix != ".safetensors":
            raise ValueError(f"{place} is no model: a folder or an official .safetensors file is expected")
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {place}")
        return AutoencoderGPSToken.__name__
    if path.is_dir():
        if (path / "model_index.json").is_file():
            raise ValueError(f"{place} is a whole pipeline: give the folder of its autoencoder, such as {path / 'vae'}")
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            name = config["_class_name"]
        except FileNotFoundError:
            raise ValueError(f"{place} is a folder without a model: it has no config.json") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{place}: its config.json is damaged or names no class ({error!r})") from error
    else:
        location = _location(place)
        try:
            name = diffusers.AutoencoderKL.load_config(**location).get("_class_name")
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(f"there is no folder {place} here, and the Hub does not give one: {reason}") from error
    if name not in CLASSES:
        raise ValueError(f"{place} holds a model of class {name}; known are {', '.join(CLASSES)}")
    return name


def _is_released(place: str) -> bool:
    """Whether a place is the short name of a released tokenizer, and no folder or file of that name is here."""
    return place in RELEASES and not Path(place).exists()


def check_place(place: str, counts: list[int] | None) -> None:
    """Checks the autoencoder at a place and its numbers of tokens without loading it.

    Raises:
        ValueError, OSError: as [`load_methods`], but for its weights.
    """
    name = class_of(place)
    if counts is None:
        return
    if name != AutoencoderGPSToken.__name__:
        raise ValueError(f"{place} is an {name}, whose number of tokens cannot be chosen: leave out @...")
    config = {"sample_size": 256, "min_region_size": 8}  # of all that was released as single files
    if not Path(place).is_file() and not _is_released(place):
        config |= AutoencoderGPSToken.load_config(**_location(place))
    for count in counts:
        check_tokens(f"{place}@{count}", count, config["sample_size"], config["min_region_size"])


def check_tokens(name: str, count: int, side: int, min_region_size: int) -> None:
    """Raises ValueError: a tile of `side` pixels cannot be divided into `count` regions."""
    most = max_tokens(side, side, min_region_size)
    if not 1 <= count <= most:
        raise ValueError(
            f"{name}: a tile of {side} px can be divided into 1 to {most} regions, so there cannot be {count} tokens"
        )


def load_methods(place: str, counts: list[int] | None, device: str) -> list[Method]:
    """The rows of the autoencoder at a place: one for each of `counts`, or one at its own number of tokens.

    Raises:
        ValueError, OSError: as [`class_of`]; `counts` for another class than ours, too many of them, or weights that
            are missing or do not fit.
    """
    check_place(place, counts)
    name = class_of(place)
    if name != AutoencoderGPSToken.__name__:
        model = _load_diffusers(place, name).to(device).eval()
        return [CodebookMethod(place, model) if name == "VQModel" else LatentMethod(place, model)]
    if Path(place).is_file() or _is_released(place):
        model = AutoencoderGPSToken.from_single_file(place)
    else:
        model = AutoencoderGPSToken.from_pretrained(**_location(place))
    model = model.to(device).eval()
    return [GPSTokenMethod(f"{place}@{count}", model, count) for count in counts or [model.config.num_tokens]]


def _load_diffusers(place: str, name: str) -> nn.Module:
    # Never a pickle. diffusers only warns of missing weights, and leaves them random.
    model, report = getattr(diffusers, name).from_pretrained(
        **_location(place), use_safetensors=True, output_loading_info=True
    )
    for problem in ("missing_keys", "mismatched_keys"):
        if report[problem]:
            raise OSError(f"{place}: the weights do not fit its config.json, {problem} {sorted(report[problem])[:3]}")
    return model


def _location(place: str) -> dict[str, Any]:
    """Arguments of diffusers' loading functions for a folder or a place on the Hub."""
    if place == "mini" or Path(place).is_dir():
        return {"pretrained_model_name_or_path": str(MINI) if place == "mini" else place}
    repository, subfolder = _on_hub(place)
    return {"pretrained_model_name_or_path": repository, "subfolder": subfolder}


def _on_hub(place: str) -> tuple[str, str | None]:
    """Repository and folder in it; ValueError for anything else."""
    match = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w./-]+))?", place)
    if match is None:
        raise ValueError(f"{place} is no folder, no file, and no OWNER/NAME of the Hub")
    return match[1], match[2]


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _like(tokens: GPSTokens, geometry: Tensor, texture: Tensor) -> GPSTokens:
    return GPSTokens(geometry, texture, tokens.image_size, tokens.tile_grid, tokens.canvas_size)
