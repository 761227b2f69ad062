"""Checkpoints of a training run: folders `checkpoint-STEP`, each written whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

logger = logging.getLogger(__name__)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """After how many steps a checkpoint was taken."""
    return int(checkpoint.name.split("-")[-1])


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, keep: int) -> None:
    """Write the state of a run, into a temporary folder that is renamed once complete; remove all but `keep`.

    Every process must call this.

    Raises OSError: it cannot be written; the checkpoints before it stay.
    """
    temporary, final = output_dir / f"tmp-checkpoint-{step}", output_dir / f"checkpoint-{step}"
    if accelerator.is_main_process:
        for left_over in output_dir.glob("tmp-checkpoint-*"):  # of a process that was killed
            shutil.rmtree(left_over)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"The checkpoint of step {step} could not be written to {output_dir} ({error}). Is the disk full? Earlier "
            "checkpoints are whole: make room, then go on with --resume_from_checkpoint latest."
        ) from error
    # Other processes write files of their own into the folder: it must not be renamed under them.
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in list_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old)


def resume_checkpoint(accelerator: Accelerator, output_dir: Path, wanted: str | None) -> None:
    """Load a checkpoint into everything that was prepared.

    Args:
        output_dir: the run's folder.
        wanted: a checkpoint's folder, "latest" for the newest of the run (none yet is fine), or None for none.

    Raises FileNotFoundError: no such folder.
    """
    if wanted is None:
        return
    if wanted == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            logger.info("No checkpoint in %s yet: starting from the beginning.", output_dir)
            return
        checkpoint = checkpoints[-1]
    else:
        checkpoint = Path(wanted)
        if not checkpoint.is_dir():
            raise FileNotFoundError(f"There is no checkpoint at {checkpoint}.")
    accelerator.load_state(str(checkpoint))
