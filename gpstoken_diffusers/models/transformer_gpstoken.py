"""GPSTokenTransformerModel: the second stage of generation, from a layout to what its Gaussians show."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..geometry import GEOMETRY_CHANNELS
from . import official_checkpoints
from .conditional_block import (
    ConditionalBlock,
    ConditionalHead,
    GaussianEmbedding,
    TimeEmbedding,
    initialise_generator,
)
from .loading import SingleFileLoadingMixin
from .token_latents import TokenLatentsMixin


@dataclass
class VelocityOutput(BaseOutput):
    """What a flow-matching network gives.

    Attributes:
        sample: (B, N, channels), the velocity data - noise at the asked time, in the dtype of the input.
    """

    sample: Tensor


class GPSTokenTransformerModel(
    SingleFileLoadingMixin, TokenLatentsMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin
):
    r"""A SiT over tokens: predicts the velocity of the latents z_t = t z + (1 - t) noise.

    Latents are standardised geometry residuals and textures ([`TokenLatentsMixin`]). Every token is given its initial
    Gaussian, and all tokens the time and the class. There is no other position, so the order of tokens has no meaning
    and their number is free. The default arguments are the released SiT-XL/2-gs without its scale of latents;
    `from_preset("xl")` and `from_single_file` include the scale.

    N. Ma et al., "SiT: exploring flow and diffusion-based generative models with scalable interpolant transformers",
    2024; GPSToken, arXiv 2509.01109.

    Args:
        texture_channels: numbers of texture per token; latents have 5 more channels.
        num_tokens: tokens per image in training. Other numbers work, less well the further they are from it.
        num_classes: classes; label `num_classes` is the null class, "no class in particular".
        hidden_size, num_layers, num_attention_heads: the transformer.
        layout_frequencies: see [`GaussianEmbedding`]; 0 as released.
        geometry_residual: "additive" as released, or "relative", see [`geometry_residual`].
        latents_mean, latents_std: (5 + texture_channels) numbers that standardise the latents; None for 0 and 1.
        learn_sigma: whether the last layer has a second, unused half, as in the released files.
        position_table: whether there is a table of `num_tokens` positions, as in the released files. It is used where
            no layout is given, and is never trained.
        shared_modulation: see [`ConditionalBlock`].
    """

    _official = official_checkpoints.GENERATOR
    _supports_gradient_checkpointing = True
    _no_split_modules = ["ConditionalBlock"]
    _repeated_blocks = ["ConditionalBlock"]
    _skip_layerwise_casting_patterns = ["_embedding", "norm", "modulation", "head"]

    @register_to_config
    def __init__(
        self,
        texture_channels: int = 16,
        num_tokens: int = 128,
        num_classes: int = 1000,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        layout_frequencies: int = 0,
        geometry_residual: str = "additive",
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        learn_sigma: bool = False,
        position_table: bool = False,
        shared_modulation: bool = False,
    ):
        super().__init__()
        if geometry_residual not in ("additive", "relative"):
            raise ValueError(f'geometry_residual must be "additive" or "relative", got {geometry_residual!r}.')
        channels = GEOMETRY_CHANNELS + texture_channels
        self._register_latents_scale(channels, latents_mean, latents_std)
        self.token_embedding = nn.Linear(channels, hidden_size)
        self.layout_embedding = GaussianEmbedding(hidden_size, layout_frequencies)
        self.time_embedding = TimeEmbedding(hidden_size)
        self.class_embedding = nn.Embedding(num_classes + 1, hidden_size)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size) if shared_modulation else nn.Identity()
        self.blocks = nn.ModuleList(
            ConditionalBlock(hidden_size, num_attention_heads, shared_modulation) for _ in range(num_layers)
        )
        self.head = ConditionalHead(hidden_size, channels * (2 if learn_sigma else 1))
        initialise_generator(self)
        if position_table:
            self.positions = nn.Parameter(torch.zeros(1, num_tokens, hidden_size), requires_grad=False)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        layout: Tensor | None = None,
        return_dict: bool = True,
    ) -> VelocityOutput | tuple[Tensor]:
        """Predicts the velocity.

        Args:
            hidden_states: (B, N, 5 + texture_channels), noisy latents.
            timestep: (B,) float, flow time: 0 is noise, 1 is data.
            class_labels: (B,) int, 0 to `num_classes`, the last for no class.
            layout: (B, N, 5), initial Gaussians. None takes the table of positions, where the model has one.
            return_dict: whether to return a [`VelocityOutput`] or a tuple.

        Returns: (B, N, 5 + texture_channels), data - noise.

        Raises ValueError: shapes that do not fit together, or no layout where there is no table.
        """
        channels = GEOMETRY_CHANNELS + self.config.texture_channels
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != channels:
            raise ValueError(
                f"hidden_states must have the shape (B, N, {channels}): five geometry channels and this model's "
                f"{self.config.texture_channels} texture channels; got {tuple(hidden_states.shape)}."
            )
        # Class embeddings are in the dtype that the network computes in; its linear layers may be stored in another.
        condition = self.class_embedding(class_labels)
        dtype = condition.dtype
        if layout is None:
            if not self.config.position_table:
                raise ValueError("This model needs a layout: (B, N, 5) initial Gaussians, one for each token.")
            if hidden_states.shape[1] != self.config.num_tokens:
                raise ValueError(
                    f"Without a layout this model takes {self.config.num_tokens} tokens, got {hidden_states.shape[1]}."
                )
            where = self.positions
        elif layout.shape != (*hidden_states.shape[:2], GEOMETRY_CHANNELS):
            raise ValueError(
                f"layout must have the shape {(*hidden_states.shape[:2], GEOMETRY_CHANNELS)} to go with the latents, "
                f"got {tuple(layout.shape)}."
            )
        else:
            where = self.layout_embedding(layout, dtype)
        tokens = self.token_embedding(hidden_states.to(dtype)) + where
        condition = nn.functional.silu(self.time_embedding(timestep, dtype) + condition)
        changes = self.modulation(condition)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._gradient_checkpointing_func(block, tokens, changes)
            else:
                tokens = block(tokens, changes)
        velocity = self.head(tokens, condition)[..., :channels].to(hidden_states.dtype)
        return VelocityOutput(sample=velocity) if return_dict else (velocity,)
