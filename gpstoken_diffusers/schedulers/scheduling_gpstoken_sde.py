"""The stochastic samplers of SiT: its reverse-time equation, as officially discretised and better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .flow_time import FLOW_SCHEDULERS, check_num_steps, keep_flow_settings, mix_noise

# The official grid of times, and its last step, which is without noise.
_FIRST_TIME, _LAST_STEP = 1e-3, 0.04


@dataclass
class GPSTokenSDESchedulerOutput(BaseOutput):
    """`prev_sample`: the sample (B, N, C) after the step, in the dtype of the sample before it."""

    prev_sample: Tensor


class GPSTokenSDEScheduler(SchedulerMixin, ConfigMixin):
    """Samples by the stochastic equation of SiT (arXiv 2401.08740) with the diffusion D(t) = (1 - t) / t:

        dx = (v + D s) dt + sqrt(2 D) dW = (2 v - x / t) dt + sqrt(2 (1 - t) / t) dW,

    from t = 0 (noise) to t = 1 (data), v being the velocity and s = (t v - x) / (1 - t) the score. Outwardly it follows
    diffusers: sigma = 1 - t, timestep = num_train_timesteps sigma, `model_output` = -v. `num_inference_steps` counts
    evaluations of the network.

    "euler_maruyama" is the official setting: times `linspace(1e-3, 0.96, steps)`, and a last step of 0.04 without
    noise. The drift is so steep at the start that few steps overshoot: on standard normal data, 10 steps take the
    spread to 107 on the way and to 2.4 at the end. Take 100 and more.

    "heun" is the other solver of the release, on the same times: a step first adds its noise, then takes the drift at
    both of its ends. So the network sees the state with the noise of the step already in it: call [`add_first_noise`]
    before the loop. It evaluates the network `2 steps - 1` times, and `timesteps` has an entry for each.

    "exponential" solves the same equation on the grid `linspace(0, 1, steps + 1)`. With the prediction of the data
    m = x + (1 - t) v and the signal-to-noise ratio u = (t / (1 - t))^2, the equation is linear but for m, so that from
    t to s

        x_s = (1 - s) / (1 - t) r x_t + s (1 - r^2) M + (1 - s) sqrt(1 - r^2) z,    r^2 = u_t / u_s,

    is exact when M is the mean of m over u (with m_t for M, this is the first order of SDE-DPM-Solver++, arXiv
    2211.01095). The second order extrapolates m along t from the step before and averages that line over u; unlike a
    line along log u it stays finite at t = 0. The last step returns m itself. With exact velocities, data of spread 0.5
    come out with 0.51 after 10 steps (standard normal data with 1.07) and within 1% after 50, where the first order
    leaves 0.39 and 0.47. Data as narrow as 0.1 need 50 steps on this grid, with whatever solver.

    Args:
        num_train_timesteps: timestep of pure noise.
        sde_solver: "exponential", "euler_maruyama" or "heun".
        solver_order: 1 or 2, the order of "exponential".
        prediction_type, use_flow_sigmas: as diffusers' multistep schedulers call what this one does; nothing else is
            taken. They are here so that `from_config` can swap the schedulers.

    Raises ValueError: other values than those.
    """

    _compatibles = FLOW_SCHEDULERS
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        sde_solver: str = "exponential",
        solver_order: int = 2,
        prediction_type: str = "flow_prediction",
        use_flow_sigmas: bool = True,
    ):
        keep_flow_settings(self)
        if sde_solver not in ("exponential", "euler_maruyama", "heun"):
            raise ValueError(f'sde_solver must be "exponential", "euler_maruyama" or "heun", got {sde_solver!r}.')
        if solver_order not in (1, 2):
            raise ValueError(f"solver_order must be 1 or 2, got {solver_order!r}.")
        # As in diffusers, there are timesteps to read before set_timesteps chooses those of a run.
        self.sigmas = torch.arange(num_train_timesteps, -1, -1, dtype=torch.float64) / num_train_timesteps
        self.timesteps = (self.sigmas[:-1] * num_train_timesteps).float()
        self.num_inference_steps: int | None = None
        self._restart()

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def order(self) -> int:
        """Entries of `timesteps` per step."""
        return 2 if self.config.sde_solver == "heun" else 1

    @property
    def step_index(self) -> int | None:
        """Index of the next step; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, if [`set_begin_index`] was called."""
        return self._begin_index

    def _restart(self, begin_index: int | None = None) -> None:
        self._step_index = self._begin_index = begin_index
        self._previous: tuple[float, Tensor] | None = None
        # Of "heun": the state at the start of a step, its noise included, and the drift there.
        self._started: tuple[Tensor, Tensor] | None = None
        self._has_first_noise = False

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Says which of `timesteps` the next call of [`step`] belongs to (above 0 for image to image)."""
        self._restart(begin_index)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Prepares a run.

        Sets `timesteps` ((evaluations,) float32 on `device`) and `sigmas` ((evaluations + 1,) float64 on the CPU, the
        last 0). They are in double precision so that 1 - sigma gives small times back without loss.

        Raises ValueError: fewer than 1 step, or fewer than 2 for the official solvers.
        """
        official = self.config.sde_solver != "exponential"
        check_num_steps(num_inference_steps, fewest=2 if official else 1)
        if official:
            times = torch.linspace(_FIRST_TIME, 1 - _LAST_STEP, num_inference_steps)
            # Both ends of a step are evaluated: all times but the first twice.
            times = times.repeat_interleave(self.order)[self.order - 1 :]
            times = torch.cat([times, torch.ones(1)]).double()
        else:
            times = torch.linspace(0, 1, num_inference_steps + 1, dtype=torch.float64)
        self.num_inference_steps = num_inference_steps
        self.sigmas = 1 - times
        self._official_step_size = (times[self.order] - times[0]).item() if official else None
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).float().to(device)
        self._restart()

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Returns `sample`: the network takes it as it is."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """Data mixed with noise as it is at `timestep` (one, or (B,)): (1 - sigma) sample + sigma noise, (B, ...)."""
        return mix_noise(sample, noise, 1 - timestep / self.config.num_train_timesteps).to(sample.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> GPSTokenSDESchedulerOutput | tuple[Tensor]:
        """Takes one step; the arithmetic is in float32.

        Args:
            model_output: (B, N, C), the network's velocity negated.
            timestep: entry of `timesteps` that this is; looked at only where the place is not known yet, that is in
                the first step without [`set_begin_index`].
            sample: (B, N, C) at that time.
            generator: of the noise: one for each sample, so that a sample does not depend on its batch, or one for
                all. CPU generators, and None (torch's global one), draw on the CPU: a seed means the same everywhere.
            noise: (B, N, C), standard normal, in place of the generator's.
            return_dict: False gives a tuple of one.

        Raises ValueError: before set_timesteps, after the last step, an unknown timestep, or another number of
            generators or shape of noise than the sample's.
        """
        if self.num_inference_steps is None:
            raise ValueError("Call set_timesteps before step.")
        if self._step_index is None:
            self._step_index = self._index_of(timestep)
        index = self._step_index
        if index >= len(self.timesteps):
            raise ValueError(
                f"All {self.num_inference_steps} steps have been taken. Call set_timesteps to start another run."
            )
        time, next_time = (1 - self.sigmas[index : index + 2]).tolist()
        is_last = index == len(self.timesteps) - 1
        velocity, state = -model_output.float(), sample.float()
        if self.config.sde_solver == "exponential":
            mean, noise_scale = self._exponential_step(state, velocity, time, next_time)
        else:
            mean, noise_scale = self._official_step(state, 2 * velocity - state / time, index)
        if noise_scale > 0 and not is_last:
            mean = mean + noise_scale * _noise_like(state, generator, noise)
        self._step_index = index + 1
        prev_sample = mean.to(sample.dtype)
        return GPSTokenSDESchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def add_first_noise(
        self,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """What the first evaluation is to see: with "heun" the sample with the noise of its first step, else as it is.

        Call it between [`set_timesteps`] or [`set_begin_index`] and the loop; arguments as in [`step`].
        """
        self._has_first_noise = True
        index = self._step_index or 0
        if self.config.sde_solver != "heun" or index == len(self.timesteps) - 1:
            return sample
        noised = sample.float() + self._official_noise_scale(index) * _noise_like(sample, generator, noise)
        return noised.to(sample.dtype)

    def _official_noise_scale(self, index: int) -> float:
        time = 1 - self.sigmas[index].item()
        return math.sqrt(2 * (1 - time) / time * self._official_step_size)

    def _official_step(self, state: Tensor, drift: Tensor, index: int) -> tuple[Tensor, float]:
        """Mean (B, N, C) of the next state, and the standard deviation of the noise that is added to it."""
        if index == len(self.timesteps) - 1:
            return state + drift * _LAST_STEP, 0.0
        step_size = self._official_step_size
        if self.config.sde_solver == "euler_maruyama":
            return state + drift * step_size, self._official_noise_scale(index)
        if index % 2 == 0:
            if not self._has_first_noise:
                raise ValueError('With sde_solver="heun", call add_first_noise before the first step.')
            self._started = state, drift
            return state + drift * step_size, 0.0
        start, start_drift = self._started
        # The network is to see the noise of the step that comes next; the last one has none.
        noise_scale = 0.0 if index == len(self.timesteps) - 2 else self._official_noise_scale(index)
        return start + (start_drift + drift) * (step_size / 2), noise_scale

    def _exponential_step(self, state: Tensor, velocity: Tensor, time: float, next_time: float) -> tuple[Tensor, float]:
        """Mean (B, N, C) and standard deviation of x at `next_time`."""
        prediction = state + (1 - time) * velocity
        mean_prediction = prediction
        if self.config.solver_order == 2 and self._previous is not None and next_time < 1:
            previous_time, previous_prediction = self._previous
            slope = (prediction - previous_prediction) / (time - previous_time)
            mean_prediction = prediction + (_mean_time(time, next_time) - time) * slope
        self._previous = (time, prediction)
        # r, 0 at both ends of the way: nothing of x is left after a step from t = 0 or to t = 1.
        kept = time * (1 - next_time) / (next_time * (1 - time))
        renewed = 1 - kept**2
        mean = (1 - next_time) / (1 - time) * kept * state + next_time * renewed * mean_prediction
        return mean, (1 - next_time) * math.sqrt(renewed)

    def _index_of(self, timestep: float | Tensor) -> int:
        found = (self.timesteps == float(timestep)).nonzero()
        if len(found) == 0:
            raise ValueError(
                f"{float(timestep):g} is none of this run's timesteps, which lead from {self.timesteps[0].item():g} to "
                f"{self.timesteps[-1].item():g}. Pass entries of scheduler.timesteps, or call set_begin_index."
            )
        return int(found[0])


def _mean_time(start: float, end: float) -> float:
    """Mean of t over the signal-to-noise ratio u = w^2, w = t / (1 - t), that is of w / (1 + w) with the weight 2 w dw;
    0 <= start < end < 1."""
    low, high = start / (1 - start), end / (1 - end)

    def antiderivative(ratio: float) -> float:
        return ratio**2 - 2 * ratio + 2 * math.log1p(ratio)

    return (antiderivative(high) - antiderivative(low)) / (high**2 - low**2)


def _noise_like(
    state: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None, noise: Tensor | None
) -> Tensor:
    """Standard normal float32 noise of the state's shape (B, ...), on its device."""
    if noise is not None:
        if noise.shape != state.shape:
            raise ValueError(f"noise must have the sample's shape {tuple(state.shape)}, got {tuple(noise.shape)}.")
        return noise.to(state)
    if isinstance(generator, Sequence):
        generator = list(generator)
        if len(generator) != len(state):
            raise ValueError(
                f"There are {len(state)} samples but {len(generator)} generators: pass one for each sample, or one "
                "generator that is no list."
            )
    drawn_on = state.device if generator is not None else torch.device("cpu")
    return randn_tensor(state.shape, generator=generator, device=drawn_on, dtype=torch.float32).to(state.device)
