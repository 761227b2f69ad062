"""GPSTokenLayoutModel: the first stage of generation, from noise to where the Gaussians lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..geometry import CENTER, SIGMA
from .conditional_block import (
    ConditionalBlock,
    ConditionalHead,
    TimeEmbedding,
    fourier_features,
    initialise_generator,
)
from .loading import FolderLoadingMixin
from .token_latents import StandardisedLatentsMixin
from .transformer_gpstoken import VelocityOutput

LAYOUT_CHANNELS = 4
# Enough octaves to tell neighbours apart in sets of some hundred tokens.
PLACE_FREQUENCIES = 8
# Bits per axis of the Z-curve: cells finer than the smallest regions of any picture.
_Z_CURVE_BITS = 12


class GPSTokenLayoutModel(
    FolderLoadingMixin, StandardisedLatentsMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin
):
    r"""A light transformer that draws layouts, N initial Gaussians, by flow matching.

    A layout's latents are, per Gaussian, (log2 sigma_x, log2 sigma_y, x, y), standardised; rho is 0 in every layout.
    Gaussians are ordered along a Z-curve through their centres, on which the halves of a partition follow each other,
    and each is given its place on the curve: as a set without order they take far longer to learn. The place is
    relative, so N is free. What the model draws lies near a partition but is not one yet; [`calibrate_layout`] finds
    that partition (generation pipeline of GPSToken, arXiv 2509.01109: mean calibration and sigma re-initialisation).

    Args:
        num_tokens: tokens per image that it was trained on.
        num_classes: classes; label `num_classes` is the null class.
        hidden_size, num_layers, num_attention_heads: the transformer.
        coordinate_frequencies: octaves of [`fourier_features`] by which the noisy latents are embedded.
        latents_mean, latents_std: four numbers each that standardise the latents; None for 0 and 1.
        shared_modulation: see [`ConditionalBlock`].

    Precision: weights and arithmetic stay float32, whatever precision the model is loaded in or cast to; the model is
    small. Calibration makes whole pixels of what is drawn: roundings would give other regions, and the same seed
    another picture. Autocast is followed, for training; the pipeline turns it off.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ConditionalBlock"]
    _repeated_blocks = ["ConditionalBlock"]
    _skip_layerwise_casting_patterns = ["_embedding", "norm", "modulation", "head"]
    # All of it: for `from_pretrained`, and for layerwise casting, which leaves these as they are.
    _keep_in_fp32_modules = [
        "token_embedding", "place_embedding", "time_embedding", "class_embedding", "modulation", "blocks", "head",
    ]  # fmt: skip

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 128,
        num_classes: int = 1000,
        hidden_size: int = 192,
        num_layers: int = 6,
        num_attention_heads: int = 3,
        coordinate_frequencies: int = 6,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        shared_modulation: bool = False,
    ):
        super().__init__()
        self._register_latents_scale(LAYOUT_CHANNELS, latents_mean, latents_std)
        self.token_embedding = nn.Linear(LAYOUT_CHANNELS * (1 + 2 * coordinate_frequencies), hidden_size)
        self.place_embedding = nn.Linear(2 * PLACE_FREQUENCIES, hidden_size)
        self.time_embedding = TimeEmbedding(hidden_size)
        self.class_embedding = nn.Embedding(num_classes + 1, hidden_size)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size) if shared_modulation else nn.Identity()
        self.blocks = nn.ModuleList(
            ConditionalBlock(hidden_size, num_attention_heads, shared_modulation) for _ in range(num_layers)
        )
        self.head = ConditionalHead(hidden_size, LAYOUT_CHANNELS)
        initialise_generator(self)
        self.gradient_checkpointing = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPSTokenLayoutModel:
        # `to`, `half`, `bfloat16` and the `to` of whatever holds this model end here.
        def in_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_rounded = moved.is_floating_point() and moved.dtype.itemsize < tensor.dtype.itemsize == 4
            return tensor.to(moved.device) if is_rounded else moved

        return super()._apply(in_float32, recurse)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> VelocityOutput | tuple[Tensor]:
        """Predicts the velocity of noisy layouts.

        Args:
            hidden_states: (B, N, 4), noisy latents, in the order of the Z-curve.
            timestep: (B,) float, flow time: 0 is noise, 1 is data.
            class_labels: (B,) int, 0 to `num_classes`, the last for no class.
            return_dict: whether to return a [`VelocityOutput`] or a tuple.

        Returns: (B, N, 4), data - noise.

        Raises ValueError: another shape of latents.
        """
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != LAYOUT_CHANNELS:
            raise ValueError(
                f"hidden_states must have the shape (B, N, {LAYOUT_CHANNELS}), got {tuple(hidden_states.shape)}."
            )
        latents = hidden_states.float()
        # Latents reach some three deviations: a quarter of them fits the longest wave of the features.
        features = [latents, fourier_features(latents / 4, self.config.coordinate_frequencies)]
        count = hidden_states.shape[1]
        place = (torch.arange(count, device=latents.device) * 2 + 1) / count - 1
        # Class embeddings are in the dtype that the network computes in; its linear layers may be stored in another.
        condition = self.class_embedding(class_labels)
        dtype = condition.dtype
        tokens = self.token_embedding(torch.cat(features, dim=-1).to(dtype))
        tokens = tokens + self.place_embedding(fourier_features(place[:, None], PLACE_FREQUENCIES).to(dtype))
        condition = nn.functional.silu(self.time_embedding(timestep, dtype) + condition)
        changes = self.modulation(condition)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._gradient_checkpointing_func(block, tokens, changes)
            else:
                tokens = block(tokens, changes)
        velocity = self.head(tokens, condition).to(hidden_states.dtype)
        return VelocityOutput(sample=velocity) if return_dict else (velocity,)

    def to_latents(self, layout: Tensor) -> Tensor:
        """Initial Gaussians (..., N, 5), in any order, as standardised latents (..., N, 4) along the Z-curve."""
        mean, std = self._latents_scale(layout.device)
        order = z_curve_order(layout[..., CENTER])
        return (layout_features(layout.gather(-2, order[..., None].expand(layout.shape))) - mean) / std

    def from_latents(self, latents: Tensor) -> Tensor:
        """Undoes `to_latents`: (..., N, 4) -> Gaussians (..., N, 5) float32 with rho = 0, not yet calibrated."""
        mean, std = self._latents_scale(latents.device)
        values = latents.float() * std + mean
        sigma, center = values[..., :2].exp2(), values[..., 2:]
        return torch.cat([sigma, torch.zeros_like(sigma[..., :1]), center], dim=-1)


def z_curve_order(center: Tensor) -> Tensor:
    """The order of points along a Z-curve (Morton order): (..., N, 2) x, y in [-1, 1] -> (..., N) int64 indices."""
    cells = ((center.float() + 1) / 2 * 2**_Z_CURVE_BITS).long().clamp(0, 2**_Z_CURVE_BITS - 1)
    code = torch.zeros_like(cells[..., 0])
    for bit in range(_Z_CURVE_BITS):
        x, y = (cells >> bit & 1).unbind(-1)
        code |= (x | y << 1) << 2 * bit
    return code.argsort(dim=-1, stable=True)


def layout_features(layout: Tensor) -> Tensor:
    """What the layout model draws: (..., 5) initial Gaussians -> (..., 4), log2 of the sigmas and the centre."""
    layout = layout.float()
    return torch.cat([layout[..., SIGMA].log2(), layout[..., CENTER]], dim=-1)
