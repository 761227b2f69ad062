"""Guidance: from a network that knows classes to one velocity to integrate, in our own way or by diffusers' guiders."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.guiders import BaseGuidance
from torch import Tensor

from ..models.conditional_block import ConditionalBlock

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

    Raises ValueError: a scale below 0 or infinite, or an interval that is reversed or outside [0, 1].
    """
    is_pair = isinstance(guidance_interval, (tuple, list)) and len(guidance_interval) == 2
    is_pair = is_pair and all(isinstance(time, Real) for time in guidance_interval)
    if not is_pair or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
        raise ValueError(
            f"guidance_interval must be (first, last) with 0 <= first <= last <= 1 in flow time (0 noise, 1 data), "
            f"got {guidance_interval!r}."
        )
    first, last = guidance_interval
    if not isinstance(guidance_scale, Real) or not 0 <= guidance_scale < math.inf:
        raise ValueError(f"guidance_scale must be at least 0 and finite, got {guidance_scale!r}.")
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


# What these do to pictures, or to attention of diffusers' own kinds, means nothing for tokens.
_NOT_FOR_TOKENS = {
    "FrequencyDecoupledGuidance": "takes pictures apart by frequency",
    "LTX2Guidance": "is for video with sound",
    "PerturbedAttentionGuidance": "replaces attention that our models compute in another way",
    "SmoothedEnergyGuidance": "blurs attention over a grid of pixels",
}


def check_guider(guider: BaseGuidance | None) -> None:
    """Raises TypeError for what is no guider of diffusers, ValueError for a guider that cannot guide tokens."""
    if guider is None:
        return
    if not isinstance(guider, BaseGuidance):
        raise TypeError(
            f"guider must be one of diffusers.guiders, such as ClassifierFreeGuidance(guidance_scale=3.0), got "
            f"{type(guider).__name__}."
        )
    if type(guider).__name__ in _NOT_FOR_TOKENS:
        raise ValueError(
            f"{type(guider).__name__} {_NOT_FOR_TOKENS[type(guider).__name__]}, so it cannot guide tokens. Take "
            "ClassifierFreeGuidance, AutoGuidance, SkipLayerGuidance or AdaptiveProjectedGuidance."
        )


def guider_velocity(
    guider: BaseGuidance,
    model: ModelMixin,
    network: Network,
    class_labels: Tensor,
    null_class: int,
    scheduler: SchedulerMixin,
) -> Velocity:
    """The velocity under one of diffusers' guiders.

    A guider's `start` and `stop` count evaluations of this run, from 0 at noise to 1 at data; a `guidance_interval`
    is in flow time. Each condition is evaluated by itself. The weak branch of `AutoGuidance` gets the label itself,
    as its paper has it, not the null label.

    Args:
        model: whose blocks a guider may skip.
        network: (latents (B, N, C), time (B,), labels (B,)) -> velocity (B, N, C), by that model.
        class_labels: (B,) int64.
        null_class: the label of the unconditional prediction.
        scheduler: whose steps the guider counts; its steps are set when the first velocity is asked for.

    Returns: (latents, time) -> velocity, (B, N, C) float32; for one run.
    """
    _register_blocks()
    weak = class_labels if type(guider).__name__ == "AutoGuidance" else torch.full_like(class_labels, null_class)
    step = 0

    def velocity(latents: Tensor, time: float) -> Tensor:
        nonlocal step
        timesteps = scheduler.timesteps[scheduler.begin_index :]
        guider.set_state(step=step, num_inference_steps=len(timesteps), timestep=timesteps[step])
        step += 1
        batches = guider.prepare_inputs({"class_labels": (class_labels, weak)})
        times = latents.new_full((len(latents),), time)
        for batch in batches:
            guider.prepare_models(model)
            try:
                # A copy: a network recorded as a CUDA graph writes its next result over it.
                batch.noise_pred = network(latents, times, batch.class_labels).to(torch.float32, copy=True)
            finally:  # what a guider hooks into a model must not outlive a run that fails
                guider.cleanup_models(model)
        return guider(batches).pred

    return velocity


def _register_blocks() -> None:
    """Tells diffusers how to skip our blocks. Its registry is private: where it moved, only such guiders fail."""
    try:
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    except ImportError:
        return
    TransformerBlockRegistry.register(ConditionalBlock, TransformerBlockMetadata(return_hidden_states_index=0))
