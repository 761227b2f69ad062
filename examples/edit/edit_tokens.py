#!/usr/bin/env python
"""Edits the demo photograph by its tokens and draws a panel of the results.

python examples/edit/edit_tokens.py edited.png

It needs only the shipped model and photograph. Every picture is decoded from tokens: no pixel is copied.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor, GPSTokens, splat_gaussians
from gpstoken_diffusers.assets import DEMO_PHOTOGRAPH, MINI
from gpstoken_diffusers.token_editing import (
    delete_tokens,
    duplicate_tokens,
    merge_tokens,
    move_tokens,
    rotate_tokens,
    scale_tokens,
    select_by_mask,
)
from gpstoken_diffusers.visualization import panel, write_png

# The kingfisher's outline in the photograph, (x, y) in pixels.
OUTLINE = [(185, 140), (210, 75), (270, 45), (335, 70), (350, 95), (435, 130), (425, 145), (348, 145), (355, 205)]
OUTLINE += [(325, 285), (285, 335), (303, 385), (205, 365), (195, 440), (162, 458), (135, 350), (108, 365), (125, 230)]


def outline_mask(photograph: Image.Image) -> Tensor:
    """(H, W) bool: the pixels of the bird, and a few around it, into which its tokens reach."""
    mask = Image.new("L", photograph.size)
    ImageDraw.Draw(mask).polygon(OUTLINE, fill=255)
    return torch.from_numpy(np.array(mask.filter(ImageFilter.MaxFilter(13)))) > 0


def lay_over(background: GPSTokens, piece: GPSTokens) -> GPSTokens:
    """A piece on a background. Where both lie they would blend, so tokens under the piece are removed."""
    (height, width), (canvas_height, canvas_width) = piece.image_size, piece.canvas_size
    ones = torch.ones_like(piece.texture[..., :1])
    painted = splat_gaussians(piece.geometry, ones, canvas_height, canvas_width)[:, 0, :height, :width]
    return merge_tokens(background, piece, painted > 0.5)


def edits(tokens: GPSTokens, bird: Tensor, mask: Tensor) -> dict[str, GPSTokens]:
    """Named edits of the photograph's tokens; `bird` selects tokens, `mask` the same in pixels."""
    every = torch.ones_like(bird)
    piece = delete_tokens(tokens, ~bird)
    # The right part of the photograph, branch and all, shifted under the bird.
    empty = merge_tokens(tokens, move_tokens(tokens, every, dx_px=-312), mask)
    return {
        "decoded as encoded": tokens,
        "deleted": delete_tokens(tokens, bird),
        "recomposed": empty,
        "moved": lay_over(empty, move_tokens(piece, every, dx_px=280, dy_px=24)),
        "scaled": lay_over(empty, scale_tokens(piece, every, 0.6, about_px=(245, 370))),
        "rotated": lay_over(empty, rotate_tokens(piece, every, 20)),
        "duplicated": lay_over(tokens, duplicate_tokens(piece, bird, dx_px=300, dy_px=24)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="The panel to write, a PNG file.")
    output = parser.parse_args().output

    autoencoder = AutoencoderGPSToken.from_pretrained(MINI).eval()
    processor = GPSTokenImageProcessor.from_pretrained(MINI)
    photograph = processor.load_image(DEMO_PHOTOGRAPH)
    mask = outline_mask(photograph)
    columns = [("photograph", photograph)]
    with torch.no_grad():
        tokens = autoencoder.encode(**processor(photograph, num_tokens=384)).tokens
        for name, edited in edits(tokens, select_by_mask(tokens, mask, "center"), mask).items():
            sample = autoencoder.decode(edited).sample
            columns.append((name, processor.postprocess(sample)[0]))
    columns = [(name, picture.resize((384, 256), Image.Resampling.LANCZOS)) for name, picture in columns]
    rows = [panel(columns[:4]), panel(columns[4:])]
    sheet = Image.new("RGB", (rows[0].width, rows[0].height + rows[1].height))
    sheet.paste(rows[0], (0, 0))
    sheet.paste(rows[1], (0, rows[0].height))
    write_png(sheet, output)
    print(f"{output}: {tokens}")


if __name__ == "__main__":
    main()
