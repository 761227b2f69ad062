"""Bytes of a picture's tokens in each encoding of a file, and what the picture loses by it.

    python tests/benchmarks/benchmark_token_files.py data/photographs/heldout [--max_images 40]

Pictures are centre squares scaled to --resolution. Bytes are those of a file of one picture, header included, and, in
brackets, what its numbers take before entropy coding: five codes of 16 bits and a texture of 8 bits, or plain
numbers. "lost" is the mean and the largest difference of PSNR against the photograph, in dB, to the tokens as encoded;
"difference" the PSNR of the picture against that of the tokens as encoded (infinite where nothing differs).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from harness import positive, table
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokens
from gpstoken_diffusers.assets import MINI
from gpstoken_diffusers.evaluation.metrics import psnr
from gpstoken_diffusers.folder_files import find_files
from gpstoken_diffusers.picture_files import image_suffixes
from gpstoken_diffusers.token_files import ENCODINGS, encoded_size
from gpstoken_diffusers.training.data import center_crop, to_pixel_values


def plain_bytes(tokens: GPSTokens, dtype: str) -> int:
    """Bytes of the numbers without entropy coding."""
    if dtype == "uint8":
        return tokens.num_tokens * (5 * 2 + tokens.texture_channels) + 8 * tokens.texture_channels
    return tokens.to(getattr(torch, dtype)).num_bytes


def measure(model: AutoencoderGPSToken, image: Tensor, num_tokens: int, folder: Path) -> list[tuple[float, ...]]:
    """Per encoding: bytes of the file, before entropy coding, PSNR, dB lost, PSNR to the tokens as encoded."""
    tokens = model.encode(image, num_tokens=num_tokens).tokens
    whole = model.decode(tokens).sample.clamp(-1, 1)
    rows = []
    for dtype in ENCODINGS:
        tokens.save(folder / "tokens.safetensors", dtype=dtype)
        stored = GPSTokens.load(folder / "tokens.safetensors").to(torch.float32)
        picture = model.decode(stored).sample.clamp(-1, 1)
        quality = psnr(picture, image).item()
        lost, difference = psnr(whole, image).item() - quality, psnr(picture, whole).item()
        rows.append((encoded_size(tokens, dtype), plain_bytes(tokens, dtype), quality, lost, difference))
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="Folder of pictures.")
    parser.add_argument("--model", default=str(MINI), help="Folder of the model; default: the shipped gpstoken-mini.")
    parser.add_argument("--resolution", type=positive, default=256, help="Side of the centre squares, in pixels.")
    parser.add_argument("--num_tokens", type=positive, default=256, help="Tokens per image.")
    parser.add_argument("--max_images", type=positive, default=40, help="Take at most this many, evenly spread.")
    args = parser.parse_args()
    model = AutoencoderGPSToken.from_pretrained(args.model).eval()
    paths = list(find_files(args.images, image_suffixes(), recursive=False).files.values())
    if not paths:
        parser.error(f"there are no pictures in {args.images}")
    paths = paths[:: max(1, len(paths) // args.max_images)][: args.max_images]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for path in tqdm(paths, unit="picture"):
            with Image.open(path) as image:
                pixels = to_pixel_values(center_crop(image, args.resolution))[None]
            rows.append(measure(model, pixels, args.num_tokens, Path(folder)))
    results = torch.tensor(rows, dtype=torch.float64)
    print(f"{len(paths)} pictures of {args.resolution} px, {args.num_tokens} tokens each\n")
    cells = []
    for dtype, columns in zip(ENCODINGS, results.transpose(0, 1), strict=True):
        size, plain, quality, lost, difference = columns.mean(0).tolist()
        most, least = columns[:, 3].max(), columns[:, 4].min()
        cells.append([dtype, f"{size:,.0f} ({plain:,.0f})", f"{quality:.2f}", f"{lost:.4f}, {most:.3f}"])
        cells[-1].append(f"{difference:.1f}, {least:.1f}")
    heads = ["dtype", "bytes (before entropy coding)", "PSNR, dB", "lost: mean, most", "difference, dB: mean, least"]
    print(table(heads, cells))


if __name__ == "__main__":
    main()
