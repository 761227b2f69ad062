"""Checkpoints of a training run: folders `checkpoint-STEP`, each written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

logger = logging.getLogger(__name__)

# What a run leaves beside its checkpoints.
_OF_A_RUN = ("model", "curve.jsonl", "logs", "skipped.txt")
_SETTINGS_FILE = "settings.json"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """After how many steps a checkpoint was taken."""
    return int(checkpoint.name.split("-")[-1])


def claim_output_dir(accelerator: Accelerator, output_dir: Path, wanted: str | None, overwrite: bool) -> None:
    """Make the folder of a run, and see that no other run is in it. Every process must call this.

    Args:
        wanted: the checkpoint to go on from, see [`resume_checkpoint`].
        overwrite: remove what another run left.

    Raises FileExistsError: another run is in the folder, and nobody said what shall become of it.
    """
    left = [*list_checkpoints(output_dir), *(output_dir / name for name in _OF_A_RUN if (output_dir / name).exists())]
    goes_on = wanted is not None and find_checkpoint(output_dir, wanted, must_exist=False).parent == output_dir
    if left and not (goes_on or overwrite):
        raise FileExistsError(
            f"Expected an --output_dir without a run in it, got {output_dir} with {left[0].name}. Go on with that run "
            "by --resume_from_checkpoint latest, choose another folder, or replace it by --overwrite."
        )
    accelerator.wait_for_everyone()  # before the main process removes what the others look at
    if accelerator.is_main_process:
        for path in left if overwrite and not goes_on else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, keep: int, settings: dict[str, Any]) -> None:
    """Write the state of a run, into a temporary folder that is renamed once complete; remove all but `keep`.

    `settings` are what [`check_checkpoint`] compares.

    Checkpoints of later steps go too: the run went back behind them, and takes those steps anew. Every process must
    call this.

    Raises OSError: it cannot be written; the checkpoints before it stay.
    """
    temporary, final = output_dir / f"tmp-checkpoint-{step}", output_dir / f"checkpoint-{step}"
    if accelerator.is_main_process:
        for left_over in output_dir.glob("tmp-checkpoint-*"):  # of a process that was killed
            shutil.rmtree(left_over)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        if accelerator.is_main_process:
            (temporary / _SETTINGS_FILE).write_text(json.dumps(settings), encoding="utf-8")
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
    checkpoints = list_checkpoints(output_dir)
    kept = [path for path in checkpoints if checkpoint_step(path) <= step][-keep:]
    for path in checkpoints:
        if path not in kept:
            shutil.rmtree(path)


def find_checkpoint(output_dir: Path, wanted: str, must_exist: bool = True) -> Path:
    """The folder that --resume_from_checkpoint means; for "latest" and no checkpoint yet, one that does not exist.

    Args:
        output_dir: the run's folder.
        wanted: "latest" for the newest checkpoint of the run, the name of one of them, or a path.

    Raises FileNotFoundError: no such folder.
    """
    if wanted == "latest":
        return (list_checkpoints(output_dir) or [output_dir / "checkpoint-0"])[-1]
    inside = output_dir / wanted
    checkpoint = inside if Path(wanted).name == wanted and inside.is_dir() else Path(wanted)
    if must_exist and not checkpoint.is_dir():
        known = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
        raise FileNotFoundError(
            f'Expected a checkpoint\'s folder, its name, or "latest", but there is no checkpoint at {checkpoint}. '
            f"{output_dir} has {known}."
        )
    return output_dir / checkpoint.name if checkpoint.resolve().parent == output_dir.resolve() else checkpoint


def check_checkpoint(output_dir: Path, wanted: str | None, settings: dict[str, Any]) -> None:
    """See that a run can go on from a checkpoint, see [`find_checkpoint`], before anything is loaded or changed.

    Args:
        settings: of this run, in JSON's types: what decides which numbers a checkpoint holds.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the checkpoint was taken with other settings.
    """
    if wanted is None or not (file := find_checkpoint(output_dir, wanted) / _SETTINGS_FILE).is_file():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    others = [name for name, value in settings.items() if before.get(name, value) != value]
    if others:
        differences = [
            f"{name} is {before[name]} there and {settings[name]} here"
            if not isinstance(settings[name], dict)
            else f"{name} differ, such as {_first_difference(before[name], settings[name])}"
            for name in others
        ]
        raise ValueError(
            f"Expected the settings that {file.parent} was trained with, got others: {'; '.join(differences)}. Give "
            f"the same ones to go on, or start another run from its weights: --pretrained {output_dir / 'model'}."
        )


def _first_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    name = next(name for name in [*before, *now] if before.get(name) != now.get(name))
    return f"{name}: {before.get(name, 'not trained')} there and {now.get(name, 'not trained')} here"


def resume_checkpoint(accelerator: Accelerator, output_dir: Path, wanted: str | None) -> None:
    """Load a checkpoint, see [`find_checkpoint`], into everything that was prepared; None loads nothing.

    Raises FileNotFoundError: no such folder.
    """
    if wanted is None:
        return
    checkpoint = find_checkpoint(output_dir, wanted)
    if checkpoint.is_dir():
        accelerator.load_state(str(checkpoint))
    else:
        logger.info("No checkpoint in %s yet: starting from the beginning.", output_dir)


def round_weights(model: nn.Module, dtype: str) -> None:
    """Make weights what they are to be saved as: "float32", "bfloat16" or "float16".

    `model.to` leaves a layout model as it is, which computes in float32 alone; loaded again, it does so again.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
