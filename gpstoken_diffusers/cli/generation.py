"""The command that makes new pictures: generate."""

from __future__ import annotations

import argparse

import torch
from diffusers.utils.logging import disable_progress_bar

from ..assets import MINI_PIPELINE
from ..image_processor import GPSTokenImageProcessor
from ..pipelines.pipeline_gpstoken import GPSTokenPipeline
from ..schedulers.presets import make_sampler
from ..visualization import picture_grid
from .codec import choose_device, choose_dtype
from .files import check_picture_suffix, prepare_file, write_picture

# Pictures that pass through the networks together: enough to keep them busy, few enough for any memory.
PICTURES_AT_ONCE = 16
DEFAULT_STEPS = 20


def generate(args: argparse.Namespace) -> int:
    """A grid of new pictures."""
    if args.count < 1:
        raise ValueError(f"-n {args.count}: make at least 1 picture.")
    check_picture_suffix(args.output)
    path = args.model or MINI_PIPELINE
    if not path.is_dir():
        raise FileNotFoundError(f"no pipeline at {path}. Give a folder that GPSTokenPipeline.save_pretrained wrote.")
    device = choose_device(args.device)
    if args.quiet:
        disable_progress_bar()
    pipe = GPSTokenPipeline.from_pretrained(path, dtype=choose_dtype(args.dtype, device), local_files_only=True)
    if args.list_labels:
        for number, name in sorted(pipe.id2label.items()):
            print(f"{number:4}  {name}")
        return 0
    prepare_file(args.output, args.layout)
    label = int(args.label) if args.label is not None and args.label.isdecimal() else args.label
    pipe.label_ids(label)
    steps = DEFAULT_STEPS
    if args.sampler is not None:
        pipe.scheduler, sampler_steps = make_sampler(args.sampler, args.steps)
        steps = sampler_steps or DEFAULT_STEPS
    elif args.steps is not None:
        steps = args.steps
    pipe.to(device)
    pipe.set_progress_bar_config(disable=args.quiet)
    layout = None if args.layout is None else _square(pipe, args)
    pictures = []
    for first in range(args.seed, args.seed + args.count, PICTURES_AT_ONCE):
        seeds = range(first, min(first + PICTURES_AT_ONCE, args.seed + args.count))
        output = pipe(
            [label] * len(seeds) if label is not None else [pipe.transformer.null_class] * len(seeds),
            num_tokens=args.num_tokens,
            layout=layout,
            num_inference_steps=steps,
            guidance_scale=args.guidance,
            layout_guidance_scale=args.layout_guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        pictures += output.images
    write_picture(picture_grid(pictures), args.output)
    if not args.quiet:
        print(f"{args.output}: {len(pictures)} pictures, seeds {args.seed} to {args.seed + args.count - 1}")
    return 0


def _square(pipe: GPSTokenPipeline, args: argparse.Namespace) -> torch.Tensor:
    """The layout of a picture's centre square."""
    picture = GPSTokenImageProcessor.load_image(args.layout)
    side, tile = min(picture.size), pipe.autoencoder.config.sample_size
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((tile, tile), resample=3)
    return pipe.prepare_layout(square, args.num_tokens)
