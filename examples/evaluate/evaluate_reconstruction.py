#!/usr/bin/env python
"""How well autoencoders reconstruct photographs, side by side on the same pictures, and beside trivial methods.

    python examples/evaluate/evaluate_reconstruction.py data/photographs/heldout --train_dir data/photographs/train \\
        --models mini@64,128,256 vae-folder stabilityai/sdxl-vae gpstoken_L256.safetensors \\
        --baselines regions pca jpeg webp jpeg:75 --resolutions 256 512 --output runs/reconstruction

--models: "mini", the shipped one; "s64", "m128" or "l256", released ones, which are fetched; an official single file of
GPSToken; a folder or OWNER/NAME[/FOLDER] of the Hub with an AutoencoderGPSToken, AutoencoderKL, AutoencoderDC,
AutoencoderTiny or VQModel. For GPSToken, @64,128 makes a row for each of these numbers of tokens per tile. Tiles of all
released models have 256 px, so a picture of 512 px has four times as many.

--baselines, of each model in turn:

    shuffled   its textures shuffled between the tokens of a picture (GPSToken only)
    initial    its initial Gaussians in place of the refined ones (GPSToken only)
    regions    each region of its partition in its mean colour (GPSToken only)
    pca        principal components of square or twice as long patches, as many as its tokens, each with as many
               numbers as a token; fitted to --train_dir
    jpeg webp  the best files that are no larger than the coded picture, picture by picture
    jpeg:75    files of one quality, once for all models (also webp:...)

Columns. Tokens and numbers: what a picture becomes (for a VQModel, indices). PSNR, SSIM and the perceptual distance are
means over pictures; a network's output is not rounded to 8 bits. rFID, sFID and the kernel distance compare all
reconstructions with all pictures; the kernel distance leaves out each picture's own reconstruction. They need
Inception's weights; without, features of EfficientNet-Lite0 are compared. Bytes are means per picture: coded is the
method's compact form, for GPSToken a whole file of GPSTokens.save(dtype="uint8"), for latents 8 bits per number without
entropy coding, for a VQModel its indices; "PSNR of coded" is measured after decoding that form. float16 and float32 are
whole files too for GPSToken. Per second: pictures encoded and decoded, after a warm-up. Memory: the peak of a batch,
without the weights.

Written to --output after each model: results.md, results.csv, results.json (with the PSNR of every picture), and for
each model a sheet of the pictures that came out worst and best.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from reconstruction.baselines import (
    CODECS,
    CROPS,
    LARGEST_PATCH,
    FileFormat,
    FileFormatWithin,
    PatchGrid,
    PatchPCA,
    RegionMeans,
    TooFewBytes,
    fit_patch_pcas,
    patch_grid,
)
from reconstruction.judges import FEATURES, PERCEPTUAL, Judges, SetDistances, load_judges
from reconstruction.measure import Row, describe_pictures, measure
from reconstruction.methods import (
    GPSTokenMethod,
    InitialGaussians,
    Method,
    ShuffledTextures,
    check_place,
    load_methods,
    parse_model,
)
from reconstruction.report import case_sheet, csv_table, json_report, markdown_table
from reconstruction.squares import Squares

from gpstoken_diffusers.evaluation.weight_files import CACHE
from gpstoken_diffusers.safe_files import write_atomically
from gpstoken_diffusers.training.pictures import open_pictures
from gpstoken_diffusers.visualization import write_png

BASELINES = ("shuffled", "initial", "regions", "pca", *CODECS)


@dataclass
class Results:
    """What a run has found so far.

    Attributes:
        tables: rows by resolution and by name, each model followed by its baselines.
        squares: the pictures, by resolution.
        notes: what the reader of the table should know.
    """

    tables: dict[int, dict[str, Row]]
    squares: dict[int, Squares]
    notes: list[str]

    @property
    def rows(self) -> list[Row]:
        """Resolution by resolution."""
        return [row for table in self.tables.values() for row in table.values()]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", type=Path, help="Folder of pictures that the models were not trained on.")
    add("--models", nargs="+", default=["mini"], help="What to measure, see above (default: %(default)s).")
    add("--baselines", nargs="*", help="What to compare with, see above; default: all, at the bytes of each model.")
    add("--train_dir", type=Path, help="Folder to fit the principal components to; without it pca is left out.")
    add("--pca_crops", type=int, default=CROPS, help="Crops to fit them to (%(default)s).")
    add("--resolutions", type=int, nargs="+", default=[256], help="Sides of the centre squares, in pixels.")
    add("--max_images", type=int, help="Take at most this many pictures, evenly spread.")
    add(
        "--perceptual",
        default="auto",
        choices=["auto", "none", *PERCEPTUAL],
        help="auto: the first whose weights are here.",
    )
    add(
        "--features",
        default="auto",
        choices=["auto", "none", *FEATURES],
        help="auto: the first whose weights are here.",
    )
    add("--cache", type=Path, default=CACHE, help="Folder of fetched networks (%(default)s).")
    add("--cases", type=int, default=4, help="Worst and best pictures in a sheet, of each so many.")
    add("--batch_size", type=int, default=4)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, help="Folder for the results.")
    args = parser.parse_args(argv)
    for name in ("batch_size", "pca_crops", "max_images", "cases"):
        value, least = getattr(args, name), 0 if name == "cases" else 1
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}")
    if min(args.resolutions) < 1:
        parser.error("--resolutions must be at least 1")
    return args


def parse_baselines(names: Sequence[str] | None, train_dir: Path | None) -> tuple[list[str], list[FileFormat]]:
    """What to compare each model with, and the formats of a quality.

    Raises ValueError: an unknown name, a quality out of range, or "pca" without pictures to fit it to.
    """
    if names is None:
        return [name for name in BASELINES if name != "pca" or train_dir], []
    relative, fixed = [], []
    for name in names:
        if match := re.fullmatch(rf"({'|'.join(CODECS)}):(\d+)", name):
            fixed.append(FileFormat(match[1], int(match[2])))
        elif name in BASELINES:
            relative.append(name)
        else:
            known = [*BASELINES, *(f"{codec}:QUALITY" for codec in CODECS)]
            raise ValueError(f"there is no baseline {name}; known are {', '.join(known)}")
    if "pca" in relative and train_dir is None:
        raise ValueError("principal components are fitted to pictures that are not measured on: give --train_dir")
    return relative, fixed


class Components:
    """Principal components, fitted at their first use and kept."""

    def __init__(self, folder: Path, crops: int):
        self.folder, self.crops = folder, crops
        self._fitted: dict[tuple[int, PatchGrid], PatchPCA] = {}

    def __call__(self, resolution: int, grid: PatchGrid) -> PatchPCA:
        key = (resolution, grid)
        if key not in self._fitted:
            (self._fitted[key],) = fit_patch_pcas(self.folder, resolution, [grid], self.crops)
        return self._fitted[key]


def compared_with(
    row: Row, method: Method, baselines: Sequence[str], components: Components | None, notes: list[str]
) -> Iterator[Method]:
    """The baselines of a model that was measured; where one does not fit, `notes` says why."""
    for name in baselines:
        if name in ("shuffled", "initial", "regions"):
            if isinstance(method, GPSTokenMethod):
                yield _token_baseline(name, method)
        elif name == "pca":
            grid = patch_grid(row.resolution, row.tokens, row.numbers // row.tokens)
            if grid is None:
                notes.append(
                    f"No PCA beside {row.method}: a square of {row.resolution} px cannot be cut into {row.tokens} "
                    f"equal patches of {row.numbers // row.tokens} to {LARGEST_PATCH} numbers."
                )
            else:
                yield components(row.resolution, grid)
        else:
            yield FileFormatWithin(name, row.coded_bytes, row.method)


def _token_baseline(name: str, method: GPSTokenMethod) -> Method:
    if name == "regions":
        return RegionMeans(method)
    kind, title = {
        "shuffled": (ShuffledTextures, "textures shuffled"),
        "initial": (InitialGaussians, "initial Gaussians"),
    }[name]
    return kind(f"{method.name}, {title}", method.model, method.num_tokens)


class Evaluation:
    """A run: measures each method once.

    Args:
        args: the command line.
        judges: networks in place of those that the command line names.

    Raises ImportError, OSError, ValueError: with a message for the user.
    """

    def __init__(self, args: argparse.Namespace, judges: Judges | None = None):
        self.args = args
        self.baselines, self.fixed = parse_baselines(args.baselines, args.train_dir)
        self.specs = [parse_model(text) for text in args.models]
        # A mistake in the last model must not show only after hours.
        for place, counts in self.specs:
            check_place(place, counts)
        self.components = None
        if args.train_dir:
            open_pictures(args.train_dir)
            self.components = Components(args.train_dir, args.pca_crops)
        squares = {side: Squares(args.images, side, args.max_images) for side in dict.fromkeys(args.resolutions)}
        self.judges = judges or load_judges(args.perceptual, args.features, args.cache, args.device)
        self.sets: dict[int, SetDistances | None] = {}
        self.results = Results({side: {} for side in squares}, squares, list(self.judges.notes))

    def run(self) -> Iterator[Results]:
        """Yields the results after each model, and at the end."""
        for place, counts in self.specs:
            self.measure_model(place, counts)
            yield self.results
        for side in self.results.squares:
            for method in self.fixed:
                self.measure(method, side)
        yield self.results

    def measure_model(self, place: str, counts: list[int] | None) -> None:
        """An autoencoder at all resolutions, and what it is compared with; then it leaves memory."""
        for method in load_methods(place, counts, self.args.device):
            for side in self.results.squares:
                row = self.measure(method, side, self.args.cases)
                for baseline in compared_with(row, method, self.baselines, self.components, self.results.notes):
                    try:
                        self.measure(baseline, side)
                    except TooFewBytes as error:
                        self.results.notes.append(f"Left out at {side} px: {error}.")

    def measure(self, method: Method, side: int, num_cases: int = 0) -> Row:
        """The row of a method, which is measured unless the table has it."""
        squares, table, args = self.results.squares[side], self.results.tables[side], self.args
        if side not in self.sets:
            self.sets[side] = describe_pictures(squares, self.judges, args.batch_size, args.device)
        if method.name not in table:
            settings = (args.batch_size, args.device, num_cases)
            table[method.name] = measure(method, squares, self.judges, self.sets[side], *settings)
        return table[method.name]


def picture_notes(squares: dict[int, Squares]) -> list[str]:
    """How many pictures there were, and which could not be read."""
    notes = [
        f"{side} px: centre squares of {len(pictures) - sum(str(path) in pictures.damaged for path in pictures.paths)} "
        f"photographs; {pictures.left_out} of the folder are smaller and left out."
        for side, pictures in squares.items()
    ]
    damaged = {name: reason for pictures in squares.values() for name, reason in pictures.damaged.items()}
    return notes + [f"Damaged and skipped: {name} ({reason})." for name, reason in damaged.items()]


def write_report(results: Results, args: argparse.Namespace) -> str:
    """Writes the files of --output, if it is given, and returns the text of results.md."""
    notes = picture_notes(results.squares) + results.notes
    tables = [markdown_table([row for row in results.rows if row.resolution == side]) for side in results.squares]
    text = "\n".join([*tables, *(f"- {note}" for note in notes)]) + "\n"
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        names = {side: pictures.names for side, pictures in results.squares.items()}
        files = {
            "results.md": text,
            "results.csv": csv_table(results.rows),
            "results.json": json_report(results.rows, names, settings=settings, notes=notes),
        }
        for name, content in files.items():
            write_atomically(args.output / name, content.encode(errors="backslashreplace"))
        for row in results.rows:
            if sheet := case_sheet(row):
                name = re.sub(r"[^\w@.-]+", "_", row.method)[-100:].strip("_.")
                write_png(sheet, args.output / f"cases_{name}_{row.resolution}px.png")
    return text


def main(argv: list[str] | None = None, judges: Judges | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parse_args(argv)
    # cuDNN may otherwise choose kernels that sum in another order on each run.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        for results in Evaluation(args, judges).run():
            text = write_report(results, args)
        print(text)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
