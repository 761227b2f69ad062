"""Training of both stages of generation by flow matching, on the loop that all scripts share."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .flow_matching import TIME_SAMPLINGS, FlowMatchingSamples, flow_matching_loss
from .launch import SHARE, add_loop_arguments, make_accelerator
from .loop import train
from .objective import Objective
from .run_record import RunState
from .token_dataset import ORIGIN_FILE

logger = logging.getLogger(__name__)

Velocity = Callable[[nn.Module, dict[str, Tensor], Tensor, Tensor], Tensor]


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `train_generator` reads."""
    add_loop_arguments(parser)
    parser.add_argument(
        "--label_dropout", type=SHARE, default=0.1, help="Share of samples without their label, for guidance."
    )
    parser.add_argument("--time_sampling", default="logit_normal", choices=TIME_SAMPLINGS)


class FlowMatchingObjective(Objective):
    """A velocity that carries noise to data; its curve has `validation_loss`, at noises and times that stay the same.

    Args:
        args: of `add_training_arguments`.
        velocity: (model, batch, noisy latents, time) -> predicted velocity.
        validation_data: items as [`FlowMatchingSamples`] takes them, or None.
        draw_pictures: (averaged model, step) -> None, called at every validation.
        origin: of the data, [`TokenDataset.origin`], saved with the model.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        velocity: Velocity,
        validation_data: Dataset | None,
        draw_pictures: Callable[[nn.Module, int], None] | None,
        origin: dict[str, Any],
    ):
        self.args, self.velocity, self.origin = args, velocity, origin
        self.validation_data, self.draw_pictures = validation_data, draw_pictures

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return flow_matching_loss(partial(self.velocity, model, batch), batch)

    def model_loss(self, output: Tensor, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        return {"loss": output.mean()}

    def validate(self, averaged: nn.Module, step: int) -> dict[str, float]:
        figures = {}
        if self.validation_data is not None:
            figures["validation_loss"] = validation_loss(averaged, self.validation_data, self.velocity, self.args)
        if self.draw_pictures is not None:
            self.draw_pictures(averaged, step)
        return figures

    def save(self, averaged: nn.Module, folder: Path, state: RunState) -> None:
        super().save(averaged, folder, state)
        (folder / ORIGIN_FILE).write_text(json.dumps(self.origin, indent=1), encoding="utf-8")


def load_pretrained(kind: type[nn.Module], folder: str, num_classes: int, **config) -> nn.Module:
    """A saved generator to start from, for data of `num_classes` classes.

    Where it has another number of them, its table of classes is replaced: every class starts as "no class", and learns
    what sets it apart.

    Args:
        kind: `GPSTokenTransformerModel` or `GPSTokenLayoutModel`.
        config: arguments of the model that replace the saved ones.
    """
    model = kind.from_pretrained(folder, **config)
    if model.config.num_classes == num_classes:
        return model
    known = model.config.num_classes
    logger.warning("%s knows %d classes, the data have %d: all are learned anew.", folder, known, num_classes)
    weights = model.state_dict()
    no_class = weights["class_embedding.weight"][model.null_class]
    weights["class_embedding.weight"] = no_class.repeat(num_classes + 1, 1)
    resized = kind.from_config(model.config, num_classes=num_classes)
    resized.load_state_dict(weights)
    return resized


def train_generator(
    args: argparse.Namespace,
    model: nn.Module,
    train_data: Dataset,
    validation_data: Dataset | None,
    velocity: Velocity,
    draw_pictures: Callable[[nn.Module, int], None] | None,
    origin: dict[str, Any],
) -> None:
    """Trains a flow-matching network; `args` are those of `add_training_arguments`. Files and errors as in `train`.

    Args:
        model: has `null_class` and is saved by `save_pretrained`.
        train_data: items as [`FlowMatchingSamples`] takes them.
        validation_data, velocity, draw_pictures, origin: see [`FlowMatchingObjective`].
    """
    accelerator = make_accelerator(args)
    count = args.max_train_steps * args.gradient_accumulation_steps * args.batch_size * accelerator.num_processes
    samples = FlowMatchingSamples(
        train_data, count, model.null_class, args.label_dropout, args.time_sampling, args.seed
    )
    objective = FlowMatchingObjective(args, velocity, validation_data, draw_pictures, origin)
    train(args, accelerator, model, samples, objective, unit="sample")


@torch.no_grad()
def validation_loss(model: nn.Module, data: Dataset, velocity: Velocity, args: argparse.Namespace) -> float:
    """Mean loss over items that were not trained on, with their labels, at times spread evenly."""
    samples = FlowMatchingSamples(data, len(data), model.null_class, label_dropout=0.0, time_sampling="uniform", seed=1)
    device = next(model.parameters()).device
    losses = []
    for batch in DataLoader(samples, args.batch_size):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision != "no"):
            losses.append(flow_matching_loss(partial(velocity, model, batch), batch))
    return torch.cat(losses).mean().item()
