#!/usr/bin/env python
"""Trains an AutoencoderGPSToken on a folder of photographs: reconstruction loss, EMA, checkpoints that resume.

    python examples/fetch_photographs.py --output data/photographs
    accelerate launch examples/train_autoencoder.py --train_dir data/photographs/train \
        --validation_dir data/photographs/heldout --output_dir runs/mini

One process or many, CPU or GPU: `accelerate config` decides. `--resume_from_checkpoint latest` goes on where a run was
stopped. The averaged weights are saved to OUTPUT_DIR/model as a diffusers folder at every checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor
from gpstoken_diffusers.metrics import psnr
from gpstoken_diffusers.training.checkpoints import resume_checkpoint, save_checkpoint
from gpstoken_diffusers.training.data import PhotographCrops, center_crop, list_images, to_pixel_values
from gpstoken_diffusers.training.optimization import build_optimizers, learning_rate_scale

logger = logging.getLogger("train_autoencoder")

# The shipped small model. Everything in it is local but the refinement transformer.
MINI_CONFIG = {
    "num_tokens": 256,
    "texture_channels": 32,
    "stem_channels": 128,
    "stem_patch_size": 4,
    "stem_num_layers": 2,
    "roi_size": 4,
    "region_reading": "flatten",
    "hidden_size": 256,
    "num_layers": 6,
    "num_attention_heads": 4,
    "decoder_type": "lattice",
    "decoder_block_out_channels": (64, 192),
    "decoder_num_layers": 6,
    "lattice_size": 4,
    "lattice_channels": 32,
    "decode_mode": "merge",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train_dir", required=True, nargs="+", help="Folders of training images, drawn from equally often.")
    add("--validation_dir", nargs="+", help="Folders of held-out images; none of them is trained on.")
    add("--output_dir", required=True, help="Where checkpoints, the model, curves and pictures go.")
    add("--pretrained", help="Folder of a model to start from; default: the mini configuration, fresh.")
    add("--config", help="JSON file of AutoencoderGPSToken arguments that replace those of the mini configuration.")
    add("--resolution", type=int, default=256, help="Side of the training crops, which is also the model's tile.")
    add("--num_tokens", type=int, default=256, help="Tokens per crop.")
    add("--token_jitter", type=float, default=0.25, help="A batch has num_tokens (1 +- this) tokens.")
    add("--batch_size", type=int, default=8, help="Crops per step and process.")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--max_train_steps", type=int, default=20000)
    add("--optimizer", default="muon", choices=["muon", "adamw"], help="muon: weight matrices; the rest by AdamW.")
    add("--learning_rate", type=float, default=2e-3, help="Of the chosen optimizer.")
    add("--adam_learning_rate", type=float, default=1e-3, help="Of what Muon does not train.")
    add("--warmup_steps", type=int, default=200)
    add("--final_lr_scale", type=float, default=0.02, help="The cosine ends at this share of the learning rate.")
    add("--l1_weight", type=float, default=1.0)
    add("--l2_weight", type=float, default=1.0)
    add("--texture_noise", type=float, default=0.0,
        help="Noise on textures, up to this share of their deviation: for tokens that a generator is to draw.")
    add("--weight_decay", type=float, default=0.01)
    add("--max_grad_norm", type=float, default=1.0)
    add("--ema_decay", type=float, default=0.999)
    add("--mixed_precision", default="bf16", choices=["no", "fp16", "bf16"])
    add("--gradient_checkpointing", action="store_true")
    add("--num_workers", type=int, default=1)
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int, default=2)
    add("--save_dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="Of OUTPUT_DIR/model.")
    add("--resume_from_checkpoint", help='A checkpoint folder, or "latest".')
    add("--validation_steps", type=int, default=500)
    add("--max_validation_images", type=int, default=32)
    add("--max_minutes", type=float, help="Stop, with a checkpoint, after this many minutes.")
    add("--seed", type=int, default=0)
    add("--report_to", default=None, help='Tracker of accelerate, such as "tensorboard".')
    args = parser.parse_args(argv)
    if not 0 <= args.token_jitter < 1:
        parser.error("--token_jitter must lie in [0, 1)")
    return args


def build_model(args: argparse.Namespace) -> AutoencoderGPSToken:
    """The model to train, with its tile at the training resolution (the weights do not depend on it)."""
    tile = {"sample_size": args.resolution, "map_size": args.resolution // 4, "num_tokens": args.num_tokens}
    if args.pretrained:
        return AutoencoderGPSToken.from_pretrained(args.pretrained, **tile)
    config = dict(MINI_CONFIG)
    if args.config:
        config.update(json.loads(Path(args.config).read_text(encoding="utf-8")))
    return AutoencoderGPSToken(**{**config, **tile})


class TokenCountBatches(PhotographCrops):
    """Crops whose token count varies from batch to batch, so that the model works at any count."""

    def __init__(self, args: argparse.Namespace, length: int, seed: int):
        super().__init__(args.train_dir, args.resolution, args.num_tokens, length, seed)
        self.batch_size, self.jitter, self.most = args.batch_size, args.token_jitter, args.num_tokens

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index // self.batch_size)
        share = 1 + self.jitter * (2 * torch.rand((), generator=generator).item() - 1)
        self.num_tokens = max(1, round(self.most * share))
        return super().__getitem__(index)


def reconstruction_loss(reconstruction: Tensor, target: Tensor, args: argparse.Namespace) -> Tensor:
    difference = reconstruction.float() - target
    return args.l1_weight * difference.abs().mean() + args.l2_weight * difference.square().mean()


def load_validation(folder: str, args: argparse.Namespace) -> Tensor:
    """Centre squares of some images of a folder, spread over it: (n, 3, R, R) in [-1, 1]."""
    paths = list_images(folder)
    crops = []
    for path in paths[:: max(1, len(paths) // args.max_validation_images)][: args.max_validation_images]:
        with Image.open(path) as image:
            crops.append(to_pixel_values(center_crop(image, args.resolution)))
    return torch.stack(crops)


@torch.no_grad()
def validate(model: AutoencoderGPSToken, images: Tensor, sheet: Path, args: argparse.Namespace) -> float:
    """Mean PSNR over held-out crops, and a sheet of pictures: inputs above their reconstructions."""
    model.eval()
    device = next(model.parameters()).device
    scores, pictures = [], []
    for batch in images.split(4):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision != "no"):
            output = model(batch.to(device)).sample
        output = output.float().cpu().clamp(-1, 1)
        scores.append(psnr(output, batch))
        pictures.append(output)
    model.train()
    rows = [torch.cat(list(rows[:8]), dim=2) for rows in (images, torch.cat(pictures))]
    array = ((torch.cat(rows, dim=1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(sheet)
    return torch.cat(scores).mean().item()


def save_model(model: AutoencoderGPSToken, ema: EMAModel, args: argparse.Namespace) -> None:
    """Writes the averaged weights and the image processor that goes with them to OUTPUT_DIR/model."""
    folder = Path(args.output_dir) / "model"
    averaged = copy.deepcopy(model)
    ema.copy_to(averaged.parameters())
    averaged.to(getattr(torch, args.save_dtype)).save_pretrained(folder)
    GPSTokenImageProcessor(
        tile_size=model.config.sample_size,
        num_tokens=model.config.num_tokens,
        min_region_size=model.config.min_region_size,
        entropy_exponent=model.config.entropy_exponent,
    ).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,  # a step is a step, however many processes share it
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    set_seed(args.seed)
    model = build_model(args).to(memory_format=torch.channels_last)
    model.train()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    ema = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    optimizers = build_optimizers(
        model, args.optimizer, args.learning_rate, args.adam_learning_rate, args.weight_decay
    )
    steps = args.max_train_steps
    batches = steps * args.gradient_accumulation_steps
    dataset = TokenCountBatches(args, batches * args.batch_size * accelerator.num_processes, args.seed)
    loader = DataLoader(dataset, args.batch_size, num_workers=args.num_workers, persistent_workers=args.num_workers > 0)

    def scale(step: int) -> float:
        return learning_rate_scale(step, args.warmup_steps, args.max_train_steps, args.final_lr_scale)

    schedulers = [LambdaLR(optimizer, scale) for optimizer in optimizers]
    model, loader = accelerator.prepare(model, loader)
    optimizers = [accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]
    schedulers = [accelerator.prepare_scheduler(scheduler) for scheduler in schedulers]
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    if accelerator.is_main_process:
        count = sum(parameter.numel() for parameter in model.parameters())
        logger.info("%.2f M parameters, %d training images", count / 1e6, sum(map(len, dataset.paths)))
        if args.report_to:
            accelerator.init_trackers("train_autoencoder", config=vars(args))

    validation = []
    if args.validation_dir and accelerator.is_main_process:
        validation = [load_validation(folder, args) for folder in args.validation_dir]

    first_step = resume_checkpoint(accelerator, output_dir, args.resume_from_checkpoint)
    if first_step:
        loader = accelerator.skip_first_batches(loader, first_step * args.gradient_accumulation_steps)

    started = time.time()
    main = accelerator.is_main_process
    progress = tqdm(total=steps, initial=first_step, disable=not main, unit="step", mininterval=5)
    average = None
    step = first_step
    for batch in loader:
        with accelerator.accumulate(model):
            target = batch["pixel_values"]
            with accelerator.autocast():
                output = model(
                    target.contiguous(memory_format=torch.channels_last),
                    batch["geometry"],
                    batch["regions"],
                    texture_noise=args.texture_noise,
                ).sample
            loss = reconstruction_loss(output, target, args)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        value = loss.detach().item()
        if not math.isfinite(value):
            raise FloatingPointError(f"The loss became {value} after step {step}; the last checkpoint is untouched.")
        if not accelerator.sync_gradients:
            continue
        step += 1
        for scheduler in schedulers:
            scheduler.step()
        ema.step(model.parameters())
        average = value if average is None else 0.98 * average + 0.02 * value
        progress.update(1)
        progress.set_postfix(loss=f"{average:.4f}", refresh=False)
        out_of_time = args.max_minutes is not None and time.time() - started > 60 * args.max_minutes
        last = step == steps or out_of_time
        if validation and (step % args.validation_steps == 0 or last):
            plain = accelerator.unwrap_model(model)
            ema.store(plain.parameters())
            ema.copy_to(plain.parameters())
            row = {"step": step, "loss": average}
            for number, images in enumerate(validation, start=1):
                # The first folder's keeps the plain name, by which curves are plotted.
                suffix = f"_{number}" if number > 1 else ""
                row[f"psnr{suffix}"] = validate(plain, images, output_dir / f"validation{suffix}.png", args)
            ema.restore(plain.parameters())
            row |= {"minutes": (time.time() - started) / 60, "lr": schedulers[0].get_last_lr()[0]}
            with (output_dir / "curve.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            logger.info(", ".join(f"{name} {number:.5g}" for name, number in row.items()))
            accelerator.log(row, step=step)
        if step % args.checkpointing_steps == 0 or last:
            save_checkpoint(accelerator, output_dir, step, args.checkpoints_total_limit)
            if main:
                save_model(accelerator.unwrap_model(model), ema, args)
        if last:
            break
    accelerator.end_training()


if __name__ == "__main__":
    main()
