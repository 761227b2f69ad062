"""How much of a picture each channel of a generator's latents carries, and a scale of latents that says so."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.autoencoder_gpstoken import AutoencoderGPSToken
from ..models.token_latents import geometry_from_residual, geometry_residual
from ..tokens import GEOMETRY_CHANNELS, GPSTokens
from .token_dataset import TokenDataset

LEAST_DEVIATION = 0.05
PROBED_ITEMS = 8
PROBE = 0.3
"""Of a channel's deviation: large enough to be seen in bfloat16, small enough to be nearly linear."""


@torch.no_grad()
def picture_shares(autoencoder: AutoencoderGPSToken, dataset: TokenDataset, std: Tensor, residual: str) -> Tensor:
    """The error of the picture that noise in one latent channel causes, as a share of that of all channels.

    Args:
        autoencoder: the tokenizer that made the dataset.
        std: (5 + C,), deviation of each channel: the noise is a fixed share of it.
        residual: "additive" or "relative", see [`geometry_residual`].

    Returns: (5 + C,) float32, positive, of sum 1. Items, evenly spread, and noise are the same in every run.
    """
    places = torch.linspace(0, len(dataset) - 1, min(PROBED_ITEMS, len(dataset))).long().tolist()
    items = [dataset[place] for place in places]
    layout, geometry, texture = (
        torch.stack([item[name] for item in items]).float() for name in ("initial_geometry", "geometry", "texture")
    )
    latents = torch.cat([geometry_residual(layout, geometry, residual), texture], dim=-1)
    noise = PROBE * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)) * std

    def picture(latents: Tensor) -> Tensor:
        moved = geometry_from_residual(layout, latents[..., :GEOMETRY_CHANNELS], residual)
        tokens = GPSTokens(moved, latents[..., GEOMETRY_CHANNELS:], dataset.image_size)
        tokens = tokens.to(autoencoder.device).to(autoencoder.dtype)
        return autoencoder.decode(tokens).sample.float()

    clean = picture(latents)
    errors = []
    for channel in range(latents.shape[-1]):
        noisy = latents.clone()
        noisy[..., channel] += noise[..., channel]
        errors.append((picture(noisy) - clean).square().mean())
    errors = torch.stack(errors).cpu() + torch.finfo(torch.float32).tiny
    return errors / errors.sum()


def latents_statistics(
    dataset: TokenDataset, residual: str, autoencoder: AutoencoderGPSToken, emphasis: float
) -> dict[str, list[float]]:
    """The scale of a dataset's latents, as arguments of the model: `latents_mean` and `latents_std`.

    Args:
        residual: "additive" or "relative", see [`geometry_residual`].
        emphasis: 0 gives every channel the deviation 1. With 1 the square of a channel's deviation is in proportion to
            its [`picture_shares`], so that the loss is nearly the error of the picture, and what is seen most comes
            out of the noise first. Between them, a power of it. The largest deviation is 1, the least 0.05.
    """
    mean, std = dataset.statistics(residual)
    std = std.clamp(min=1e-6)
    if emphasis:
        gain = picture_shares(autoencoder, dataset, std.float(), residual).pow(emphasis / 2).double()
        std = std / (gain / gain.max()).clamp(min=LEAST_DEVIATION)
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
