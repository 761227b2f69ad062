"""How long the partition takes: native library against its definition, timed in turns in one process; then on a GPU,
where there is one, against bringing the pictures to the CPU.

    python tests/benchmarks/benchmark_partition.py [--repeats 20]

One photograph (scikit-image's astronaut at 256 px), one thread unless the row says otherwise; the best of
several runs, which other work on the machine disturbs least. The official Python code took 92 ms for 256
tokens and 24 ms for 64 on one core of the kind of machine that this was written on: taken as constants here.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import skimage.data
import torch
from PIL import Image

from gpstoken_diffusers.ops.backend import native
from gpstoken_diffusers.ops.partition import grayscale, max_tokens, partition_image
from gpstoken_diffusers.ops.partition_reference import partition_image_reference

OFFICIAL_MS = {256: 92.0, 64: 24.0}


def photograph(height: int, width: int) -> torch.Tensor:
    """(1, 3, height, width) in [-1, 1]."""
    picture = Image.fromarray(skimage.data.astronaut()).resize((width, height), Image.Resampling.BILINEAR)
    return (torch.tensor(np.array(picture)).permute(2, 0, 1)[None].double() / 127.5 - 1).float()


def best_ms(calls: dict[str, tuple], repeats: int) -> dict[str, float]:
    """Best time of each call in ms. Calls take turns; a call is (function, how many runs in all)."""
    best = dict.fromkeys(calls, float("inf"))
    for i in range(repeats):
        for name, (function, runs) in calls.items():
            if i < runs:
                start = time.perf_counter()
                function()
                best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


def on_gpu(repeats: int) -> None:
    """Batches that lie on the GPU, by both ways."""
    if not torch.cuda.is_available() or native.library("cuda") is None:
        print(f"no GPU rows: torch sees no CUDA device, or {native.why_missing('cuda') or 'none'}")
        return
    for count, num_tokens in ((1, 64), (1, 256), (8, 256), (64, 128), (64, 256)):
        batch = photograph(256, 256).expand(count, -1, -1, -1).cuda()

        def there(batch: torch.Tensor = batch, n: int = num_tokens) -> None:
            partition_image(batch, n)
            torch.cuda.synchronize()

        def here(batch: torch.Tensor = batch, n: int = num_tokens) -> None:
            partition_image(batch.cpu(), n).geometry.cuda()

        best = best_ms({"there": (there, repeats + 1), "here": (here, repeats)}, repeats + 1)
        print(f"{count} on the GPU, {num_tokens} tokens: {best['there']:.2f} ms, by the CPU {best['here']:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the native partition against its definition.")
    parser.add_argument("--repeats", type=int, default=20, help="native runs per row (the definition: 3)")
    repeats = parser.parse_args().repeats
    library = native.library("cpu")
    if library is None:
        raise SystemExit(f"nothing to compare: {native.why_missing('cpu')}")
    threads = torch.get_num_threads()
    print(f"instruction set {library.gpstoken_cpu_isa().decode()}, torch with {threads} threads")
    print(f"{'image':>11} {'tokens':>7} {'native':>9} {'definition':>11} {'ratio':>6} {'official /':>11}")
    for height, width, num_tokens in ((256, 256, 256), (256, 256, 64), (256, 256, 1024), (300, 500, 256)):
        image = photograph(height, width)
        grey = grayscale(image).numpy()
        torch.set_num_threads(1)
        calls = {
            "native": (lambda image=image, n=num_tokens: partition_image(image, n), repeats),
            "definition": (lambda grey=grey, n=num_tokens: partition_image_reference(grey, n), 3),
        }
        best = best_ms(calls, repeats)
        torch.set_num_threads(threads)
        official = OFFICIAL_MS.get(num_tokens) if (height, width) == (256, 256) else None
        native_ms, plain_ms = best["native"], best["definition"]
        against = f"{official / native_ms:.1f}" if official else ""
        print(
            f"{f'{height} x {width}':>11} {num_tokens:>7} {native_ms:>6.2f} ms {plain_ms:>8.1f} ms "
            f"{plain_ms / native_ms:>6.1f} {against:>11}"
        )

    batch = photograph(256, 256).expand(16, -1, -1, -1)
    calls = {}
    for count in sorted({1, threads}):

        def run(count: int = count) -> None:
            torch.set_num_threads(count)
            partition_image(batch, 256)

        calls[f"{count} threads"] = (run, repeats)
    for name, value in best_ms(calls, repeats).items():
        print(f"batch of 16, 256 px, 256 tokens, {name}: {value / 16:.2f} ms per image")
    on_gpu(repeats)
    print(f"largest number of tokens at 256 px: {max_tokens(256, 256)}")


if __name__ == "__main__":
    main()
