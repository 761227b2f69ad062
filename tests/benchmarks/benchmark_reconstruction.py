#!/usr/bin/env python
"""Time and peak memory of reconstructing one 256-pixel image at L256 size, against an eager float32 plain path.

    python tests/benchmarks/benchmark_reconstruction.py

Ours in float32 and in bfloat16 beside each other; `python -m gpstoken_diffusers.benchmark` measures every stage and
size in one of them, and holds the plain path. Each path is timed in the same process, in turn; medians are shown. Peak
memory is that of a fresh process per path, over what it held once the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpstoken_diffusers import AutoencoderGPSToken
from gpstoken_diffusers.benchmark.made_up import autoencoder_config, copy_in, made_up_model, made_up_pictures
from gpstoken_diffusers.benchmark.measure import alternate, difference, peak_memory_mb
from gpstoken_diffusers.benchmark.twins import plain_reconstruction

CPU = torch.device("cpu")
PLAIN = "plain float32"
PATHS = {PLAIN: torch.float32, "ours float32": torch.float32, "ours bfloat16": torch.bfloat16}


def prepare(path: str) -> Callable[[], Sequence[Tensor]]:
    config = autoencoder_config("l256", toy=False)
    plain = made_up_model(AutoencoderGPSToken, config, CPU)
    images = made_up_pictures(1, config.get("sample_size", 256), CPU)
    if path == PLAIN:
        return lambda: (plain_reconstruction(plain, images),)
    model = copy_in(plain, config, PATHS[path])
    return lambda: (model(images).sample,)  # float32 pixels: the partition looks at all their digits


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-of", choices=PATHS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(peak_memory_mb(prepare(args.memory_of), CPU)))
        return
    runs = {path: prepare(path) for path in PATHS}
    expected, errors, first_seconds = runs[PLAIN](), {}, {}
    for path, run in runs.items():
        started = time.perf_counter()
        errors[path] = difference(run(), expected)
        first_seconds[path] = time.perf_counter() - started
    timings = alternate(runs, args.repeats, first_seconds, synchronize=lambda: None, on_call=lambda: None)
    print(f"{args.threads} threads, torch {torch.__version__}, one 256-pixel image, L256 size")
    print("| path | seconds | times as fast | RMS difference / std | peak memory, MB |\n|---|---|---|---|---|")
    for path, timing in timings.items():
        command = [sys.executable, __file__, "--memory-of", path, "--threads", str(args.threads)]
        memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ratio = timings[PLAIN].median / timing.median
        shown = "" if memory is None else f"{memory:.0f}"
        print(f"| {path} | {timing.median:.2f} | {ratio:.2f} | {errors[path]:.1e} | {shown} |")


if __name__ == "__main__":
    main()
