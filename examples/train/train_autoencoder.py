#!/usr/bin/env python
"""Trains an AutoencoderGPSToken, or fine-tunes one, on pictures of a folder, of tar shards or of a dataset of the Hub.

    python examples/mini_corpus/fetch_photographs.py --output data/photographs
    accelerate launch examples/train/train_autoencoder.py --train_dir data/photographs/train \
        --validation_dir data/photographs/heldout --output_dir runs/mini

One process or many, CPU or GPU: `accelerate config` decides. Two processes with half the --batch_size learn the same as
one. `--resume_from_checkpoint latest` continues a run that was stopped or killed. At every checkpoint the averaged
weights are saved to OUTPUT_DIR/model as a diffusers folder.

Recipes: "pixels" (default) for the best PSNR, "sharp" with perceptual and adversarial losses, "official" for what the
research code does, its mistakes included (Inception gets values up to 510), "paper" for what the paper's text says, in
the model too: support 5, regions of 4 px, S64 with 60 blocks (a --pretrained model keeps its own). Options override the
recipe. Ours differ from the official one in crops of all scales instead of centre squares, token counts that vary, Muon
with a cosine and clipped gradients, model and critic trained in the same step, and a critic without batch norm across
pictures.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from pathlib import Path

import gpstoken_diffusers.training  # noqa: F401  before torch, which reads a setting that it makes

# isort: split
import torch
from accelerate import Accelerator

from gpstoken_diffusers import AutoencoderGPSToken
from gpstoken_diffusers.evaluation.perceptual import NAMES, perceptual_distance
from gpstoken_diffusers.training.autoencoder_objective import (
    AutoencoderObjective,
    add_loss_arguments,
    load_validation,
)
from gpstoken_diffusers.training.data import CROPS, TrainingCrops, collate_crops
from gpstoken_diffusers.training.launch import COUNT, NATURAL, SHARE_BELOW_1, add_loop_arguments, make_accelerator
from gpstoken_diffusers.training.linear_start import linear_parameters
from gpstoken_diffusers.training.loop import train
from gpstoken_diffusers.training.model_card import write_model_card
from gpstoken_diffusers.training.pictures import DatasetPictures, Pictures, open_pictures
from gpstoken_diffusers.training.recipes import MODELS, PAPER_MODEL, PAPER_S64, RECIPES
from gpstoken_diffusers.training.run_record import RunState

# The refinement transformer's attention, which low-rank adapters are put on.
LORA_TARGETS = r"refiner\..*\.(to_q|to_k|to_v|to_out)"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", default="pixels", choices=RECIPES, help="Defaults that belong together, see above.")
    add(
        "--train_dir",
        nargs="+",
        help='Folders of images, or of tar shards, or patterns such as "shards/*.tar"; drawn from equally often.',
    )
    add("--dataset_name", help="A dataset of the Hub, or a folder of save_to_disk, in place of --train_dir.")
    add("--dataset_config", help="Its configuration.")
    add("--dataset_split", default="train")
    add("--image_column", default="image")
    add("--validation_dir", nargs="+", default=[], help="Held-out images as for --train_dir; none is trained on.")
    add("--max_validation_images", type=COUNT, default=32, help="Of each of them.")
    add("--preset", choices=MODELS, help="Sizes of a fresh model (default: mini), or of an official file.")
    add("--config", help="JSON file of AutoencoderGPSToken arguments that replace those of the preset.")
    add("--pretrained", help="A model to start from: a folder, or an official .safetensors file.")
    add(
        "--freeze",
        choices=["encoder", "decoder", "linear"],
        help="A part that is not trained; linear: the layers that linear_start sets.",
    )
    add(
        "--lora_rank",
        type=NATURAL,
        default=0,
        help="Train low-rank adapters of the refinement transformer alone; they "
        "are merged into OUTPUT_DIR/model, and saved by themselves to OUTPUT_DIR/model/lora.",
    )
    add("--resolution", type=COUNT, help="Side of the training crops, and the model's tile; default: the model's.")
    add("--num_tokens", type=COUNT, help="Tokens per crop; default: the model's.")
    add("--token_jitter", type=SHARE_BELOW_1, default=0.25, help="A batch has num_tokens (1 +- this) tokens.")
    add(
        "--token_range",
        type=COUNT,
        nargs=2,
        metavar=("FEWEST", "MOST"),
        help="A batch has so many tokens, drawn log-uniformly, in place of --num_tokens and --token_jitter.",
    )
    add("--crop", default="scales", choices=CROPS, help="Crops of all scales, or centre squares.")
    add("--perceptual_network", default="efficientnet-lite0", choices=NAMES)
    add("--perceptual_weights", help="File of its weights; default: what fetch_perceptual.py fetched.")
    add("--feature_network", default="inception", choices=NAMES)
    add("--feature_weights", help="File of its weights.")
    add("--judge", choices=NAMES, help="Network whose distance validation reports; take one not trained on.")
    add_loss_arguments(parser)
    add_loop_arguments(parser)
    parser.set_defaults(batch_size=8, warmup_steps=200)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    recipe, _ = parser.parse_known_args(argv)
    parser.set_defaults(**RECIPES[recipe.recipe])
    args = parser.parse_args(argv)
    if bool(args.train_dir) == bool(args.dataset_name):
        parser.error("give --train_dir or --dataset_name")
    if args.pretrained and not Path(args.pretrained).is_file() and (args.preset or args.config):
        parser.error("the sizes of a --pretrained folder are its own: leave --preset and --config out")
    if args.lora_rank and args.freeze:
        parser.error("--lora_rank trains the adapters alone: leave --freeze out")
    return args


def build_model(args: argparse.Namespace) -> AutoencoderGPSToken:
    """The model to train, with --resolution as its tile and --num_tokens as its default, where they are given."""
    if args.pretrained is None:
        config = dict(MODELS[args.preset or "mini"])
        if args.recipe == "paper":
            config |= {**PAPER_MODEL, **(PAPER_S64 if args.preset == "s64" else {})}
        if args.config:
            config |= json.loads(Path(args.config).read_text(encoding="utf-8"))
        model = AutoencoderGPSToken(**config)
    elif Path(args.pretrained).is_file():
        model = AutoencoderGPSToken.from_single_file(args.pretrained, preset=args.preset, config=args.config)
    else:
        model = AutoencoderGPSToken.from_pretrained(args.pretrained)
    model = with_tile(model, args.resolution or model.config.sample_size, args.num_tokens or model.config.num_tokens)
    model.requires_grad_(True)
    if args.lora_rank:
        from peft import LoraConfig

        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=LORA_TARGETS))
    parts = {"encoder": (model.stem, model.refiner), "decoder": (model.decoder,)}
    for part in parts.get(args.freeze, ()):
        part.requires_grad_(False)
    if args.freeze == "linear":
        for parameter in linear_parameters(model):
            parameter.requires_grad_(False)
    return model.to(memory_format=torch.channels_last)


def with_tile(model: AutoencoderGPSToken, resolution: int, num_tokens: int) -> AutoencoderGPSToken:
    """The same weights, which depend on neither, with another tile and number of tokens for it."""
    config = model.config
    upscale = config.sample_size // config.map_size
    if resolution % upscale:
        raise ValueError(f"--resolution must be a multiple of {upscale} for this model's decoder, got {resolution}.")
    tile = {"sample_size": resolution, "map_size": resolution // upscale, "num_tokens": num_tokens}
    if all(config[name] == value for name, value in tile.items()):
        return model
    resized = AutoencoderGPSToken.from_config(config, **tile)
    resized.load_state_dict(model.state_dict())
    return resized


def training_pictures(args: argparse.Namespace) -> list[Pictures]:
    if args.dataset_name:
        return [DatasetPictures(args.dataset_name, args.dataset_split, args.image_column, args.dataset_config)]
    return [open_pictures(place) for place in args.train_dir]


class LoraObjective(AutoencoderObjective):
    """Saves a model with its adapters merged, and the adapters beside it."""

    def save(self, averaged: AutoencoderGPSToken, folder: Path, state: RunState) -> None:
        averaged.save_lora_adapter(folder / "lora")
        averaged.fuse_lora()
        averaged.unload_lora()
        super().save(averaged, folder, state)


def build_objective(
    args: argparse.Namespace, accelerator: Accelerator, model: AutoencoderGPSToken, sources: list[Pictures]
) -> AutoencoderObjective:
    def network(weight: float, name: str, weights: str | None) -> torch.nn.Module | None:
        return perceptual_distance(name, weights).to(accelerator.device) if weight else None

    resolution, validation = model.config.sample_size, []
    if accelerator.is_main_process:
        places = [open_pictures(place) for place in args.validation_dir]
        validation = [load_validation(place, resolution, args.max_validation_images) for place in places]

    def write_card(folder: Path, state: RunState) -> None:
        write_model_card(
            folder,
            model,
            settings=vars(args) | {"resolution": resolution, "num_tokens": model.config.num_tokens},
            command=shlex.join(["accelerate", "launch", *sys.argv]),
            device=f"{accelerator.num_processes} x {_device_name(accelerator.device)}",
            num_pictures=sum(map(len, sources)),
            num_skipped=len(state.skipped),
            per_step=args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes,
            steps=state.step,
            minutes=state.minutes,
            last_row=state.last_row,
        )

    kind = LoraObjective if args.lora_rank else AutoencoderObjective
    return kind(
        args,
        perceptual=network(args.perceptual_weight, args.perceptual_network, args.perceptual_weights),
        features=network(args.feature_weight, args.feature_network, args.feature_weights),
        last_layer=model.decoder.conv_out.weight,
        mean=lambda tensor: accelerator.reduce(tensor, "mean"),
        validation=validation,
        judge=perceptual_distance(args.judge) if args.judge else None,
        write_card=write_card,
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type.upper()}"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(args)
    torch.manual_seed(args.seed)
    model = build_model(args)
    sources = training_pictures(args)
    per_step = args.batch_size * accelerator.num_processes
    samples = TrainingCrops(
        sources,
        model.config.sample_size,
        model.config.num_tokens,
        length=args.max_train_steps * args.gradient_accumulation_steps * per_step,
        seed=args.seed,
        crop=args.crop,
        token_jitter=args.token_jitter,
        batch_size=per_step,
        token_range=args.token_range and tuple(args.token_range),
        partition=model.partition_settings,
    )
    objective = build_objective(args, accelerator, model, sources)
    train(args, accelerator, model, samples, objective, collate=collate_crops)


if __name__ == "__main__":
    main()
