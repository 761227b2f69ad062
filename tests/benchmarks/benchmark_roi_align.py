"""Times of the native RoIAlign on the CPU against torchvision's, in one process and in turns.

    python tests/benchmarks/benchmark_roi_align.py [--rounds 9] [--threads 1] [--batch-size 1]

Maps and regions are those of gpstoken-mini (128 channels at 64 x 64, 4 x 4 cells) and of a released L256 (128 at 256 x
256, 8 x 8 cells): the 256 regions of the photograph that the package ships. `torchvision` is what the model did before:
features to float32, boxes, torchvision's operator, back to the features' type. Times are of the processor, not of the
clock, so that what else the machine does counts little; with more than one thread they would leave out the others, so
then they are of the clock.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torchvision
from PIL import Image
from torch import Tensor

from gpstoken_diffusers.assets import DEMO_PHOTOGRAPH  # noqa: E402
from gpstoken_diffusers.image_processor import GPSTokenImageProcessor  # noqa: E402
from gpstoken_diffusers.ops.partition import partition_image  # noqa: E402
from gpstoken_diffusers.ops.roi_align import roi_align  # noqa: E402

PICTURE_SIDE, NUM_TOKENS = 256, 256
# Name, channels, side of the map, cells along an axis.
MODELS = [("mini", 128, 64, 4), ("released L256", 128, 256, 8)]


def torchvisions(features: Tensor, regions: Tensor, size: int, scale: float) -> Tensor:
    boxes = list(regions.float())
    cells = torchvision.ops.roi_align(features.float(), boxes, size, scale, aligned=True)
    return cells.unflatten(0, regions.shape[:2]).to(features.dtype)


FUNCTIONS = {"native": roi_align, "torchvision": torchvisions}


def passes(
    regions: Tensor, channels: int, side: int, size: int, dtype: torch.dtype
) -> dict[str, dict[str, Callable[[], object]]]:
    """What is timed for one map: by pass, then by implementation."""
    features = torch.randn(len(regions), channels, side, side).to(dtype)
    leaf = features.contiguous(memory_format=torch.channels_last).requires_grad_()
    arguments = (leaf, regions, size, side / PICTURE_SIDE)
    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    for name, function in FUNCTIONS.items():
        forward[name] = partial(torch.no_grad()(function), *arguments)
        cells = function(*arguments)
        backward[name] = partial(torch.autograd.grad, cells, leaf, torch.ones_like(cells), retain_graph=True)
    return {"forward": forward, "backward": backward}


def measure(actions: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for round_ in range(rounds + 1):
        for name, action in actions.items():
            started = clock()
            action()
            if round_:  # the first warms up
                times[name].append(1000 * (clock() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    with Image.open(DEMO_PHOTOGRAPH) as photograph:
        side = min(photograph.size)
        picture = photograph.convert("RGB").crop((0, 0, side, side)).resize((PICTURE_SIDE, PICTURE_SIDE))
    pixels = GPSTokenImageProcessor().preprocess(picture)["pixel_values"]
    regions = partition_image(pixels, NUM_TOKENS).regions.expand(args.batch_size, -1, -1)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}; {args.threads} threads")
    print(f"batch of {args.batch_size}; ms, median of {args.rounds} rounds\n")
    print("| model | type | pass | native | torchvision | ratio |")
    print("|---|---|---|---|---|---|")
    for (name, *sizes), dtype in itertools.product(MODELS, (torch.float32, torch.bfloat16)):
        for direction, actions in passes(regions, *sizes, dtype).items():
            ms = measure(actions, args.rounds, clock)
            cells = f"{ms['native']:.2f} | {ms['torchvision']:.2f} | {ms['torchvision'] / ms['native']:.1f}"
            print(f"| {name} | {str(dtype)[6:]} | {direction} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
