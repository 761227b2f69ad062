"""GPSTokenInpaintPipeline: a part of a picture generated anew, the other tokens kept as they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.guiders import BaseGuidance
from PIL import Image
from torch import Generator, Tensor

from gpstoken_diffusers.image_processor import ImageLike
from gpstoken_diffusers.picture_files import mask_levels
from gpstoken_diffusers.token_editing import select_by_mask
from gpstoken_diffusers.tokens import GPSTokens

from .class_labels import Labels
from .pipeline_gpstoken import GPSTokenPipelineOutput
from .pipeline_gpstoken_img2img import GPSTokenImg2ImgPipeline
from .sampling import StepCallback


class GPSTokenInpaintPipeline(GPSTokenImg2ImgPipeline):
    r"""Generates those tokens of a picture anew that a mask touches, and keeps all others bit for bit.

    Components are those of [`GPSTokenPipeline`], and `GPSTokenInpaintPipeline.from_pipe(pipe)`
    shares them (without the dtype, diffusers would cast them to float32).

    The network sees the kept tokens at every evaluation, noised to the time of that step: they go along the straight
    way from their noise to themselves, by which all solvers, those with several evaluations per step too, treat them
    exactly. New tokens are drawn for the layout of the picture itself, so that the sizes of what was masked remain.

    What is kept are tokens. The pixels of the result are those of decoded tokens, and differ from the picture's as any
    reconstruction does. With a lattice decoder, pixels beyond the reach of the new tokens are exactly those of the
    reconstruction; a map decoder normalises over the whole picture, so that all change a little.

    Pictures larger than one tile: tiles that the mask does not touch cost nothing; of the others, each is generated
    seeing its own kept tokens alone, so that a mask across a border of tiles is filled from both sides independently.
    """

    @torch.no_grad()
    def __call__(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask: ImageLike | Sequence[ImageLike],
        class_labels: Labels = None,
        strength: float = 1.0,
        reach_sigmas: float = 1.5,
        num_tokens: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        guider: BaseGuidance | None = None,
    ) -> GPSTokenPipelineOutput | tuple:
        """Fills masks. Arguments that are not listed are as in `GPSTokenPipeline.__call__`.

        Args:
            image: a picture, or several of one size, of any kind that the image processor takes.
            mask: of the pictures' size, one for all or one for each; bright (above 0.5, or True) where something new is
                to come: PIL images, or arrays or tensors (H, W) or (B, H, W) of booleans, uint8 or floats in [0, 1].
            class_labels: one for all pictures, or one for each; several labels for one picture give several results.
            strength: in (0, 1]; below 1 the new tokens start from the old ones, noised that part of the way.
            reach_sigmas: a token is made anew if the mask reaches into the box of that many sigmas around it. 1.5 is
                about the region that a token stands for; at 3 kept tokens paint next to nothing on the mask.
            num_tokens: tokens per tile; None takes the number that the models were trained on.

        Returns: as `GPSTokenPipeline.__call__`; the output's `layout` is in coordinates of the whole picture. Callbacks
        see the latents of the tiles that are generated.

        Raises:
            ValueError: a mask of another size or number, an empty one, one with NaN or that reaches no token, a
                strength outside (0, 1], and as `GPSTokenPipeline.__call__`.
            TypeError: arguments of another type.
        """
        self._check_request(output_type)
        settings = self._texture_settings(
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            strength,
            guider or self.guider,
        )
        tokens, layout, labels = self._encode_with_labels(image, class_labels, num_tokens)
        chosen = self._chosen(tokens, mask, reach_sigmas)
        generators, _ = self._seeded(generator, len(labels))
        tokens = self._regenerate_selected(tokens, layout, chosen, labels, generators, settings)
        return self._output(tokens, tokens.with_tiles(layout, layout).geometry, output_type, return_dict)

    def _chosen(self, tokens: GPSTokens, mask: ImageLike | Sequence[ImageLike], reach_sigmas: float) -> Tensor:
        """(B, N) bool: the tokens that the mask touches."""
        pixels = self._mask_pixels(mask)
        if tuple(pixels.shape[1:]) != tokens.image_size:
            raise ValueError(
                f"mask must have the picture's size (height, width) {tokens.image_size}, got {tuple(pixels.shape[1:])}."
            )
        if len(pixels) not in (1, tokens.batch_size):
            raise ValueError(f"There are {len(pixels)} masks for {tokens.batch_size} pictures.")
        empty = ~pixels.flatten(1).any(dim=1)
        if empty.any():
            raise ValueError(
                f"mask {int(empty.nonzero()[0])} is empty: no pixel is above 0.5. Mark what is to be generated anew."
            )
        chosen = select_by_mask(tokens, pixels.expand(tokens.batch_size, -1, -1), reach_sigmas=reach_sigmas)
        if not chosen.any(dim=1).all():
            raise ValueError(
                f"The mask reaches no token within {reach_sigmas} sigmas: raise reach_sigmas, or enlarge the mask."
            )
        return chosen

    def _mask_pixels(self, mask: ImageLike | Sequence[ImageLike]) -> Tensor:
        """(B, H, W) bool, scaled and cropped as the pictures are."""
        masks = mask if isinstance(mask, (list, tuple)) else [mask]
        planes = [plane for one in masks for plane in _planes(one)]
        # The image processor's own way, so that a mask meets the pixels it was drawn for. Values are in [-1, 1].
        return self.image_processor(planes, num_tokens=1)["pixel_values"][:, 0] > 0


def _planes(mask: ImageLike) -> list[Tensor]:
    """A mask, or a batch of them, as floats in [0, 1], each (H, W)."""
    if isinstance(mask, Image.Image):
        mask = mask_levels(mask)
    if not isinstance(mask, (np.ndarray, Tensor)):
        raise TypeError(f"mask must be PIL images, numpy arrays or tensors, got {type(mask).__name__}.")
    values = torch.as_tensor(np.array(mask) if isinstance(mask, np.ndarray) else mask.detach().cpu())
    if values.ndim not in (2, 3):
        raise ValueError(f"mask must have the shape (H, W) or (B, H, W), got {tuple(values.shape)}.")
    values = values / 255 if values.dtype == torch.uint8 else values.float()
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("mask must lie in [0, 1] without NaN, or be boolean or uint8.")
    return list(values if values.ndim == 3 else values[None])
