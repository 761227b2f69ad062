"""How a run is started: the arguments that all training scripts share, and accelerate's view of the machine."""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Callable
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

# What trackers call the name of a run in a project.
_RUN_NAMES = {
    "clearml": "task_name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "trackio": "name",
    "wandb": "name",
}


def _number(kind: type, what: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """A type for argparse: numbers that fit; others are refused with what was expected."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):  # NaN fits nothing
            raise argparse.ArgumentTypeError(f"expected {what}, got {text}")
        return value

    return parse


COUNT = _number(int, "an integer of at least 1", lambda value: value >= 1)
NATURAL = _number(int, "an integer of at least 0", lambda value: value >= 0)
RATE = _number(float, "a number above 0", lambda value: 0 < value < math.inf)
AMOUNT = _number(float, "a number of at least 0", lambda value: 0 <= value < math.inf)
SHARE = _number(float, "a share from 0 to 1", lambda value: 0 <= value <= 1)
SHARE_BELOW_1 = _number(float, "a share from 0 to below 1", lambda value: 0 <= value < 1)
"""Types of arguments: a run must not find out after an hour that a number makes no sense."""

PRECISIONS = ("no", "fp16", "bf16")


def add_loop_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `train` reads; scripts change their defaults by `parser.set_defaults`."""
    add = parser.add_argument
    add("--output_dir", required=True, help="Where checkpoints, the model, curves and pictures go.")
    add("--batch_size", type=COUNT, default=32, help="Samples per step and process.")
    add("--gradient_accumulation_steps", type=COUNT, default=1)
    add("--max_train_steps", type=COUNT, default=20000)
    add("--optimizer", default="muon", choices=OPTIMIZERS, help="muon: weight matrices; the rest by AdamW.")
    add("--learning_rate", type=RATE, default=2e-3, help="Of the chosen optimizer.")
    add("--adam_learning_rate", type=RATE, default=1e-3, help="Of what Muon does not train.")
    add("--adam_betas", type=SHARE_BELOW_1, nargs=2, default=(0.9, 0.99), metavar=("BETA1", "BETA2"))
    add("--weight_decay", type=AMOUNT, default=0.01)
    add(
        "--lr_schedule",
        default="cosine",
        choices=LR_SCHEDULES,
        help="A cosine over --max_train_steps, a constant, or a cosine over --max_minutes, which then count from the "
        "run's first start.",
    )
    add("--warmup_steps", type=NATURAL, default=100)
    add("--final_lr_scale", type=SHARE, default=0.02, help="The cosine ends at this share of the learning rate.")
    add("--max_grad_norm", type=AMOUNT, default=1.0, help="0 does not clip.")
    add("--ema_decay", type=SHARE, default=0.999, help="Of the averaged weights, which are the ones that are saved.")
    add(
        "--mixed_precision",
        choices=PRECISIONS,
        help="Default: what accelerate is told, or bf16 without accelerate launch.",
    )
    add("--gradient_checkpointing", action="store_true", help="Less memory for a second forward pass.")
    add("--num_workers", type=NATURAL, default=1, help="Processes that prepare batches, for each training process.")
    add("--checkpointing_steps", type=COUNT, default=500)
    add("--checkpoints_total_limit", type=COUNT, default=2)
    add("--save_dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="Of OUTPUT_DIR/model.")
    add("--resume_from_checkpoint", help='A checkpoint\'s folder, its name in OUTPUT_DIR, or "latest".')
    add("--overwrite", action="store_true", help="Remove the run that is in OUTPUT_DIR, and start anew.")
    add("--validation_steps", type=COUNT, default=500)
    add("--max_minutes", type=AMOUNT, help="Stop, with a checkpoint, after this many minutes.")
    add("--seed", type=NATURAL, default=0)
    add("--report_to", default="tensorboard", help='Tracker of accelerate, or "none". TensorBoard: OUTPUT_DIR/logs.')
    add("--tracker_project_name", default="gpstoken", help="The tracker's project; its runs are named as OUTPUT_DIR.")


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """accelerate's view of this run: devices, processes, precision, tracker. Sets `args.mixed_precision`.

    Raises ValueError: a launch configuration that shards weights over processes, a precision that the scripts do not
    train in, or a tracker that is not installed.
    """
    # accelerate launch hands on what its own options and its configuration say.
    args.mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "bf16")
    if args.mixed_precision not in PRECISIONS:
        raise ValueError(
            f"Expected a mixed precision of {', '.join(PRECISIONS)}, got {args.mixed_precision} from accelerate's "
            "configuration. Give one of them by --mixed_precision."
        )
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
    if tracker is not None and not accelerator.log_with:
        raise ValueError(f"Expected a tracker that is installed, got --report_to {tracker}: pip install it first.")
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate's configuration asks for {accelerator.distributed_type}, which shards weights over processes. "
            "These scripts average the weights and train a critic beside them, each process with all of it: choose "
            "plain data parallelism in `accelerate config`. The largest released autoencoder needs 3 GB that way."
        )
    return accelerator


def start_trackers(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """A run named as its folder, in one project for all of them."""
    name = Path(args.output_dir).resolve().name
    options = {tracker: {option: name} for tracker, option in _RUN_NAMES.items()}
    accelerator.init_trackers(args.tracker_project_name, trackable_settings(args), options)


def trackable_settings(args: argparse.Namespace) -> dict[str, str | float]:
    """Settings as trackers take them: numbers and strings."""
    plain = (bool, int, float, str)
    return {name: value if isinstance(value, plain) else str(value) for name, value in vars(args).items()}
