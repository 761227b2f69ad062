#!/usr/bin/env python
"""Puts a tokenizer and the two trained stages together into a folder that DiffusionPipeline.from_pretrained loads.

    python examples/train/assemble_pipeline.py --transformer runs/texture/model --layout_model runs/layout/model \
        --tokens tokens/train --output my-pipeline
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers.utils import IMAGE_PROCESSOR_NAME

from gpstoken_diffusers import (
    AutoencoderGPSToken,
    GPSTokenImageProcessor,
    GPSTokenLayoutModel,
    GPSTokenPipeline,
    GPSTokenTransformerModel,
)
from gpstoken_diffusers.assets import MINI
from gpstoken_diffusers.schedulers.presets import SAMPLER_PRESETS, make_sampler
from gpstoken_diffusers.training.checkpoints import round_weights
from gpstoken_diffusers.training.token_dataset import TokenDataset


def tokenizer_processor(folder: str, autoencoder: AutoencoderGPSToken) -> GPSTokenImageProcessor:
    """The image processor that lies beside a tokenizer; where there is none, the one that follows from its settings."""
    try:
        return GPSTokenImageProcessor.from_pretrained(folder)
    except OSError:
        if Path(folder, IMAGE_PROCESSOR_NAME).exists():  # and damaged
            raise
        return GPSTokenImageProcessor.for_autoencoder(autoencoder.config)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--autoencoder", default=str(MINI), help="Folder of the tokenizer; default: the shipped one.")
    add("--transformer", required=True, help="Folder of the second stage, as train_texture.py saves it.")
    add("--layout_model", help="Folder of the first stage, as train_layout.py saves it.")
    add("--tokens", required=True, help="Token dataset that was trained on: it knows the classes and the tokenizer.")
    add(
        "--other_tokenizer",
        action="store_true",
        help="Take a tokenizer although another one made the tokens: the same with a decoder that was trained on, say.",
    )
    add("--sampler", default="unipc", choices=SAMPLER_PRESETS, help="Of both stages, unless another is asked for.")
    add("--dtype", default="float16", choices=["float32", "bfloat16", "float16"], help="Of the weights in the folder.")
    add("--output", required=True, type=Path, help="Folder to write.")
    args = parser.parse_args(argv)

    dataset = TokenDataset(args.tokens)
    doubt = dataset.check_autoencoder(args.autoencoder)
    if doubt and not args.other_tokenizer:
        raise ValueError(f"{doubt} Give the right one by --autoencoder; if this one is meant, add --other_tokenizer.")
    autoencoder = AutoencoderGPSToken.from_pretrained(args.autoencoder)
    transformer = GPSTokenTransformerModel.from_pretrained(args.transformer)
    layout_model = GPSTokenLayoutModel.from_pretrained(args.layout_model) if args.layout_model else None
    dataset.check_origin(args.transformer, transformer.config.num_classes)
    if layout_model is not None:
        dataset.check_origin(args.layout_model, layout_model.config.num_classes)
    pipe = GPSTokenPipeline(
        autoencoder=autoencoder,
        transformer=transformer,
        scheduler=make_sampler(args.sampler)[0],
        image_processor=GPSTokenImageProcessor.for_autoencoder(
            autoencoder.config, num_tokens=transformer.config.num_tokens
        ),
        layout_model=layout_model,
        layout_scheduler=make_sampler(args.sampler)[0] if layout_model else None,
        id2label=dataset.id2label,
    )
    for model in (autoencoder, transformer, layout_model):
        if model is not None:
            round_weights(model, args.dtype)
    pipe.save_pretrained(args.output)
    # With its processor beside it, the tokenizer's folder can be used alone.
    tokenizer_processor(args.autoencoder, autoencoder).save_pretrained(args.output / "autoencoder")
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB, {len(pipe.id2label)} classes")


if __name__ == "__main__":
    main()
