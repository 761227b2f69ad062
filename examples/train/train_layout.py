#!/usr/bin/env python
"""Trains the first stage of generation: where the Gaussians of a picture lie, by flow matching on real layouts.

    accelerate launch examples/train/encode_dataset.py --data pictures/train --output tokens/train
    accelerate launch examples/train/train_layout.py --train_dir tokens/train --output_dir runs/layout

One process or many, CPU or GPU: `accelerate config` decides. `--resume_from_checkpoint latest` continues a run
that was stopped. At every checkpoint the averaged weights are saved to OUTPUT_DIR/model as a diffusers folder; at every
validation OUTPUT_DIR/layouts.png shows calibrated layouts, generated from noise, one row per class.
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

from gpstoken_diffusers import GPSTokenLayoutModel
from gpstoken_diffusers.models.transformer_gpstoken_layout import layout_features
from gpstoken_diffusers.training.generator_loop import add_training_arguments, load_pretrained, train_generator
from gpstoken_diffusers.training.launch import COUNT
from gpstoken_diffusers.training.previews import save_layout_preview
from gpstoken_diffusers.training.token_dataset import TokenDataset


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train_dir", required=True, help="Token dataset to train on, as encode_dataset.py writes it.")
    add("--validation_dir", help="Token dataset that is not trained on.")
    add("--pretrained", help="Folder of a model to start from; default: a fresh one.")
    add("--config", help="JSON file of GPSTokenLayoutModel arguments that replace the defaults.")
    add("--min_region_size", type=COUNT, default=8, help="Of the partitions that layouts come from, px.")
    add_training_arguments(parser)
    args = parser.parse_args(argv)
    if args.pretrained and args.config:
        parser.error("the sizes of a --pretrained model are its own: leave --config out")
    return args


class LayoutLatents(Dataset):
    """The layouts of a token dataset as a layout model's latents."""

    def __init__(self, dataset: TokenDataset, model: GPSTokenLayoutModel):
        self.latents, self.labels = model.to_latents(dataset.layouts()), dataset.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return {"latents": self.latents[index], "label": self.labels[index]}


def build_model(args: argparse.Namespace, dataset: TokenDataset) -> GPSTokenLayoutModel:
    if args.pretrained:
        return load_pretrained(GPSTokenLayoutModel, args.pretrained, len(dataset.id2label))
    config = json.loads(Path(args.config).read_text(encoding="utf-8")) if args.config else {}
    features = layout_features(dataset.layouts()).double().flatten(0, 1)
    data = {
        "num_tokens": dataset.num_tokens,
        "num_classes": len(dataset.id2label),
        "latents_mean": features.mean(0).tolist(),
        "latents_std": features.std(0).clamp(min=1e-6).tolist(),
    }
    return GPSTokenLayoutModel(**data | config)


def velocity(model: nn.Module, batch: dict[str, Tensor], noisy: Tensor, time: Tensor) -> Tensor:
    return model(noisy, time, batch["label"]).sample


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    dataset = TokenDataset(args.train_dir)
    torch.manual_seed(args.seed)
    model = build_model(args, dataset)
    shown = TokenDataset(args.validation_dir) if args.validation_dir else dataset
    shown.validates(dataset)
    validation = LayoutLatents(shown, model) if args.validation_dir else None

    def draw_pictures(averaged: GPSTokenLayoutModel, step: int) -> None:
        save_layout_preview(averaged, shown, args.min_region_size, Path(args.output_dir) / "layouts.png")

    train_generator(args, model, LayoutLatents(dataset, model), validation, velocity, draw_pictures, dataset.origin())


if __name__ == "__main__":
    main()
