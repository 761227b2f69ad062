#!/usr/bin/env python
"""Tables 1 and 3 of the paper (arXiv 2509.01109): reconstruction at 256 px, and at 512 and 1024 px, beside its figures.

    python examples/evaluate/reproduce_paper.py IMAGENET_VAL --models s64 m128 l256 --output paper
    python examples/evaluate/reproduce_paper.py data/photographs/heldout --models mini --tables 1 --output paper

The published figures are of the released tokenizers on the 50,000 pictures of ImageNet's validation set; on other
pictures, or of other models, the two columns say different things. evaluate_reconstruction.py measures, and its options
can follow (--device, --max_images, --perceptual, ...); which judges it has depends on the networks that
fetch_perceptual.py has fetched. Each table is OUTPUT/table1.md, with evaluate_reconstruction's own files in
OUTPUT/table1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import evaluate_reconstruction
from reconstruction.judges import Judges

from gpstoken_diffusers.safe_files import write_atomically

TABLES = {1: [256], 3: [512, 1024]}
"""Resolutions of each table, in pixels."""

PUBLISHED = {
    (256, "s64"): {"PSNR, dB": 22.18, "SSIM": 0.578, "LPIPS": 0.111, "rFID": 1.31},
    (256, "m128"): {"PSNR, dB": 24.06, "SSIM": 0.657, "LPIPS": 0.080, "rFID": 0.65},
    (256, "l256"): {"PSNR, dB": 28.81, "SSIM": 0.809, "LPIPS": 0.043, "rFID": 0.22},
    (512, "m128"): {"PSNR, dB": 26.74},
    (512, "l256"): {"PSNR, dB": 32.00},
    (1024, "m128"): {"PSNR, dB": 31.22},
    (1024, "l256"): {"PSNR, dB": 37.71},
}
"""By resolution and model."""

_NO_FIGURES = {"method", "resolution", "pictures", "tokens", "numbers", "parameters"}


def table(rows: list[dict]) -> str:
    """A Markdown table: of each row of a report every figure, with the published one where there is one."""
    lines = ["| resolution | method | tokens | figure | measured | published |", "|---|---|---|---|---|---|"]
    for row in rows:
        model = Path(row["method"].split("@")[0]).stem.removeprefix("gpstoken_")
        published = PUBLISHED.get((row["resolution"], model), {})
        measured = {name: value for name, value in row.items() if isinstance(value, float) and name not in _NO_FIGURES}
        for name in dict.fromkeys([*published, *measured]):
            # Judges say which network they use: "LPIPS (VGG)". A judge of another name is not the published one.
            key = next((key for key in measured if key.split(" (")[0] == name), name)
            if name in published or not any(name.split(" (")[0] == other for other in published):
                cells = (f"{figures[which]:.4g}" if which in figures else "-"
                         for figures, which in ((measured, key), (published, name)))  # fmt: skip
                head = (row["resolution"], row["method"], row.get("tokens") or "-", key)
                lines.append(f"| {' | '.join(map(str, (*head, *cells)))} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None, judges: Judges | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="FOLDER", help="Pictures; the paper took ImageNet's validation set.")
    parser.add_argument("--models", nargs="+", default=["s64", "m128", "l256"], help="As evaluate_reconstruction's.")
    parser.add_argument("--tables", type=int, nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--resolutions", type=int, nargs="+", help="Other sides than the tables', in pixels.")
    parser.add_argument("--output", type=Path, required=True)
    args, others = parser.parse_known_args(argv)
    for number in args.tables:
        sides = map(str, args.resolutions or TABLES[number])
        folder = args.output / f"table{number}"
        command = [args.data, "--models", *args.models, "--baselines", "--resolutions", *sides, "--output", str(folder)]
        if code := evaluate_reconstruction.main([*command, *others], judges):
            return code
        text = table(json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"])
        write_atomically(args.output / f"table{number}.md", text.encode())
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
