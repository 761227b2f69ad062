#!/usr/bin/env python
"""Generates tens of thousands of samples, for a FID that can be compared with published ones.

    accelerate launch examples/evaluate/generate_samples.py --pipeline runs/pipeline --output samples --npz samples.npz
    python -m pytorch_fid samples reference.npz   # or torch-fidelity, clean-fid: they take the folder
    python evaluator.py reference.npz samples.npz  # of guided-diffusion, whose figures most papers give

--output gets 000000.png, 000001.png and so on, and settings.json. --npz packs them into one file: arr_0 (n, H, W, 3)
uint8 and arr_1 (n,) int64, the class numbers. Classes take turns: picture i is of class i modulo their number.

The processes of `accelerate launch` share the work. Run again after an interruption, the script makes what is missing.
Picture i depends on --seed and i alone: not on --num_images, on the number of processes or on interruptions. (On one
kind of device, with one --batch_size and number of threads: the last bits of the arithmetic depend on them.)

Exit code: 0 done, 1 an error (it says what), 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
import zipfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from generation.pictures import DEFAULT_STEPS, claim_samples
from PIL import Image
from tqdm.auto import tqdm

from gpstoken_diffusers import GPSTokenPipeline, LayoutBank, make_sampler
from gpstoken_diffusers.assets import MINI_PIPELINE
from gpstoken_diffusers.safe_files import write_atomically
from gpstoken_diffusers.training.launch import AMOUNT, COUNT, NATURAL

logger = logging.getLogger("generate_samples")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pipeline", type=Path, default=MINI_PIPELINE, help="Folder that save_pretrained wrote; default: the shipped.")
    add("--output", type=Path, required=True, help="Folder of the pictures.")
    add("--num_images", type=COUNT, default=50_000)
    add("--npz", type=Path, help="File that all pictures are packed into at the end.")
    add("--labels", nargs="+", help="Classes by name or number; default: all.")
    add("--layouts", type=Path, help="File of LayoutBank.save, for pipelines without a layout model.")
    add("--guidance_scale", type=AMOUNT, default=3.0, help="Of the textures; 1 is none.")
    add("--layout_guidance_scale", type=AMOUNT, default=2.0, help="Of the layouts.")
    add("--sampler", help="Name of a sampler (official-sde, heun, unipc, ...); default: the pipeline's own scheduler.")
    add("--steps", type=COUNT, help=f"Steps of the textures; default: the sampler's own number, or {DEFAULT_STEPS}.")
    add("--seed", type=NATURAL, default=0)
    add("--batch_size", type=COUNT, default=16, help="Pictures that pass through the networks together.")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="Of the networks' weights.")
    return parser.parse_args(argv)


def picture_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06}.png"


def generate_batch(
    pipe: GPSTokenPipeline, indices: range, labels: Sequence[int], bank: LayoutBank | None, args: argparse.Namespace
) -> list[Image.Image]:
    """Pictures of these numbers; `labels` are the classes that take turns."""
    return pipe(
        [labels[index % len(labels)] for index in indices],
        layout=bank,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        layout_guidance_scale=args.layout_guidance_scale,
        generator=[torch.Generator().manual_seed((args.seed << 32) + index) for index in indices],
    ).images


def pack(folder: Path, num_images: int, labels: Sequence[int], path: Path) -> None:
    """Writes the pictures as an .npz file, one at a time: tens of thousands do not fit into memory.

    Raises OSError: it cannot be written; an older file is left as it was.
    """
    height, width = np.asarray(Image.open(picture_path(folder, 0))).shape[:2]
    temporary = path.with_name(f".{path.name}.tmp")
    header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, height, width, 3)}
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for index in tqdm(range(num_images), desc=path.name, unit="picture"):
                    file.write(np.asarray(Image.open(picture_path(folder, index)).convert("RGB")).tobytes())
            with archive.open("arr_1.npy", "w") as file:
                classes = [labels[index % len(labels)] for index in range(num_images)]
                np.lib.format.write_array(file, np.array(classes, dtype=np.int64))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Makes what is missing in args.output.

    Raises:
        ValueError: no such class or sampler, or a folder of samples that were made otherwise.
        OSError: no such pipeline, or a file cannot be written.
    """
    # At the end all processes wait for the slowest, however long it takes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])
    main = accelerator.is_main_process
    if not args.pipeline.is_dir():
        raise FileNotFoundError(f"no pipeline at {args.pipeline}: give a folder that save_pretrained wrote")
    pipe = GPSTokenPipeline.from_pretrained(args.pipeline, dtype=getattr(torch, args.dtype), local_files_only=True)
    wanted = args.labels or range(pipe.transformer.config.num_classes)
    labels = pipe.label_ids([int(label) if str(label).isdecimal() else label for label in wanted])
    bank = LayoutBank.load(args.layouts) if args.layouts else None
    if bank is None and pipe.layout_model is None:
        raise ValueError(f"{args.pipeline} has no layout model: give layouts by --layouts")
    if args.sampler:
        pipe.scheduler, args.steps = make_sampler(args.sampler, args.steps)
    args.steps = args.steps or DEFAULT_STEPS
    if main:
        names = ("guidance_scale", "layout_guidance_scale", "sampler", "steps", "seed", "dtype")
        settings = {name: getattr(args, name) for name in names} | {"classes": labels}
        settings["layouts"] = args.layouts.name if args.layouts else None
        claim_samples(args.output, args.pipeline, settings, "--output")
        for left_over in args.output.glob(".*.tmp"):  # of a process that was killed while it wrote
            left_over.unlink()
    accelerator.wait_for_everyone()
    # Batches are the same whatever is missing, so that every picture has the same companions, and the same last bits.
    batches = [range(start, start + args.batch_size) for start in range(0, args.num_images, args.batch_size)]
    missing = [
        batch
        for batch in batches
        if not all(picture_path(args.output, index).exists() for index in batch if index < args.num_images)
    ]
    accelerator.wait_for_everyone()  # all have looked before anyone writes, so all share out the same batches
    pipe.to(accelerator.device).set_progress_bar_config(disable=True)
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    for batch in tqdm(mine, disable=not main, unit="batch", desc=f"{args.batch_size} pictures each"):
        for index, image in zip(batch, generate_batch(pipe, batch, labels, bank, args), strict=True):
            path = picture_path(args.output, index)
            if index < args.num_images and not path.exists():
                image.save(file := io.BytesIO(), "PNG")
                write_atomically(path, file.getvalue())
    accelerator.wait_for_everyone()
    if main:
        logger.info("%s holds %d pictures of %d classes", args.output, args.num_images, len(labels))
        if args.npz:
            pack(args.output, args.num_images, labels, args.npz)
    accelerator.end_training()


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
