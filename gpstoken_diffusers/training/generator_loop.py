"""The training loop that both stages of generation share: arguments, steps, averaging, checkpoints, curves."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .checkpoints import resume_checkpoint, save_checkpoint
from .flow_matching import TIME_SAMPLINGS, FlowMatchingSamples, flow_matching_loss
from .optimization import build_optimizers, learning_rate_scale

logger = logging.getLogger(__name__)

Velocity = Callable[[nn.Module, dict[str, Tensor], Tensor, Tensor], Tensor]


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `train_generator` reads."""
    add = parser.add_argument
    add("--output_dir", required=True, help="Where checkpoints, the model, curves and pictures go.")
    add("--batch_size", type=int, default=32, help="Samples per step and process.")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--max_train_steps", type=int, default=20000)
    add("--label_dropout", type=float, default=0.1, help="Share of samples without their label, for guidance.")
    add("--time_sampling", default="logit_normal", choices=TIME_SAMPLINGS)
    add("--optimizer", default="muon", choices=["muon", "adamw"], help="muon: weight matrices; the rest by AdamW.")
    add("--learning_rate", type=float, default=2e-3, help="Of the chosen optimizer.")
    add("--adam_learning_rate", type=float, default=1e-3, help="Of what Muon does not train.")
    add("--warmup_steps", type=int, default=100)
    add("--final_lr_scale", type=float, default=0.02, help="The cosine ends at this share of the learning rate.")
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
    add("--max_minutes", type=float, help="Stop, with a checkpoint, after this many minutes.")
    add("--seed", type=int, default=0)
    add("--report_to", default=None, help='Tracker of accelerate, such as "tensorboard".')


def train_generator(
    args: argparse.Namespace,
    model: nn.Module,
    train_data: Dataset,
    validation_data: Dataset | None,
    velocity: Velocity,
    draw_pictures: Callable[[nn.Module, int], None] | None = None,
) -> None:
    """Train a flow-matching network; `args` are those of `add_training_arguments`.

    OUTPUT_DIR/model holds the averaged weights at every checkpoint, OUTPUT_DIR/curve.jsonl one line per validation:
    `step`, `loss` (running mean), `validation_loss` (of the averaged weights, at noises and times that stay the same
    throughout a run), `minutes`, `lr`.

    Args:
        model: has `null_class` and is saved by `save_pretrained`.
        train_data, validation_data: items as [`FlowMatchingSamples`] takes them.
        velocity: (model, batch, noisy latents, time) -> predicted velocity.
        draw_pictures: (averaged model, step) -> None, called by the main process at every validation.

    Raises FloatingPointError when the loss is no number any more; the last checkpoint stays.
    """
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
    model.train()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    ema = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    optimizers = build_optimizers(
        model, args.optimizer, args.learning_rate, args.adam_learning_rate, args.weight_decay
    )
    batches = args.max_train_steps * args.gradient_accumulation_steps
    samples = FlowMatchingSamples(
        train_data,
        batches * args.batch_size * accelerator.num_processes,
        model.null_class,
        args.label_dropout,
        args.time_sampling,
        args.seed,
    )
    loader = DataLoader(samples, args.batch_size, num_workers=args.num_workers, persistent_workers=args.num_workers > 0)

    def scale(step: int) -> float:
        return learning_rate_scale(step, args.warmup_steps, args.max_train_steps, args.final_lr_scale)

    schedulers = [LambdaLR(optimizer, scale) for optimizer in optimizers]
    model, loader = accelerator.prepare(model, loader)
    optimizers = [accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]
    schedulers = [accelerator.prepare_scheduler(scheduler) for scheduler in schedulers]
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    plain = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        count = sum(parameter.numel() for parameter in plain.parameters())
        logger.info("%.2f M parameters, %d training items", count / 1e6, len(train_data))
    if args.report_to:
        accelerator.init_trackers("train_generator", config=vars(args))

    step = resume_checkpoint(accelerator, output_dir, args.resume_from_checkpoint)
    if step:
        loader = accelerator.skip_first_batches(loader, step * args.gradient_accumulation_steps)
    started = time.time()
    progress = tqdm(
        total=args.max_train_steps, initial=step, disable=not accelerator.is_main_process, unit="step", mininterval=5
    )
    average, accumulated = None, 0.0
    for batch in loader:
        with accelerator.accumulate(model):
            with accelerator.autocast():
                loss = flow_matching_loss(partial(velocity, model, batch), batch).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        accumulated += loss.detach() / args.gradient_accumulation_steps
        if not accelerator.sync_gradients:
            continue
        value, accumulated = accelerator.reduce(accumulated, "mean").item(), 0.0
        if not math.isfinite(value):
            raise FloatingPointError(f"The loss became {value} after step {step}; the last checkpoint is untouched.")
        step += 1
        for scheduler in schedulers:
            scheduler.step()
        ema.step(plain.parameters())
        average = value if average is None else 0.98 * average + 0.02 * value
        progress.update(1)
        progress.set_postfix(loss=f"{average:.4f}", refresh=False)
        out_of_time = args.max_minutes is not None and time.time() - started > 60 * args.max_minutes
        last = step == args.max_train_steps or out_of_time
        if accelerator.is_main_process and (step % args.validation_steps == 0 or last):
            ema.store(plain.parameters())
            ema.copy_to(plain.parameters())
            row = {"step": step, "loss": average}
            if validation_data is not None:
                row["validation_loss"] = validation_loss(plain, validation_data, velocity, args)
            if draw_pictures is not None:
                draw_pictures(plain.eval(), step)
                plain.train()
            ema.restore(plain.parameters())
            row |= {"minutes": (time.time() - started) / 60, "lr": schedulers[0].get_last_lr()[0]}
            with (output_dir / "curve.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            logger.info(", ".join(f"{name} {number:.5g}" for name, number in row.items()))
            accelerator.log(row, step=step)
        if step % args.checkpointing_steps == 0 or last:
            save_checkpoint(accelerator, output_dir, step, args.checkpoints_total_limit)
            if accelerator.is_main_process:
                averaged = copy.deepcopy(plain)
                ema.copy_to(averaged.parameters())
                averaged.to(getattr(torch, args.save_dtype)).save_pretrained(output_dir / "model")
        if last:
            break
    accelerator.end_training()


@torch.no_grad()
def validation_loss(model: nn.Module, data: Dataset, velocity: Velocity, args: argparse.Namespace) -> float:
    """Mean loss over items that were not trained on, with their labels, at times spread evenly."""
    samples = FlowMatchingSamples(data, len(data), model.null_class, label_dropout=0.0, time_sampling="uniform", seed=1)
    device = next(model.parameters()).device
    model.eval()
    losses = []
    for batch in DataLoader(samples, args.batch_size):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision != "no"):
            losses.append(flow_matching_loss(partial(velocity, model, batch), batch))
    model.train()
    return torch.cat(losses).mean().item()
