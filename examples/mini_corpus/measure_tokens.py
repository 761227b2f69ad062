"""Mean PSNR of folders of pictures by number of tokens, as a row of a Markdown table for each folder.

    python examples/mini_corpus/measure_tokens.py runs/mini2/tokenizer/fine/model data/photographs/heldout

Pictures are cut to their centre squares at the model's tile; the model works in bfloat16. The last column is
the processor's time for all encoding and decoding.
"""

from __future__ import annotations

import argparse
import time

import torch

from gpstoken_diffusers import AutoencoderGPSToken
from gpstoken_diffusers.evaluation.metrics import psnr
from gpstoken_diffusers.training.autoencoder_objective import load_validation
from gpstoken_diffusers.training.pictures import open_pictures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder of an AutoencoderGPSToken.")
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--max_images", type=int, default=1000)
    args = parser.parse_args(argv)
    model = AutoencoderGPSToken.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    for folder in args.folders:
        images = load_validation(open_pictures(folder), model.config.sample_size, args.max_images)
        figures = []
        started = time.process_time()
        for count in args.tokens:
            with torch.inference_mode():
                outputs = [model(batch, num_tokens=count).sample.float().clamp(-1, 1) for batch in images.split(4)]
            figures.append(f"{psnr(torch.cat(outputs), images).mean().item():.2f}")
        print(
            f"| {folder} ({len(images)}) |",
            " | ".join(figures),
            f"| {time.process_time() - started:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
