#!/usr/bin/env python
"""What layout and texture can do apart: one sheet of pictures from two pictures and a pipeline.

    python examples/edit/two_stages.py pictures/heldout/Food*/hamburger.png pictures/heldout/Anim*/cat.png sheet.png

Row by row: the layout of the first picture with textures of each class; variations of the first picture, ever further
away; its textures in new layouts; its right half filled in; and the way from the first picture to the second.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps

from gpstoken_diffusers import (
    GPSTokenImageProcessor,
    GPSTokenImg2ImgPipeline,
    GPSTokenInpaintPipeline,
    GPSTokenPipeline,
)
from gpstoken_diffusers.assets import MINI_PIPELINE
from gpstoken_diffusers.token_matching import interpolate_tokens
from gpstoken_diffusers.visualization import panel

COLUMNS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="A picture.")
    parser.add_argument("second", type=Path, help="Another picture.")
    parser.add_argument("output", type=Path, help="The sheet to write.")
    parser.add_argument("--pipeline", default=str(MINI_PIPELINE), help="Folder of the pipeline; default: the shipped.")
    parser.add_argument("--label", help="Class of the first picture; default: no class in particular.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = GPSTokenPipeline.from_pretrained(args.pipeline)
    image_to_image, inpaint = GPSTokenImg2ImgPipeline.from_pipe(pipe), GPSTokenInpaintPipeline.from_pipe(pipe)
    side = pipe.autoencoder.config.sample_size
    first, second = (
        ImageOps.fit(GPSTokenImageProcessor.load_image(path), (side, side)) for path in (args.first, args.second)
    )

    def seeds(count: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(args.seed + place) for place in range(count)]

    names = list(pipe.id2label.values())[: COLUMNS - 1]
    rows = [[("layout of", first)]]
    rows[0] += zip(names, pipe(names, layout=first, generator=seeds(len(names))).images, strict=True)

    rows.append([("image to image", first)])
    for strength in (0.2, 0.4, 0.6, 0.8, 1.0):
        drawn = image_to_image(first, args.label, strength=strength, generator=seeds(1)).images[0]
        rows[1].append((f"strength {strength}", drawn))

    rows.append([("textures of", first)])
    labels = [args.label] * (COLUMNS - 1) if args.label else [pipe.transformer.null_class] * (COLUMNS - 1)
    drawn = image_to_image(first, labels, strength=0.7, keep="texture", generator=seeds(len(labels))).images
    rows[2] += [(f"new layout {place + 1}", picture) for place, picture in enumerate(drawn)]

    mask = Image.new("L", first.size)
    ImageDraw.Draw(mask).rectangle((side // 2, 0, side, side), fill=255)
    shown = Image.composite(Image.new("RGB", first.size, "gray"), first, mask)
    drawn = inpaint(first, mask, labels, generator=seeds(len(labels))).images
    rows.append([("right half unknown", shown), *((f"filled in {i + 1}", picture) for i, picture in enumerate(drawn))])

    start, end = (image_to_image.encode(picture)[0] for picture in (first, second))
    way = [(weight, interpolate_tokens(start, end, weight)) for weight in torch.linspace(0, 1, COLUMNS).tolist()]
    rows.append([(f"{1 - weight:.0%} and {weight:.0%}", pipe.decode(tokens)[0]) for weight, tokens in way])

    strips = [panel(row) for row in rows]
    sheet = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)))
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    sheet.save(args.output)
    print(f"{args.output}: {sheet.width} x {sheet.height} px")


if __name__ == "__main__":
    main()
