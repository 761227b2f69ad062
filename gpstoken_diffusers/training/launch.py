"""How a run is started: the arguments that all training scripts share, and accelerate's view of the machine."""

from __future__ import annotations

import argparse
import logging
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    is_tensorboard_available,
)

from .optimization import LR_SCHEDULES, OPTIMIZERS

logger = logging.getLogger(__name__)


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
    add("--resume_from_checkpoint", help='A checkpoint\'s folder, its name in OUTPUT_DIR, or "latest".')
    add("--overwrite", action="store_true", help="Remove the run that is in OUTPUT_DIR, and start anew.")
    add("--validation_steps", type=int, default=500)
    add("--max_minutes", type=float, help="Stop, with a checkpoint, after this many minutes.")
    add("--seed", type=int, default=0)
    add("--report_to", default="tensorboard", help='Tracker of accelerate, or "none". Logs go to OUTPUT_DIR/logs.')


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


def trackable_settings(args: argparse.Namespace) -> dict[str, str | float]:
    """Settings as trackers take them: numbers and strings."""
    plain = (bool, int, float, str)
    return {name: value if isinstance(value, plain) else str(value) for name, value in vars(args).items()}
