"""Where the weights of the perceptual distances are found. None of them is part of this package."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch
from torch import Tensor

from .weight_files import CACHE, Wheel, read_weights_file, read_wheel

FETCH = "python examples/evaluate/fetch_perceptual.py"

LPIPS_WHEEL = Wheel(
    requirement="lpips==0.1.4",
    file="lpips-0.1.4-py3-none-any.whl",
    sha256="fd537af5828b69d2e6ffc0a397bd506dbc28ca183543617690844c08e102ec5e",
    command=f"{FETCH} lpips-vgg",
)
LPIPS_HEADS_SHA256 = {
    "vgg": "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    "alex": "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
}
TORCHVISION_FILES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}
"""Names in PyTorch's download cache of the ImageNet weights that LPIPS was made with."""

STLPIPS_WHEEL = Wheel(
    requirement="stlpips-pytorch==0.0.2",
    file="stlpips_pytorch-0.0.2-py3-none-any.whl",
    sha256="a412bf901a97c942b37af57c7c63b6e5d1aebfe8d1dfc17853d4b2f878630645",
    command=f"{FETCH} stlpips-vgg",
)
STLPIPS_SHA256 = {
    "vgg": "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250",
    "alex": "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee",
}

INCEPTION_FILES = ("weights-inception-2015-12-05-6401da91.pth", "pt_inception-2015-12-05-6726825d.pth")
"""The same network as torch-fidelity and as pytorch-fid publish it."""


def find_trunk_file(trunk: str) -> Path:
    """torchvision's weights in PyTorch's download cache.

    Raises:
        FileNotFoundError: they are not there.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / TORCHVISION_FILES[trunk]
    if not path.is_file():
        function = {"vgg": "vgg16", "alex": "alexnet"}[trunk]
        raise FileNotFoundError(
            f"LPIPS needs torchvision's ImageNet weights, and there is no {path}. Where PyTorch's server can be "
            f"reached, run: python -c \"import torchvision; torchvision.models.{function}(weights='IMAGENET1K_V1')\"; "
            f"else copy {path.name} there, or give its path as the weights. stlpips-{trunk} needs no such file"
        )
    return path


def find_inception_file(cache: Path = CACHE) -> Path:
    """The weights of the Inception network, in `cache` or in PyTorch's download cache.

    Raises:
        FileNotFoundError: they are not there.
    """
    folders = (cache.expanduser(), Path(torch.hub.get_dir()) / "checkpoints")
    for path in (folder / name for folder in folders for name in INCEPTION_FILES):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"there is no {' or '.join(INCEPTION_FILES)} in {folders[0]} or {folders[1]}. The package index does not carry "
        "them: the projects torch-fidelity and pytorch-fid publish them as release files. Copy one there, or give its "
        "path as the weights"
    )


def trunk_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the convolutions, named as torchvision does; LPIPS's packages group them in `net.slice1` to 5."""
    renamed = {re.sub(r"^net\.slice\d\.", "features.", name): value for name, value in weights.items()}
    return {name: value for name, value in renamed.items() if re.fullmatch(r"features\.\d+\.(weight|bias)", name)}


def installed_file(package: str, inside: str) -> Path | None:
    """A file of an installed package, which is not imported; None where there is none."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / inside if spec is not None and spec.origin else None
    return path if path is not None and path.is_file() else None


def read_heads(trunk: str, cache: Path) -> dict[str, Tensor]:
    """The weights of LPIPS's channels, `lin0.model.1.weight` to 4.

    Raises:
        FileNotFoundError: they are neither installed nor in `cache`.
        ValueError: a file with another sha256.
    """
    member = f"weights/v0.1/{trunk}.pth"
    if path := installed_file("lpips", member):
        return read_weights_file(path, LPIPS_HEADS_SHA256[trunk])
    return read_wheel(LPIPS_WHEEL, f"lpips/{member}", cache)


def read_stlpips(trunk: str, weights: str | Path | None, cache: Path) -> tuple[dict[str, Tensor], str]:
    """The weights of ST-LPIPS by their package's names, and where they are from.

    Raises:
        FileNotFoundError: they are neither in `cache` nor installed.
        ValueError: a file with another sha256.
    """
    member = f"weights/vST0.0/{trunk}_shift_tolerant.pth"
    if weights is None and not (cache.expanduser() / STLPIPS_WHEEL.file).is_file():
        weights = installed_file("stlpips_pytorch", member)
    if weights is not None:
        return read_weights_file(Path(weights).expanduser(), STLPIPS_SHA256[trunk]), str(weights)
    return read_wheel(STLPIPS_WHEEL, f"stlpips_pytorch/{member}", cache), STLPIPS_WHEEL.file
