"""The loop that every training script runs: steps, averaging, checkpoints, curves, progress, and how it ends."""

from __future__ import annotations

import argparse
import copy
import logging
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    is_tensorboard_available,
    set_seed,
)
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .checkpoints import replace_folder, resume_checkpoint, save_checkpoint
from .discriminator import PatchCritic
from .optimization import LR_SCHEDULES, OPTIMIZERS, build_optimizer, learning_rate_scale
from .run_record import Curve, RunState, dump_batch

logger = logging.getLogger(__name__)

AVERAGE_DECAY = 0.98
"""Share of the old in the running means that progress bar and curve show."""


def add_loop_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `train` reads; scripts change their defaults by `parser.set_defaults`."""
    add = parser.add_argument
    add("--output_dir", required=True, help="Where checkpoints, the model, curves and pictures go.")
    add("--batch_size", type=int, default=32, help="Samples per step and process.")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--max_train_steps", type=int, default=20000)
    add("--optimizer", default="muon", choices=OPTIMIZERS, help="muon: weight matrices; the rest by AdamW.")
    add("--learning_rate", type=float, default=2e-3, help="Of the chosen optimizer.")
    add("--adam_learning_rate", type=float, default=1e-3, help="Of what Muon does not train.")
    add("--adam_betas", type=float, nargs=2, default=(0.9, 0.99), metavar=("BETA1", "BETA2"))
    add("--weight_decay", type=float, default=0.01)
    add("--lr_schedule", default="cosine", choices=LR_SCHEDULES)
    add("--warmup_steps", type=int, default=100)
    add("--final_lr_scale", type=float, default=0.02, help="The cosine ends at this share of the learning rate.")
    add("--max_grad_norm", type=float, default=1.0, help="0 does not clip.")
    add("--ema_decay", type=float, default=0.999, help="Of the averaged weights, which are the ones that are saved.")
    add("--mixed_precision", default="bf16", choices=["no", "fp16", "bf16"])
    add("--gradient_checkpointing", action="store_true", help="Less memory for a second forward pass.")
    add("--num_workers", type=int, default=1, help="Processes that prepare batches, for each training process.")
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int, default=2)
    add("--save_dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="Of OUTPUT_DIR/model.")
    add("--resume_from_checkpoint", help='A checkpoint folder, or "latest".')
    add("--validation_steps", type=int, default=500)
    add("--max_minutes", type=float, help="Stop, with a checkpoint, after this many minutes.")
    add("--seed", type=int, default=0)
    add("--report_to", default="tensorboard", help='Tracker of accelerate, or "none". Logs go to OUTPUT_DIR/logs.')


class Objective(ABC):
    """What a network is trained for. Scripts subclass it; the loop asks it for losses, figures and files.

    Attributes:
        critic: what is trained beside the model, against it; None without one.
        pictures: what the last validation drew, by name: (n, H, W, 3) uint8, for the tracker.
    """

    critic: PatchCritic | None = None
    pictures: dict[str, np.ndarray] = {}

    def trains(self, step: int) -> tuple[bool, bool]:
        """Whether the step after `step` trains (the model, the critic)."""
        return True, False

    @abstractmethod
    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """What the model gives for a batch."""

    @abstractmethod
    def model_loss(self, output: Tensor, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Named numbers, of which "loss" is what the model descends."""

    def validate(self, averaged: nn.Module, step: int) -> dict[str, float]:
        """Figures of the averaged model for the curve; pictures may be written. Only the main process calls it."""
        return {}

    def save(self, averaged: nn.Module, folder: Path, state: RunState) -> None:
        """Writes the averaged model, already in --save_dtype, into an empty folder."""
        averaged.save_pretrained(folder)


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """accelerate's view of this run: devices, processes, precision, tracker.

    Raises ValueError: a launch configuration that shards weights over processes.
    """
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it announces each file of a checkpoint
    tracker = None if args.report_to == "none" else args.report_to
    if tracker == "tensorboard" and not is_tensorboard_available():
        logger.warning("tensorboard is not installed: the figures go to %s/curve.jsonl alone.", args.output_dir)
        tracker = None
    handlers = [
        # Buffers are constants, or batch statistics that each process may keep for itself.
        DistributedDataParallelKwargs(broadcast_buffers=False),
        # The others wait while the main process validates.
        InitProcessGroupKwargs(timeout=timedelta(hours=2)),
    ]
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=tracker,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir) / "logs")
        ),
        kwargs_handlers=handlers,
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate's configuration asks for {accelerator.distributed_type}, which shards weights over processes. "
            "These scripts average the weights and train a critic beside them, each process with all of it: choose "
            "plain data parallelism in `accelerate config`. The largest released autoencoder needs 3 GB that way."
        )
    return accelerator


def train(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: nn.Module,
    samples: Dataset,
    objective: Objective,
    collate: Callable | None = None,
    unit: str = "image",
) -> None:
    """Trains a model; `args` are those of `add_loop_arguments`.

    OUTPUT_DIR gets `checkpoint-STEP` folders to resume from, `model` with the averaged weights at every checkpoint,
    `curve.jsonl` with one line per validation (step, running means of the losses, figures of the averaged model,
    minutes, samples per second, learning rate), `logs` of the tracker, and `skipped.txt` if samples had to be skipped.

    Args:
        accelerator: of `make_accelerator`.
        model: parameters that need no gradient stay as they are.
        samples: one for each place in the run, `steps x accumulation x batch x processes` of them, so that what a step
            sees depends on the seed alone. A sample's "skipped" entry, if any, is a list of names that could not be
            read.
        objective: what to train for.
        collate: samples to a batch; default: torch's.
        unit: what the progress bar counts.

    Raises:
        FloatingPointError: a loss or gradient is no number any more. The batch is written to OUTPUT_DIR, the weights
            did not change, the last checkpoint stays.
        OSError: a checkpoint cannot be written; the one before it stays whole.
    """
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    main = accelerator.is_main_process
    set_seed(args.seed)
    model.train()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    ema = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    betas = tuple(args.adam_betas)
    optimizers = [
        build_optimizer(model, args.optimizer, args.learning_rate, args.adam_learning_rate, args.weight_decay, betas)
    ]
    networks, critic = [model], objective.critic
    if critic is not None:
        networks.append(critic.network)
        optimizers.append(torch.optim.Adam(critic.network.parameters(), lr=critic.learning_rate, betas=critic.betas))
    learning_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    loader = DataLoader(
        samples,
        args.batch_size,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        collate_fn=collate,
        generator=torch.Generator(),  # its own: the model's noise must not depend on how often a loader was started
    )
    state = RunState()
    plain = model
    *prepared, loader = accelerator.prepare(*networks, *optimizers, loader)
    networks, optimizers = prepared[: len(networks)], prepared[len(networks) :]
    model = networks[0]
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema, state)
    curve = Curve(output_dir / "curve.jsonl")
    if main:
        trained = sum(parameter.numel() for parameter in plain.parameters() if parameter.requires_grad)
        logger.info("%.2f M parameters to train", trained / 1e6)
    if accelerator.log_with:
        accelerator.init_trackers(output_dir.resolve().name, config=_trackable(args))

    step = resume_checkpoint(accelerator, output_dir, args.resume_from_checkpoint)
    if main:
        curve.forget_after(step)
    if step:
        loader = accelerator.skip_first_batches(loader, step * args.gradient_accumulation_steps)
    per_step = args.batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    progress = tqdm(
        total=args.max_train_steps * per_step,
        initial=step * per_step,
        disable=not main,
        unit=unit,
        unit_scale=True,
        mininterval=5,
    )
    stopping = _StopRequest()
    started, minutes_before = time.monotonic(), state.minutes
    first_step, sums = step, {}
    batches = iter(loader)
    while step < args.max_train_steps:
        batch = next(batches)
        if step == first_step and main and not sums:
            logger.info("The first batch came after %.1f s", time.monotonic() - started)
        state.skip(batch.pop("skipped", []))
        scale = learning_rate_scale(
            step, args.warmup_steps, args.max_train_steps, args.final_lr_scale, args.lr_schedule
        )
        for optimizer, rates in zip(optimizers, learning_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
        trains_model, trains_critic = objective.trains(step)
        with accelerator.accumulate(*networks):
            with accelerator.autocast(), torch.set_grad_enabled(trains_model):
                output = objective.forward(model, batch)
                numbers = objective.model_loss(output, batch, step) if trains_model else {}
            if trains_model:
                accelerator.backward(numbers["loss"])
            if trains_critic:
                with accelerator.autocast():
                    numbers |= critic.loss(networks[1], output.detach(), batch)
                accelerator.backward(numbers["critic_loss"])
            for name, number in numbers.items():
                sums[name] = sums.get(name, 0) + number.detach().float() / args.gradient_accumulation_steps
            trained = optimizers[:1] * trains_model + optimizers[1:] * trains_critic
            if accelerator.sync_gradients:
                state.minutes = minutes_before + (time.monotonic() - started) / 60
                late = args.max_minutes is not None and time.monotonic() - started > 60 * args.max_minutes
                sums["stop"] = torch.tensor(float(late or stopping.requested), device=accelerator.device)
                # One exchange for all numbers; every process comes to the same conclusions.
                values = accelerator.reduce(torch.stack(list(sums.values())), "mean").tolist()
                numbers, sums = dict(zip(sums, values, strict=True)), {}
                asked_to_stop = numbers.pop("stop") > 0
                if args.max_grad_norm and trains_model:
                    numbers["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
                _check_finite(numbers, accelerator, batch, output_dir, step)
            for optimizer in trained:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        if not accelerator.sync_gradients:
            continue
        step += 1
        if trains_model:
            ema.step(plain.parameters())
        state.average(numbers, AVERAGE_DECAY)
        progress.update(per_step)
        skipped = {"skipped": len(state.skipped)} if state.skipped else {}
        progress.set_postfix(step=step, loss=f"{state.averages.get('loss', math.nan):.4f}", **skipped, refresh=False)
        last = step == args.max_train_steps or asked_to_stop
        if step % args.validation_steps == 0 or last:
            state.share_skipped(output_dir, main)
            if main:
                row = {"step": step, **state.averages}
                with _averaged_weights(plain, ema):
                    row |= objective.validate(plain, step)
                seconds = time.monotonic() - started
                row |= {"minutes": minutes_before + seconds / 60, "lr": scale * args.learning_rate}
                row[f"{unit}s_per_second"] = (step - first_step) * per_step / seconds
                curve.append(row)
                state.last_row = row
                logger.info(", ".join(f"{name} {number:.5g}" for name, number in row.items()))
                accelerator.log(row, step=step)
                for tracker in accelerator.trackers:
                    if objective.pictures and hasattr(tracker, "log_images"):  # not every tracker shows pictures
                        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                        tracker.log_images(objective.pictures, step=step, **layout)
        if step % args.checkpointing_steps == 0 or last:
            state.share_skipped(output_dir, main)
            save_checkpoint(accelerator, output_dir, step, args.checkpoints_total_limit)
            if main:
                averaged = copy.deepcopy(plain)
                ema.copy_to(averaged.parameters())
                averaged.to(getattr(torch, args.save_dtype))
                with replace_folder(output_dir / "model") as folder:
                    objective.save(averaged, folder, state)
        if asked_to_stop:
            logger.info("Stopped after step %d; go on with --resume_from_checkpoint latest.", step)
            break
    progress.close()
    stopping.restore()
    accelerator.end_training()


def _check_finite(
    numbers: dict[str, float], accelerator: Accelerator, batch: dict[str, Tensor], output_dir: Path, step: int
) -> None:
    """Raises FloatingPointError before a number that is none reaches the weights, and keeps the batch."""
    # In float16 gradients may overflow: the scaler then leaves the step out and scales less.
    checked = {name: value for name, value in numbers.items() if name != "grad_norm" or accelerator.scaler is None}
    bad = [f"{name} = {value}" for name, value in checked.items() if not math.isfinite(value)]
    if bad:
        file = dump_batch(output_dir, step, accelerator.process_index, batch)
        raise FloatingPointError(
            f"After step {step}: {', '.join(bad)}. The batch is in {file}; the weights did not change, and the last "
            "checkpoint is whole. A lower --learning_rate or --mixed_precision no often helps."
        )


@contextmanager
def _averaged_weights(model: nn.Module, ema: EMAModel) -> Iterator[None]:
    """The model with its averaged weights, in eval mode."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    try:
        yield
    finally:
        model.train()
        ema.restore(model.parameters())


class _StopRequest:
    """Whether the system has asked the process to end (SIGTERM, as batch systems send before they kill)."""

    def __init__(self):
        self.requested = False
        self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.requested = True

    def restore(self) -> None:
        signal.signal(signal.SIGTERM, self._before)


def _trackable(args: argparse.Namespace) -> dict[str, str | float]:
    """Settings as trackers take them: numbers and strings."""
    plain = (bool, int, float, str)
    return {name: value if isinstance(value, plain) else str(value) for name, value in vars(args).items()}
