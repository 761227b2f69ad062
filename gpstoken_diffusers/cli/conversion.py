"""`gpstoken convert`: an official checkpoint to a folder for `from_pretrained`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from ..models.autoencoder_gpstoken import AutoencoderGPSToken
from ..safe_files import replace_folder
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
    with replace_folder(target) as folder:
        model.save_pretrained(folder)
        processor_for(model, args.checkpoint).save_pretrained(folder)
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
