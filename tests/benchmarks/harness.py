"""What all benchmarks share: taking turns, medians and quartiles, memory, a progress bar, and the report.

The package that is timed is the installed one. Where none is installed it is the checkout that this file lies in. A
benchmark stops where the native library is missing, and says so: plain PyTorch is never timed under the name "native".
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm.auto import tqdm

if importlib.util.find_spec("gpstoken_diffusers") is None:
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from roofline import Peak, Work, count_operations, measure_peak, synchronize, tensor_bytes  # noqa: E402

import gpstoken_diffusers  # noqa: E402
from gpstoken_diffusers.assets import DEMO_PHOTOGRAPH  # noqa: E402
from gpstoken_diffusers.ops.backend import native  # noqa: E402
from gpstoken_diffusers.safe_files import write_atomically  # noqa: E402

Run = Callable[[], Sequence[Tensor] | None]
CPU = torch.device("cpu")
REFERENCE = "reference"

# A round repeats what is faster than this, so that the clock and the caller do not count.
SHORTEST_ROUND_S = 0.1
MOST_CALLS = 50

# Environment of a process whose C library (glibc) gives back at once whatever it frees of 64 KiB and more.
RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

NOTES = """\
- Medians over the rounds, all ways in turn in one process; in brackets the first and third quartile.
- *times as fast* and *difference*: against the way that stands last. The difference is a root mean square over the
  standard deviation: what the dtype costs, or an error. With random weights rounding grows more than with trained ones.
- *memory*: by how much one call raises memory at its peak, its results included, weights and inputs not.
- *GFLOP*, *share*: of the roofline, see `tests/benchmarks/roofline.py`. The partition has no operation that is counted:
  its share is that of memory alone.
"""


@dataclass(frozen=True)
class Case:
    """Something that several ways do alike: a row.

    Attributes:
        table: heading of the table that the row stands in.
        labels: column -> cell, of the columns before the times.
        ways: name -> function that returns tensors to compare, or None. The last is what the others are compared with.
        device: where they run.
        dtypes: way -> dtype it computes in, for its share of the roofline; others have none.
        read_bytes: way -> bytes of inputs and weights, for the same ways.
        calls: how often one call of a way does it.
        warm_up_calls: of the first way, before it is timed: it may be compiled.
    """

    table: str
    labels: Mapping[str, str]
    ways: Mapping[str, Run]
    device: torch.device = CPU
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    read_bytes: Mapping[str, int] = field(default_factory=dict)
    calls: int = 1
    warm_up_calls: int = 0


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

    def __str__(self) -> str:
        unit, scale = next(
            (u, s) for u, s in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)) if self.median * s >= 1 or s == 1e6
        )
        first, third = self.quartiles
        return f"{self.median * scale:.3g} {unit} ({first * scale:.3g}–{third * scale:.3g})"


@dataclass
class Row:
    """What was measured of a case; all mappings are by way."""

    table: str
    labels: Mapping[str, str]
    timings: dict[str, Timing]
    differences: dict[str, float]
    work: dict[str, Work]
    dtypes: Mapping[str, torch.dtype]
    memory_mb: dict[str, float | None] = field(default_factory=dict)

    def times_as_fast(self, way: str) -> float:
        return list(self.timings.values())[-1].median / self.timings[way].median

    def share(self, way: str, peak: Peak) -> float:
        """Of the roofline."""
        return peak.floor_s(self.work[way], self.dtypes[way]) / self.timings[way].median

    def as_json(self, peak: Peak | None) -> dict:
        """With null for infinities and NaN."""
        values: dict = {"table": self.table, **self.labels}
        for way, timing in self.timings.items():
            own = {"seconds": timing.seconds, "median_s": timing.median, "quartiles_s": timing.quartiles}
            own |= {"times_as_fast": self.times_as_fast(way), "peak_memory_mb": self.memory_mb.get(way)}
            if way in self.differences:
                own["difference"] = self.differences[way] if math.isfinite(self.differences[way]) else None
            if way in self.work:
                own |= dataclasses.asdict(self.work[way])
                own |= {"floor_s": peak.floor_s(self.work[way], self.dtypes[way]), "share": self.share(way, peak)}
            values[way] = own
        return values


# ---- the command line ----


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def make_parser(doc: str, rounds: int = 5, threads: int | None = None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    threads = threads or torch.get_num_threads()
    parser.add_argument("--rounds", type=positive, default=rounds, help=f"timed rounds (default: {rounds})")
    parser.add_argument("--threads", type=positive, default=threads, help=f"CPU threads of torch (default: {threads})")
    parser.add_argument("--output", type=Path, help="folder for results.md, results.json and plot.png")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # what the fresh processes are asked for
    return parser


def native_backend(device: torch.device = CPU) -> str:
    """Which native library runs, in a few words.

    Raises ValueError: there is none, so that the native functions would run by their references.
    """
    library = native.library(device.type)
    if library is None:
        raise ValueError(
            f"expected the native {device.type} library, but there is none: {native.why_missing(device.type)}. "
            "Install the package (`pip install .`), or build the library in the checkout; see `gpstoken doctor`."
        )
    return f"native, {library.gpstoken_cpu_isa().decode()}" if device.type == "cpu" else "native"


def conditions(args: argparse.Namespace, device: torch.device = CPU, backend: str | None = None) -> list[str]:
    """Lines on what was measured where. Sets the number of threads; see [`native_backend`] for what it raises."""
    torch.set_num_threads(args.threads)
    backend = backend or native_backend(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    print(f"timing {Path(gpstoken_diffusers.__file__).parent}: {backend}", file=sys.stderr)
    versions = f"torch {torch.__version__}, gpstoken_diffusers {gpstoken_diffusers.__version__} ({backend})"
    return [f"{name}, {args.threads} CPU threads, {versions}, {args.rounds} rounds"]


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main(run: Callable[[], None]) -> int:
    """Runs a benchmark; the exit code is 1, with one line of explanation, for a mistake in what was asked for."""
    try:
        run()
    except (ValueError, OSError) as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 1
    return 0


def run_cases(
    args: argparse.Namespace,
    title: str,
    lines: Sequence[str],
    cases: Iterable[Case],
    count: int,
    peak_dtypes: Sequence[torch.dtype] = (),
    device: torch.device = CPU,
    quick: bool = False,
    memory_command: Sequence[str] = (),
) -> None:
    """Measures all cases, prints the tables, and writes them to `args.output`.

    Args:
        args: of [`make_parser`].
        title, lines: of the heading.
        cases: made one after the other, so that a model can go before the next one comes.
        count: how many they are, for the progress bar.
        peak_dtypes: shares of the roofline are of the device's best in these; none: no shares.
        quick: measure that best in a moment.
        memory_command: script and arguments that make the same cases in a fresh process, to measure memory there.
    """
    if args.memory_of:
        found = [_memory_or_none(case, args.memory_of) for case in cases]
        print(json.dumps(found))
        return
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
    rows: list[Row] = []
    with tqdm(total=count * (1 + args.rounds), unit="round", smoothing=0) as progress:
        progress.set_description("the device's best")
        peak = measure_peak(device, peak_dtypes, quick) if peak_dtypes else None
        for case in cases:
            progress.set_description(", ".join(case.labels.values()) or case.table)
            rows.append(measure(case, args.rounds, progress))
            report(args.output, title, lines, rows, peak)  # what is done stays, should the next one fail
            case = None  # its model goes before the next one comes
        if peak:
            peak = peak.best(measure_peak(device, peak_dtypes, quick))
        for way in dict.fromkeys(way for row in rows for way in row.timings) if memory_command else ():
            progress.set_description(f"memory, {way}")
            try:
                for row, value in zip(rows, memory_in_fresh_process(memory_command, way), strict=True):
                    row.memory_mb[way] = value
            except RuntimeError as error:
                tqdm.write(f"benchmark: the memory of {way} could not be measured: {error}", file=sys.stderr)
    print(report(args.output, title, lines, rows, peak))
    if args.output:
        write_plot(args.output / "plot.png", lambda figure: _bars(figure, title, rows, peak), 1.6 + 0.27 * len(rows))


# ---- measuring ----


def measure(case: Case, rounds: int, progress: tqdm) -> Row:
    """Calls each way once to compare and count, then all in turn to time them."""
    results, first_seconds, operations = {}, {}, 0
    for number, (way, run) in enumerate(case.ways.items()):
        progress.set_postfix_str(way)
        started = time.perf_counter()
        if number == 0 and case.dtypes:
            with torch.compiler.set_stance("force_eager"):  # what is compiled cannot be counted
                operations, results[way] = count_operations(run)
            for _ in range(case.warm_up_calls):
                results[way] = [tensor.clone() for tensor in run()]
        else:
            results[way] = run()
        synchronize(case.device)
        first_seconds[way] = time.perf_counter() - started
        if first_seconds[way] < 5 * SHORTEST_ROUND_S:  # a first call is slower, which counts where calls are short
            started = time.perf_counter()
            run()
            synchronize(case.device)
            first_seconds[way] = time.perf_counter() - started
    progress.update()
    expected = list(results.values())[-1]
    compared = [way for way in list(results)[:-1] if results[way] is not None and expected is not None]
    row = Row(
        case.table,
        case.labels,
        {},
        {way: difference(results[way], expected) for way in compared},
        {way: Work(operations, size + tensor_bytes(results[way])) for way, size in case.read_bytes.items()},
        case.dtypes,
    )
    results.clear()
    timings = alternate(case.ways, rounds, first_seconds, case.device, progress)
    row.timings = {way: Timing(tuple(value / case.calls for value in timings[way])) for way in case.ways}
    if case.device.type == "cuda":
        row.memory_mb = {way: peak_memory_mb(run, case.device) for way, run in case.ways.items()}
    return row


def alternate(
    runs: Mapping[str, Run], rounds: int, first_seconds: Mapping[str, float], device: torch.device, progress: tqdm
) -> dict[str, list[float]]:
    """Seconds of each run by round, taken in turn, in an order that turns round with every round.

    first_seconds: what a call of each took, roughly: those that took little are called repeatedly in a round.
    """
    calls = {name: max(1, min(MOST_CALLS, int(SHORTEST_ROUND_S / max(first_seconds[name], 1e-9)))) for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            progress.set_postfix_str(name)
            synchronize(device)
            started = time.perf_counter()
            for _ in range(calls[name]):
                runs[name]()
            synchronize(device)
            seconds[name].append((time.perf_counter() - started) / calls[name])
        progress.update()
    return seconds


def difference(result: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Root mean square of the difference over the standard deviation of what was expected; of the worst tensor.

    Raises ValueError: other shapes, or another number of tensors.
    """
    if [tensor.shape for tensor in result] != [tensor.shape for tensor in expected]:
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (result, expected)]
        raise ValueError(f"two ways give results of different shapes: expected {shapes[1]}, got {shapes[0]}.")
    shares = []
    for own, wanted in zip(result, expected, strict=True):
        wanted = wanted.double()
        deviation = wanted.std(correction=0).item()
        error = (own.double() - wanted).square().mean().sqrt().item()
        shares.append(error / deviation if deviation else error)
    return max(shares, key=lambda share: (share != share, share))  # NaN is the worst of all


def copy(source: Tensor, target: Tensor) -> None:
    """As a way: reads and writes so many bytes, once."""
    target.copy_(source)


def photograph(height: int, width: int | None = None, part: float = 1.0) -> Tensor:
    """(1, 3, height, width) in [-1, 1]: the middle of the photograph that the package ships, `part` of its sides."""
    with Image.open(DEMO_PHOTOGRAPH) as image:
        left, top = (side * (1 - part) / 2 for side in image.size)
        box = (left, top, image.width - left, image.height - top)
        small = image.convert("RGB").resize((width or height, height), Image.Resampling.BICUBIC, box)
    return pil_to_tensor(small)[None].float() / 127.5 - 1


# ---- memory ----


def peak_memory_mb(run: Run, device: torch.device) -> float | None:
    """By how much one call raises this process's memory at its peak, its results included, in MB (2^20 bytes).

    On CUDA that is what torch's allocator holds. On the CPU it is resident memory (Linux; None elsewhere). There the
    process should not have done much before, or should have had `RETURNS_MEMORY` in its environment from its start:
    otherwise it may still hold what it once freed.
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


def _resident_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def _memory_or_none(case: Case, way: str) -> float | None:
    return peak_memory_mb(case.ways[way], case.device) if way in case.ways else None


def memory_in_fresh_process(command: Sequence[str], way: str) -> list[float | None]:
    """Peak memory of one way of each case, by another process, which has done nothing else before."""
    return in_fresh_process([*command, "--memory_of", way])


def in_fresh_process(command: Sequence[str]) -> list | dict:
    """What a script prints last, as JSON; it runs in a process that gives freed memory back at once.

    Raises RuntimeError, with the end of what it said, where that process fails (for lack of memory, say).
    """
    root = str(Path(gpstoken_diffusers.__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **RETURNS_MEMORY, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- the report ----


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (heads, ["---"] * len(heads), *rows))


def report(folder: Path | None, title: str, lines: Sequence[str], rows: Sequence[Row], peak: Peak | None) -> str:
    """The tables with what they mean; with a folder results.md and results.json too, each whole or not at all."""
    bests = {}
    if peak:
        bests = {str(dtype).removeprefix("torch."): peak.fastest(dtype) for dtype in peak.routes}
        speeds = ", ".join(f"{speed / 1e12:.3g} ({dtype}, {route})" for dtype, (route, speed) in bests.items())
        copies = ", ".join(f"{speed / 1e9:.3g} ({size / 2**20:.0f} MB)" for size, speed in peak.copies.items())
        lines = [*lines, f"the device's best, measured: {speeds} TOP/s; copies at {copies} GB/s read and written"]
        if any(row.share(way, peak) > 1.05 for row in rows for way in row.work):
            lines.append("a share above 105%: the device's best was measured too low, so measure again undisturbed")
    parts = [f"# {title}\n", *(f"- {line}" for line in lines), ""]
    for (heading, _), own in groupby(rows, key=lambda row: (row.table, tuple(row.timings))):
        parts += [f"## {heading}\n", _table(list(own), peak), ""]
    text = "\n".join([*parts, NOTES])
    if folder:
        write_atomically(folder / "results.md", text.encode())
        values = {"title": title, "conditions": lines, "rows": [row.as_json(peak) for row in rows]}
        if peak:
            values["best_operations_per_s"] = {dtype: speed for dtype, (_, speed) in bests.items()}
            values["copy_bytes_per_s"] = peak.copies
        write_atomically(folder / "results.json", (json.dumps(values, indent=2) + "\n").encode())
    return text


def _table(rows: Sequence[Row], peak: Peak | None) -> str:
    """Columns that no row fills are left out. Cells with several numbers have them in the order of the ways."""
    ways = list(rows[0].timings)
    columns: dict[str, list[str]] = {name: [row.labels[name] for row in rows] for name in rows[0].labels}
    columns |= {way: [str(row.timings[way]) for row in rows] for way in ways}
    if len(ways) > 1:
        columns["times as fast"] = [", ".join(f"{row.times_as_fast(way):.2f}" for way in ways[:-1]) for row in rows]
    columns["difference"] = [", ".join(f"{value:.1e}" for value in row.differences.values()) for row in rows]
    memory = [[value for value in row.memory_mb.values() if value is not None] for row in rows]
    columns["memory, MB"] = [", ".join(f"{value:.0f}" for value in values) for values in memory]
    operations = [next((work.operations for work in row.work.values()), 0) for row in rows]
    columns["GFLOP"] = [f"{number / 1e9:.3g}" if number else "" for number in operations]
    columns["share"] = [", ".join(f"{row.share(way, peak):.1%}" for way in row.work) for row in rows]
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    return table(list(columns), zip(*columns.values(), strict=True))


def write_plot(path: Path, draw: Callable[[object], None], height: float) -> None:
    """A PNG file of what `draw` puts on a figure; where matplotlib is missing, advice instead."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"benchmark: {path.name} needs matplotlib: `pip install matplotlib`.", file=sys.stderr)
        return
    figure, data = Figure(figsize=(13, height), layout="constrained"), io.BytesIO()
    FigureCanvasAgg(figure)
    draw(figure)
    figure.savefig(data, format="png", dpi=110)
    write_atomically(path, data.getvalue())


def _bars(figure, title: str, rows: Sequence[Row], peak: Peak | None) -> None:
    """For each row: times as fast as its last way, milliseconds, share of the roofline."""
    places = list(range(len(rows)))[::-1]
    speed, duration, roof = figure.subplots(1, 3, sharey=True)
    ways = [list(row.timings) for row in rows]
    # From 1 to either side: the axis is logarithmic and has no zero.
    speed.barh(places, [row.times_as_fast(own[0]) - 1 for row, own in zip(rows, ways, strict=True)], left=1)
    speed.axvline(1, color="black", linewidth=0.8)
    speed.set_xscale("log")
    speed.set_yticks(places, [", ".join(row.labels.values()) for row in rows])
    speed.set_xlabel("times as fast as the last way")
    for number in range(max(map(len, ways))):
        height = 0.8 / max(map(len, ways))
        for axes, value in (
            (duration, lambda row, way: 1000 * row.timings[way].median),
            (roof, lambda row, way: 100 * row.share(way, peak) if way in row.work else 0),
        ):
            chosen = [
                (p, row, own[number]) for p, row, own in zip(places, rows, ways, strict=True) if number < len(own)
            ]
            heights = [place + 0.4 - (number + 0.5) * height for place, *_ in chosen]
            names = list(dict.fromkeys(way for *_, way in chosen))
            axes.barh(heights, [value(row, way) for _, row, way in chosen], height=height, label=", ".join(names))
    duration.set_xscale("log")
    duration.set_xlabel("milliseconds")
    roof.set_xlabel("share of the roofline, %")
    figure.suptitle(title, fontsize=10)
    figure.legend(*duration.get_legend_handles_labels(), loc="outside upper right", ncols=max(map(len, ways)))
