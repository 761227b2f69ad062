"""Classifier-free guidance: from a network that knows classes to one velocity to integrate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Both in flow time, 0 being noise and 1 data. A network: (latents (B, N, C), time (B,), labels (B,)) -> (B, N, C).
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
Velocity = Callable[[Tensor, float], Tensor]


# Schedulers of diffusers keep sigma = 1 - time in float32, some with sums that round several times, and one begins at
# 1 - 1e-6. Grids are a hundred times coarser than this.
_SAME_TIME = 1e-5


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
        guidance_interval: (first, last) time of guidance in flow time, 0 being noise and 1 data. Both ends count, and
            steps of a grid that begin there within rounding count as well.

    Returns: (latents, time) -> velocity, (B, N, C) float32. It also takes 2 B rows, samples and then their companions,
        and returns as many, as the released sampler does: where guidance acts, companions get the velocity of their
        samples; elsewhere they go their own way without a class. Only the step size of "official-ode" depends on them.

    Raises ValueError: a scale below 0, or an interval that is reversed or outside [0, 1].
    """
    first, last = guidance_interval
    if not 0 <= first <= last <= 1:
        raise ValueError(
            f"guidance_interval must be (first, last) with 0 <= first <= last <= 1 in flow time (0 noise, 1 data), "
            f"got {tuple(guidance_interval)}."
        )
    if not guidance_scale >= 0:
        raise ValueError(f"guidance_scale must be at least 0, got {guidance_scale}.")
    batch_size = len(class_labels)
    guidable = guidance_scale != 1 and bool((class_labels != null_class).any())
    both = torch.cat([class_labels, torch.full_like(class_labels, null_class)])

    def evaluate(latents: Tensor, time: float) -> Tensor:
        return network(latents, latents.new_full((len(latents),), time), both[: len(latents)])

    def velocity(latents: Tensor, time: float) -> Tensor:
        samples = latents[:batch_size]
        if guidable and first - _SAME_TIME <= time <= last + _SAME_TIME:
            conditional, unconditional = evaluate(torch.cat([samples, samples]), time).float().chunk(2)
            towards_data = unconditional + guidance_scale * (conditional - unconditional)
        else:
            # A copy: some schedulers keep it, and a network recorded as a CUDA graph writes its next result over it.
            towards_data = evaluate(latents if guidable else samples, time).to(torch.float32, copy=True)
        return torch.cat([towards_data] * (len(latents) // len(towards_data)))

    return velocity
