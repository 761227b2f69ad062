"""Two conventions of time and sign meet here, and nowhere else.

The networks of this package follow SiT (arXiv 2401.08740): x_t = t data + (1 - t) noise with t from 0 (noise) to 1
(data), and they predict the velocity v = data - noise. Schedulers of diffusers, and ours with them, count
sigma = 1 - t from 1 (noise) to 0 (data), name steps by timestep = 1000 sigma, and expect noise - data = -v.
"""

from __future__ import annotations

from numbers import Integral

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
)
from torch import Tensor

# What from_config can turn a flow scheduler into, and from.
FLOW_SCHEDULERS = [
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
]

# At sigma = 1 exactly log(t / sigma) is infinite, which the multistep solvers of diffusers cannot always take.
_ALMOST_NOISE = 1 - 1e-6


def check_num_steps(num_inference_steps: int, fewest: int = 1) -> None:
    """Raises ValueError unless `num_inference_steps` is an integer of at least `fewest`."""
    is_integer = isinstance(num_inference_steps, Integral) and not isinstance(num_inference_steps, bool)
    if not is_integer or num_inference_steps < fewest:
        raise ValueError(f"num_inference_steps must be an integer of at least {fewest}, got {num_inference_steps!r}.")


def check_flow_settings(scheduler: SchedulerMixin) -> None:
    """Raises ValueError if the scheduler is one for another kind of diffusion."""
    config, name = scheduler.config, type(scheduler).__name__
    if "prediction_type" not in config:
        # diffusers' schedulers that know flows only mix noise and data by this method, and all others by `add_noise`.
        if not hasattr(scheduler, "scale_noise"):
            raise ValueError(
                f"{name} is no scheduler for flows, but these networks predict the velocity of a flow. Take "
                "FlowMatchEulerDiscreteScheduler, say, or one that make_sampler makes."
            )
    elif config.prediction_type != "flow_prediction" or not config.get("use_flow_sigmas", False):
        raise ValueError(
            f"{name} has prediction_type={config.prediction_type!r} and use_flow_sigmas="
            f"{config.get('use_flow_sigmas', False)}, but these networks predict the velocity of a flow. Make it with "
            'prediction_type="flow_prediction", use_flow_sigmas=True.'
        )


def keep_flow_settings(scheduler: SchedulerMixin) -> None:
    """Checks the flow settings of a scheduler of ours, and hands them on to whatever is made from its config.

    diffusers notes which settings were left at their defaults, and `from_config` gives another class its own defaults
    for those. The multistep solvers' own are not for flows.
    """
    check_flow_settings(scheduler)
    defaults = set(scheduler.config.get("_use_default_values", ())) - {"prediction_type", "use_flow_sigmas"}
    scheduler.register_to_config(_use_default_values=sorted(defaults))


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    device: str | torch.device | None = None,
    strength: float = 1.0,
) -> int:
    """Sets the steps of any flow scheduler so that they lead all the way from noise (t = 0) to data (t = 1).

    Left alone, diffusers' flow schedulers begin or end a thousandth short, or spend a whole step on that thousandth.
    The steps are uniform in sigma before the scheduler's own shift.

    Args:
        scheduler: ours, or one of diffusers for flows, set to flow prediction where it knows others.
        num_inference_steps: steps of the whole way.
        device: where the scheduler keeps its timesteps.
        strength: in (0, 1], the part of the way to go. Below 1 (image to image) the first steps are left out: mix data
            and noise by [`mix_noise`] at the time of the first step that is left.

    Returns: the index in `scheduler.timesteps` of the first step to take; the scheduler has been told.

    Raises ValueError: fewer than one step, a strength outside (0, 1], or a scheduler not set to flows.
    """
    check_num_steps(num_inference_steps)
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be greater than 0 and at most 1, got {strength!r}.")
    check_flow_settings(scheduler)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigmas = torch.linspace(1, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64)
        scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
    elif isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
        # It takes no sigmas, and draws its grid between these two, which its constructor has shifted already.
        scheduler.sigma_max, scheduler.sigma_min = 1.0, 1 / num_inference_steps
        scheduler.set_timesteps(num_inference_steps, device=device)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device)
        if isinstance(scheduler, DPMSolverMultistepScheduler):
            # Its own grid starts at 1 - 1/1000.
            scheduler.sigmas[0] = _ALMOST_NOISE
    # Heun's scheduler evaluates twice per step, hence its order of 2.
    skipped = num_inference_steps - max(1, round(num_inference_steps * strength))
    begin_index = skipped * scheduler.order
    scheduler.set_begin_index(begin_index)
    return begin_index


def data_times(scheduler: SchedulerMixin) -> list[float]:
    """SiT's time t in [0, 1] at which the network is to be evaluated, for each entry of `scheduler.timesteps`.

    It comes from the sigmas: some of diffusers' schedulers round their timesteps to integers.
    """
    return (1 - scheduler.sigmas.cpu().double()).tolist()[: len(scheduler.timesteps)]


def to_model_output(velocity: Tensor) -> Tensor:
    """The network's velocity (data - noise), of any shape, as the `model_output` of a scheduler's `step`."""
    return -velocity


def mix_noise(data: Tensor, noise: Tensor, time: float | Tensor) -> Tensor:
    """The path between noise and data at SiT's time: t data + (1 - t) noise.

    Args:
        data, noise: (B, ...) of one shape.
        time: t in [0, 1], one for all, or (B,) one for each.
    """
    if isinstance(time, Tensor) and time.ndim == 1:
        time = time.to(data.device).view(-1, *[1] * (data.ndim - 1))
    return time * data + (1 - time) * noise
