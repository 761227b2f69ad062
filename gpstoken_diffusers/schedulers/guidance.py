"""Classifier-free guidance: from a network that knows classes to one velocity to integrate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Both in flow time, 0 being noise and 1 data. A network: (latents (B, N, C), time (B,), labels (B,)) -> (B, N, C).
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
Velocity = Callable[[Tensor, float], Tensor]


def guided_velocity(
    network: Network,
    class_labels: Tensor,
    null_class: int,
    guidance_scale: float,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """The velocity under classifier-free guidance, u + scale (c - u), with no more evaluations than it needs.

    Args:
        network: (latents (B, N, C), time (B,), labels (B,)) -> velocity (B, N, C).
        class_labels: (B,) int64.
        null_class: the label of the unconditional prediction u.
        guidance_scale: 1 is no guidance. Then, for samples without a class, and at times outside the interval, the
            network sees each sample once.
        guidance_interval: (first, last) time of guidance, inclusive, in flow time: 0 is noise, 1 is data.

    Returns: (latents, time) -> velocity (B, N, C) float32.

    Raises ValueError: a scale below 0, or an interval that is reversed or outside [0, 1].
    """
    first, last = guidance_interval
    if not 0 <= first <= last <= 1:
        raise ValueError(
            f"guidance_interval must be (first, last) with 0 <= first <= last <= 1 in flow time (0 noise, 1 data), "
            f"got {tuple(guidance_interval)}."
        )
    if guidance_scale < 0:
        raise ValueError(f"guidance_scale must not be negative, got {guidance_scale}.")
    guidable = guidance_scale != 1 and bool((class_labels != null_class).any())
    both = torch.cat([class_labels, torch.full_like(class_labels, null_class)])

    def velocity(latents: Tensor, time: float) -> Tensor:
        if not guidable or not first <= time <= last:
            towards_data = network(latents, latents.new_full((len(latents),), time), class_labels)
            # A copy: some schedulers keep it, and a network recorded as a CUDA graph writes its next result over it.
            return towards_data.to(torch.float32, copy=True)
        doubled = torch.cat([latents, latents])
        conditional, unconditional = network(doubled, doubled.new_full((len(doubled),), time), both).float().chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return velocity
