"""The command that makes new pictures: generate."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar
from huggingface_hub.utils import disable_progress_bars

from ..assets import MINI_PIPELINE
from ..image_processor import GPSTokenImageProcessor
from ..layouts.calibration import check_num_tokens
from ..models.hub_files import is_repository
from ..pipelines.pipeline_gpstoken import GPSTokenPipeline
from ..schedulers.presets import make_sampler
from ..visualization import grid_size, picture_grid
from .codec import choose_device, choose_dtype
from .files import check_picture_size, check_picture_suffix, prepare_file, write_picture

# Pictures that pass through the networks together: enough to keep them busy, few enough for any memory.
PICTURES_AT_ONCE = 16


def generate(args: argparse.Namespace) -> int:
    """A grid of new pictures."""
    if args.count < 1:
        raise ValueError(f"-n {args.count}: make at least 1 picture.")
    check_picture_suffix(args.output)
    place = args.model or str(MINI_PIPELINE)
    is_here = Path(place).is_dir()
    if not is_here and not is_repository(place):
        raise FileNotFoundError(
            f"no pipeline at {place}. Give a folder of GPSTokenPipeline.save_pretrained, or OWNER/NAME on the Hub."
        )
    device = choose_device(args.device)
    if args.quiet:
        disable_progress_bar()
        disable_progress_bars()
    dtype = choose_dtype(args.dtype, device)
    try:
        pipe = GPSTokenPipeline.from_pretrained(place, dtype=dtype, local_files_only=is_here)
    except OSError as error:
        if is_here:
            raise
        raise OSError(f"no pipeline at {place}: there is no such folder here. On the Hub: {error}") from error
    if args.list_labels:
        for number, name in sorted(pipe.id2label.items()):
            print(f"{number:4}  {name}")
        return 0
    prepare_file(args.output, args.layout)
    label = int(args.label) if args.label is not None and args.label.isdecimal() else args.label
    pipe.label_ids(label)
    config = pipe.autoencoder.config
    if args.num_tokens is not None:
        check_num_tokens(args.num_tokens, config.sample_size, config.sample_size, config.min_region_size)
    check_picture_size(args.output, *grid_size(args.count, config.sample_size))
    steps = args.steps
    if args.sampler is not None:
        pipe.scheduler, steps = make_sampler(args.sampler, args.steps)
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
