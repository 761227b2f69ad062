#!/usr/bin/env python
"""Time and peak memory of reconstructing one 256-pixel image at L256 size, against an eager float32 plain path.

    python tests/benchmark_reconstruction.py

Weights are random: the time does not depend on them. The plain path computes the same function with the same weights
in eager float32 PyTorch as the research code does: partition in Python, every RoI cell embedded before it is pooled
block by block, a dense splat, contiguous memory. Each path is timed in the same process, in turn; medians are shown.
Peak memory is that of a fresh process per path, over what it held once the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from gpstoken_diffusers import AutoencoderGPSToken
from gpstoken_diffusers.models.refinement import apply_geometry_residual
from gpstoken_diffusers.ops.partition import grayscale, initial_gaussians
from gpstoken_diffusers.ops.partition_reference import partition_image_reference
from gpstoken_diffusers.ops.splat_reference import splat_gaussians_reference

PATHS = ("plain float32", "ours float32", "ours bfloat16")


def plain_reconstruction(model: AutoencoderGPSToken, images: Tensor) -> Tensor:
    """What the research code computes, in the order in which it computes it."""
    config, refiner = model.config, model.refiner
    grey = grayscale(images).numpy()
    regions = torch.from_numpy(partition_image_reference(grey, config.num_tokens))
    geometry = initial_gaussians(regions, *images.shape[-2:])
    features = model.stem(images)
    boxes = torch.cat([torch.zeros(regions.shape[1], 1), regions[0].float()], dim=1)
    cells = roi_align(features, boxes, config.roi_size, aligned=True)
    reader = refiner.region_reader
    embedded = F.conv2d(cells, reader.proj.weight[:, :, None, None], reader.proj.bias).flatten(2)
    hidden = refiner.token_embedding + refiner.geometry_embedding(geometry)
    for block, weight, bias in zip(refiner.blocks, reader.pool_weight, reader.pool_bias, strict=True):
        hidden = block(hidden, F.linear(embedded, weight[None], bias[None]).transpose(1, 2).reshape(hidden.shape))
    refined = apply_geometry_residual(geometry, refiner.geometry_head(hidden))
    texture = refiner.texture_head(hidden)
    feature_map = splat_gaussians_reference(refined, texture, config.map_size, config.map_size, config.support)
    return model.decoder(feature_map.contiguous())


def prepare(path: str):
    torch.manual_seed(0)
    model = AutoencoderGPSToken.from_preset("l256").eval()
    images = F.interpolate(torch.rand(1, 3, 32, 32) * 2 - 1, size=256, mode="bicubic").clamp(-1, 1)
    images = (images + 0.2 * torch.randn(images.shape) * torch.linspace(0, 1, 256)).clamp(-1, 1)
    if path == "plain float32":
        return lambda: plain_reconstruction(model, images)
    model = model.to(torch.bfloat16 if path == "ours bfloat16" else torch.float32)
    return lambda: model(images).sample  # float32 pixels: the partition looks at all their digits


def resident_mb(field: str) -> float:
    """A line of this process's memory account, such as VmRSS or its peak VmHWM (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def forget_peak() -> None:
    """Starts the account of this process's peak memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory(path: str) -> None:
    """Prints by how much one reconstruction raises this process's memory at its peak, in MB."""
    with torch.no_grad():
        run = prepare(path)
        forget_peak()  # building the model reached more
        before = resident_mb("VmRSS")
        run()
    print(json.dumps(resident_mb("VmHWM") - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-of", choices=PATHS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        peak_memory(args.memory_of)
        return
    with torch.no_grad():
        runs = {path: prepare(path) for path in PATHS}
        expected = runs["plain float32"]()
        seconds: dict[str, list[float]] = {path: [] for path in PATHS}
        errors = {}
        for path, run in runs.items():
            errors[path] = (run().float() - expected).square().mean().sqrt() / expected.std()
        for _ in range(args.repeats):
            for path, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[path].append(time.perf_counter() - start)
    median = {path: sorted(times)[len(times) // 2] for path, times in seconds.items()}
    print(f"{args.threads} threads, torch {torch.__version__}, one 256-pixel image, L256 size")
    print("| path | seconds | times as fast | RMS difference / std | peak memory, MB |\n|---|---|---|---|---|")
    for path in PATHS:
        command = [sys.executable, __file__, "--memory-of", path, "--threads", str(args.threads)]
        memory = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ratio = median["plain float32"] / median[path]
        print(f"| {path} | {median[path]:.2f} | {ratio:.2f} | {errors[path]:.1e} | {memory:.0f} |")


if __name__ == "__main__":
    main()
