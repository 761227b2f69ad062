"""`gpstoken reconstruct`: pictures through the model and back, with metrics; a run that was cut off goes on.

A written picture carries its own record, as a text chunk of the PNG: its source, the settings, the metrics.
So a picture and its metrics appear together or not at all, and the tables can always be made again.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..folder_files import find_files
from ..picture_files import image_suffixes
from ..safe_files import write_atomically
from .codec import Codec, load_codec, quality, quality_text
from .errors import ends_run, printable, reason
from .files import prepare_folder, write_picture
from .folders import find_pictures, model_settings, settings_difference
from .made_folders import make_folder
from .sources import Record, folder_mark, is_same_source

RECORD = "gpstoken"  # name of the text chunk
COLUMNS = ("file", "width", "height", "tokens", "floats", "psnr", "ssim", "seconds")
AVERAGED = COLUMNS[3:]
_ADVICE = "Choose another folder, or add --overwrite to do them again."


def reconstruct(args: argparse.Namespace) -> int:
    """Reconstruct a picture or all pictures of a folder. Returns 1 if any of them failed."""
    if args.output.suffix.lower() in image_suffixes() and not args.output.is_dir():
        raise ValueError(f"the output {args.output} must be a folder: the picture and its metrics are written there.")
    sources = find_pictures(args.path, args.output, args.recursive)
    prepare_folder(args.output)
    codec = load_codec(args)
    codec.check_num_tokens(args.num_tokens)
    settings = model_settings(codec, args.num_tokens) | {"mode": args.mode or codec.model.config.decode_mode}

    known = _records_in(args.output)
    others = [record["settings"] for record in known.values() if record["settings"] != settings]
    if others and not args.overwrite:
        raise ValueError(
            f"{args.output} holds pictures of other settings ({settings_difference(others[0], settings)}). {_ADVICE}"
        )
    folder = args.path if args.path.is_dir() else args.path.parent
    waiting, failures = [], {}
    for name, source in sources.items():
        try:
            if args.overwrite or name not in known or not is_same_source(known[name]["source"], source, folder):
                waiting.append(name)
        except ValueError as error:
            raise ValueError(f"{error}, and its result is in {args.output}. {_ADVICE}") from error
        except OSError as error:
            failures[name] = reason(error)
            print(f"gpstoken: error: {printable(name)}: {failures[name]}", file=sys.stderr)
    skipped, finished = len(sources) - len(waiting) - len(failures), 0
    try:
        with tqdm(sorted(waiting), unit="picture", disable=args.quiet) as bar:
            for name in bar:
                try:
                    picture, metrics, source = _one(codec, sources[name], name, args)
                    record = {"source": source | {"folder": folder_mark(folder)}, "settings": settings}
                    target = args.output / f"{name}.png"
                    make_folder(target.parent)
                    write_picture(picture, target, {RECORD: json.dumps(record | {"metrics": metrics})})
                # Whatever a picture raises is its own error; trouble with the whole disk ends the run.
                except Exception as error:
                    if isinstance(error, OSError) and ends_run(error):
                        raise
                    failures[name] = reason(error)
                    bar.write(f"gpstoken: error: {printable(name)}: {failures[name]}", file=sys.stderr)
                    continue
                finished += 1
                bar.set_postfix_str(quality_text(metrics))
    finally:  # after Ctrl-C too, the tables tell of all pictures that are there
        records, means = _write_tables(args.output, settings, failures)
    if not args.quiet:
        before = f", {skipped} done before" if skipped else ""
        failed = f", {len(failures)} failed" if failures else ""
        print(f"{args.output}: {finished} reconstructed{before}{failed}")
        if records:
            print(f"mean: {quality_text(means)}   {means['tokens']:g} tokens   {means['seconds']:.2f} s")
    return 1 if failures else 0


def _records_in(output: Path) -> dict[str, Record]:
    """The records of the pictures that this command wrote into a folder, by the name of their source."""
    found = {name: _record_of(target) for name, target in find_files(output, [".png"]).files.items()}
    return {name.removesuffix(".png"): record for name, record in found.items() if record is not None}


def _record_of(target: Path) -> Record | None:
    """The record in a picture; None if the file is not whole, or not of this command."""
    try:
        with Image.open(target, formats=["PNG"]) as picture:
            record = json.loads(picture.info[RECORD])
            picture.verify()  # checksums of the whole file, without decoding it
        return {name: record[name] for name in ("source", "settings", "metrics")}
    except Exception:  # whatever a picture raises: it is not one of ours
        return None


def _one(codec: Codec, source: Path, name: str, args: argparse.Namespace) -> tuple[Image.Image, Record, Record]:
    """The result, its metrics, and the record of its source."""
    start = time.perf_counter()
    encoded = codec.encode(source, args.num_tokens)
    picture = codec.decode(encoded.tokens, args.mode)
    seconds = time.perf_counter() - start
    tokens = encoded.tokens
    metrics = {
        "file": name,
        "width": picture.width,
        "height": picture.height,
        "tokens": tokens.num_tokens,
        "floats": tokens.num_floats,
        **quality(encoded.picture, picture),
        "seconds": round(seconds, 4),
    }
    return picture, metrics, encoded.source


def _write_tables(
    output: Path, settings: Record, failures: dict[str, str]
) -> tuple[dict[str, Record], dict[str, float | None]]:
    """Write metrics.csv and metrics.json of the pictures that are in a folder now.

    Returns: their metrics by name, and the means, of finite values.
    """
    while True:
        before = _state(output)
        known = _records_in(output)
        records = {name: record["metrics"] for name, record in known.items() if record["settings"] == settings}
        rows = [records[name] for name in sorted(records)]
        means = {column: _mean(row[column] for row in rows) for column in AVERAGED}
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, {"file": "mean", **means}] if rows else [])
        # A name that is not in UTF-8 is written with escapes, as JSON does.
        write_atomically(output / "metrics.csv", table.getvalue().encode(errors="backslashreplace"))
        document = {
            "settings": settings,
            "mean": means,
            "pictures": [{**row, "psnr": _finite(row["psnr"])} for row in rows],  # JSON has no infinity
            "failed": [{"file": name, "error": failures[name]} for name in sorted(failures)],
        }
        write_atomically(output / "metrics.json", (json.dumps(document, indent=2) + "\n").encode())
        if _state(output) == before:  # else another run has written a picture meanwhile, and perhaps its tables
            return records, means


def _state(output: Path) -> dict[str, int]:
    """Changes when a picture in a folder does."""
    return {name: target.stat().st_mtime_ns for name, target in find_files(output, [".png"]).files.items()}


def _mean(values: Iterable[float | None]) -> float | None:
    finite = [value for value in values if _finite(value) is not None]
    return sum(finite) / len(finite) if finite else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
