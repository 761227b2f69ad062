"""`gpstoken convert` and `gpstoken download`: official files to a folder for `from_pretrained`, or to the cache."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars

from ..models.autoencoder_gpstoken import AutoencoderGPSToken
from ..models.transformer_gpstoken import GPSTokenTransformerModel
from ..pipelines.pipeline_gpstoken import GPSTokenPipeline
from ..safe_files import replace_folder
from .codec import processor_for
from .files import prepare_folder

# What this command writes; --overwrite removes folders of such files and no others.
_WEIGHTS = r"diffusion_pytorch_model.*\.safetensors(\.index\.json)?"
_OWN_FILE = re.compile(
    rf"config\.json|preprocessor_config\.json|{_WEIGHTS}|model_index\.json|pipeline\.py|"
    r"block\.py|modular_config\.json|modular_model_index\.json|"
    rf"(autoencoder|transformer|layout_bank)/(config\.json|gpstoken_diffusers\.py|{_WEIGHTS})|"
    r"image_processor/(preprocessor_config\.json|gpstoken_diffusers\.py)|"
    r"scheduler/(scheduler_config\.json|gpstoken_diffusers\.py)"
)


def convert(args: argparse.Namespace) -> int:
    """Write the model and its processor's settings, or a pipeline; the folder appears whole or not at all."""
    if args.quiet:
        disable_progress_bars()
    target = args.output.resolve()
    _check_target(target, args.overwrite)
    checkpoint = Path(args.checkpoint)
    if checkpoint.exists() and target in checkpoint.resolve().parents:
        raise ValueError(f"the output folder {target} holds the checkpoint itself. Choose another one.")
    prepare_folder(target.parent)
    dtype = getattr(torch, args.dtype)
    if args.autoencoder is None and args.layouts is None:
        _convert_autoencoder(args, target, dtype)
    else:
        _convert_generator(args, target, dtype)
    return 0


def _convert_autoencoder(args: argparse.Namespace, target: Path, dtype: torch.dtype) -> None:
    model = AutoencoderGPSToken.from_single_file(args.checkpoint, preset=args.preset, config=args.config, dtype=dtype)
    with replace_folder(target) as folder:
        model.save_pretrained(folder)
        processor_for(model, Path(args.checkpoint)).save_pretrained(folder)
    if not args.quiet:
        size = f"{model.num_parameters():,} parameters in {args.dtype}"
        print(f"{args.output}: {size}, {model.config.num_tokens} tokens per tile")


def _convert_generator(args: argparse.Namespace, target: Path, dtype: torch.dtype) -> None:
    if args.preset is not None:
        raise ValueError("--preset is for tokenizers: of a generator, --autoencoder names the tokenizer.")
    generator = GPSTokenTransformerModel.from_single_file(args.checkpoint, config=args.config, dtype=dtype)
    pipe = GPSTokenPipeline.from_official(generator, args.autoencoder or "m128", args.layouts, dtype=dtype)
    with replace_folder(target) as folder:
        pipe.save_pretrained(folder)
    if not args.quiet:
        layouts = "no layouts" if pipe.layout_bank is None else f"{len(pipe.layout_bank):,} layouts"
        size = f"{generator.num_parameters():,} parameters of the generator in {args.dtype}"
        print(f"{args.output}: {size}, {generator.config.num_classes:,} classes, {layouts}")


def download(args: argparse.Namespace) -> int:
    """Fetch files to the cache; one that cannot be fetched does not stop the others."""
    if args.quiet:
        disable_progress_bars()
    failed = False
    for name in args.files:
        try:
            path = AutoencoderGPSToken.download_single_file(name)
            if not path.is_file():
                raise FileNotFoundError(
                    f"no model {name}. Give s64, m128, l256, OWNER/REPO/FILE or an address of the Hub."
                )
        except (OSError, ValueError) as error:
            print(f"gpstoken: error: {error}", file=sys.stderr)
            failed = True
        else:
            if not args.quiet:
                print(f"{name}: {path}, {path.stat().st_size:,} bytes")
    return int(failed)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"the output {target} is a file, but it must be a folder.")
    names = sorted(entry.relative_to(target).as_posix() for entry in target.rglob("*") if not entry.is_dir())
    if names and not overwrite:
        raise ValueError(f"the output folder {target} is not empty. Choose another one, or add --overwrite.")
    foreign = [name for name in names if not _OWN_FILE.fullmatch(name)]
    if foreign:
        raise ValueError(
            f"the output folder {target} holds more than a converted model ({', '.join(foreign[:5])}), so it "
            "is not overwritten. Choose another one."
        )
