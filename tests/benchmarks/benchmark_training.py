"""Images per second that examples/train/train_autoencoder.py trains, against the same loop on the references.

    python tests/benchmarks/benchmark_training.py data/photographs/train
    python tests/benchmarks/benchmark_training.py --device cuda --batch_size 32 --steps 60  # the demo photograph

The reference loop partitions in NumPy and splats densely in PyTorch, in float32. Every variant is a run of its own from
start to end. They take turns; medians are shown, with the time until the first batch. On the CPU every process has one
thread, and two share the global batch; on a GPU there is one process.
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

from harness import REFERENCE, conditions, main, make_parser, positive, table
from torch import device
from tqdm.auto import tqdm

from gpstoken_diffusers.assets import DEMO_PHOTOGRAPH

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train" / "train_autoencoder.py"
# name: (processes, backend, precision)
VARIANTS = {
    "reference, float32": (1, REFERENCE, "no"),
    "native, float32": (1, "auto", "no"),
    "native, bfloat16": (1, "auto", "bf16"),
    "native, bfloat16, 2 processes": (2, "auto", "bf16"),
}


def run_visibly(command: list[str], variables: dict[str, str]) -> tuple[int, str]:
    """Runs a command, shows its messages and its progress bar while they come; returns its exit code and them."""
    written = []
    with subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while piece := process.stderr.read1():
            written.append(piece.decode(errors="replace"))
            print(end=written[-1], file=sys.stderr, flush=True)
    return process.returncode, "".join(written)


def measure(variant: str, args: argparse.Namespace) -> tuple[float, float]:
    """(images per second after the first batch, seconds until the first batch) of one run."""
    processes, backend, precision = VARIANTS[variant]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, *launch, str(SCRIPT), "--train_dir", args.images, "--output_dir", folder, "--resolution",
            str(args.resolution), "--num_tokens", str(args.num_tokens), "--batch_size",
            str(args.batch_size // processes), "--max_train_steps", str(args.steps), "--report_to", "none",
            "--token_jitter", "0", "--mixed_precision", precision,
        ]  # fmt: skip
        variables = {**os.environ, "GPSTOKEN_BACKEND": backend, "OMP_NUM_THREADS": str(args.threads)}
        if args.device == "cpu":
            variables |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
        code, text = run_visibly(command, variables)
        if code:
            raise ValueError(f"{variant}: the training script failed:\n{text[-3000:]}")
        row = json.loads((Path(folder) / "curve.jsonl").read_text().splitlines()[-1])
    first = float(re.search(r"The first batch came after ([\d.]+) s", text).group(1))
    seconds = args.steps * args.batch_size / row["images_per_second"]
    return args.steps * args.batch_size / (seconds - first), first


def run() -> None:
    parser = make_parser(__doc__, rounds=3, threads=1)
    parser.add_argument("images", nargs="?", help="folder of photographs (default: the demo photograph alone)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--resolution", type=positive, default=256)
    parser.add_argument("--num_tokens", type=positive, default=256)
    parser.add_argument("--batch_size", type=positive, default=4, help="of all processes together")
    parser.add_argument("--steps", type=positive, default=12)
    args = parser.parse_args()
    print("\n".join(conditions(args, device(args.device))))
    variants = [name for name, (processes, *_) in VARIANTS.items() if args.device == "cpu" or processes == 1]
    results = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        if args.images is None:
            shutil.copy(DEMO_PHOTOGRAPH, folder)
            args.images = folder
        progress = tqdm(list(itertools.product(range(args.rounds), variants)), unit="run")
        for _, name in progress:
            progress.set_description(name)
            results[name].append(measure(name, args))
    medians = {
        name: [statistics.median(values) for values in zip(*runs, strict=True)] for name, runs in results.items()
    }
    slow = medians["reference, float32"][0]
    rows = [(name, f"{rate:.2f}", f"{rate / slow:.2f}", f"{first:.1f}") for name, (rate, first) in medians.items()]
    print(table(["variant", "images per second", "times the first", "first batch, s"], rows))


if __name__ == "__main__":
    sys.exit(main(run))
