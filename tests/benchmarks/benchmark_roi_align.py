"""Times the native RoIAlign on the CPU against torchvision's, forward and backward.

    python tests/benchmarks/benchmark_roi_align.py [--batch_size 8]

Maps and regions are those of gpstoken-mini (128 channels at 64 x 64, 4 x 4 cells) and of a released L256 (128 at 256 x
256, 8 x 8 cells): the 256 regions of the photograph that the package ships. torchvision's takes float32 alone, so that
other features are converted there and back.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from functools import partial

import torch
import torchvision
from harness import Case, conditions, main, make_parser, photograph, positive, run_cases
from torch import Tensor

from gpstoken_diffusers.ops.partition import partition_image
from gpstoken_diffusers.ops.roi_align import roi_align

PICTURE_PX, NUM_TOKENS = 256, 256
MODELS = {"mini": (128, 64, 4), "released L256": (128, 256, 8)}  # channels, side of the map, cells along an axis
DTYPES = [torch.float32, torch.bfloat16]


def torchvisions(features: Tensor, regions: Tensor, size: int, scale: float) -> Tensor:
    cells = torchvision.ops.roi_align(features.float(), list(regions.float()), size, scale, aligned=True)
    return cells.unflatten(0, regions.shape[:2]).to(features.dtype)


def cases(batch_size: int) -> Iterator[Case]:
    regions = partition_image(photograph(PICTURE_PX), NUM_TOKENS).regions.expand(batch_size, -1, -1)
    for (model, (channels, side, cells)), dtype in itertools.product(MODELS.items(), DTYPES):
        features = torch.randn(batch_size, channels, side, side).to(dtype)
        features = features.contiguous(memory_format=torch.channels_last).requires_grad_()
        forward, backward = {}, {}
        for name, function in {"native": roi_align, "torchvision": torchvisions}.items():
            call = partial(function, features, regions, cells, side / PICTURE_PX)
            forward[name] = torch.no_grad()(lambda call=call: (call(),))
            out = call()
            backward[name] = partial(torch.autograd.grad, out, [features], torch.ones_like(out), retain_graph=True)
        for name, ways in (("forward", forward), ("backward", backward)):
            yield Case(f"RoIAlign, {name}", {"model": model, "dtype": str(dtype)[6:]}, ways)


def run() -> None:
    parser = make_parser(__doc__, rounds=9, threads=1)
    parser.add_argument("--batch_size", type=positive, default=1, help="pictures at once (default: 1)")
    args = parser.parse_args()
    lines = [*conditions(args), f"torchvision {torchvision.__version__}, batches of {args.batch_size}"]
    run_cases(args, "RoIAlign", lines, cases(args.batch_size), 2 * len(MODELS) * len(DTYPES))


if __name__ == "__main__":
    sys.exit(main(run))
