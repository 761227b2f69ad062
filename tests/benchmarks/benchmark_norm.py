"""Times of the native normalisations on the CPU against what torch does for the same, in one process and in turns.

    python tests/benchmarks/benchmark_norm.py [--rounds 7] [--threads 1]

Maps are those of gpstoken-mini (192 channels at 64 x 64) and of the released decoder (512 at 64 x 64, 128 at 256 x
256), channels-last. `torch` is torch's own norm followed by SiLU (its group norm is inaccurate there, see
ops/group_norm.py), `definition` the plain twin. `copy` reads and writes the map once: nothing can be faster.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gpstoken_diffusers.ops.group_norm import group_norm  # noqa: E402
from gpstoken_diffusers.ops.norm_reference import group_norm_reference, pixel_norm_reference  # noqa: E402
from gpstoken_diffusers.ops.pixel_norm import pixel_norm  # noqa: E402

SHAPES = [(4, 192, 64, 64), (1, 512, 64, 64), (1, 128, 256, 256)]
GROUPS, EPS = 32, 1e-6
COLUMNS = ("native", "torch", "definition", "copy")


def torch_pixel_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight.to(x.dtype), bias.to(x.dtype), EPS)
    return F.silu(rows.permute(0, 3, 1, 2))


def torch_group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight.to(x.dtype), bias.to(x.dtype), EPS))


KINDS: dict[str, dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "pixel": {
        "native": lambda x, w, b: pixel_norm(x, w, b, EPS, silu=True),
        "torch": torch_pixel_norm,
        "definition": lambda x, w, b: pixel_norm_reference(x, w, b, EPS, True),
    },
    "group": {
        "native": lambda x, w, b: group_norm(x, w, b, GROUPS, EPS, silu=True),
        "torch": torch_group_norm,
        "definition": lambda x, w, b: group_norm_reference(x, w, b, GROUPS, EPS, False, True),
    },
}


def passes(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, dict[str, Callable[[], object]]]:
    """What is timed for one map: by pass, then by column."""
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    target = torch.empty_like(x)
    leaves = [x.clone().requires_grad_(), torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1])]
    forward: dict[str, Callable[[], object]] = {"copy": partial(target.copy_, x)}
    backward: dict[str, Callable[[], object]] = {}
    for name, function in KINDS[kind].items():
        forward[name] = partial(torch.no_grad()(function), *leaves)
        out = function(*leaves)
        backward[name] = partial(torch.autograd.grad, out, leaves[:2], torch.ones_like(out), retain_graph=True)
    return {"forward": forward, "backward": backward}


def measure(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for round_ in range(rounds + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if round_:  # the first warms up
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads; ms, median of {args.rounds} rounds\n")
    print("| norm | map | type | pass | native | torch | definition | copy |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, shape, dtype in itertools.product(KINDS, SHAPES, (torch.float32, torch.bfloat16)):
        for name, actions in passes(kind, shape, dtype).items():
            ms = measure(actions, args.rounds)
            cells = [f"{ms[column]:.2f}" if column in ms else "" for column in COLUMNS]
            size = "x".join(map(str, shape))
            print(f"| {kind} | {size} | {str(dtype)[6:]} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
