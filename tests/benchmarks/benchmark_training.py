#!/usr/bin/env python
"""Images per second that examples/train/train_autoencoder.py trains, against the same loop without native operations.

    python tests/benchmarks/benchmark_training.py data/photographs/train
    python tests/benchmarks/benchmark_training.py --device cuda --batch_size 32 --steps 60  # the demo photograph

The slow one partitions in NumPy and splats densely in PyTorch, in float32: a straightforward loop. Every variant is a
run of its own from start to end; variants take turns, medians are shown, with the time until the first batch. On the
CPU every process has one thread, and two share the global batch; on a GPU there is one process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from gpstoken_diffusers.assets import DEMO_PHOTOGRAPH

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train" / "train_autoencoder.py"
# name: (processes, environment, arguments)
VARIANTS = {
    "reference operations, float32": (1, {"GPSTOKEN_BACKEND": "reference"}, ["--mixed_precision", "no"]),
    "native operations, float32": (1, {}, ["--mixed_precision", "no"]),
    "native operations, bfloat16": (1, {}, ["--mixed_precision", "bf16"]),
    "native operations, bfloat16, 2 processes": (2, {}, ["--mixed_precision", "bf16"]),
}


def run(variant: str, args: argparse.Namespace) -> tuple[float, float]:
    """(images per second after the first batch, seconds until the first batch) of one run."""
    processes, environment, more = VARIANTS[variant]
    batch_size = args.batch_size // processes
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, *launch, str(SCRIPT), "--train_dir", args.images, "--output_dir", folder, "--resolution",
            str(args.resolution), "--num_tokens", str(args.num_tokens), "--batch_size", str(batch_size),
            "--max_train_steps", str(args.steps), "--report_to", "none", "--token_jitter", "0", *more,
        ]  # fmt: skip
        variables = dict(os.environ)
        if args.device == "cpu":
            variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
        done = subprocess.run(command, env=variables | environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        row = json.loads((Path(folder) / "curve.jsonl").read_text().splitlines()[-1])
    first = float(re.search(r"The first batch came after ([\d.]+) s", done.stderr).group(1))
    seconds = args.steps * args.batch_size / row["images_per_second"]
    return args.steps * args.batch_size / (seconds - first), first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", help="Folder of photographs. Default: the demo photograph alone.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--num_tokens", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4, help="Of all processes together.")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    variants = [name for name, (processes, *_) in VARIANTS.items() if args.device == "cpu" or processes == 1]
    results = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        if args.images is None:
            shutil.copy(DEMO_PHOTOGRAPH, folder)
            args.images = folder
        for _, name in itertools.product(range(args.rounds), variants):
            results[name].append(run(name, args))
    slow = statistics.median(rate for rate, _ in results["reference operations, float32"])
    print("| variant | images per second | times the first | first batch, s |\n|---|---|---|---|")
    for name, runs in results.items():
        rate, first = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"| {name} | {rate:.2f} | {rate / slow:.2f} | {first:.1f} |")


if __name__ == "__main__":
    main()
