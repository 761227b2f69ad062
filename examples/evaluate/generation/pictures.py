"""The pictures that a generator is judged by: real ones, its samples, and reconstructions by its tokenizer."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import LayerSkipConfig, guiders
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from gpstoken_diffusers import GPSTokenImageProcessor, GPSTokenPipeline, GPSTokens, make_sampler
from gpstoken_diffusers.safe_files import write_atomically
from gpstoken_diffusers.training.data import center_crop
from gpstoken_diffusers.training.labelled_pictures import ClassFolders

DEFAULT_STEPS = 20
GUIDERS = {
    "auto": lambda scale: guiders.AutoGuidance(scale, auto_guidance_config=LayerSkipConfig([3, 4])),
    "apg": lambda scale: guiders.AdaptiveProjectedGuidance(scale),
    "zero-star": lambda scale: guiders.ClassifierFreeZeroStarGuidance(scale),
    "magnitude": lambda scale: guiders.MagnitudeAwareGuidance(scale),
    "tangential": lambda scale: guiders.TangentialClassifierFreeGuidance(scale),
}
"""Of diffusers, by the names of --guider, for the scale of --guidance_scale; each evaluates twice a step."""


def open_classes(folder: Path, names: list[str]) -> tuple[ClassFolders, Tensor]:
    """The pictures of a folder, and the place in `names` of each one's class (n,) int64.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: its classes are not those of `names`.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    pictures = ClassFolders(folder)
    found, expected = set(pictures.id2label.values()), set(names)
    if found != expected:
        parts = [(f"{folder} lacks", expected - found), ("the pipeline does not know", found - expected)]
        differences = [f"{what} {', '.join(map(repr, sorted(some)[:5]))}" for what, some in parts if some]
        raise ValueError(f"the folders of {folder} must be named as the pipeline's classes: {'; '.join(differences)}")
    return pictures, torch.tensor([names.index(pictures.id2label[label]) for label in pictures.labels])


def read_square(path: Path, side: int) -> Image.Image:
    """The centre square of a picture on white at `side` pixels."""
    return center_crop(GPSTokenImageProcessor.load_image(path), side)


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter where they do not divide."""
    iterator = iter(items)
    while batch := [item for _, item in zip(range(size), iterator, strict=False)]:
        yield batch


def evenly_spread(items: Sequence, count: int) -> list:
    """At most `count` of them."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def generate(pipe: GPSTokenPipeline, args: argparse.Namespace) -> tuple[list[Path], Tensor]:
    """Samples of every class as files CLASS/PLACE.png of --samples_dir, made where they are missing.

    `args` is the command line of evaluate_generation.py.

    Returns: their paths class by class, and the class of each by its place among the pipeline's (n,) int64.

    Raises ValueError: the folder holds samples of another pipeline or of other settings.
    """
    names = ("guidance_scale", "layout_guidance_scale", "sampler", "steps", "seed")
    settings = {name: getattr(args, name) for name in names} | ({"guider": args.guider} if args.guider else {})
    claim_samples(args.samples_dir, args.pipeline, settings, "--samples_dir")
    steps = args.steps
    if args.sampler:
        pipe.scheduler, steps = make_sampler(args.sampler, args.steps)
    labels = sorted(pipe.id2label)
    wanted = [(row, place) for row in range(len(labels)) for place in range(args.num_images_per_class)]
    paths = [args.samples_dir / pipe.id2label[labels[row]] / f"{place:05}.png" for row, place in wanted]
    missing = [(path, *item) for path, item in zip(paths, wanted, strict=True) if not path.exists()]
    with tqdm(total=len(missing), desc="samples", unit="picture") as progress:
        for batch in batches(missing, args.batch_size):
            # Independent of --num_images_per_class: asking for more must not change the samples that exist.
            seeds = [(args.seed + place) * len(labels) + row for _, row, place in batch]
            images = pipe(
                [labels[row] for _, row, _ in batch],
                num_inference_steps=steps or DEFAULT_STEPS,
                guidance_scale=args.guidance_scale,
                layout_guidance_scale=args.layout_guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                guider=GUIDERS[args.guider](args.guidance_scale) if args.guider else None,
            ).images
            for (path, _, _), image in zip(batch, images, strict=True):
                path.parent.mkdir(exist_ok=True)
                partial = path.with_suffix(".partial")
                image.save(partial, "PNG")
                partial.replace(path)
            progress.update(len(batch))
    return paths, torch.tensor([row for row, _ in wanted])


def claim_samples(folder: Path, pipeline: Path, settings: dict[str, Any], option: str) -> None:
    """Write down in `folder` what its samples are made with, so that they can be gone on with.

    Args:
        settings: what decides the samples beside the pipeline's files, in JSON's types.
        option: that names the folder.

    Raises ValueError: existing samples were made with something else, or the folder holds something else.
    """
    digest = hashlib.sha256()
    for path in sorted(pipeline.rglob("*")):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.relative_to(pipeline).as_posix().encode() + path.read_bytes())
    settings = {"pipeline": digest.hexdigest()} | settings
    note = folder / "settings.json"
    if note.exists():
        before = json.loads(note.read_text(encoding="utf-8"))
        if differing := [name for name, value in settings.items() if before.get(name) != value]:
            raise ValueError(
                f"{folder} holds samples made with another {', '.join(differing)}; give another folder by {option}, "
                "or remove this one"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else than samples; give another folder by {option}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(settings, indent=2).encode())


@torch.no_grad()
def reconstruct(
    pipe: GPSTokenPipeline, paths: list[Path], batch_size: int, shuffle: bool = False
) -> Iterator[Image.Image]:
    """Pictures through the pipeline's tokenizer and back, at the generator's number of tokens.

    With `shuffle`, each token shows the texture of another one of its picture.
    """
    model = pipe.autoencoder
    order = torch.randperm(pipe.transformer.config.num_tokens, generator=torch.Generator().manual_seed(0))
    for batch in batches(paths, batch_size):
        images = [read_square(path, model.config.sample_size) for path in batch]
        features = pipe.image_processor(images, num_tokens=len(order))
        tokens = model.encode(**{name: value.to(model.device) for name, value in features.items()}).tokens
        texture = tokens.texture[:, order] if shuffle else tokens.texture
        yield from pipe.decode(GPSTokens(tokens.geometry, texture, tokens.image_size, canvas_size=tokens.canvas_size))
