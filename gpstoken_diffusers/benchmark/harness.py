"""One row of the table: a stage's two ways compared, counted and timed; and memory, in processes of their own."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import gpstoken_diffusers

from .measure import RETURNS_MEMORY, SHORTEST_ROUND_S, Timing, alternate, difference, peak_memory_mb, synchronizer
from .peers import PEERS, make_peer
from .roofline import Peak, Work, count_operations, tensor_bytes
from .stages import OURS, TWIN, WAYS, Settings, Stage, make_stages


@dataclass
class Row:
    """What was measured of a stage; dictionaries are by way, "twin" and "ours".

    Attributes:
        size, stage, note: which stage.
        peer: whether it is one of diffusers' autoencoders, whose two ways are float32 and the other dtype.
        timings: seconds.
        difference: root mean square of what ours gives less what the twin gives, over the twin's deviation.
        work: operations and bytes that cannot be avoided.
        dtypes: in which it computes.
        memory_mb: what a call adds to memory at its peak; None where it was not measured.
    """

    size: str
    stage: str
    note: str
    peer: bool
    timings: dict[str, Timing]
    difference: float
    work: dict[str, Work]
    dtypes: dict[str, torch.dtype]
    memory_mb: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(WAYS))

    @property
    def times_as_fast(self) -> float:
        return self.timings[TWIN].median / self.timings[OURS].median

    def floor_s(self, way: str, peak: Peak) -> float:
        """The least seconds for that work on a device that does so much at best."""
        return peak.floor_s(self.work[way], self.dtypes[way])

    def share(self, way: str, peak: Peak) -> float:
        """Of the roofline, around 1 at best."""
        return self.floor_s(way, peak) / self.timings[way].median


def all_stages(
    sizes: Sequence[str], names: Sequence[str], peers: bool, settings: Settings
) -> Iterator[tuple[Stage, bool]]:
    """Each stage and whether it is a peer's. A model is built when its first stage is asked for."""
    for size in sizes:
        yield from ((stage, False) for stage in make_stages(size, names, settings))
        gc.collect()
    for name in PEERS if peers else ():
        yield make_peer(name, settings), True
        gc.collect()


def measure_stage(stage: Stage, peer: bool, rounds: int, on_call: Callable[[], None]) -> Row:
    """Calls each way once to compare and count, then both in turn to time them.

    rounds: timed ones, at least 1. on_call: called after each round of each way, the first included.
    """
    synchronize = synchronizer(stage.device)
    results, first_seconds, operations = {}, {}, 0
    for way in WAYS:
        started = time.perf_counter()
        if way == OURS:
            with torch.compiler.set_stance("force_eager"):  # what is compiled cannot be counted
                operations, results[way] = count_operations(stage.runs[way])
            for _ in range(stage.warm_up_calls):
                results[way] = [tensor.clone() for tensor in stage.runs[way]()]
        else:
            results[way] = stage.runs[way]()
        synchronize()
        first_seconds[way] = time.perf_counter() - started
        if first_seconds[way] < 5 * SHORTEST_ROUND_S:  # a first call is slower, which counts where calls are short
            started = time.perf_counter()
            stage.runs[way]()
            synchronize()
            first_seconds[way] = time.perf_counter() - started
        on_call()
    work = {
        way: Work(operations, stage.input_bytes[way] + stage.weights_bytes[way] + tensor_bytes(results[way]))
        for way in WAYS
    }
    distance = difference(results[OURS], results[TWIN])
    results.clear()
    row = Row(
        stage.size,
        stage.name,
        stage.note,
        peer,
        alternate(stage.runs, rounds, first_seconds, synchronize, on_call),
        distance,
        work,
        stage.dtypes,
    )
    if stage.device.type == "cuda":
        row.memory_mb = {way: peak_memory_mb(stage.runs[way], stage.device) for way in WAYS}
    return row


def memory_of(way: str, stages: Iterator[tuple[Stage, bool]]) -> dict[str, float | None]:
    """Peak memory in MB of one way of each stage, by the name that [`memory_key`] makes."""
    return {
        memory_key(stage.size, stage.name): peak_memory_mb(stage.runs[way], stage.device)
        for stage, _ in stages
    }


def memory_key(size: str, stage: str) -> str:
    """How [`memory_of`] names a stage."""
    return f"{size}: {stage}"


def memory_in_fresh_process(way: str, arguments: Sequence[str]) -> dict[str, float | None]:
    """[`memory_of`] by another process, which has done nothing else before.

    arguments: of `python -m gpstoken_diffusers.benchmark`, as of this run.

    Raises RuntimeError, with the end of what it said, where that process fails (of memory, say).
    """
    command = [sys.executable, "-m", "gpstoken_diffusers.benchmark", *arguments, "--memory_of", way]
    root = str(Path(gpstoken_diffusers.__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **RETURNS_MEMORY, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])
