"""ComfyUI's pictures and masks to what the package takes, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.model_management

if TYPE_CHECKING:
    import torch
    from PIL import Image


def from_image(image: torch.Tensor) -> torch.Tensor:
    """IMAGE (B, H, W, 3 or 4) in [0, 1] -> (B, 3 or 4, H, W); values that overshoot a little are cut off."""
    return image.movedim(-1, 1).float().clamp(0, 1)


def to_image(pictures: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1] -> IMAGE (B, H, W, 3) float32, where ComfyUI keeps results."""
    return pictures.movedim(1, -1).to(comfy.model_management.intermediate_device()).float().contiguous()


def pil_to_image(pictures: list[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size -> IMAGE."""
    import numpy as np
    import torch

    arrays = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return to_image(torch.from_numpy(arrays).movedim(-1, 1) / 255)


def image_to_pil(image: torch.Tensor) -> list[Image.Image]:
    """IMAGE -> RGB pictures."""
    from PIL import Image

    eight_bit = (image[..., :3].float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    return [Image.fromarray(array) for array in eight_bit]


NO_MASK = (64, 64)
"""What Load Image gives as the mask of a picture without transparency has this size, and is zero everywhere."""


def given_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask, or None if there is none: nothing is connected, or a picture without transparency."""
    if mask is None or (tuple(mask.shape[-2:]) == NO_MASK and not mask.any()):
        return None
    return mask


def fitting_mask(mask: torch.Tensor, batch_size: int, size: tuple[int, int]) -> torch.Tensor:
    """MASK (1 or B, H, W) -> (B, H, W) float32 in [0, 1].

    Raises ValueError: another size or number than the pictures', or NaN.
    """
    mask = mask.float()
    mask = mask[None] if mask.ndim == 2 else mask
    if tuple(mask.shape[-2:]) != tuple(size):
        raise ValueError(
            f"The mask has {mask.shape[-1]} x {mask.shape[-2]} pixels, the picture {size[1]} x {size[0]} (width x "
            "height): a mask must have the picture's size. Draw one in the mask editor of Load Image, or resize yours."
        )
    if len(mask) not in (1, batch_size):
        raise ValueError(f"There are {len(mask)} masks for {batch_size} pictures: give one, or one for each.")
    if mask.isnan().any():
        raise ValueError("The mask has NaN values.")
    return mask.clamp(0, 1).expand(batch_size, -1, -1)
