#!/usr/bin/env python
"""Draws held-out PSNR against minutes from the curve.jsonl files that train_autoencoder.py writes.

python examples/train/plot_training_curve.py runs/coarse/curve.jsonl runs/fine/curve.jsonl -o curve.png

Several files are phases of one training, one after the other.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--labels", nargs="+", help="A name for each phase.")
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7, 3.5), dpi=110)
    start = 0.0
    for index, path in enumerate(args.curves):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        minutes = [start + row["minutes"] for row in rows]
        label = args.labels[index] if args.labels else path.parent.name
        axes.plot(minutes, [row["psnr"] for row in rows], marker="o", markersize=3, label=label)
        start = minutes[-1]
    axes.set(xlabel="minutes of training", ylabel="held-out PSNR, dB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
