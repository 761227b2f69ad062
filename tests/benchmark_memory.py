#!/usr/bin/env python
"""Peak memory and time of encoding and decoding large pictures with the shipped model (Linux).

    python tests/benchmark_memory.py --sizes 512 1024 2048 4096

Each size runs in a fresh process; memory is the growth over what the loaded model and the picture itself take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch

from gpstoken_diffusers import AutoencoderGPSToken
from gpstoken_diffusers.assets import MINI
from gpstoken_diffusers.benchmark.measure import peak_memory_mb


def measure(size: int) -> dict[str, float]:
    model = AutoencoderGPSToken.from_pretrained(MINI).eval()
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.interpolate(
        torch.rand(1, 3, size // 16, size // 16, generator=generator) * 2 - 1, size=(size, size), mode="bilinear"
    )
    found = {}

    def encode() -> None:
        found["tokens"] = model.encode(image).tokens

    def decode() -> None:
        found["sample"] = model.decode(found["tokens"]).sample

    figures = {}
    with torch.no_grad():
        for name, run in (("encode", encode), ("decode", decode)):
            started = time.perf_counter()
            figures[f"{name}_mb"] = peak_memory_mb(run, torch.device("cpu"))
            figures[f"{name}_seconds"] = time.perf_counter() - started
    picture_mb = found["sample"].numel() * found["sample"].element_size() / 2**20
    return {"tokens": found["tokens"].num_tokens, **figures, "picture_mb": picture_mb}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.sizes[0])))
        return
    print("| side, px | tokens | encode, s | decode, s | encode peak, MB | decode peak, MB | picture, MB |")
    print("|---|---|---|---|---|---|---|")
    for size in args.sizes:
        command = [sys.executable, __file__, "--one", "--sizes", str(size)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"| {size} | {row['tokens']} | {row['encode_seconds']:.1f} | {row['decode_seconds']:.1f} | "
            f"{row['encode_mb']:.0f} | {row['decode_mb']:.0f} | {row['picture_mb']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
