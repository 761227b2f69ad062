"""Samplers by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from .flow_time import check_num_steps
from .scheduling_dopri5 import FlowMatchDopri5Scheduler
from .scheduling_gpstoken_sde import GPSTokenSDEScheduler


@dataclass(frozen=True)
class SamplerPreset:
    """A way of sampling.

    Attributes:
        description: one line for a menu.
        make: makes its scheduler.
        num_steps: steps unless others are asked for; None for a solver that chooses them itself.
        inference_steps: what the scheduler is to count, from the number of steps.
        evaluations: evaluations of the network (guidance doubles their cost, not their number), from the number of
            steps; None where the solver chooses.
    """

    description: str
    make: Callable[[], SchedulerMixin]
    num_steps: int | None
    inference_steps: Callable[[int], int] = lambda steps: steps
    evaluations: Callable[[int], int] | None = lambda steps: steps


def _make_unipc() -> SchedulerMixin:
    return UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")


def _make_dpm_solver() -> SchedulerMixin:
    return DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")


def _make_euler_maruyama() -> SchedulerMixin:
    return GPSTokenSDEScheduler(sde_solver="euler_maruyama")


def _make_sde_heun() -> SchedulerMixin:
    return GPSTokenSDEScheduler(sde_solver="heun")


# The official defaults are 250 steps, in which both ends of the grid count. Those of the others are where a Gaussian
# with known answer comes out within 1% (Euler: 3%).
SAMPLER_PRESETS = {
    "official-sde": SamplerPreset("The paper's: Euler-Maruyama, 100 steps and more", _make_euler_maruyama, 250),
    "official-sde-heun": SamplerPreset(
        "The paper's SDE with Heun steps, two evaluations per step",
        _make_sde_heun,
        250,
        evaluations=lambda steps: 2 * steps - 1,
    ),
    "official-ode": SamplerPreset("The paper's ODE: adaptive dopri5", FlowMatchDopri5Scheduler, None, evaluations=None),
    "official-ode-euler": SamplerPreset(
        "The paper's Euler ODE: its steps count both ends of the grid",
        FlowMatchEulerDiscreteScheduler,
        250,
        inference_steps=lambda steps: steps - 1,
        evaluations=lambda steps: steps - 1,
    ),
    "sde": SamplerPreset(
        "The paper's equation with an exponential solver, 20 steps and more", GPSTokenSDEScheduler, 50
    ),
    "euler": SamplerPreset("Euler, diffusers' default for flows", FlowMatchEulerDiscreteScheduler, 50),
    "heun": SamplerPreset(
        "Heun, second order, two evaluations per step",
        FlowMatchHeunDiscreteScheduler,
        20,
        evaluations=lambda steps: 2 * steps - 1,
    ),
    "unipc": SamplerPreset("UniPC, second order, right from 10 steps on", _make_unipc, 20),
    "dpm++": SamplerPreset("DPM-Solver++ 2M, second order, right from 10 steps on", _make_dpm_solver, 20),
}


def make_sampler(name: str, num_steps: int | None = None) -> tuple[SchedulerMixin, int | None]:
    """A fresh scheduler and the number of steps to give to [`flow_time.set_timesteps`].

    Args:
        name: one of `SAMPLER_PRESETS`:

            | name | evaluations of the network for n steps | n unless said |
            |---|---|---|
            | "official-sde" | n | 250 |
            | "official-sde-heun" | 2 n - 1 | 250 |
            | "official-ode" | as the tolerances ask (26 in the reference's small run) | - |
            | "official-ode-euler" | n - 1 | 250 |
            | "sde" | n | 50 |
            | "euler" | n | 50 |
            | "heun" | 2 n - 1 | 20 |
            | "unipc" | n | 20 |
            | "dpm++" | n | 20 |
        num_steps: n; None takes the preset's. Without effect on "official-ode", which has no steps to set.

    Returns: the scheduler, and the steps: None for "official-ode", whose scheduler integrates by itself.

    Raises ValueError: an unknown name, or fewer steps than the sampler needs.
    """
    preset = SAMPLER_PRESETS.get(name)
    if preset is None:
        close = difflib.get_close_matches(str(name).lower(), SAMPLER_PRESETS, n=2)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"There is no sampler {name!r}.{hint} Choose one of {', '.join(SAMPLER_PRESETS)}.")
    if preset.num_steps is None:
        return preset.make(), None
    num_steps = preset.num_steps if num_steps is None else num_steps
    check_num_steps(num_steps, fewest=2 if name.startswith("official") else 1)
    return preset.make(), preset.inference_steps(num_steps)
