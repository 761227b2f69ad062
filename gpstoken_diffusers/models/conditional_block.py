"""What the generating transformers share: adaLN-zero blocks, and embeddings of time, class and Gaussians."""

from __future__ import annotations

import math

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from ..geometry import CENTER, GEOMETRY_CHANNELS, SIGMA
from .attention import FeedForward, TokenAttention, autocast_disabled

TIME_FREQUENCIES = 256


class ConditionalBlock(nn.Module):
    """Transformer block whose normalisations are shifted, scaled and gated by a condition (adaLN-zero).

    W. Peebles and S. Xie, "Scalable diffusion models with transformers", 2023. The gates start at zero, so a fresh
    block is the identity.

    Args:
        shared_modulation: the model computes shifts, scales and gates once, and a block only adds numbers of its own to
            them: a third of the weights less (J. Chen et al., "PixArt-alpha", 2023).

    Shapes: tokens (B, N, hidden_size) -> the same; condition (B, hidden_size), already activated, or what the model
    made of it, (B, 6 hidden_size).
    """

    def __init__(self, hidden_size: int, heads: int, shared_modulation: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = TokenAttention(hidden_size, heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(hidden_size, 4 * hidden_size, hidden_size, nn.GELU("tanh"))
        self.shared_modulation = shared_modulation
        if shared_modulation:
            self.offset = Offset(6 * hidden_size)
        else:
            self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        changes = self.offset(condition) if self.shared_modulation else self.modulation(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = changes[:, None].chunk(6, dim=-1)
        hidden_states = hidden_states + gate1 * self.attn(self.norm1(hidden_states) * (1 + scale1) + shift1)
        return hidden_states + gate2 * self.ff(self.norm2(hidden_states) * (1 + scale2) + shift2)


class Offset(nn.Module):
    """Adds learned numbers, one per channel, that start at zero: (..., channels) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, values: Tensor) -> Tensor:
        return values + self.bias


class ConditionalHead(nn.Module):
    """The last layer: a modulated normalisation and a linear map.

    Shapes: tokens (B, N, hidden_size), condition (B, hidden_size), already activated -> (B, N, out_features).
    """

    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, out_features)

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.proj(self.norm(hidden_states) * (1 + scale) + shift)


class TimeEmbedding(FeedForward):
    """Embeds flow time in [0, 1], not scaled, by 256 sines and cosines and two linear layers.

    Shapes: (B,) and the dtype that the network computes in -> (B, hidden_size).
    """

    def __init__(self, hidden_size: int):
        super().__init__(TIME_FREQUENCIES, hidden_size, hidden_size, nn.SiLU())

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        waves = get_timestep_embedding(timestep, TIME_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        return super().forward(waves.to(dtype))


def fourier_features(values: Tensor, frequencies: int) -> Tensor:
    """Sines and cosines at wavelengths 4, 2, 1, ...: (..., K) float32 -> (..., 2 K frequencies) float32."""
    octaves = 2.0 ** torch.arange(frequencies, device=values.device) * (math.pi / 2)
    phases = (values[..., None] * octaves).flatten(-2)
    return torch.cat([phases.sin(), phases.cos()], dim=-1)


class GaussianEmbedding(FeedForward):
    """Embeds the Gaussians that condition each token.

    Args:
        hidden_size: width of the tokens.
        frequencies: 0 embeds the five numbers as they are, as the released generator does. More adds
            [`fourier_features`] of the centre and of log2(sigma) / 2: from bare coordinates, a network is slow to learn
            to tell apart neighbours at a hundredth of the image.

    Shapes: (B, N, 5) float32 and the dtype that the network computes in -> (B, N, hidden_size).
    """

    def __init__(self, hidden_size: int, frequencies: int):
        super().__init__(GEOMETRY_CHANNELS + 8 * frequencies, hidden_size, hidden_size, nn.SiLU())
        self.frequencies = frequencies

    def forward(self, geometry: Tensor, dtype: torch.dtype) -> Tensor:
        features = geometry.float()
        if self.frequencies:
            with autocast_disabled(geometry):
                where = torch.cat([features[..., SIGMA].log2() / 2, features[..., CENTER]], dim=-1)
                features = torch.cat([features, fourier_features(where, self.frequencies)], dim=-1)
        return super().forward(features.to(dtype))


def initialise_generator(model: nn.Module) -> None:
    """Draws fresh weights: Xavier-uniform matrices, small embeddings, and zeros in gates and the last layer."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for module in model.modules():
        if isinstance(module, (TimeEmbedding, GaussianEmbedding)):
            nn.init.normal_(module[0].weight, std=0.02)
            nn.init.normal_(module[2].weight, std=0.02)
        if isinstance(getattr(module, "modulation", None), nn.Linear):
            nn.init.zeros_(module.modulation.weight)
        if isinstance(module, ConditionalHead):
            nn.init.zeros_(module.proj.weight)
