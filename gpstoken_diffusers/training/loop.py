"""The loop that every training script runs: steps, averaging, checkpoints, curves, progress, and how it ends."""

from __future__ import annotations

import argparse
import copy
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..safe_files import replace_folder
from .checkpoints import check_checkpoint, claim_output_dir, resume_checkpoint, round_weights, save_checkpoint
from .launch import start_trackers
from .objective import Objective
from .optimization import build_optimizer, learning_rate_scale
from .run_record import Curve, RunState, dump_batch

logger = logging.getLogger(__name__)

AVERAGE_DECAY = 0.98
"""Share of the old in the running means that progress bar and curve show."""


def train(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: nn.Module,
    samples: Dataset,
    objective: Objective,
    collate: Callable | None = None,
    unit: str = "image",
) -> None:
    """Trains a model; `args` are those of `launch.add_loop_arguments`.

    OUTPUT_DIR gets `checkpoint-STEP` folders to resume from, `model` with the averaged weights at every checkpoint,
    `curve.jsonl` with one line per validation (step, running means of the losses, figures of the averaged model,
    minutes, samples per second, learning rate), `logs` of the tracker, and `skipped.txt` if samples had to be skipped.

    Args:
        accelerator: of `launch.make_accelerator`.
        model: parameters that need no gradient stay as they are.
        samples: one for each place in the run, `steps x accumulation x batch x processes` of them, so that what a step
            sees depends on the seed alone. A sample's "skipped" entry, if any, is a list of names that could not be
            read.
        objective: what to train for.
        collate: samples to a batch; default: torch's.
        unit: what the progress bar counts.

    Raises:
        FloatingPointError: a loss or gradient is NaN or infinite. The batch is written to OUTPUT_DIR, the weights did
            not change, the last checkpoint stays.
        FileExistsError: OUTPUT_DIR has another run in it, see `checkpoints.claim_output_dir`.
        OSError: a checkpoint or the model cannot be written; those before stay whole.
        ValueError: a checkpoint of other settings, see `checkpoints.check_checkpoint`; a rate over minutes
            without a number of them.
    """
    if args.lr_schedule == "minutes" and not args.max_minutes:
        raise ValueError("--lr_schedule minutes needs --max_minutes, the time of the whole run.")
    set_seed(args.seed)
    run = _Run(args, accelerator, model, samples, objective, collate, unit)
    run.resume()
    run.go()
    accelerator.end_training()


class _Run:
    """One call of [`train`]: what it holds, and what it does at each step."""

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        model: nn.Module,
        samples: Dataset,
        objective: Objective,
        collate: Callable | None,
        unit: str,
    ):
        self.args, self.accelerator, self.objective, self.unit = args, accelerator, objective, unit
        self.main = accelerator.is_main_process
        self.output_dir = Path(args.output_dir)
        claim_output_dir(accelerator, self.output_dir, args.resume_from_checkpoint, args.overwrite)
        self.state, self.curve = RunState(), Curve(self.output_dir / "curve.jsonl")
        self.plain = model.train()
        if args.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.ema = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
        rates = args.learning_rate, args.adam_learning_rate
        optimizers = [build_optimizer(model, args.optimizer, *rates, args.weight_decay, tuple(args.adam_betas))]
        networks, critic = [model], objective.critic
        if critic is not None:
            networks.append(critic.network)
            optimizers.append(torch.optim.Adam(critic.network.parameters(), critic.learning_rate, critic.betas))
        self.learning_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        loader = DataLoader(
            samples,
            args.batch_size,
            num_workers=args.num_workers,
            persistent_workers=args.num_workers > 0,
            collate_fn=collate,
            worker_init_fn=_ignore_stop_requests,
            generator=torch.Generator(),  # its own: the model's noise must not depend on how often a loader was started
        )
        *prepared, self.loader = accelerator.prepare(*networks, *optimizers, loader)
        self.networks, self.optimizers = prepared[: len(networks)], prepared[len(networks) :]
        self.ema.to(accelerator.device)
        accelerator.register_for_checkpointing(self.ema, self.state)
        self.per_step = args.batch_size * accelerator.num_processes * args.gradient_accumulation_steps
        trained = {name: list(value.shape) for name, value in self.plain.named_parameters() if value.requires_grad}
        self.settings = {
            "optimizer": args.optimizer,
            "critic": critic is not None,
            "fp16": accelerator.scaler is not None,
            "trained weights": trained,
        }

    def resume(self) -> None:
        """Goes back to the checkpoint that was asked for, if any: weights, curve and place in the data."""
        args, accelerator = self.args, self.accelerator
        check_checkpoint(self.output_dir, args.resume_from_checkpoint, self.settings)
        if accelerator.log_with:
            start_trackers(accelerator, args)
        resume_checkpoint(accelerator, self.output_dir, args.resume_from_checkpoint)
        if self.main:
            self.curve.forget_after(self.step)
        if self.step:
            self.loader = accelerator.skip_first_batches(self.loader, self.step * args.gradient_accumulation_steps)

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        return self.state.step

    def go(self) -> None:
        """The steps that are left, until the end, the time limit or SIGTERM."""
        args, state = self.args, self.state
        if self.main:
            trained = sum(parameter.numel() for parameter in self.plain.parameters() if parameter.requires_grad)
            logger.info("%.2f M parameters to train", trained / 1e6)
        self.first_step, self.minutes_before, self.started = self.step, state.minutes, time.monotonic()
        total, done = args.max_train_steps * self.per_step, self.step * self.per_step
        bar = tqdm(total=total, initial=done, disable=not self.main, unit=self.unit, unit_scale=True, mininterval=5)
        with bar, _stop_requests() as requested:
            batches = iter(self.loader)
            late = killed = False
            while self.step < args.max_train_steps and not (late or killed):
                numbers, late, killed = self._take_step(batches, requested)
                state.average(numbers, AVERAGE_DECAY)
                bar.update(self.per_step)
                skipped = {"skipped": len(state.skipped)} if state.skipped else {}
                loss = f"{state.averages.get('loss', math.nan):.4f}"
                bar.set_postfix(step=self.step, loss=loss, **skipped, refresh=False)
                last = late or self.step == args.max_train_steps
                # A batch system kills soon after it has asked: there may be no time for a validation.
                validates = not killed and (last or self.step % args.validation_steps == 0)
                saves = last or killed or self.step % args.checkpointing_steps == 0
                if validates or saves:
                    state.share_skipped(self.output_dir, self.main)
                if validates and self.main:
                    self._validate()
                if saves:
                    self._save()
        if late or killed:
            logger.info("Stopped after step %d; go on with --resume_from_checkpoint latest.", self.step)

    def _take_step(self, batches: Iterator[dict], requested: Callable[[], bool]) -> tuple[dict[str, float], bool, bool]:
        """One step of the optimizers.

        Returns: its numbers, averaged over processes; whether the time is over; whether the system asks to end.
        """
        args, accelerator = self.args, self.accelerator
        trains_model, trains_critic = self.objective.trains(self.step)
        trained = self.optimizers[:1] * trains_model + self.optimizers[1:] * trains_critic
        self._set_learning_rates()
        sums: dict[str, Tensor] = {}
        for _ in range(args.gradient_accumulation_steps):
            batch = next(batches)
            if self.step == self.first_step and not sums and self.main:
                logger.info("The first batch came after %.1f s", time.monotonic() - self.started)
            self.state.skip(batch.pop("skipped", []))
            with accelerator.accumulate(*self.networks):
                for name, number in self._backward(batch, trains_model, trains_critic).items():
                    sums[name] = sums.get(name, 0) + number.detach().float() / args.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    numbers, late, killed = self._share(sums, requested())
                    if args.max_grad_norm and trains_model:
                        norm = accelerator.clip_grad_norm_(self.networks[0].parameters(), args.max_grad_norm)
                        numbers["grad_norm"] = norm.item()
                    self._check_finite(numbers, batch)
                for optimizer in trained:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
        if trains_model:
            self.ema.step(self.plain.parameters())
        self.state.step += 1
        return numbers, late, killed

    def _learning_rate_scale(self, step: int) -> float:
        args = self.args
        steps = (step, args.warmup_steps, args.max_train_steps)
        share = self.state.minutes / args.max_minutes if args.lr_schedule == "minutes" else 0.0
        return learning_rate_scale(*steps, args.final_lr_scale, args.lr_schedule, share)

    def _set_learning_rates(self) -> None:
        scale = self._learning_rate_scale(self.step)
        for optimizer, rates in zip(self.optimizers, self.learning_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale

    def _backward(self, batch: dict[str, Tensor], trains_model: bool, trains_critic: bool) -> dict[str, Tensor]:
        """The losses of a batch, whose gradients are added to those that are there."""
        accelerator, objective = self.accelerator, self.objective
        with accelerator.autocast(), torch.set_grad_enabled(trains_model):
            output = objective.forward(self.networks[0], batch)
            numbers = objective.model_loss(output, batch, self.step) if trains_model else {}
        if trains_model:
            accelerator.backward(numbers["loss"])
        if trains_critic:
            with accelerator.autocast():
                numbers |= objective.critic.loss(self.networks[1], output.detach(), batch)
            accelerator.backward(numbers["critic_loss"])
        return numbers

    def _share(self, sums: dict[str, Tensor], requested: bool) -> tuple[dict[str, float], bool, bool]:
        """Numbers averaged over the processes; whether the time is over, or the end was asked for, in one of them.

        One exchange for everything; every process comes to the same conclusions.
        """
        seconds = time.monotonic() - self.started
        args, minutes = self.args, self.minutes_before + seconds / 60
        counted = minutes if args.lr_schedule == "minutes" else seconds / 60
        late = args.max_minutes is not None and counted > args.max_minutes
        ends = torch.tensor([minutes, late, requested], dtype=torch.float32, device=self.accelerator.device)
        shared = self.accelerator.reduce(torch.cat([torch.stack(list(sums.values())), ends]), "mean").tolist()
        *values, self.state.minutes, late, requested = shared
        return dict(zip(sums, values, strict=True)), late > 0, requested > 0

    def _check_finite(self, numbers: dict[str, float], batch: dict[str, Tensor]) -> None:
        """Raises FloatingPointError before NaN or infinity reaches the weights, and keeps the batch."""
        # In float16 gradients may overflow: the scaler then leaves the step out and scales less.
        scaled = self.accelerator.scaler is not None
        checked = {name: value for name, value in numbers.items() if name != "grad_norm" or not scaled}
        bad = [f"{name} = {value}" for name, value in checked.items() if not math.isfinite(value)]
        if bad:
            file = dump_batch(self.output_dir, self.step, self.accelerator.process_index, batch)
            raise FloatingPointError(
                f"After step {self.step}: {', '.join(bad)}. The batch is in {file}; the weights did not change, and "
                "the last checkpoint is whole. A lower --learning_rate or --mixed_precision no often helps."
            )

    def _validate(self) -> None:
        """A row of the curve: running means, and figures and pictures of the averaged model."""
        row = {"step": self.step, **self.state.averages}
        with _averaged_weights(self.plain, self.ema):
            row |= self.objective.validate(self.plain, self.step)
        seconds = time.monotonic() - self.started
        row["minutes"] = self.minutes_before + seconds / 60
        row["lr"] = self._learning_rate_scale(self.step - 1) * self.args.learning_rate
        row[f"{self.unit}s_per_second"] = (self.step - self.first_step) * self.per_step / seconds
        self.curve.append(row)
        self.state.last_row = row
        logger.info(", ".join(f"{name} {number:.5g}" for name, number in row.items()))
        self.accelerator.log(row, step=self.step)
        for tracker in self.accelerator.trackers:
            if self.objective.pictures and hasattr(tracker, "log_images"):  # not every tracker shows pictures
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(self.objective.pictures, step=self.step, **layout)

    def _save(self) -> None:
        """A checkpoint, and the averaged model by itself."""
        save_checkpoint(self.accelerator, self.output_dir, self.step, self.args.checkpoints_total_limit, self.settings)
        if not self.main:
            return
        averaged = copy.deepcopy(self.plain)
        self.ema.copy_to(averaged.parameters())
        round_weights(averaged, self.args.save_dtype)
        folder = self.output_dir / "model"
        try:
            with replace_folder(folder) as fresh:
                self.objective.save(averaged, fresh, self.state)
        except (OSError, SafetensorError) as error:  # safetensors has an error of its own
            raise OSError(
                f"{folder} could not be written after step {self.step} ({error}). Is the disk full? The checkpoint of "
                "that step is whole, and a model that was there before is too: make room, then go on with "
                "--resume_from_checkpoint latest."
            ) from error


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


def _ignore_stop_requests(worker: int) -> None:
    """Leaves the end of a loading process to the training process, which still needs it for the step at hand.

    Batch systems send SIGTERM to all processes of a run.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether the system has asked the process to end (SIGTERM, as batch systems send before they kill)."""
    requests = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: requests.append(number))
    try:
        yield lambda: bool(requests)
    finally:
        signal.signal(signal.SIGTERM, before)
