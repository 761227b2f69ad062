#!/usr/bin/env python
"""How well a GPSToken autoencoder reconstructs photographs, beside what trivial methods give for the same numbers.

    python examples/evaluate_reconstruction.py data/photographs/heldout --train_dir data/photographs/train

Rows: the model; its textures shuffled between the tokens of an image; its initial Gaussians in place of the refined
ones (both show whether texture and geometry matter); each region of the partition painted with its mean colour; and a
principal component analysis of square patches with as many components as a token has numbers, at the same number of
patches as tokens, fitted to --train_dir. Images are centre squares scaled to --resolution.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokens
from gpstoken_diffusers.assets import MINI
from gpstoken_diffusers.metrics import psnr, ssim
from gpstoken_diffusers.tokens import GEOMETRY_CHANNELS
from gpstoken_diffusers.training.data import TrainingCrops, center_crop, to_pixel_values
from gpstoken_diffusers.training.pictures import list_images


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", type=Path, help="Folder of pictures that the model was not trained on.")
    add("--model", default=str(MINI), help="Folder of the model; default: the shipped gpstoken-mini.")
    add("--train_dir", help="Folder to fit the principal components to; without it that row is left out.")
    add("--resolution", type=int, default=256, help="Side of the centre squares, in pixels.")
    add("--num_tokens", type=int, default=256, help="Tokens per image.")
    add("--batch_size", type=int, default=4)
    add("--max_images", type=int, help="Take at most this many pictures, evenly spread.")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, help="Also write results.json, results.md and sheet.png to this folder.")
    return parser.parse_args(argv)


def region_means(images: Tensor, regions: Tensor) -> Tensor:
    """Paints each region of a partition with its mean colour: (B, 3, H, W), (B, N, 4) -> (B, 3, H, W)."""
    painted = torch.empty_like(images)
    for image, boxes, out in zip(images, regions.tolist(), painted, strict=True):
        for x0, y0, x1, y1 in boxes:
            window = (slice(None), slice(y0, y1 + 1), slice(x0, x1 + 1))
            out[window] = image[window].mean(dim=(1, 2), keepdim=True)
    return painted


class PatchPCA:
    """Principal components of square patches, as many patches per image as tokens.

    Args:
        folder: training images.
        patch: side in pixels.
        components: numbers kept per patch.
    """

    def __init__(self, folder: str, resolution: int, patch: int, components: int, crops: int = 1200):
        self.patch = patch
        dataset = TrainingCrops(folder, resolution, num_tokens=1, length=crops)
        patches = torch.cat([self._cut(dataset[index]["pixel_values"][None]) for index in range(crops)])
        self.mean = patches.mean(0)
        centred = (patches - self.mean).double()
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        self.basis = vectors[:, -components:].float()

    def _cut(self, images: Tensor) -> Tensor:
        columns = torch.nn.functional.unfold(images, self.patch, stride=self.patch)
        return columns.transpose(1, 2).reshape(-1, columns.shape[1])

    def __call__(self, images: Tensor) -> Tensor:
        patches = self._cut(images) - self.mean
        restored = patches @ self.basis @ self.basis.T + self.mean
        columns = restored.unflatten(0, (len(images), -1)).transpose(1, 2)
        return torch.nn.functional.fold(columns, images.shape[-2:], self.patch, stride=self.patch)


def shuffled_texture(tokens: GPSTokens, seed: int) -> GPSTokens:
    order = torch.randperm(tokens.num_tokens, generator=torch.Generator().manual_seed(seed))
    return GPSTokens(tokens.geometry, tokens.texture[:, order], tokens.image_size, tokens.tile_grid, tokens.canvas_size)


@torch.no_grad()
def evaluate(args: argparse.Namespace) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """Mean PSNR and SSIM per method, and each method's pictures of the first images."""
    model = AutoencoderGPSToken.from_pretrained(args.model).to(args.device).eval()
    if args.resolution > model.config.sample_size:
        raise SystemExit(f"--resolution may be at most the model's tile, {model.config.sample_size} pixels.")
    floats = GEOMETRY_CHANNELS + model.config.texture_channels
    methods = ["gpstoken", "textures shuffled", "initial Gaussians", "region means"]
    pca = None
    patch = math.isqrt(args.resolution**2 // args.num_tokens)
    if args.train_dir and args.resolution % patch == 0 and (args.resolution // patch) ** 2 == args.num_tokens:
        pca = PatchPCA(args.train_dir, args.resolution, patch, floats)
        methods.append(f"PCA of {patch}x{patch} patches, {floats} numbers")
    paths = list_images(args.images)
    if args.max_images:
        paths = paths[:: max(1, len(paths) // args.max_images)][: args.max_images]
    scores = {name: {"psnr": [], "ssim": []} for name in methods}
    pictures: dict[str, list[Tensor]] = {name: [] for name in ["input", *methods]}
    for start in tqdm(range(0, len(paths), args.batch_size), unit="batch"):
        images = []
        for path in paths[start : start + args.batch_size]:
            with Image.open(path) as image:
                images.append(to_pixel_values(center_crop(image, args.resolution)))
        images = torch.stack(images)
        output = model.encode(images.to(args.device), num_tokens=args.num_tokens)
        results = [
            model.decode(tokens).sample.float().cpu().clamp(-1, 1)
            for tokens in (
                output.tokens,
                shuffled_texture(output.tokens, seed=start),
                GPSTokens(
                    output.initial_tokens.geometry,
                    output.tokens.texture,
                    output.tokens.image_size,
                    canvas_size=output.tokens.canvas_size,
                ),
            )
        ]
        results.append(region_means(images, output.regions))
        if pca is not None:
            results.append(pca(images).clamp(-1, 1))
        pictures["input"].append(images)
        for name, result in zip(methods, results, strict=True):
            scores[name]["psnr"].append(psnr(result, images))
            scores[name]["ssim"].append(ssim(result, images))
            pictures[name].append(result)
    table = {
        name: {metric: torch.cat(values).mean().item() for metric, values in row.items()}
        for name, row in scores.items()
    }
    return table, {name: torch.cat(parts[:2])[:8] for name, parts in pictures.items()}


def markdown(table: dict[str, dict[str, float]]) -> str:
    lines = ["| method | PSNR, dB | SSIM |", "|---|---|---|"]
    lines += [f"| {name} | {row['psnr']:.2f} | {row['ssim']:.3f} |" for name, row in table.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    table, pictures = evaluate(args)
    print(markdown(table))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "results.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        (args.output / "results.md").write_text(markdown(table) + "\n", encoding="utf-8")
        sheet = torch.cat([torch.cat(list(rows), dim=2) for rows in pictures.values()], dim=1)
        array = ((sheet + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(args.output / "sheet.png")


if __name__ == "__main__":
    main()
