#!/usr/bin/env python
"""Plots how reconstructions depend on the number of tokens, an importance map and the resolution.

    python examples/evaluate/plot_reconstruction.py data/heldout --train_dir data/train --output plots

writes to --output

    tokens.png, tokens.csv            PSNR against --num_tokens, all by one model; principal components of as many
                                      patches and numbers, JPEG and WebP files of as many bytes as the coded tokens
    adaptivity.png, adaptivity.csv    PSNR inside and outside a central disc, as its importance grows
    resolution.png, resolution.csv,   one model from the smallest of --resolutions to the largest, on the photographs
    resolution.md                     that are large enough for all of them

Settings and columns are those of evaluate_reconstruction.py.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from reconstruction.baselines import (
    CODECS,
    CROPS,
    TITLES,
    FileFormatWithin,
    PatchPCA,
    TooFewBytes,
    fit_patch_pcas,
    patch_grid,
)
from reconstruction.judges import PERCEPTUAL, Judges, load_judges
from reconstruction.measure import CODED, CODED_PSNR, PSNR, SSIM, Row, measure
from reconstruction.methods import GPSTokenMethod, load_methods
from reconstruction.report import csv_table, markdown_table
from reconstruction.squares import Squares
from torch import Tensor
from tqdm.auto import tqdm

from gpstoken_diffusers.evaluation.metrics import psnr
from gpstoken_diffusers.evaluation.weight_files import CACHE
from gpstoken_diffusers.safe_files import write_atomically
from gpstoken_diffusers.tokens import GEOMETRY_CHANNELS

TOKENS = [32, 64, 128, 256, 512, 1024]
STRENGTHS = [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
RESOLUTIONS = [256, 512, 1024]
DISC_RADIUS = 0.5
"""Of the important disc, where the picture spans 2: the disc covers a fifth of it."""


@dataclass(frozen=True)
class Adaptivity:
    """Mean PSNR in dB at one strength of importance."""

    strength: float
    inside: float
    outside: float
    whole: float


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", type=Path, help="Folder of pictures that the model was not trained on.")
    add("--model", default="mini", help="The shipped model, an official file, a folder or a name of the Hub.")
    add("--train_dir", type=Path, help="Folder to fit the principal components to; without it that curve is left out.")
    add("--pca_crops", type=int, default=CROPS, help="Crops to fit them to (%(default)s).")
    add("--num_tokens", type=int, nargs="+", default=TOKENS, help="Of the first curve, per tile.")
    add("--strengths", type=float, nargs="+", default=STRENGTHS, help="Of importance, see encode().")
    add("--resolutions", type=int, nargs="+", default=RESOLUTIONS, help="The first is that of the curves as well.")
    add("--table_tokens", type=int, help="Per tile, of the last two figures; default: the model's own.")
    add("--max_images", type=int, help="Take at most this many pictures, evenly spread.")
    add("--perceptual", default="auto", choices=["auto", "none", *PERCEPTUAL], help="For the table of resolutions.")
    add("--cache", type=Path, default=CACHE, help="Folder of fetched networks (%(default)s).")
    add("--batch_size", type=int, default=4)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, required=True, help="Folder for the figures.")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------- measuring


def tokens_curve(method: GPSTokenMethod, args: argparse.Namespace) -> list[Row]:
    """Rows of the model at each number of tokens, each followed by its baselines."""
    squares = Squares(args.images, args.resolutions[0], args.max_images)
    methods = [GPSTokenMethod(f"{args.model}@{count}", method.model, count) for count in args.num_tokens]
    rows = []
    components = _components(methods, squares.resolution, args)
    for count, at_count in zip(args.num_tokens, methods, strict=True):
        own = measure(at_count, squares, batch_size=args.batch_size, device=args.device)
        others = [FileFormatWithin(codec, own.coded_bytes, own.method) for codec in CODECS]
        others += [components[count]] if count in components else []
        rows.append(own)
        for other in others:
            with contextlib.suppress(TooFewBytes):  # the curve then begins at more tokens
                rows.append(measure(other, squares, batch_size=args.batch_size))
    return rows


def _components(methods: list[GPSTokenMethod], resolution: int, args: argparse.Namespace) -> dict[int, PatchPCA]:
    """Principal components of as many patches as tokens, by tokens per tile, where a square can be cut into so many."""
    if not args.train_dir:
        return {}
    grids = {}
    for method in methods:
        config = method.model.config
        tiles = (-(-resolution // config.sample_size)) ** 2
        grid = patch_grid(resolution, tiles * method.num_tokens, GEOMETRY_CHANNELS + config.texture_channels)
        if grid is not None:
            grids[method.num_tokens] = grid
    fitted = fit_patch_pcas(args.train_dir, resolution, list(grids.values()), args.pca_crops)
    return dict(zip(grids, fitted, strict=True))


def disc(side: int) -> Tensor:
    """(side, side) boolean: the disc in the middle of a square."""
    places = torch.linspace(-1, 1, side)
    return places[:, None].square() + places.square() <= DISC_RADIUS**2


@torch.no_grad()
def adaptivity_curve(method: GPSTokenMethod, args: argparse.Namespace) -> list[Adaptivity]:
    """The model at one number of tokens, while importance moves more and more of them into the disc."""
    squares = Squares(args.images, args.resolutions[0], args.max_images)
    inside, model = disc(squares.resolution).to(args.device), method.model
    points = []
    for strength in tqdm(args.strengths, desc="importance", unit="strength"):
        values: list[Tensor] = []
        for _, images in squares.batches(args.batch_size):
            images = images.to(args.device)
            settings = {"importance": inside.float(), "importance_strength": strength}
            tokens = model.encode(images, num_tokens=method.num_tokens, **settings).tokens
            output = model.decode(tokens).sample.float().clamp(-1, 1)
            values.append(torch.stack([psnr(output, images, mask) for mask in (inside, ~inside, None)]).cpu())
        points.append(Adaptivity(strength, *torch.cat(values, dim=1).mean(dim=1).tolist()))
    return points


def resolution_table(method: GPSTokenMethod, args: argparse.Namespace, judges: Judges) -> list[Row]:
    """A row per resolution, of the same photographs."""
    largest = max(args.resolutions)
    squares = [Squares(args.images, side, args.max_images, at_least=largest) for side in args.resolutions]
    return [measure(method, some, judges, None, args.batch_size, args.device) for some in squares]


# ---------------------------------------------------------------------------------------------------- drawing


def draw_tokens(rows: Sequence[Row], model: str) -> plt.Figure:
    """PSNR against tokens on the left, against bytes on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), dpi=110, sharey=True)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_kind(row, model), []).append(row)
    for number, (kind, members) in enumerate(groups.items()):
        style = {"marker": "o", "markersize": 3, "label": kind, "color": f"C{number}"}
        if members[0].tokens is not None:
            left.plot([row.tokens for row in members], [row.figures[PSNR] for row in members], **style)
        kilobytes = [row.figures[CODED] / 1000 for row in members]
        right.plot(kilobytes, [row.figures[CODED_PSNR] for row in members], **style)
    left.set(xscale="log", xlabel="tokens, or patches of as many numbers", ylabel="PSNR, dB")
    counts = sorted({row.tokens for row in rows if row.tokens})
    left.set_xticks(counts, [f"{count:,}" for count in counts])
    left.minorticks_off()
    right.set(xscale="log", xlabel="kB per picture, coded")
    largest = max(row.figures[CODED] for row in rows) / 1000
    smallest = min(row.figures[CODED] for row in rows) / 1000
    powers = range(math.floor(math.log2(smallest)), math.ceil(math.log2(largest)) + 1)
    right.set_xticks([2.0**power for power in powers], [f"{2.0**power:g}" for power in powers])
    right.minorticks_off()
    return _finished(figure)


def _kind(row: Row, model: str) -> str:
    if row.method.startswith("PCA"):
        return "PCA of patches"
    return next((title for title in TITLES.values() if row.method.startswith(title)), model)


def draw_adaptivity(points: Sequence[Adaptivity]) -> plt.Figure:
    """PSNR inside and outside the disc against the strength of importance."""
    figure, axes = plt.subplots(figsize=(6, 3.8), dpi=110)
    strengths = [point.strength for point in points]
    for name, title in (("inside", "inside the disc"), ("outside", "outside"), ("whole", "whole picture")):
        axes.plot(strengths, [getattr(point, name) for point in points], marker="o", markersize=3, label=title)
    axes.set_xscale("symlog", linthresh=0.25)
    axes.set_xticks(strengths, [f"{strength:g}" for strength in strengths])
    axes.minorticks_off()
    axes.set(xlabel="importance of the disc", ylabel="PSNR, dB")
    return _finished(figure)


def draw_resolutions(rows: Sequence[Row]) -> plt.Figure:
    """PSNR and SSIM against the side of the picture."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.4), dpi=110)
    sides = [str(row.resolution) for row in rows]
    for axes, name in zip(panels, (PSNR, SSIM), strict=True):
        axes.plot(sides, [row.figures[name] for row in rows], marker="o", label=rows[0].method)
        axes.set(xlabel="side of the picture, px", ylabel=name)
    return _finished(figure)


def _finished(figure: plt.Figure) -> plt.Figure:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    return figure


def write_figure(figure: plt.Figure, path: Path) -> None:
    """Writes a PNG; a reader sees the old file or the whole new one."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


def adaptivity_csv(points: Sequence[Adaptivity]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["importance strength", "PSNR inside, dB", "PSNR outside, dB", "PSNR, dB"])
    writer.writerows([point.strength, point.inside, point.outside, point.whole] for point in points)
    return buffer.getvalue()


def plot(args: argparse.Namespace) -> dict[str, Any]:
    """Writes everything; returns what the figures show. Raises ImportError, OSError, ValueError with a message."""
    counts = None if args.table_tokens is None else [args.table_tokens]
    (method,) = load_methods(args.model, counts, args.device)
    if not isinstance(method, GPSTokenMethod):
        raise ValueError(f"{args.model} is no GPSToken autoencoder: its number of tokens cannot be chosen")
    # Mistakes that would show only after the first figures.
    Squares(args.images, max(args.resolutions), args.max_images)
    judges = load_judges(args.perceptual, "none", args.cache, args.device)
    args.output.mkdir(parents=True, exist_ok=True)

    rows = tokens_curve(method, args)
    write_atomically(args.output / "tokens.csv", csv_table(rows).encode())
    write_figure(draw_tokens(rows, args.model), args.output / "tokens.png")

    points = adaptivity_curve(method, args)
    write_atomically(args.output / "adaptivity.csv", adaptivity_csv(points).encode())
    write_figure(draw_adaptivity(points), args.output / "adaptivity.png")

    table = resolution_table(method, args, judges)
    write_atomically(args.output / "resolution.csv", csv_table(table).encode())
    write_atomically(args.output / "resolution.md", markdown_table(table).encode())
    write_figure(draw_resolutions(table), args.output / "resolution.png")
    return {"tokens": rows, "adaptivity": points, "resolution": table}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parse_args(argv)
    try:
        results = plot(args)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(markdown_table(results["tokens"]))
    print(adaptivity_csv(results["adaptivity"]))
    print(markdown_table(results["resolution"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
