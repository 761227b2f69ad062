"""Networks that judge reconstructions: a perceptual distance per picture, and features of whole sets of pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gpstoken_diffusers.evaluation.distances import FeatureMoments, frechet_distance, paired_kernel_distance
from gpstoken_diffusers.evaluation.efficientnet import read_feature_network
from gpstoken_diffusers.evaluation.inception import InceptionV3
from gpstoken_diffusers.evaluation.perceptual import PerceptualDistance, perceptual_distance
from gpstoken_diffusers.evaluation.perceptual_files import find_inception_file
from gpstoken_diffusers.evaluation.weight_files import CACHE, read_weights_file

PERCEPTUAL = ("lpips-alex", "lpips-vgg", "stlpips-alex", "stlpips-vgg")
"""Perceptual distances, the ones that are comparable with the literature first."""
FEATURES = ("inception", "efficientnet-lite0")

KERNEL_PICTURES = 5000
"""Kernel distances are those of at most so many pictures, the first ones: they need all features in memory."""
PIXELS_AT_ONCE = 1 << 18
"""A perceptual network has gigabytes of maps for larger batches."""
SPATIAL_LAYER, SPATIAL_CHANNELS = "Mixed_6d.branch1x1", 7
"""What sFID compares: mixed_6/conv:0 of TensorFlow's graph, its first 7 channels at all 17 x 17 places."""


class FeatureJudge(nn.Module):
    """Features that sets of pictures are compared by.

    Args:
        name: "inception" or "efficientnet-lite0".
        cache: folder of fetched files.

    Attributes:
        frechet, kernel, spatial: what to call the distances; `spatial` is None where there is none.

    Raises:
        FileNotFoundError: the weights are missing; the message says how to get them.
        ValueError: a damaged file.
        ImportError: "efficientnet-lite0" without timm.
    """

    def __init__(self, name: str, cache: Path = CACHE):
        super().__init__()
        self._spatial_maps: list[Tensor] = []
        if name == "inception":
            path = find_inception_file(cache)
            self.network = InceptionV3()
            self.network.load(read_weights_file(path), str(path))
            self.network.get_submodule(SPATIAL_LAYER).register_forward_hook(
                lambda module, inputs, maps: self._spatial_maps.append(maps[:, :SPATIAL_CHANNELS].flatten(1))
            )
            self.frechet, self.kernel, self.spatial = "rFID", "KID x 1000", "sFID"
        else:
            self.network = read_feature_network(cache)
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


@dataclass
class FeatureSet:
    """What is kept of the features of a set of pictures."""

    moments: FeatureMoments = field(default_factory=FeatureMoments)
    spatial: FeatureMoments = field(default_factory=FeatureMoments)
    first: list[Tensor] = field(default_factory=list)

    def add(self, features: Tensor, spatial: Tensor | None) -> None:
        room = KERNEL_PICTURES - self.moments.count
        if room > 0:
            self.first.append(features[:room].float().cpu())
        self.moments.add(features)
        if spatial is not None:
            self.spatial.add(spatial)


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

    def set_distances(self, made: FeatureSet, real: FeatureSet) -> dict[str, float | None]:
        """Distances of a set from the set it was made of, picture by picture in one order; None for too few."""
        count = made.moments.count
        figures: dict[str, float | None] = {self.features.frechet: None}
        if self.features.spatial:
            figures[self.features.spatial] = None
        figures[self.features.kernel] = None
        if count >= 2:
            figures[self.features.frechet] = frechet_distance(made.moments.gaussian(), real.moments.gaussian())
            if self.features.spatial:
                figures[self.features.spatial] = frechet_distance(made.spatial.gaussian(), real.spatial.gaussian())
        if count >= 3:
            kernel = paired_kernel_distance(torch.cat(made.first), torch.cat(real.first))
            figures[self.features.kernel] = 1000 * kernel.value
        return figures


def load_judges(perceptual: str, features: str, cache: Path, device: str) -> Judges:
    """The networks that are asked for.

    Args:
        perceptual: a name of `PERCEPTUAL`; "auto", the first of them whose weights are there; or "none".
        features: a name of `FEATURES`, "auto" or "none".
        cache: folder of fetched files.
        device: where they compute.

    Raises:
        FileNotFoundError, ImportError: a network asked for by its name is not there.
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
    notes.append(f"None of {', '.join(names)} is here, so that column is missing. The last of them: {reason}.")
    return None
