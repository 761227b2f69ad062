"""The loop from noise to data, for every flow scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import Generator, Tensor

from .flow_time import data_times, set_timesteps, to_model_output
from .guidance import Velocity
from .scheduling_dopri5 import FlowMatchDopri5Scheduler
from .scheduling_gpstoken_sde import GPSTokenSDEScheduler


class FlowStep(NamedTuple):
    """A step that was taken.

    Attributes:
        number: counts the steps from 0.
        time: the flow time at its start; at its end for adaptive schedulers.
        timestep: the same as the scheduler names it, a tensor without dimensions.
        latents: (B, N, C) float32 after the step.
        denoised: (B, N, C) float32, what the network expected at the start of the step that the way will end as; the
            latents themselves from adaptive schedulers.
    """

    number: int
    time: float
    timestep: Tensor
    latents: Tensor
    denoised: Tensor


def is_adaptive(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler chooses its own steps, and so has no list of timesteps."""
    return isinstance(scheduler, FlowMatchDopri5Scheduler)


def integrate_flow(
    scheduler: SchedulerMixin,
    velocity: Velocity,
    latents: Tensor,
    num_inference_steps: int | None,
    generators: Sequence[Generator] = (),
    on_step: Callable[[FlowStep], Tensor | None] = lambda step: step.latents,
    strength: float = 1.0,
) -> Tensor:
    """From noise to data by any flow scheduler.

    Args:
        scheduler: of diffusers or of this package.
        velocity: (latents, flow time) -> data - noise, as [`guided_velocity`] makes it: adaptive schedulers call it
            with 2 B rows.
        latents: (B, N, C) float32 at the flow time at which the steps begin.
        num_inference_steps: steps of the whole way; adaptive schedulers ignore it.
        generators: one per sample, for schedulers that add noise.
        on_step: called after every step; the way goes on from the latents that it returns, and ends with None. What it
            returns to an adaptive scheduler only says whether to go on.
        strength: the part of the way to go, see [`set_timesteps`].

    Returns: (B, N, C) float32.
    """
    if is_adaptive(scheduler):
        return _integrate_adaptively(scheduler, velocity, latents, on_step, 1 - strength)
    begin = set_timesteps(scheduler, num_inference_steps, latents.device, strength)
    times = data_times(scheduler)
    draws_noise = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": list(generators)} if draws_noise else {}
    if isinstance(scheduler, GPSTokenSDEScheduler):
        latents = scheduler.add_first_noise(latents, **options)
    for number, (timestep, time) in enumerate(zip(scheduler.timesteps[begin:], times[begin:], strict=True)):
        towards_data = velocity(latents, time)
        stepped = scheduler.step(to_model_output(towards_data), timestep, latents, **options).prev_sample
        kept = on_step(FlowStep(number, time, timestep, stepped, latents + (1 - time) * towards_data))
        if kept is None:
            return stepped
        latents = kept
    return latents


def _integrate_adaptively(
    scheduler: FlowMatchDopri5Scheduler,
    velocity: Velocity,
    latents: Tensor,
    on_step: Callable[[FlowStep], Tensor | None],
    start_time: float,
) -> Tensor:
    """As the release does it: samples and their companions are one state, and the errors of both set the step size."""
    batch_size, steps = len(latents), 0

    def callback(time: float, state: Tensor) -> bool:
        nonlocal steps
        samples = state[:batch_size]
        kept = on_step(FlowStep(steps, time, torch.tensor(1000 * (1 - time)), samples, samples))
        steps += 1
        return kept is None

    return scheduler.integrate(velocity, torch.cat([latents, latents]), start_time, callback)[:batch_size]
