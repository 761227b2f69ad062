#!/usr/bin/env python
"""Trains the second stage of generation: what the Gaussians of a layout show, by flow matching.

    accelerate launch examples/train/encode_dataset.py --data pictures/train --output tokens/train
    accelerate launch examples/train/train_texture.py --train_dir tokens/train --output_dir runs/texture

One process or many, CPU or GPU: `accelerate config` decides. `--resume_from_checkpoint latest` continues a run
that was stopped. At every checkpoint the averaged weights are saved to OUTPUT_DIR/model as a diffusers folder; at every
validation OUTPUT_DIR/samples.png shows textures generated for real layouts, one row per class.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import gpstoken_diffusers.training  # noqa: F401  before torch, which reads a setting that it makes

# isort: split
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenTransformerModel
from gpstoken_diffusers.assets import MINI
from gpstoken_diffusers.training.generator_loop import add_training_arguments, load_pretrained, train_generator
from gpstoken_diffusers.training.latent_scale import latents_statistics
from gpstoken_diffusers.training.launch import SHARE
from gpstoken_diffusers.training.previews import save_texture_preview
from gpstoken_diffusers.training.token_dataset import TokenDataset

logger = logging.getLogger(__name__)

# The shipped small generator.
MINI_CONFIG = {
    "hidden_size": 320,
    "num_layers": 8,
    "num_attention_heads": 5,
    "layout_frequencies": 8,
    "geometry_residual": "relative",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train_dir", required=True, help="Token dataset to train on, as encode_dataset.py writes it.")
    add("--validation_dir", help="Token dataset that is not trained on.")
    add("--autoencoder", default=str(MINI), help="Folder of the tokenizer that made the tokens; default: the shipped.")
    add("--pretrained", help="Folder of a model to start from; default: the mini configuration, fresh.")
    add(
        "--new_statistics",
        action="store_true",
        help="Standardise latents by this dataset's mean and deviation in place of the pretrained model's: for tokens "
        "of another tokenizer.",
    )
    add("--config", help="JSON file of GPSTokenTransformerModel arguments that replace the mini configuration's.")
    add(
        "--emphasis",
        type=SHARE,
        default=0.0,
        help="Of latent channels that change the picture most. 0: every channel has the deviation 1; 1: as much as it "
        "changes the picture.",
    )
    add_training_arguments(parser)
    args = parser.parse_args(argv)
    if args.pretrained and args.emphasis and not args.new_statistics:
        parser.error("latents of a --pretrained model keep their scale: --emphasis needs --new_statistics beside it")
    if args.pretrained and args.config:
        parser.error("the sizes of a --pretrained model are its own: leave --config out")
    return args


class TextureLatents(Dataset):
    """Items of a token dataset as a generator's latents, with the layout that conditions them."""

    def __init__(self, dataset: TokenDataset, model: GPSTokenTransformerModel):
        self.dataset, self.model = dataset, model

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        item = self.dataset[index]
        layout = item["initial_geometry"]
        latents = self.model.to_latents(layout, item["geometry"], item["texture"])
        return {"latents": latents, "layout": layout, "label": item["label"]}


def build_model(
    args: argparse.Namespace, dataset: TokenDataset, autoencoder: AutoencoderGPSToken
) -> GPSTokenTransformerModel:
    if args.pretrained:
        residual = GPSTokenTransformerModel.load_config(args.pretrained)["geometry_residual"]
        statistics = latents_statistics(dataset, residual, autoencoder, args.emphasis) if args.new_statistics else {}
        model = load_pretrained(GPSTokenTransformerModel, args.pretrained, len(dataset.id2label), **statistics)
        if model.config.texture_channels != dataset.texture_channels:
            raise ValueError(
                f"Expected a --pretrained model of {dataset.texture_channels} texture channels, as the tokens in "
                f"{args.train_dir} have, got {args.pretrained} with {model.config.texture_channels}. Train a "
                "fresh one, without --pretrained."
            )
        return model
    config = dict(MINI_CONFIG)
    if args.config:
        config |= json.loads(Path(args.config).read_text(encoding="utf-8"))
    data = {
        "texture_channels": dataset.texture_channels,
        "num_tokens": dataset.num_tokens,
        "num_classes": len(dataset.id2label),
    }
    residual = config.get("geometry_residual", "additive")
    statistics = latents_statistics(dataset, residual, autoencoder, args.emphasis)
    return GPSTokenTransformerModel(**data | statistics | config)


def velocity(model: nn.Module, batch: dict[str, Tensor], noisy: Tensor, time: Tensor) -> Tensor:
    return model(noisy, time, batch["label"], batch["layout"]).sample


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    dataset = TokenDataset(args.train_dir)
    if doubt := dataset.check_autoencoder(args.autoencoder):
        logger.warning("%s samples.png shows the textures by it.", doubt)
    autoencoder = AutoencoderGPSToken.from_pretrained(args.autoencoder)
    torch.manual_seed(args.seed)
    model = build_model(args, dataset, autoencoder)
    shown = TokenDataset(args.validation_dir) if args.validation_dir else dataset
    shown.validates(dataset)
    validation = TextureLatents(shown, model) if args.validation_dir else None

    def draw_pictures(averaged: GPSTokenTransformerModel, step: int) -> None:
        save_texture_preview(averaged, autoencoder, shown, Path(args.output_dir) / "samples.png")

    train_generator(args, model, TextureLatents(dataset, model), validation, velocity, draw_pictures, dataset.origin())


if __name__ == "__main__":
    main()
