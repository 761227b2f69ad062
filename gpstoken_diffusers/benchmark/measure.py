"""Times of two ways of doing the same, taken in turn; and the memory that each needs at its peak."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Run = Callable[[], Sequence[Tensor]]

# Each round repeats what is faster than this, so that the clock and the caller do not count.
SHORTEST_ROUND_S = 0.1
MOST_CALLS = 50

# Environment of a process whose C library (glibc) gives back at once whatever it frees of 64 KiB and more.
RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third; the only value twice where there is one."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


def synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that waits until the device has done all that it was given."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def alternate(
    runs: Mapping[str, Run],
    rounds: int,
    first_seconds: Mapping[str, float],
    synchronize: Callable[[], None],
    on_call: Callable[[], None],
) -> dict[str, Timing]:
    """Times of each run, in turn, in an order that turns round with every round.

    Args:
        runs: by name; each has been called before.
        rounds: at least 1.
        first_seconds: what a call of each took, roughly: those that took little are called repeatedly in a round.
        synchronize: see [`synchronizer`].
        on_call: called after each round of each run.
    """
    calls = {name: max(1, min(MOST_CALLS, int(SHORTEST_ROUND_S / max(first_seconds[name], 1e-9)))) for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            synchronize()
            started = time.perf_counter()
            for _ in range(calls[name]):
                runs[name]()
            synchronize()
            seconds[name].append((time.perf_counter() - started) / calls[name])
            on_call()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def difference(result: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Root mean square of the difference over the standard deviation of what was expected; of the worst tensor.

    Raises ValueError: other shapes, or another number of tensors.
    """
    if [tensor.shape for tensor in result] != [tensor.shape for tensor in expected]:
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (result, expected)]
        raise ValueError(f"the two ways give results of different shapes: ours {shapes[0]}, the twin's {shapes[1]}.")
    shares = []
    for own, wanted in zip(result, expected, strict=True):
        wanted = wanted.double()
        deviation = wanted.std(correction=0).item()
        error = (own.double() - wanted).square().mean().sqrt().item()
        shares.append(error / deviation if deviation else error)
    return max(shares, key=lambda share: (share != share, share))  # NaN is the worst of all


def peak_memory_mb(run: Run, device: torch.device) -> float | None:
    """By how much one call raises this process's memory at its peak, its results included, in MB (2^20 bytes).

    On CUDA that is what torch's allocator holds. On the CPU it is resident memory (Linux; None elsewhere), for which
    the process should not have done much before, or have `RETURNS_MEMORY` in its environment from its start on: what
    it once freed it may otherwise still hold.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    clear.write_text("5")  # starts the account of the peak anew
    before = _resident_mb("VmRSS")
    run()
    return max(0.0, _resident_mb("VmHWM") - before)


def _resident_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
