"""The canvas of a picture that is drawn: its size at any scale, its pieces' places, the picture cut out of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from .windows import Size, Window

Scale = tuple[Fraction, Fraction]  # vertically, horizontally

_CANVAS_OF_PICTURE = 3  # how many times a picture's pixels its canvas may have, where it is drawn enlarged

Progress = Callable[[float], None]
"""Called after each piece of work with the share that is done, above 0 and at most 1; it may raise to stop."""


def checked_size(size: Size) -> Size:
    """A size that a user asked for: (height, width), each an int of at least 1; else TypeError or ValueError."""
    # bool is an int to Python, but never a number of pixels.
    if not isinstance(size, (tuple, list)) or [
        isinstance(side, (int, np.integer)) and not isinstance(side, bool) for side in size
    ] != [True, True]:
        raise TypeError(f"size must be two ints (height, width), got {size!r}.")
    if min(size) < 1:
        raise ValueError(f"size must be at least 1 px along both axes (height, width), got {tuple(size)}.")
    return (int(size[0]), int(size[1]))


def scaled(map_size: Size, scale: Scale) -> Size:
    """(height, width) of a map enlarged by `scale`, in whole map pixels."""
    return tuple(max(1, round(side * ratio)) for side, ratio in zip(map_size, scale, strict=True))


def drawn_scale(scale: Scale, canvas_size: Size, size: Size) -> Scale:
    """The scale to draw a canvas at, of which a picture is cut out and resampled.

    That of the picture, unless most of the canvas is padding. Then it is smaller, so that no more is drawn than three
    times the pixels of the picture, or the canvas at its own size.
    """
    drawn = math.prod(canvas_size) * float(scale[0] * scale[1])
    share = max(math.prod(canvas_size), _CANVAS_OF_PICTURE * math.prod(size)) / drawn
    return scale if share >= 1 else tuple(ratio * Fraction(math.sqrt(share)) for ratio in scale)


class Canvas:
    """Pictures that are drawn piece by piece.

    Args:
        batch_size: number of pictures.
        map_size: (height, width) in map pixels of the feature map that they are drawn from.
        upscale: image pixels per map pixel along each axis.
        progress: hears of each piece but the last.

    Attributes:
        pictures: (batch_size, C, height upscale, width upscale); None until the first piece comes.
    """

    def __init__(self, batch_size: int, map_size: Size, upscale: int, progress: Progress | None = None):
        self.batch_size, self.map_size, self.upscale, self.progress = batch_size, map_size, upscale, progress
        self._left = batch_size * map_size[0] * map_size[1]
        self.pictures: Tensor | None = None

    def put(self, image: int, piece: Tensor, inner: Window, painted: Window) -> None:
        """Writes the inner part of `piece` (C, h, w), which shows the window `painted`, to its place in a picture."""
        if self.pictures is None:
            size = (side * self.upscale for side in self.map_size)
            self.pictures = piece.new_empty(self.batch_size, len(piece), *size)
        top, left, bottom, right = (side * self.upscale for side in inner)
        y0, x0 = painted.top * self.upscale, painted.left * self.upscale
        self.pictures[image, :, top:bottom, left:right] = piece[:, top - y0 : bottom - y0, left - x0 : right - x0]
        self._left -= inner.size[0] * inner.size[1]
        if self.progress is not None and self._left > 0:  # whoever cuts the picture out says that it is done
            self.progress(1 - self._left / (self.batch_size * self.map_size[0] * self.map_size[1]))


def cut_picture(canvas: Tensor, canvas_size: Size, scale: Scale, size: Size) -> Tensor:
    """Cuts the picture out of its scaled canvas. A canvas that is not exactly of this scale is resampled first.

    Args:
        canvas: (B, C, h, w), the whole canvas as it was decoded.
        canvas_size: (height, width) in pixels of the canvas at its own size.
        scale: how much larger the picture is to be.
        size: (height, width) of the picture, the canvas's top left part.

    Returns: (B, C, *size), in the dtype of `canvas`.
    """
    wanted = tuple(side * ratio for side, ratio in zip(canvas_size, scale, strict=True))  # exact, maybe not integers
    if canvas.shape[-2:] != wanted:
        # By factors, not to a size: a padded canvas may end within a pixel, and places must stay exact. torch takes
        # the floor of length times factor in float64, so a little is added to keep an integer from falling.
        factors = tuple(
            float(length / side) * (1 + 1e-12) for length, side in zip(wanted, canvas.shape[-2:], strict=True)
        )
        # What lies further right and below than the cubic kernel reaches does not show in the picture.
        height, width = (
            math.ceil(own / factor + 2 * max(1, 1 / factor)) + 1 for own, factor in zip(size, factors, strict=True)
        )
        canvas = canvas[..., :height, :width]
        canvas = F.interpolate(canvas.float(), scale_factor=factors, mode="bicubic", antialias=True).to(canvas.dtype)
    return canvas[..., : size[0], : size[1]]
