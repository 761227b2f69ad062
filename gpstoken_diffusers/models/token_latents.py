"""Tokens as a generator's latents and back: a geometry residual and texture, each channel standardised."""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import CENTER, GENERATED_MAX_ABS_RHO, GEOMETRY_CHANNELS, MIN_SIGMA, RHO, SIGMA


def geometry_residual(initial_geometry: Tensor, geometry: Tensor, kind: str) -> Tensor:
    """The difference between a Gaussian and its initial one; undone by [`geometry_from_residual`].

    Args:
        initial_geometry, geometry: (..., 5) float32.
        kind: "additive", the difference of the numbers, as in the released generator; or "relative": log ratios of
            the sigmas, atanh of rho, and the centre's shift in units of the initial sigmas. Additive residuals of small
            Gaussians vanish beside those of large ones; relative ones have the same size, and any value gives a valid
            Gaussian.

    Returns: (..., 5) float32.
    """
    if kind == "additive":
        return geometry - initial_geometry
    scale = initial_geometry[..., SIGMA]
    rho = geometry[..., RHO, None].clamp(-GENERATED_MAX_ABS_RHO, GENERATED_MAX_ABS_RHO)
    return torch.cat(
        [
            (geometry[..., SIGMA] / scale).log(),
            rho.atanh() - initial_geometry[..., RHO, None].atanh(),
            (geometry[..., CENTER] - initial_geometry[..., CENTER]) / scale,
        ],
        dim=-1,
    )


def geometry_from_residual(initial_geometry: Tensor, residual: Tensor, kind: str) -> Tensor:
    """Undoes [`geometry_residual`]; sigma and rho are clamped as the released code does.

    Returns: (..., 5) float32, sigma in [1e-5, 1 - 1e-5], |rho| <= 0.99999.
    """
    if kind == "additive":
        sigma = initial_geometry[..., SIGMA] + residual[..., SIGMA]
        rho = initial_geometry[..., RHO, None] + residual[..., RHO, None]
        center = initial_geometry[..., CENTER] + residual[..., CENTER]
    else:
        scale = initial_geometry[..., SIGMA]
        sigma = scale * residual[..., SIGMA].exp()
        rho = (initial_geometry[..., RHO, None].atanh() + residual[..., RHO, None]).tanh()
        center = initial_geometry[..., CENTER] + scale * residual[..., CENTER]
    sigma = sigma.clamp(MIN_SIGMA, 1 - MIN_SIGMA)
    return torch.cat([sigma, rho.clamp(-GENERATED_MAX_ABS_RHO, GENERATED_MAX_ABS_RHO), center], dim=-1)


class StandardisedLatentsMixin:
    """A generator whose config holds the mean and deviation of each latent channel, and its number of classes."""

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return self.config.num_classes

    def _register_latents_scale(self, channels: int, mean: list[float] | None, std: list[float] | None) -> None:
        """Checks and completes `latents_mean` and `latents_std`, None being 0 and 1; for `__init__` to call."""
        scale = {"latents_mean": mean or [0.0] * channels, "latents_std": std or [1.0] * channels}
        for name, values in scale.items():
            if len(values) != channels:
                raise ValueError(f"{name} must have a number for each of {channels} channels, got {len(values)}.")
        if min(scale["latents_std"]) <= 0:
            raise ValueError(f"latents_std must be positive, got {min(scale['latents_std'])}.")
        self.register_to_config(**{name: list(values) for name, values in scale.items()})

    def _latents_scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        scale = (self.config.latents_mean, self.config.latents_std)
        return tuple(torch.tensor(values, dtype=torch.float32, device=device) for values in scale)


class TokenLatentsMixin(StandardisedLatentsMixin):
    """Standardised latents of a generator, by `latents_mean`, `latents_std` and `geometry_residual` of its config."""

    def to_latents(self, initial_geometry: Tensor, geometry: Tensor, texture: Tensor) -> Tensor:
        """Tokens as latents.

        Args:
            initial_geometry: (..., N, 5), the layout they were made from.
            geometry, texture: (..., N, 5) and (..., N, C).

        Returns: (..., N, 5 + C) float32, around mean 0 and standard deviation 1.
        """
        residual = geometry_residual(initial_geometry.float(), geometry.float(), self.config.geometry_residual)
        mean, std = self._latents_scale(texture.device)
        return (torch.cat([residual, texture.float()], dim=-1) - mean) / std

    def from_latents(self, initial_geometry: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Undoes `to_latents`: layout and latents -> geometry (..., N, 5) and texture (..., N, C), float32."""
        mean, std = self._latents_scale(latents.device)
        values = latents.float() * std + mean
        residual, texture = values[..., :GEOMETRY_CHANNELS], values[..., GEOMETRY_CHANNELS:]
        kind = self.config.geometry_residual
        return geometry_from_residual(initial_geometry.float(), residual, kind), texture
