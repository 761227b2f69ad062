"""`gpstoken convert`: an official checkpoint to a folder for `from_pretrained`."""

from __future__ import annotations

import argparse
import re
import secrets
import shutil
from pathlib import Path

import torch

from ..image_processor import GPSTokenImageProcessor
from ..models.autoencoder_gpstoken import AutoencoderGPSToken
from .codec import processor_for
from .files import prepare_folder

# What this command writes; --overwrite removes folders of such files and no others.
_OWN_FILE = re.compile(r"config\.json|preprocessor_config\.json|diffusion_pytorch_model.*\.safetensors(\.index\.json)?")


def convert(args: argparse.Namespace) -> int:
    """Write the model and its processor's settings; the folder appears whole or not at all."""
    target = args.output.resolve()
    _check_target(target, args.overwrite)
    prepare_folder(target.parent)
    dtype = getattr(torch, args.dtype)
    model = AutoencoderGPSToken.from_single_file(args.checkpoint, preset=args.preset, config=args.config, dtype=dtype)
    _save(model, processor_for(model, args.checkpoint), target)
    if not args.quiet:
        size = f"{model.num_parameters():,} parameters in {args.dtype}"
        print(f"{args.output}: {size}, {model.config.num_tokens} tokens per tile")
    return 0


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"the output {target} is a file, but it must be a folder.")
    names = sorted(entry.name for entry in target.iterdir())
    if names and not overwrite:
        raise ValueError(f"the output folder {target} is not empty. Choose another one, or add --overwrite.")
    foreign = [name for name in names if not _OWN_FILE.fullmatch(name)]
    if foreign:
        raise ValueError(
            f"the output folder {target} holds more than a converted model ({', '.join(foreign[:5])}), so it "
            "is not overwritten. Choose another one."
        )


def _save(model: AutoencoderGPSToken, processor: GPSTokenImageProcessor, target: Path) -> None:
    mark = secrets.token_hex(4)
    fresh, old = (target.with_name(f".{target.name}.{mark}.{end}") for end in ("tmp", "old"))
    try:
        fresh.mkdir()
        model.save_pretrained(fresh)
        processor.save_pretrained(fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except BaseException:  # Ctrl-C too leaves what was there before
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
