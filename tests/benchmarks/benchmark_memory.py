#!/usr/bin/env python
"""What large pictures cost with the shipped model: seconds and memory by size and budget, and by tokens of one tile.

    python tests/benchmarks/benchmark_memory.py --sizes 512 1024 2048 4096 8192 --budgets none 100MB 1GB
    python tests/benchmarks/benchmark_memory.py --sizes --tokens 64 256 1024 4096     # the second part alone

The first part encodes and decodes pictures of `--sizes` squared, each in a fresh process that gives freed memory back
at once (Linux). Working memory is the growth over what the loaded model and the picture take, less the tokens or the
picture that comes out; seconds are those of the processor, of all threads together, which other programs disturb least.
The second part encodes one tile of 256 px into more and more tokens and tells attention, which goes with their square,
from everything else. A plot needs matplotlib (`pip install matplotlib`).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor, partition_image
from gpstoken_diffusers.assets import DEMO_PHOTOGRAPH, MINI
from gpstoken_diffusers.benchmark.measure import RETURNS_MEMORY, peak_memory_mb
from gpstoken_diffusers.benchmark.report import plot_advice
from gpstoken_diffusers.safe_files import write_atomically

Figures = dict[str, float]
NO_BUDGET = "none"
SMALLEST_REGION_PX = 4  # of the partition into many tokens: a tile of 256 px has 4,096 such regions


def picture(size: int, dtype: torch.dtype) -> Tensor:
    """(1, 3, size, size): the shipped photograph, mirrored over and over, so that all sizes have the same detail."""
    photograph = GPSTokenImageProcessor.load_image(DEMO_PHOTOGRAPH).crop((192, 128, 704, 640))
    tile = GPSTokenImageProcessor.from_pretrained(MINI)(photograph, num_tokens=1)["pixel_values"].to(dtype)
    pair = torch.cat([tile, tile.flip(-1)], dim=-1)
    block = torch.cat([pair, pair.flip(-2)], dim=-2)
    times = -(-size // block.shape[-1])
    return block.repeat(1, 1, times, times)[..., :size, :size].contiguous()


def measure_size(size: int, budget: str, dtype: torch.dtype) -> Figures:
    """Seconds and working memory (MB) of one picture, in this process."""
    model = AutoencoderGPSToken.from_pretrained(MINI, dtype=dtype).eval()
    model.set_memory_budget(None if budget == NO_BUDGET else budget)
    image, found = picture(size, dtype), {}

    def encode() -> list[Tensor]:
        (found["tokens"],) = model.encode(image, return_dict=False)
        return []

    def decode() -> list[Tensor]:
        found["sample"] = model.decode(found["tokens"]).sample
        return []

    figures = {}
    with torch.inference_mode():
        model(image[..., :256, :256])  # loads what is loaded once
        for name, run in (("encode", encode), ("decode", decode)):
            started, started_wall = time.process_time(), time.perf_counter()
            peak = peak_memory_mb(run, torch.device("cpu"))
            figures[f"{name}_seconds"] = time.process_time() - started
            figures[f"{name}_wall_seconds"] = time.perf_counter() - started_wall
            result = found["tokens"].num_bytes if name == "encode" else found["sample"].nbytes
            figures[f"{name}_mb"] = peak - result / 2**20
    return {"tokens": found["tokens"].num_tokens, "megapixels": size * size / 1e6, **figures}


class AttentionTime(TorchFunctionMode):
    """Processor seconds of all attentions: products of queries and keys, softmax, products with values."""

    def __init__(self):
        super().__init__()
        self.seconds = 0.0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        started = time.process_time()
        result = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.seconds += time.process_time() - started
        return result


def measure_tokens(num_tokens: int, rounds: int, dtype: torch.dtype) -> Figures:
    """Processor milliseconds of the stages of one 256-px tile, medians; attention is a part of refinement."""
    model = AutoencoderGPSToken.from_pretrained(MINI, dtype=dtype).eval()
    tile = picture(256, dtype)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, function, *args):
        started = time.process_time()
        result = function(*args)
        seconds.setdefault(name, []).append(time.process_time() - started)
        return result

    with torch.inference_mode():
        for _ in range(rounds + 1):
            regions, geometry = timed(
                "partition", lambda: partition_image(tile.float(), num_tokens, min_region_size=SMALLEST_REGION_PX)
            )
            features = timed("stem", model.stem, tile)
            refined, texture = timed("refinement", model.refiner, features, geometry, regions)
            timed("decoder", model.decoder, refined, texture, (64, 64), (256, 256))
            spent = AttentionTime()
            with spent:
                model.refiner(features, geometry, regions)
            seconds.setdefault("attention", []).append(spent.seconds)
    figures = {name: 1e3 * statistics.median(values[1:]) for name, values in seconds.items()}  # the first warms up
    figures["rest of refinement"] = figures.pop("refinement") - figures["attention"]
    return figures


def in_fresh_process(part: str, number: int, args: argparse.Namespace, budget: str = NO_BUDGET) -> Figures:
    command = [sys.executable, __file__, "--part", part, str(number), "--budgets", budget, "--dtype", args.dtype]
    command += ["--rounds", str(args.rounds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **RETURNS_MEMORY})
    return json.loads(done.stdout.splitlines()[-1])


def report_sizes(args: argparse.Namespace) -> list[dict]:
    print("| budget | side, px | tokens | encode, s (per MP) | decode, s (per MP) | encode, MB | decode, MB |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for budget in args.budgets:
        for size in args.sizes:
            row = {"budget": budget, "size": size, **in_fresh_process("size", size, args, budget)}
            rows.append(row)
            encode_s, decode_s = (
                f"{row[way]:.1f} ({row[way] / row['megapixels']:.2f})" for way in ("encode_seconds", "decode_seconds")
            )
            print(
                f"| {budget} | {size} | {row['tokens']} | {encode_s} | {decode_s} | {row['encode_mb']:.0f} | "
                f"{row['decode_mb']:.0f} |",
                flush=True,
            )
    return rows


STAGES = ("partition", "stem", "attention", "rest of refinement", "decoder")


def report_tokens(args: argparse.Namespace) -> list[dict]:
    print(f"| tokens of one tile | {' | '.join(f'{stage}, ms' for stage in STAGES)} |")
    print("|---|" + "---|" * len(STAGES))
    rows = []
    for count in args.tokens:
        rows.append({"tokens": count, **in_fresh_process("tokens", count, args)})
        print(f"| {count} | {' | '.join(f'{rows[-1][stage]:.2f}' for stage in STAGES)} |", flush=True)
    return rows


def plot(path: Path, sizes: list[dict], tokens: list[dict]) -> None:
    """Seconds and working memory by size, milliseconds by tokens; a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    speed, memory, stages = figure.subplots(1, 3)
    for index, budget in enumerate(dict.fromkeys(row["budget"] for row in sizes)):
        rows = [row for row in sizes if row["budget"] == budget]
        pixels = [row["megapixels"] for row in rows]
        for way, line in (("encode", "o-"), ("decode", "s--")):
            settings = {"color": f"C{index}", "label": f"{way}, budget {budget}"}
            speed.plot(pixels, [row[f"{way}_seconds"] / row["megapixels"] for row in rows], line, **settings)
            memory.plot(pixels, [row[f"{way}_mb"] for row in rows], line, **settings)
    speed.set_ylabel("processor seconds per megapixel")
    memory.set_ylabel("working memory, MB")
    for axes in (speed, memory):
        axes.set_xlabel("megapixels")
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    counts = [row["tokens"] for row in tokens]
    for stage in STAGES:
        stages.loglog(counts, [row[stage] for row in tokens], "o-", label=stage)
    if tokens:
        last = tokens[-1]
        guide = [last["attention"] * (count / counts[-1]) ** 2 for count in counts]
        stages.loglog(counts, guide, "k:", linewidth=0.8, label="the square of the tokens")
        stages.set_xlabel("tokens of one 256-px tile")
        stages.set_ylabel("processor milliseconds")
        stages.legend(fontsize=7)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    write_atomically(path, data.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192], help="sides in pixels")
    parser.add_argument(
        "--budgets", nargs="+", default=[NO_BUDGET], help="of `set_memory_budget`, such as 100MB; none is the default"
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=[64, 256, 1024, 4096], help="of the second part")
    parser.add_argument("--rounds", type=int, default=5, help="of the second part (default: 5)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path, default=Path("outputs/memory"), help="folder for the results")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is not None:
        part, number = args.part
        dtype = getattr(torch, args.dtype)
        if part == "size":
            print(json.dumps(measure_size(int(number), args.budgets[0], dtype)))
        else:
            print(json.dumps(measure_tokens(int(number), args.rounds, dtype)))
        return
    sizes = report_sizes(args) if args.sizes else []
    tokens = report_tokens(args) if args.tokens else []
    args.output.mkdir(parents=True, exist_ok=True)
    document = {"dtype": args.dtype, "threads": torch.get_num_threads(), "sizes": sizes, "tokens": tokens}
    write_atomically(args.output / "results.json", (json.dumps(document, indent=2) + "\n").encode())
    advice = plot_advice()
    if advice is None:
        plot(args.output / "plot.png", sizes, tokens)
    else:
        print(advice, file=sys.stderr)


if __name__ == "__main__":
    main()
