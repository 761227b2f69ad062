"""How different two pictures look: distances between features of frozen networks, differentiable in the picture.

Each distance is named for what it is by its `label`. Values of different distances, or of one distance with another
trunk, are not comparable. None of the weights is part of this package: examples/evaluate/fetch_perceptual.py fetches
what the package index carries, and says where the rest is to be had.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.attention import autocast_disabled
from .efficientnet import EfficientNetLite0, read_feature_network
from .inception import InceptionV3
from .perceptual_files import find_inception_file, find_trunk_file, read_heads, read_stlpips, trunk_weights
from .perceptual_trunks import CHANNELS, TRUNKS, build_trunk
from .weight_files import CACHE, load_exactly, read_weights_file

TRUNK_TITLES = {"vgg": "VGG", "alex": "AlexNet"}
INPUT_RANGES = {"uint8": 127.5, "official": 255.0}
"""Levels per unit of the picture."""

# Mean and deviation of ImageNet's colours as LPIPS rounds them, for pictures in [-1, 1].
COLOUR_MEAN = (-0.030, -0.088, -0.188)
COLOUR_DEVIATION = (0.458, 0.448, 0.450)

FARTHEST = 32.0
"""Pixels beyond this are of another scale: a network in training strays from [-1, 1], but not as far as 0..255."""


class PerceptualDistance(nn.Module, ABC):
    """What the distances share: `distance(a, b)` is (B,), 0 for equal pictures, symmetric, differentiable in both.

    The network has no trainable parameters and stays in evaluation mode whatever a parent is set to. Convolutions
    follow autocast; what is compared is float32 (or float64, after `.double()`). In bfloat16 ST-LPIPS of photographs
    changes by 2 % at most where it is small (0.01), by 0.1 % where it is large, and its gradient keeps its direction
    (cosine 0.95 to 1.00). Inception's features lose small differences (noise of 0.02: up to twice the value), and
    EfficientNet's gradients turn (cosine 0.6 to 0.95): these two stay in float32 under autocast.

    Attributes:
        label: what it is, for tables.
        smallest: side in pixels of the smallest picture it takes.
        follows_autocast: whether convolutions may run in another precision.
    """

    label: str
    smallest: int = 1
    follows_autocast: bool = True

    def freeze(self) -> None:
        """To be called at the end of the constructor."""
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor | tuple[Tensor, ...]) -> Tensor:
        """Distance of each picture of `a` from that of `b`.

        Args:
            a: (B, 3, H, W) in [-1, 1], floating point. Values somewhat outside are taken as they are.
            b: the same shape; or what `forward_features` gave for such pictures, where they are compared with more
                than once.

        Returns:
            (B,), at least 0.

        Raises:
            ValueError: other shapes, pictures smaller than `smallest`, or values far from [-1, 1].
            TypeError: the pixels are not floating point numbers.
        """
        if isinstance(b, Tensor):
            if a.shape != b.shape:
                raise ValueError(
                    f"both must have one shape (B, 3, H, W), but their shapes are {tuple(a.shape)} and {tuple(b.shape)}"
                )
            return self.compare(self.forward_features(a), self.forward_features(b))
        features = self.forward_features(a)
        shapes = [[tuple(part.shape) for part in parts] for parts in (features, b)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the features have the shapes {shapes[1]}, expected {shapes[0]}: of other pictures")
        return self.compare(features, b)

    def forward_features(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """What is compared: (B, 3, H, W) in [-1, 1] -> maps (B, C, h, w). Call it under `torch.no_grad()` for targets.

        Raises:
            ValueError, TypeError: as for the distance.
        """
        if not pictures.is_floating_point():
            raise TypeError(f"pixels must be floating point numbers in [-1, 1], not {pictures.dtype}")
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures must have the shape (B, 3, H, W), not {tuple(pictures.shape)}")
        if min(pictures.shape) < 1 or min(pictures.shape[-2:]) < self.smallest:
            raise ValueError(
                f"{self.label} needs pictures of at least {self.smallest} x {self.smallest} pixels, "
                f"not {tuple(pictures.shape)}"
            )
        # One number, though reading it lets a GPU wait: a picture in 0..255 would train towards nonsense in silence.
        largest = pictures.detach().abs().amax().item()
        if largest > FARTHEST:
            raise ValueError(f"pixels must lie in [-1, 1], but one is {largest:g}: divide 0..255 by 127.5, subtract 1")
        pictures = pictures.to(next(self.parameters()).dtype)
        with nullcontext() if self.follows_autocast else autocast_disabled(pictures):
            return self._features(pictures)

    def compare(self, a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
        """(B,): squared differences, summed over channels, averaged over the picture, summed over the maps."""
        return sum((map_a - map_b).square().sum(dim=1).mean(dim=(1, 2)) for map_a, map_b in zip(a, b, strict=True))

    @abstractmethod
    def _features(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Maps (B, C, h, w) of pictures that were checked."""


def unit(maps: Tensor) -> Tensor:
    """Each pixel's vector of channels scaled to length 1, in float32 at least; zeros stay zeros."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    # A root of 0 has no slope, and squares of 1e-23 are 0 in float32: the least value keeps NaN out of gradients and is
    # lost beside the 1e-10 that LPIPS adds.
    return maps / (maps.square().sum(dim=1, keepdim=True).clamp(min=1e-30).sqrt() + 1e-10)


class _WeightedUnits(PerceptualDistance):
    """Unit vectors at five depths, their squared differences weighted per channel: what LPIPS and ST-LPIPS share.

    Args:
        trunk: "vgg" or "alex".
        shift_tolerant: as [`build_trunk`].
        weights: of the trunk, `features.N.weight` and `features.N.bias`.
        heads: `lin0.model.1.weight` to `lin4.model.1.weight`, each (1, C, 1, 1), at least 0.
        source: where they are from, for messages.
    """

    def __init__(
        self, trunk: str, shift_tolerant: bool, weights: dict[str, Tensor], heads: dict[str, Tensor], source: str
    ):
        super().__init__()
        self.trunk = build_trunk(trunk, shift_tolerant)
        load_exactly(self.trunk, weights, source)
        for name, values in (("mean", COLOUR_MEAN), ("deviation", COLOUR_DEVIATION)):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1), persistent=False)
        for depth, channels in enumerate(CHANNELS[trunk]):
            head = heads.get(f"lin{depth}.model.1.weight")
            if head is None or head.shape != (1, channels, 1, 1) or head.min() < 0:
                came = "nothing" if head is None else f"{tuple(head.shape)}, least {head.min():g}"
                raise ValueError(
                    f"{source}: lin{depth}.model.1.weight must be (1, {channels}, 1, 1), at least 0, but came {came}"
                )
            # The root: weights of squared differences become factors of the features, whose target is made once.
            self.register_buffer(f"scale{depth}", head.sqrt(), persistent=False)

    def _features(self, pictures: Tensor) -> tuple[Tensor, ...]:
        normalised = (pictures - self.mean) / self.deviation
        maps = self.trunk(normalised.contiguous(memory_format=torch.channels_last))
        return tuple(unit(at_depth) * self.get_buffer(f"scale{depth}") for depth, at_depth in enumerate(maps))


class LPIPS(_WeightedUnits):
    """LPIPS 0.1 of Zhang, Isola, Efros, Shechtman and Wang (2018), arXiv 1801.03924, equation 1.

    The trunk is torchvision's VGG-16 or AlexNet as trained on ImageNet, the weights of the channels are the paper's.

    Args:
        trunk: "vgg" or "alex".
        weights: a file of torch.save: torchvision's trunk, or a whole `lpips.LPIPS().state_dict()`. None takes
            torchvision's file from PyTorch's download cache.
        heads: a file of the channels' weights, as the package lpips has them in weights/v0.1. None takes those of
            `weights`, or else of the installed package lpips, or else of its wheel in `cache`.
        cache: folder of fetched files.

    Raises:
        FileNotFoundError: weights are missing; the message says how to get them.
        ValueError: another trunk, or files that are damaged or of another network.
    """

    def __init__(
        self,
        trunk: str = "vgg",
        weights: str | Path | None = None,
        heads: str | Path | None = None,
        cache: Path = CACHE,
    ):
        _check_trunk(trunk)
        path = Path(weights) if weights is not None else find_trunk_file(trunk)
        loaded = read_weights_file(path.expanduser())
        if heads is not None:
            given = read_weights_file(Path(heads).expanduser())
        elif any(name.startswith("lin0.") for name in loaded):
            given = loaded
        else:
            given = read_heads(trunk, cache)
        super().__init__(trunk, False, trunk_weights(loaded), given, str(path))
        self.label = f"LPIPS ({TRUNK_TITLES[trunk]})"
        # Below these a pooling has nothing left.
        self.smallest = {"vgg": 16, "alex": 31}[trunk]
        self.freeze()


class STLPIPS(_WeightedUnits):
    """Shift-tolerant LPIPS of Ghildyal and Liu (2022), arXiv 2207.13686: LPIPS with other poolings and weights.

    Values are those of the package stlpips-pytorch 0.0.2 within rounding. They are not comparable with published
    LPIPS: name them ST-LPIPS. The package says BSD-2, but the code that its networks come from (antialiased CNNs) is
    for non-commercial use, so what may be done with the weights is unclear: they are fetched where they are needed and
    never passed on.

    Args:
        trunk: "vgg" or "alex".
        weights: the file of weights, vgg_shift_tolerant.pth or alex_shift_tolerant.pth. None takes it out of the wheel
            in `cache`, or else from the installed package, which is not imported.
        cache: folder of fetched files.

    Raises:
        FileNotFoundError: weights are missing; the message says how to get them.
        ValueError: another trunk, or a file with another sha256.
    """

    def __init__(self, trunk: str = "vgg", weights: str | Path | None = None, cache: Path = CACHE):
        _check_trunk(trunk)
        loaded, source = read_stlpips(trunk, weights, cache)
        super().__init__(trunk, True, trunk_weights(loaded), loaded, source)
        self.label = f"ST-LPIPS ({TRUNK_TITLES[trunk]})"
        # Below these a pooling or its mirrored edge has too few pixels.
        self.smallest = {"vgg": 18, "alex": 21}[trunk]
        self.freeze()


class EfficientNetFeatures(PerceptualDistance):
    """Unit vectors of EfficientNet-Lite0 at five depths, their squared differences averaged over the depths.

    What Zhang et al. (2018) call an uncalibrated distance: every channel counts alike. From 0 to 4.

    Args:
        network: frozen.
    """

    follows_autocast = False
    label = "EfficientNet-Lite0 feature distance"

    def __init__(self, network: EfficientNetLite0):
        super().__init__()
        self.network = network
        self.freeze()

    def _features(self, pictures: Tensor) -> tuple[Tensor, ...]:
        maps = self.network.maps(pictures)
        return tuple(unit(at_depth) * len(maps) ** -0.5 for at_depth in maps)


class InceptionFeatures(PerceptualDistance):
    """Mean squared difference of the 2048 features that Frechet distances are computed with.

    What GPSToken (Zhang et al. 2025, arXiv 2509.01109) was trained with, at weight 1. Its published code feeds the
    network 255 (x + 1), levels up to 510, where it was made for 0 to 255.

    Args:
        weights: weights-inception-2015-12-05-6401da91.pth or pt_inception-2015-12-05-6726825d.pth. None looks for
            them in `cache` and in PyTorch's download cache.
        input_range: "uint8", levels 127.5 (x + 1); or "official", 255 (x + 1).
        cache: folder of fetched files.

    Raises:
        FileNotFoundError: weights are missing; the message says how to get them.
        ValueError: another input range, or a file that is damaged or of another network.
    """

    follows_autocast = False

    def __init__(self, weights: str | Path | None = None, input_range: str = "uint8", cache: Path = CACHE):
        super().__init__()
        if input_range not in INPUT_RANGES:
            raise ValueError(f"input_range must be one of {', '.join(INPUT_RANGES)}, not {input_range!r}")
        self.levels = INPUT_RANGES[input_range]
        path = Path(weights).expanduser() if weights is not None else find_inception_file(cache)
        self.network = InceptionV3()
        self.network.load(read_weights_file(path), str(path))
        self.label = "Inception-v3 feature MSE" + (" (levels to 510)" if input_range == "official" else "")
        self.freeze()

    def _features(self, pictures: Tensor) -> tuple[Tensor, ...]:
        # Not rounded to whole levels, as pictures in 8 bits are: that has no slope.
        return (self.network(self.levels * (pictures + 1))[:, :, None, None],)

    def compare(self, a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
        (a,), (b,) = a, b
        return (a - b).square().mean(dim=(1, 2, 3))


def _check_trunk(trunk: str) -> None:
    if trunk not in TRUNKS:
        raise ValueError(f"the trunk must be one of {', '.join(TRUNKS)}, not {trunk!r}")


NAMES: dict[str, Callable[[str | Path | None, Path], PerceptualDistance]] = {
    "lpips-vgg": lambda weights, cache: LPIPS("vgg", weights, cache=cache),
    "lpips-alex": lambda weights, cache: LPIPS("alex", weights, cache=cache),
    "stlpips-vgg": lambda weights, cache: STLPIPS("vgg", weights, cache),
    "stlpips-alex": lambda weights, cache: STLPIPS("alex", weights, cache),
    "inception": lambda weights, cache: InceptionFeatures(weights, cache=cache),
    "inception-official": lambda weights, cache: InceptionFeatures(weights, "official", cache),
    "efficientnet-lite0": lambda weights, cache: EfficientNetFeatures(read_feature_network(cache, weights)),
}
"""What [`perceptual_distance`] makes."""


def perceptual_distance(name: str, weights: str | Path | None = None, cache: str | Path = CACHE) -> PerceptualDistance:
    """The distance of a name, on the CPU, in float32.

    Args:
        name: one of `NAMES`.
        weights: the file of its weights; None takes them from where they are kept or fetched to.
        cache: folder of fetched files.

    Raises:
        ValueError: another name, or a file that is damaged or of another network.
        FileNotFoundError: weights are missing; the message says how to get them.
        ImportError: "efficientnet-lite0" without timm.
    """
    if name not in NAMES:
        raise ValueError(f"the distance must be one of {', '.join(NAMES)}, not {name!r}")
    return NAMES[name](None if weights is None else Path(weights).expanduser(), Path(cache))
