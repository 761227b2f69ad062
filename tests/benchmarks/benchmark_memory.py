"""What large pictures cost with the shipped model: seconds and memory by size and budget, and by tokens of one tile.

    python tests/benchmarks/benchmark_memory.py --sizes 512 1024 2048 4096 8192 --budgets none 100MB 1GB
    python tests/benchmarks/benchmark_memory.py --sizes --tokens 64 256 1024 4096     # the second part alone

The first part encodes and decodes pictures of `--sizes` squared, each in a fresh process that gives freed memory back
at once (Linux). Working memory is the growth over what the loaded model and the picture take, less the tokens or the
picture that comes out. Seconds are those of the processor, of all threads together, which other programs disturb least.
The second part encodes one tile of 256 px into more and more tokens. It tells attention, which goes with their square,
from everything else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from harness import (
    CPU,
    conditions,
    in_fresh_process,
    main,
    make_parser,
    peak_memory_mb,
    photograph,
    positive,
    table,
    write_plot,
)
from torch import Tensor
from tqdm.auto import tqdm

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokens, partition_image
from gpstoken_diffusers.assets import MINI
from gpstoken_diffusers.models import attention
from gpstoken_diffusers.safe_files import write_atomically

Figures = dict[str, float]
NO_BUDGET = "none"
SMALLEST_REGION_PX = 4  # of the partition into many tokens: a tile of 256 px has 4,096 such regions
STAGES = ("partition", "stem", "attention", "rest of refinement", "decoder")


def picture(size: int, dtype: torch.dtype) -> Tensor:
    """(1, 3, size, size): the shipped photograph, mirrored over and over, so that all sizes have the same detail."""
    tile = photograph(512).to(dtype)
    pair = torch.cat([tile, tile.flip(-1)], dim=-1)
    block = torch.cat([pair, pair.flip(-2)], dim=-2)
    times = -(-size // block.shape[-1])
    return block.repeat(1, 1, times, times)[..., :size, :size].contiguous()


def measure_size(size: int, budget: str, dtype: torch.dtype) -> Figures:
    """Processor seconds and working memory (MB) of one picture, in this process."""
    model = AutoencoderGPSToken.from_pretrained(MINI, dtype=dtype).eval()
    model.set_memory_budget(None if budget == NO_BUDGET else budget)
    image, found = picture(size, dtype), {}

    def encode() -> None:
        (found["encode"],) = model.encode(image, return_dict=False)

    def decode() -> None:
        found["decode"] = model.decode(found["encode"]).sample

    figures = {}
    with torch.inference_mode():
        model(image[..., :256, :256])  # loads what is loaded once
        for name, run in (("encode", encode), ("decode", decode)):
            started = time.process_time()
            peak = peak_memory_mb(run, CPU)
            figures[f"{name}_seconds"] = time.process_time() - started
            result = found[name].num_bytes if name == "encode" else found[name].nbytes
            figures[f"{name}_mb"] = peak - result / 2**20
    return {"tokens": found["encode"].num_tokens, "megapixels": size * size / 1e6, **figures}


@contextlib.contextmanager
def attention_seconds() -> Iterator[list[float]]:
    """Within it, processor seconds of each attention: products of queries and keys, softmax, products with values."""
    seconds: list[float] = []

    def timed(function, *args, **kwargs):
        started = time.process_time()
        result = function(*args, **kwargs)
        seconds.append(time.process_time() - started)
        return result

    with contextlib.ExitStack() as stack:
        for name in ("dispatch_attention_fn", "attention_by_products"):
            stack.enter_context(mock.patch.object(attention, name, partial(timed, getattr(attention, name))))
        yield seconds


def measure_tokens(num_tokens: int, rounds: int, dtype: torch.dtype) -> Figures:
    """Processor milliseconds of the stages of one 256-px tile, medians; attention is a part of refinement."""
    model = AutoencoderGPSToken.from_pretrained(MINI, dtype=dtype).eval()
    tile = photograph(256)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, function, *args):
        started = time.process_time()
        result = function(*args)
        seconds.setdefault(name, []).append(time.process_time() - started)
        return result

    with torch.inference_mode():
        for _ in range(rounds + 1):
            cut = partial(partition_image, tile, num_tokens, min_region_size=SMALLEST_REGION_PX)
            regions, geometry = timed("partition", cut)
            features = timed("stem", model.stem, tile.to(dtype))
            refined, texture = timed("refinement", model.refiner, features, geometry, regions)
            timed("decoder", model.decode, GPSTokens(refined, texture, (256, 256)))
            with attention_seconds() as spent:
                model.refiner(features, geometry, regions)
            seconds.setdefault("attention", []).append(sum(spent))
    figures = {name: 1e3 * statistics.median(values[1:]) for name, values in seconds.items()}  # the first warms up
    figures["rest of refinement"] = figures.pop("refinement") - figures["attention"]
    return figures


def plot(figure, sizes: list[dict], tokens: list[dict]) -> None:
    """Seconds and working memory by size, milliseconds by tokens."""
    speed, memory, stages = figure.subplots(1, 3)
    for index, budget in enumerate(dict.fromkeys(row["budget"] for row in sizes)):
        rows = [row for row in sizes if row["budget"] == budget]
        pixels = [row["megapixels"] for row in rows]
        for way, line in (("encode", "o-"), ("decode", "s--")):
            settings = {"color": f"C{index}", "label": f"{way}, budget {budget}"}
            speed.plot(pixels, [row[f"{way}_seconds"] / row["megapixels"] for row in rows], line, **settings)
            memory.plot(pixels, [row[f"{way}_mb"] for row in rows], line, **settings)
    for axes, name in ((speed, "processor seconds per megapixel"), (memory, "working memory, MB")):
        axes.set(xlabel="megapixels", ylabel=name, xscale="log", ylim=(0, None))
        axes.legend(fontsize=7)
    counts = [row["tokens"] for row in tokens]
    for stage in STAGES:
        stages.loglog(counts, [row[stage] for row in tokens], "o-", label=stage)
    if tokens:
        guide = [tokens[-1]["attention"] * (count / counts[-1]) ** 2 for count in counts]
        stages.loglog(counts, guide, "k:", linewidth=0.8, label="the square of the tokens")
    stages.set(xlabel="tokens of one 256-px tile", ylabel="processor milliseconds")
    stages.legend(fontsize=7)


def run() -> None:
    parser = make_parser(__doc__, threads=1)
    parser.set_defaults(output=Path("outputs/memory"))
    parser.add_argument("--sizes", type=positive, nargs="*", default=[512, 1024, 2048, 4096, 8192], help="sides in px")
    parser.add_argument(
        "--budgets", nargs="+", default=[NO_BUDGET], help="of `set_memory_budget`, such as 100MB; none is the default"
    )
    parser.add_argument("--tokens", type=positive, nargs="*", default=[64, 256, 1024, 4096], help="of the second part")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)  # what the fresh processes are asked for
    args = parser.parse_args()
    dtype, lines = getattr(torch, args.dtype), conditions(args)
    if args.one:
        of_size = len(args.one) == 2
        print(
            json.dumps(
                measure_size(int(args.one[0]), args.one[1], dtype)
                if of_size
                else measure_tokens(int(args.one[0]), args.rounds, dtype)
            )
        )
        return
    command = [__file__, "--dtype", args.dtype, "--threads", str(args.threads), "--rounds", str(args.rounds), "--one"]
    sizes, tokens = [], []
    for budget, size in tqdm([(budget, size) for budget in args.budgets for size in args.sizes], unit="picture"):
        sizes.append({"budget": budget, "size": size, **in_fresh_process([*command, str(size), budget])})
    for count in tqdm(args.tokens, unit="tile"):
        tokens.append({"tokens": count, **in_fresh_process([*command, str(count)])})
    print("\n".join(lines), "\n")
    heads = ["budget", "side, px", "tokens", "encode, s (per MP)", "decode, s (per MP)", "encode, MB", "decode, MB"]
    ways = ("encode", "decode")
    print(
        table(
            heads,
            (
                [row["budget"], row["size"], row["tokens"]]
                + [f"{row[f'{way}_seconds']:.1f} ({row[f'{way}_seconds'] / row['megapixels']:.2f})" for way in ways]
                + [f"{row[f'{way}_mb']:.0f}" for way in ways]
                for row in sizes
            ),
        ),
        "\n",
    )
    heads = ["tokens of one tile", *(f"{stage}, ms" for stage in STAGES)]
    print(table(heads, ([row["tokens"], *(f"{row[stage]:.2f}" for stage in STAGES)] for row in tokens)))
    args.output.mkdir(parents=True, exist_ok=True)
    document = {"conditions": lines, "dtype": args.dtype, "sizes": sizes, "tokens": tokens}
    write_atomically(args.output / "results.json", (json.dumps(document, indent=2) + "\n").encode())
    write_plot(args.output / "plot.png", lambda figure: plot(figure, sizes, tokens), 4)


if __name__ == "__main__":
    sys.exit(main(run))
