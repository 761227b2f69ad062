"""Layouts on request: partitions that follow boxes or a mask.

They need no picture: they are for generating, where the layout comes first. To draw the tokens of a given picture
somewhere, use `importance` of `partition_image`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch

from ..ops.partition import Partition, initial_gaussians, partition_image
from .calibration import calibrate_layout, check_num_tokens, checked_sides

__all__ = ["layout_from_boxes", "layout_from_mask"]

LARGEST_STRENGTH = 1e6  # far beyond any use: 1e6 pixels outside the mask already weigh as much as one inside


def layout_from_boxes(
    boxes_px: torch.Tensor | np.ndarray | Sequence[Sequence[float]],
    num_tokens: int,
    *,
    image_size: tuple[int, int] = (256, 256),
    min_region_size: int = 8,
) -> Partition:
    """A partition that follows boxes in one image: tokens concentrate where the boxes are small.

    Each box stands for one token, like a region. With fewer boxes than tokens, the boxes and the whole image are halved
    as regions are until there are enough. Each gives equally many pieces, as far as it can be halved, so small boxes
    give small pieces. `calibrate_layout` then finds the nearest partition. Boxes may overlap and leave gaps.

    Args:
        boxes_px: (K, 4) x0, y0, x1, y1 in pixels, the last ones inclusive: 0 <= x0 <= x1 <= width - 1, y likewise.
        num_tokens: regions wanted, from 1 to `max_tokens(height, width, min_region_size)`.
        image_size: (height, width) in pixels, at least 2 x 2.
        min_region_size: px, at least 2; as in `partition_image`.

    Returns:
        Partition of one layout (B = 1) on the CPU.

    Raises:
        ValueError: no box, boxes of another shape, outside the image, upside down or not finite, or sizes outside
            the above.
        TypeError: sizes that are not integers.
    """
    height, width = checked_sides(image_size)
    num_tokens, min_region_size = operator.index(num_tokens), operator.index(min_region_size)
    check_num_tokens(num_tokens, height, width, min_region_size)
    boxes = torch.as_tensor(boxes_px).detach().cpu().double()
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) == 0:
        raise ValueError(f"boxes_px: expected at least one box, (K, 4) x0, y0, x1, y1, got {tuple(boxes.shape)}.")
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        if not (0 <= x0 <= x1 <= width - 1 and 0 <= y0 <= y1 <= height - 1):  # NaN fails this too
            raise ValueError(
                f"boxes_px: box {i} is ({x0:g}, {y0:g}, {x1:g}, {y1:g}), but an image of {height} x {width} px "
                f"takes 0 <= x0 <= x1 <= {width - 1} and 0 <= y0 <= y1 <= {height - 1} (pixels, the last ones "
                "inclusive)."
            )
    if len(boxes) < num_tokens:
        boxes = _halved_boxes(boxes, num_tokens, height, width, min_region_size)
    predicted = initial_gaussians(boxes, height, width)[None]
    return calibrate_layout(predicted, num_tokens, image_size=image_size, min_region_size=min_region_size)


def layout_from_mask(
    mask: torch.Tensor | np.ndarray,
    num_tokens: int,
    *,
    strength: float = 8.0,
    min_region_size: int = 8,
    seen: Sequence[tuple[int, int]] | None = None,
) -> Partition:
    """A partition of an image without content: tokens concentrate where a mask is bright.

    A pixel weighs 1 + strength * mask, and the heaviest region is halved until there are enough. Regions then weigh
    about the same, and

        tokens per pixel where the mask is m : where it is 0  =  1 + strength * m : 1

    as nearly as halving allows: either density is off by up to the square root of 2, their ratio by up to 2, before
    regions in the mask reach min_region_size; from then on all further tokens go elsewhere. A mask that is the same
    everywhere, such as an empty one, gives an even partition.

    Args:
        mask: (H, W), or (B, H, W) for B layouts; boolean, or floats in [0, 1]. At least 2 x 2 px, any device.
        num_tokens: regions wanted, from 1 to `max_tokens(H, W, min_region_size)`.
        strength: how much more a pixel of 1 weighs than one of 0, from 0 (no effect) to 1e6.
        min_region_size: px, at least 2; as in `partition_image`.
        seen: (height, width) of each mask's top left part that counts, the rest being padding; as in `partition_image`.

    Returns:
        Partition of B layouts (B = 1 for a single mask), on the mask's device, in the order of `partition_image`.

    Raises:
        ValueError: a mask of another shape, NaN or values outside [0, 1], or numbers outside the above.
        TypeError: a mask that is no tensor or array of floats or booleans, or sizes that are not integers.
    """
    if isinstance(mask, np.ndarray):
        mask = torch.tensor(mask)
    if not isinstance(mask, torch.Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        what = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a torch tensor or NumPy array of floats or booleans, got {what}.")
    if mask.ndim not in (2, 3):
        raise ValueError(f"mask: expected (H, W) or (B, H, W), got {tuple(mask.shape)}.")
    if not 0 <= strength <= LARGEST_STRENGTH:  # NaN fails this too
        raise ValueError(f"strength={strength}: expected 0 to {LARGEST_STRENGTH:g}.")
    weight = mask.detach().cpu().double()  # not every device has float64
    if weight.numel() and not (weight.min() >= 0 and weight.max() <= 1):  # a NaN anywhere becomes both
        raise ValueError(
            f"mask: expected values in [0, 1], got {weight.min():.4g} to {weight.max():.4g}. "
            "Scale it, and set how much it counts by strength."
        )
    # Rounding gives a flat image a complexity of 4e-17 of its area: lost beside a weight of 1.
    found = partition_image(
        torch.zeros(weight.shape),
        num_tokens,
        min_region_size=min_region_size,
        complexity_bias=1 + strength * weight,
        seen=seen,
    )
    return Partition(found.regions.to(mask.device), found.geometry.to(mask.device))


def _halved_boxes(boxes: torch.Tensor, count: int, height: int, width: int, min_region_size: int) -> torch.Tensor:
    """(M, 4) pieces of boxes (K, 4) and of the image itself: `count`, shared evenly, or all that there can be."""
    image = (0.0, 0.0, width - 1.0, height - 1.0)
    pieces = [[tuple(box)] for box in [*boxes.tolist(), image]]  # of each box, the pieces in order of making
    divisible = list(pieces)
    while divisible and sum(map(len, pieces)) < count:
        fewest = min(divisible, key=len)
        x0, y0, x1, y1 = fewest[0]  # the oldest is the largest, but for a pixel of odd lengths
        if max(x1 - x0, y1 - y0) <= min_region_size:
            divisible = [box for box in divisible if box is not fewest]
        elif x1 - x0 > y1 - y0:
            middle = x0 + (x1 - x0 + 1) // 2
            del fewest[0]
            fewest += [(x0, y0, middle - 1, y1), (middle, y0, x1, y1)]
        else:
            middle = y0 + (y1 - y0 + 1) // 2
            del fewest[0]
            fewest += [(x0, y0, x1, middle - 1), (x0, middle, x1, y1)]
    return torch.tensor([piece for box in pieces for piece in box], dtype=torch.float64)
