"""The table, its numbers as JSON, and a plot."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..safe_files import write_atomically
from .harness import Row
from .measure import Timing
from .roofline import Peak
from .stages import OURS, TWIN, WAYS

MATPLOTLIB_ADVICE = 'plot.png needs matplotlib: `pip install matplotlib`, or this package with its extra "train".'

_NOTES = """\
- Medians over the rounds ({rounds}), both ways in turn in one process; in brackets the first and third quartile.
- *difference*: root mean square of ours less the twin, over the twin's standard deviation. What the dtype costs, or an
  error. With random weights rounding grows more than with trained ones.
- *memory*: by how much one call raises memory at its peak, its results included, weights and inputs not.
- *GFLOP*: matrix products, convolutions, attention, and pairs of pixel and token in the splat. *share*: of the
  roofline, the least time for these operations and for moving inputs, outputs and weights once, over the time taken.
  The partition has no operation that is counted: its share is that of memory alone.
- The twin is eager float32 PyTorch and NumPy, not the released code: see `gpstoken_diffusers/benchmark/twins.py`.
"""


@dataclass(frozen=True)
class Conditions:
    """Under which all was measured.

    Attributes:
        title, lines: of the heading.
        values: the same for JSON.
        rounds: how often each was timed.
        dtype: of ours.
        peak: the device's best.
    """

    title: str
    lines: tuple[str, ...]
    values: dict
    rounds: int
    dtype: str
    peak: Peak


def write_report(folder: Path, rows: Sequence[Row], conditions: Conditions) -> None:
    """Writes results.md and results.json, each whole or not at all.

    Raises OSError: the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.md", markdown(rows, conditions).encode())
    document = {**conditions.values, "rows": [_plain(row, conditions.peak) for row in rows]}
    write_atomically(folder / "results.json", (json.dumps(document, indent=2) + "\n").encode())


def markdown(rows: Sequence[Row], conditions: Conditions) -> str:
    """The tables with what they mean."""
    parts = [f"# {conditions.title}\n", *(f"- {line}" for line in conditions.lines), ""]
    own, peers = ([row for row in rows if row.peer == peer] for peer in (False, True))
    if own:
        parts += ["## Ours against the plain twin\n", _table(own, "ours", "twin", conditions.peak), ""]
    if peers:
        parts += ["## What else there is: diffusers' autoencoders, encode and decode\n"]
        parts += [_table(peers, conditions.dtype, "float32", conditions.peak), ""]
    return "\n".join([*parts, _NOTES.format(rounds=conditions.rounds)])


def _table(rows: Sequence[Row], ours: str, twin: str, peak: Peak) -> str:
    heads = ["size", "stage", ours, twin, "times as fast", "difference", f"memory, MB: {ours}", twin, "GFLOP"]
    heads += [f"share: {ours}", twin]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row.size, row.stage + (f", {row.note}" if row.note else "")]
        cells += [_time(row.timings[OURS]), _time(row.timings[TWIN])]
        cells += [f"{row.times_as_fast:.2f}", f"{row.difference:.1e}"]
        cells += ["" if row.memory_mb[way] is None else f"{row.memory_mb[way]:.0f}" for way in (OURS, TWIN)]
        operations = row.work[OURS].operations
        cells += [f"{operations / 1e9:.3g}" if operations else ""]
        cells += [f"{row.share(way, peak):.1%}" for way in (OURS, TWIN)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(timing: Timing) -> str:
    unit, scale = ("s", 1.0) if timing.median >= 1 else ("ms", 1e3)
    first, third = timing.quartiles
    return f"{timing.median * scale:.3g} {unit} ({first * scale:.3g}–{third * scale:.3g})"


def _plain(row: Row, peak: Peak) -> dict:
    """A row as JSON takes it: infinities and NaN become null."""
    values = {
        "size": row.size,
        "stage": row.stage,
        "note": row.note,
        "peer": row.peer,
        "times_as_fast": row.times_as_fast,
        "difference": row.difference if math.isfinite(row.difference) else None,
    }
    for way in WAYS:
        timing = row.timings[way]
        values[way] = {
            "seconds": list(timing.seconds),
            "median_s": timing.median,
            "quartiles_s": list(timing.quartiles),
            "peak_memory_mb": row.memory_mb[way],
            **dataclasses.asdict(row.work[way]),
            "floor_s": row.floor_s(way, peak),
            "share_of_roofline": row.share(way, peak),
        }
    return values


def plot_advice() -> str | None:
    """What to do to get a plot; None where nothing is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return MATPLOTLIB_ADVICE
    return None


def write_plot(path: Path, rows: Sequence[Row], conditions: Conditions) -> None:
    """Bars for each row: times as fast as the twin, milliseconds, share of the roofline; a PNG file.

    Raises ImportError: no matplotlib, see [`plot_advice`].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [f"{row.size}: {row.stage}" for row in rows]
    places = list(range(len(rows)))[::-1]
    figure = Figure(figsize=(13, 1.6 + 0.27 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    speed, duration, roof = figure.subplots(1, 3, sharey=True)
    own = ["tab:gray" if row.peer else "tab:blue" for row in rows]
    # From 1 to either side: the axis is logarithmic and has no zero.
    speed.barh(places, [row.times_as_fast - 1 for row in rows], left=1, color=own)
    speed.axvline(1, color="black", linewidth=0.8)
    speed.set_xscale("log")
    speed.set_yticks(places, names)
    speed.set_ylim(-0.7, len(rows) - 0.3)
    speed.set_xlabel("times as fast as plain float32 (grey: peers)")
    for way, offset, color in ((OURS, 0.2, "tab:blue"), (TWIN, -0.2, "tab:orange")):
        heights = [place + offset for place in places]
        milliseconds = [1000 * row.timings[way].median for row in rows]
        duration.barh(heights, milliseconds, height=0.4, color=color, label=way)
        roof.barh(heights, [100 * row.share(way, conditions.peak) for row in rows], height=0.4, color=color, label=way)
    duration.set_xscale("log")
    duration.set_xlabel(f"milliseconds (of peers: {conditions.dtype}, float32)")
    roof.set_xlabel("share of the roofline, %")
    figure.suptitle(conditions.title, fontsize=10)
    figure.legend(*roof.get_legend_handles_labels(), loc="outside upper right", ncols=len(WAYS))
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    write_atomically(path, data.getvalue())
