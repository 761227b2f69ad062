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

from ..picture_files import image_suffixes
from ..safe_files import write_atomically
from .codec import Codec, load_codec, quality, quality_text
from .files import prepare_folder, write_picture
from .folders import Record, find_pictures, model_settings, picture_state, settings_difference

RECORD = "gpstoken"  # name of the text chunk
COLUMNS = ("file", "width", "height", "tokens", "floats", "psnr", "ssim", "seconds")
AVERAGED = COLUMNS[3:]


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
            f"{args.output} holds pictures of other settings ({settings_difference(others[0], settings)}). "
            "Choose another folder, or add --overwrite to do them again."
        )
    waiting = {
        name
        for name, source in sources.items()
        if args.overwrite or name not in known or known[name]["source"] != picture_state(source)
    }
    records = {
        name: record["metrics"]
        for name, record in known.items()
        if name not in waiting and record["settings"] == settings
    }
    failures: dict[str, str] = {}
    try:
        with tqdm(sorted(waiting), unit="picture", disable=args.quiet) as bar:
            for name in bar:
                try:
                    picture, metrics = _one(codec, sources[name], name, args)
                # Whatever a picture raises is its own error; trouble with the output folder ends the run.
                except Exception as error:
                    failures[name] = str(error) or type(error).__name__
                    bar.write(f"gpstoken: error: {name}: {failures[name]}", file=sys.stderr)
                    continue
                record = {"source": picture_state(sources[name]), "settings": settings, "metrics": metrics}
                target = args.output / f"{name}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                write_picture(picture, target, {RECORD: json.dumps(record)})
                records[name] = metrics
                bar.set_postfix_str(quality_text(metrics))
    finally:  # after Ctrl-C too, the tables tell of all pictures that are there
        means = _write_tables(args.output, settings, records, failures)
    if not args.quiet:
        finished, skipped = len(waiting) - len(failures), len(sources) - len(waiting)
        before = f", {skipped} done before" if skipped else ""
        failed = f", {len(failures)} failed" if failures else ""
        print(f"{args.output}: {finished} reconstructed{before}{failed}")
        if records:
            print(f"mean: {quality_text(means)}   {means['tokens']:g} tokens   {means['seconds']:.2f} s")
    return 1 if failures else 0


def _records_in(output: Path) -> dict[str, Record]:
    """The records of the pictures that this command wrote into a folder, by the name of their source."""
    records = {}
    for target in output.rglob("*.png"):
        if (record := _record_of(target)) is not None:
            records[target.relative_to(output).as_posix().removesuffix(".png")] = record
    return records


def _record_of(target: Path) -> Record | None:
    """The record in a picture; None if the file is not whole, or not of this command."""
    try:
        with Image.open(target) as picture:
            record = json.loads(picture.info[RECORD])
            picture.verify()  # checksums of the whole file, without decoding it
        return {name: record[name] for name in ("source", "settings", "metrics")}
    except (OSError, SyntaxError, KeyError, ValueError, TypeError):
        return None


def _one(codec: Codec, source: Path, name: str, args: argparse.Namespace) -> tuple[Image.Image, Record]:
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
    return picture, metrics


def _write_tables(
    output: Path, settings: Record, records: dict[str, Record], failures: dict[str, str]
) -> dict[str, float | None]:
    """Write metrics.csv and metrics.json; returns the means, of finite values."""
    rows = [records[name] for name in sorted(records)]
    means = {column: _mean(row[column] for row in rows) for column in AVERAGED}
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*rows, {"file": "mean", **means}] if rows else [])
    write_atomically(output / "metrics.csv", table.getvalue().encode())
    document = {
        "settings": settings,
        "mean": means,
        "pictures": [{**row, "psnr": _finite(row["psnr"])} for row in rows],  # JSON has no infinity
        "failed": [{"file": name, "error": failures[name]} for name in sorted(failures)],
    }
    write_atomically(output / "metrics.json", (json.dumps(document, indent=2) + "\n").encode())
    return means


def _mean(values: Iterable[float | None]) -> float | None:
    finite = [value for value in values if _finite(value) is not None]
    return sum(finite) / len(finite) if finite else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
