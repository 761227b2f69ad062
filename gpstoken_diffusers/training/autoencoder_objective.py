"""What an autoencoder is trained for: pixels, what a perceptual network sees, and what a critic thinks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..evaluation.metrics import psnr, ssim
from ..image_processor import GPSTokenImageProcessor
from ..visualization import picture_grid, write_png
from .data import center_crop, to_pixel_values
from .discriminator import PatchCritic, PatchDiscriminator, adaptive_weight
from .launch import AMOUNT, COUNT, NATURAL, RATE, SHARE
from .objective import Objective
from .pictures import Pictures
from .run_record import RunState

CRITIC_SCHEDULES = ("both", "alternating")
SHEET_COLUMNS = 8


def add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `AutoencoderObjective` reads."""
    add = parser.add_argument
    add("--l1_weight", type=AMOUNT, default=1.0)
    add("--l2_weight", type=AMOUNT, default=1.0)
    add(
        "--psnr_weight",
        type=AMOUNT,
        default=0.0,
        help="Of minus the PSNR in dB, so that pictures with many tokens and small errors count as much as others.",
    )
    add("--perceptual_weight", type=AMOUNT, default=0.0, help="Of the distance that --perceptual_network measures.")
    add("--feature_weight", type=AMOUNT, default=0.0, help="Of the distance that --feature_network measures.")
    add("--adversarial_weight", type=AMOUNT, default=0.0, help="Of the critic's opinion; 0 trains without a critic.")
    add("--perceptual_start", type=NATURAL, default=0, help="Step at which that distance begins to count.")
    add("--critic_start", type=NATURAL, default=0, help="Step at which the critic begins.")
    add(
        "--critic_schedule",
        default="both",
        choices=CRITIC_SCHEDULES,
        help="Train model and critic in every step, or in turns, each every other step, as officially.",
    )
    add("--critic_learning_rate", type=RATE, default=1e-4)
    add("--critic_channels", type=COUNT, default=64)
    add("--critic_norm", default="group", choices=["group", "batch"])
    add(
        "--nested_share",
        type=SHARE,
        default=0.0,
        help="Share of pictures of whose texture only the first channels are kept, a random number of them, so that "
        "any beginning of a texture decodes.",
    )
    add(
        "--texture_noise",
        type=AMOUNT,
        default=0.0,
        help="Noise on textures, up to this share of their deviation: for tokens that a generator is to draw.",
    )


class AutoencoderObjective(Objective):
    """Reconstruction, perceptual and adversarial losses, and validation on held-out pictures.

    loss = l1 |x - y| + l2 (x - y)^2 - p PSNR + perceptual d(x, y) + features f(x, y) + adversarial w (-critic(x)),
    with the adaptive weight w of [`adaptive_weight`], which compares with the terms before f.

    Args:
        args: of `add_loss_arguments` and of the loop.
        perceptual: (reconstruction, picture), both (B, 3, H, W) in [-1, 1] -> (B,), differentiable; None without.
        features: another of the kind.
        last_layer: weight of the decoder's last layer.
        mean: averages a tensor over the processes.
        validation: held-out pictures, a batch (n, 3, R, R) in [-1, 1] per set.
        judge: another distance for the curve, that training does not see; None without.
        write_card: (folder, state) -> None, writes the model card.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None,
        features: Callable[[Tensor, Tensor], Tensor] | None,
        last_layer: nn.Parameter,
        mean: Callable[[Tensor], Tensor],
        validation: list[Tensor],
        judge: Callable[[Tensor, Tensor], Tensor] | None,
        write_card: Callable[[Path, RunState], None],
    ):
        self.args, self.perceptual, self.features = args, perceptual, features
        self.last_layer, self.mean, self.validation = last_layer, mean, validation
        self.judge, self.write_card = judge, write_card
        if args.adversarial_weight:
            network = PatchDiscriminator(channels=args.critic_channels, norm=args.critic_norm)
            self.critic = PatchCritic(network, args.critic_learning_rate)

    def trains(self, step: int) -> tuple[bool, bool]:
        if self.critic is None or step < self.args.critic_start:
            return True, False
        if self.args.critic_schedule == "alternating":
            return step % 2 == 0, step % 2 == 1
        return True, True

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        pixels = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        changes = {"texture_noise": self.args.texture_noise, "nested_share": self.args.nested_share}
        return model(pixels, batch["geometry"], batch["regions"], **changes).sample

    def model_loss(self, output: Tensor, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        args, target = self.args, batch["pixel_values"]
        output = output.float()
        difference = output - target
        numbers = {"l1": difference.abs().mean(), "l2": difference.square().mean()}
        loss = args.l1_weight * numbers["l1"] + args.l2_weight * numbers["l2"]
        if args.psnr_weight:
            # Without the 1e-6, 60 dB, a picture of one colour that comes out right would have a boundless gradient.
            numbers["psnr"] = -10 * (difference.square().mean((1, 2, 3)) / 4 + 1e-6).log10().mean()
            loss = loss - args.psnr_weight * numbers["psnr"]
        if self.perceptual is not None and step >= args.perceptual_start:
            numbers["perceptual"] = self.perceptual(output, target).mean()
            loss = loss + args.perceptual_weight * numbers["perceptual"]
        compared = loss
        if self.features is not None:
            numbers["features"] = self.features(output, target).mean()
            loss = loss + args.feature_weight * numbers["features"]
        if self.critic is not None and step >= args.critic_start:
            numbers["adversarial"] = -self.critic.opinion(output)
            weight = adaptive_weight(compared, numbers["adversarial"], self.last_layer, self.mean)
            numbers["adaptive_weight"] = weight
            loss = loss + args.adversarial_weight * weight * numbers["adversarial"]
        return {"loss": loss, **numbers}

    @torch.no_grad()
    def validate(self, averaged: nn.Module, step: int) -> dict[str, float]:
        """PSNR, SSIM and the judge's distance over held-out pictures; the first set's names carry no number."""
        figures, self.pictures = {}, {}
        for number, images in enumerate(self.validation, start=1):
            suffix = f"_{number}" if number > 1 else ""
            outputs = reconstruct(averaged, images, self.args.mixed_precision != "no")
            figures[f"psnr{suffix}"] = psnr(outputs, images).mean().item()
            figures[f"ssim{suffix}"] = ssim(outputs, images).mean().item()
            if self.judge is not None:
                distances = [self.judge(*pair) for pair in zip(outputs.split(4), images.split(4), strict=True)]
                figures[f"judge{suffix}"] = torch.cat(distances).mean().item()
            sheet = picture_sheet(images, outputs)
            write_png(sheet, Path(self.args.output_dir) / f"validation{suffix}.png")
            self.pictures[f"validation{suffix}"] = np.asarray(sheet)[None]
        return figures

    def save(self, averaged: nn.Module, folder: Path, state: RunState) -> None:
        """The model, the image processor that goes with it, and its card."""
        averaged.save_pretrained(folder)
        GPSTokenImageProcessor.for_autoencoder(averaged.config).save_pretrained(folder)
        self.write_card(folder, state)


def reconstruct(model: nn.Module, images: Tensor, in_bfloat16: bool) -> Tensor:
    """(n, 3, H, W) in [-1, 1] -> the same on the CPU, through a model in eval mode, clamped to [-1, 1]."""
    device = next(model.parameters()).device
    outputs = []
    for batch in images.split(4):
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16):
            outputs.append(model(batch.to(device)).sample.float().cpu().clamp(-1, 1))
    return torch.cat(outputs)


def load_validation(pictures: Pictures, resolution: int, most: int) -> Tensor:
    """Centre squares of some pictures of a collection, spread over it: (n, 3, R, R) in [-1, 1].

    Raises ValueError: none of them can be read.
    """
    crops = []
    for index in list(range(0, len(pictures), max(1, len(pictures) // most)))[:most]:
        try:
            crops.append(to_pixel_values(center_crop(pictures.load(index), resolution)))
        except Exception:  # whatever a picture raises is its own error
            continue
    if not crops:
        raise ValueError(f"No validation picture can be read, {pictures.name(0)} among them.")
    return torch.stack(crops)


def picture_sheet(images: Tensor, outputs: Tensor) -> Image.Image:
    """The first inputs above their reconstructions; both are (n, 3, H, W) in [-1, 1]."""
    pairs = torch.cat([images[:SHEET_COLUMNS], outputs[:SHEET_COLUMNS]])
    return picture_grid(GPSTokenImageProcessor().postprocess(pairs), columns=len(pairs) // 2)
