"""Networks that judge reconstructions: a perceptual distance per picture, and features of whole sets of pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from gpstoken_diffusers.evaluation.distances import paired_kernel_distance
from gpstoken_diffusers.evaluation.efficientnet import read_efficientnet
from gpstoken_diffusers.evaluation.inception import InceptionV3, find_inception_file
from gpstoken_diffusers.evaluation.perceptual import PerceptualDistance, perceptual_distance
from gpstoken_diffusers.evaluation.weight_files import CACHE, read_weights_file

PERCEPTUAL = ("lpips-alex", "lpips-vgg", "stlpips-alex", "stlpips-vgg")
"""Perceptual distances, those comparable with the literature first."""
FEATURES = ("inception", "efficientnet-lite0")

KERNEL_PICTURES = 5000
"""Kernel distances need all features in memory: they are those of the first pictures, at most this many."""
PIXELS_AT_ONCE = 1 << 18
"""With more of them the maps of a perceptual network take gigabytes."""
SPATIAL_LAYER, SPATIAL_CHANNELS = "network.Mixed_6d.branch1x1", 7
"""What sFID compares: mixed_6/conv:0 of TensorFlow's graph, its first 7 channels at all 17 x 17 places."""


class FeatureJudge(nn.Module):
    """Features that sets of pictures are compared by.

    Args:
        name: "inception" or "efficientnet-lite0".
        cache: folder of fetched files.

    Attributes:
        frechet, kernel, spatial: names of the distances; `spatial` is None where there is none.

    Raises:
        FileNotFoundError: the weights are missing; the message says how to get them.
        ValueError: a damaged file.
        ImportError: "efficientnet-lite0" without timm, "inception" without torch-fidelity.
    """

    def __init__(self, name: str, cache: Path = CACHE):
        super().__init__()
        self._spatial_maps: list[Tensor] = []
        if name == "inception":
            path = find_inception_file(cache)
            self.network = InceptionV3(read_weights_file(path), str(path))
            self.network.get_submodule(SPATIAL_LAYER).register_forward_hook(
                lambda module, inputs, maps: self._spatial_maps.append(maps[:, :SPATIAL_CHANNELS].flatten(1))
            )
            self.frechet, self.kernel, self.spatial = "rFID", "KID x 1000", "sFID"
        else:
            self.network = read_efficientnet(cache)
            self.frechet, self.spatial = "Frechet distance, EfficientNet-Lite0", None
            self.kernel = "kernel distance x 1000, EfficientNet-Lite0"
        self.levels = name == "inception"
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) in [-1, 1], seen as they would be saved -> features (B, D), and spatial ones (B, 2023)."""
        levels = ((images + 1) * 127.5).round().clamp(0, 255)
        features = self.network(levels if self.levels else levels / 127.5 - 1)
        spatial = self._spatial_maps.pop() if self.spatial else None
        return features, spatial


class SetDistances:
    """How far sets of reconstructions are from the pictures that they were made of, by a judge's features.

    Args:
        judge: the network.
    """

    def __init__(self, judge: FeatureJudge):
        self.judge = judge
        self._frechet: dict[str, FrechetInceptionDistance] = {}
        self._real: list[Tensor] = []
        self._made: list[Tensor] = []

    def add(self, images: Tensor, real: bool) -> None:
        """Take pictures (B, 3, H, W) in [-1, 1], the real ones and their reconstructions in one order."""
        features, spatial = self.judge(images)
        for name, values in ((self.judge.frechet, features), (self.judge.spatial, spatial)):
            if values is not None:
                if name not in self._frechet:
                    network = _GivenFeatures(values.shape[1])
                    self._frechet[name] = FrechetInceptionDistance(network, reset_real_features=False)
                self._frechet[name].update(values.double().cpu(), real=real)
        rows = self._real if real else self._made
        if room := max(0, KERNEL_PICTURES - sum(map(len, rows))):
            rows.append(features[:room].float().cpu())

    def forget_made(self) -> None:
        """Start another set of reconstructions."""
        self._made.clear()
        for distance in self._frechet.values():
            distance.reset()

    def figures(self) -> dict[str, float | None]:
        """Distances by name; None for too few pictures."""
        names = [name for name in (self.judge.frechet, self.judge.spatial, self.judge.kernel) if name]
        figures: dict[str, float | None] = dict.fromkeys(names)
        count = sum(map(len, self._made))
        if count >= 2:
            # Of equal sets rounding can make it negative.
            figures |= {name: max(0.0, distance.compute().item()) for name, distance in self._frechet.items()}
        if count >= 3:
            kernel = paired_kernel_distance(torch.cat(self._made), torch.cat(self._real))
            figures[self.judge.kernel] = 1000 * kernel.value
        return figures


class _GivenFeatures(nn.Identity):
    """A network for torchmetrics that is given features in place of pictures."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


@dataclass(frozen=True)
class Judges:
    """The networks of a run; either may be missing.

    Attributes:
        notes: what is missing and how to get it.
    """

    perceptual: PerceptualDistance | None = None
    features: FeatureJudge | None = None
    notes: tuple[str, ...] = ()

    @torch.no_grad()
    def perceptual_distances(self, outputs: Tensor, images: Tensor) -> Tensor:
        """(B,) of reconstructions and their pictures."""
        size = max(1, PIXELS_AT_ONCE // (images.shape[-2] * images.shape[-1]))
        pairs = zip(outputs.split(size), images.split(size), strict=True)
        return torch.cat([self.perceptual(output, image) for output, image in pairs])


def load_judges(perceptual: str, features: str, cache: Path, device: str) -> Judges:
    """The networks of a run.

    Args:
        perceptual: a name in `PERCEPTUAL`; "auto", the first of them whose weights are found; or "none".
        features: a name in `FEATURES`, "auto" or "none".
        cache: folder of fetched files.
        device: where they compute.

    Raises:
        FileNotFoundError, ImportError: a network that was named is missing.
        ValueError: a damaged file.
    """
    notes: list[str] = []
    distance = _first(perceptual, PERCEPTUAL, lambda name: perceptual_distance(name, cache=cache), notes)
    judge = _first(features, FEATURES, lambda name: FeatureJudge(name, cache), notes)
    return Judges(distance and distance.to(device), judge and judge.to(device), tuple(notes))


def _first(wanted: str, names: tuple[str, ...], make: Callable[[str], nn.Module], notes: list[str]) -> nn.Module | None:
    if wanted == "none":
        return None
    if wanted != "auto":
        return make(wanted)
    for name in names:
        try:
            return make(name)
        except (FileNotFoundError, ImportError) as error:
            reason = str(error)
    notes.append(f"The weights of {', '.join(names)} are missing, so that column is left out. The last: {reason}.")
    return None
