"""Times of the CPU splat, forward + backward, against the dense plain PyTorch definition.

    python tests/benchmarks/benchmark_splat.py [--rounds 7] [--threads 2]

Tokens are the initial Gaussians of real partitions of the demo photograph. Both implementations are timed in
turn within one process; `wall` is the median of the rounds, `cpu` the least processor time of one round over all
threads, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]

from gpstoken_diffusers.benchmark.roofline import pairs_in_boxes  # noqa: E402
from gpstoken_diffusers.ops.backend import native  # noqa: E402
from gpstoken_diffusers.ops.partition import partition_image  # noqa: E402
from gpstoken_diffusers.ops.splat import splat_gaussians  # noqa: E402
from gpstoken_diffusers.ops.splat_reference import (  # noqa: E402
    splat_gaussians_backward_reference,
    splat_gaussians_reference,
)

PHOTOGRAPH = ROOT / "gpstoken_diffusers" / "assets" / "demo.jpg"


def photograph(side: int, count: int = 1) -> Tensor:
    """(count, 3, side, side) in [-1, 1]: crops of the photograph that slide over it."""
    image = Image.open(PHOTOGRAPH).convert("RGB")
    crops = []
    for i in range(count):
        share = 1 - 0.5 * i / max(count - 1, 1)  # of the shorter side
        size = int(min(image.size) * share)
        left, top = (image.width - size) * i // max(count, 1), (image.height - size) * i // max(count, 1)
        crop = image.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + size, top + size))
        crops.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))
    return torch.stack(crops).float() / 127.5 - 1


def operator(geometry: Tensor, texture: Tensor, upstream: Tensor) -> None:
    """The public operator with autograd, as training calls it."""
    geometry, texture = geometry.detach().requires_grad_(), texture.detach().requires_grad_()
    out = splat_gaussians(geometry, texture, *upstream.shape[2:])
    torch.autograd.grad(out, (geometry, texture), upstream)


def definition(geometry: Tensor, texture: Tensor, upstream: Tensor) -> None:
    """The plain twin, with its written-out gradient, which is faster than autograd's."""
    splat_gaussians_reference(geometry, texture, *upstream.shape[2:])
    splat_gaussians_backward_reference(geometry, texture, upstream)


def measure(actions: dict[str, tuple[Callable[[], None], int]], rounds: int) -> dict[str, tuple[float, float]]:
    """name -> (median wall, least cpu) in ms of one call; each action has its number of calls per round."""
    wall: dict[str, list[float]] = {name: [] for name in actions}
    cpu: dict[str, list[float]] = {name: [] for name in actions}
    for round_ in range(rounds + 1):
        for name, (action, calls) in actions.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(calls):
                action()
            if round_:  # the first warms up
                cpu[name].append((time.process_time() - cpu_start) / calls * 1e3)
                wall[name].append((time.perf_counter() - wall_start) / calls * 1e3)
    return {name: (statistics.median(wall[name]), min(cpu[name])) for name in actions}


def case(geometry: Tensor, channels: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    texture = torch.randn(*geometry.shape[:2], channels, generator=generator)
    return geometry, texture, torch.randn(len(geometry), channels, side, side, generator=generator)


def against_definition(rounds: int) -> None:
    print("\nforward + backward, B=8, N=256, C=32, 64x64, support 3")
    inputs = case(partition_image(photograph(256, 8), 256).geometry, 32, 64)
    times = measure({"native": (partial(operator, *inputs), 10), "plain": (partial(definition, *inputs), 1)}, rounds)
    for name, (wall, cpu) in times.items():
        print(f"  {name:<8} wall {wall:9.2f} ms   cpu {cpu:9.2f} ms")
    (wall, cpu), (plain_wall, plain_cpu) = times["native"], times["plain"]
    print(f"  ratio    wall {plain_wall / wall:9.0f}      cpu {plain_cpu / cpu:9.0f}      (aim: 20)")


def growth(title: str, cases: dict[str, tuple[Tensor, int]], rounds: int, calls: int = 5) -> None:
    print(f"\n{title}")
    inputs = {name: case(geometry, 32, side) for name, (geometry, side) in cases.items()}
    times = measure({name: (partial(operator, *args), calls) for name, args in inputs.items()}, rounds)
    first = next(iter(times.values()))[1]
    for name, (geometry, side) in cases.items():
        wall, cpu = times[name]
        inside = pairs_in_boxes(geometry, side, side, support=3.0)
        print(
            f"  {name:<12} wall {wall:8.2f} ms   cpu {cpu:8.2f} ms = {cpu / first:6.1f} x the first   "
            f"{inside:9,d} pairs inside boxes, {inside / (geometry.shape[1] * side**2):.1%} of the dense ones"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    library = native.library("cpu")
    if library is None:
        sys.exit(f"no native CPU library: {native.why_missing('cpu')}")
    isa = library.gpstoken_cpu_isa().decode()
    print(f"{platform.machine()}, {isa}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    against_definition(arguments.rounds)

    large = photograph(1024)
    tokens = {n: partition_image(large, n).geometry for n in (64, 256, 1024, 4096)}
    by_number = {f"N={n}": (geometry, 256) for n, geometry in tokens.items()}
    growth("with N, one 1024-px photograph, 256x256 map, C=32", by_number, arguments.rounds)
    fixed = {}
    for n, geometry in tokens.items():
        equal = geometry.clone()
        equal[..., :2] = 0.02
        fixed[f"N={n}"] = (equal, 256)
    growth("with N, all sigmas 0.02 so that tokens do not shrink, 256x256 map, C=32", fixed, arguments.rounds)
    by_size = {f"{side}x{side}": (tokens[256], side) for side in (32, 64, 128, 256, 512)}
    growth("with the size of the map, the same 256 tokens, C=32", by_size, arguments.rounds)


if __name__ == "__main__":
    main()
