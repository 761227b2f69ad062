"""The official deterministic sampler: an adaptive Runge-Kutta method of Dormand and Prince."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from .flow_time import FLOW_SCHEDULERS, keep_flow_settings, mix_noise

# Dormand and Prince (1980), "A family of embedded Runge-Kutta formulae", table 2: the times of the stages as fractions
# of a step, and the weights that lead to each stage. The last stage is the fifth-order solution itself, so its slope
# is the first of the next step.
_STAGES = [
    (1 / 5, [1 / 5]),
    (3 / 10, [3 / 40, 9 / 40]),
    (4 / 5, [44 / 45, -56 / 15, 32 / 9]),
    (8 / 9, [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729]),
    (1.0, [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656]),
    (1.0, [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]),
]
# Fifth-order weights less those of an embedded fourth-order solution. The one taken by the official solver lies nearer
# to the fifth-order solution than Dormand's and Prince's own: its error is two thirds of theirs.
_ERROR = [
    2 / 3 * (35 / 384 - 5179 / 57600),
    0,
    2 / 3 * (500 / 1113 - 7571 / 16695),
    2 / 3 * (125 / 192 - 393 / 640),
    2 / 3 * (-2187 / 6784 + 92097 / 339200),
    2 / 3 * (11 / 84 - 187 / 2100),
    2 / 3 * (-1 / 40),
]
# Shampine (1986), "Some practical Runge-Kutta formulas": the solution in the middle of a step, to fourth order.
_MIDDLE = [
    6025192743 / 60171106304,
    0,
    51252292925 / 130801643196,
    -2691868925 / 90256659456,
    187940372067 / 3189068634112,
    -1776094331 / 39487288512,
    11237099 / 470086768,
]

# Networks take the time in float32, which tells no closer times apart.
_SHORTEST_STEP = 1e-8


class FlowMatchDopri5Scheduler(SchedulerMixin, ConfigMixin):
    """Integrates dx/dt = v(x, t) from noise at t = 0 to data at t = 1 by steps that it chooses itself.

    It has no list of timesteps, for it asks the network itself: call [`integrate`] in place of the loop over `step`.
    Sizes of steps follow torchdiffeq's "dopri5", which the official sampling uses. In two ways that concerns users:
    the error is one number for the whole batch, so a sample depends a little (within the tolerances) on its
    companions; and the last step goes beyond t = 1 (to about 1.4) and is interpolated back, so the velocity must be
    defined there.

    Args:
        atol, rtol: a step is taken if the root mean square of error / (atol + rtol |x|) over the batch is at most 1.
        num_train_timesteps: timestep of pure noise, for [`scale_noise`].
        prediction_type, use_flow_sigmas: as diffusers' multistep schedulers call what this one does; nothing else is
            taken. They are here so that `from_config` can swap the schedulers.

    Attributes:
        num_evaluations: how often the last call of [`integrate`] evaluated the velocity.

    Raises ValueError: other settings than those, an atol of 0 or less, or a negative rtol.
    """

    _compatibles = FLOW_SCHEDULERS
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        num_train_timesteps: int = 1000,
        prediction_type: str = "flow_prediction",
        use_flow_sigmas: bool = True,
    ):
        keep_flow_settings(self)
        if not (atol > 0 and rtol >= 0):
            raise ValueError(f"atol must be greater than 0, and rtol at least 0, got {atol!r} and {rtol!r}.")
        self.num_evaluations = 0

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """Data mixed with noise as it is at `timestep` (one, or (B,)): (1 - sigma) sample + sigma noise, (B, ...)."""
        return mix_noise(sample, noise, 1 - timestep / self.config.num_train_timesteps).to(sample.dtype)

    def integrate(
        self,
        velocity: Callable[[Tensor, float], Tensor],
        sample: Tensor,
        start_time: float = 0.0,
        callback: Callable[[float, Tensor], bool | None] | None = None,
    ) -> Tensor:
        """The sample at t = 1.

        Args:
            velocity: v(x, t), in the network's own convention (data - noise, t = 1 being data): called with x
                (B, N, C) float32 and t, which may exceed 1; returns (B, N, C) of any floating dtype.
            sample: (B, N, C) at `start_time`.
            start_time: t in [0, 1); above 0 for image to image.
            callback: called with (t, x) after each step that is taken; True ends the integration there.

        Returns: (B, N, C) in the dtype of `sample`; what was reached so far, if the callback ended it.

        Raises:
            ValueError: a start outside [0, 1), or a velocity that is not finite.
            RuntimeError: the tolerances cannot be met.
        """
        if not 0 <= start_time < 1:
            raise ValueError(f"start_time must be at least 0 and less than 1, got {start_time!r}.")
        self.num_evaluations = 0

        def slope_at(state: Tensor, time: float) -> Tensor:
            self.num_evaluations += 1
            return velocity(state, time).float()

        time, state = float(start_time), sample.float()
        slope = slope_at(state, time)
        step = self._first_step(slope_at, time, state, slope)
        while True:
            if step < _SHORTEST_STEP:
                raise RuntimeError(
                    f"The velocity is too rough at t = {time:g}: no step is short enough for atol = "
                    f"{self.config.atol:g} and rtol = {self.config.rtol:g}. Raise them."
                )
            slopes = [slope]
            for fraction, weights in _STAGES:
                stage = _advance(state, step, weights, slopes)
                slopes.append(slope_at(stage, time + fraction * step))
            error = self._norm(_advance(None, step, _ERROR, slopes), state, stage)
            if not math.isfinite(error):
                raise ValueError(
                    f"The velocity is not finite near t = {time:g}. In float16, try bfloat16 or float32 instead."
                )
            if error <= 1:
                if time + step >= 1:
                    middle = _advance(state, step, _MIDDLE, slopes)
                    state = _interpolate((1 - time) / step, step, state, middle, stage, slopes[0], slopes[-1])
                    if callback is not None:
                        callback(1.0, state)
                    return state.to(sample.dtype)
                time, state, slope = time + step, stage, slopes[-1]
                if callback is not None and callback(time, state):
                    return state.to(sample.dtype)
            step *= _step_factor(error)

    def _norm(self, values: Tensor, *states: Tensor) -> float:
        """Root mean square over the batch of values / (atol + rtol |x|), |x| the larger one of the states."""
        size = states[0].abs()
        for state in states[1:]:
            size = size.maximum(state.abs())
        return (values / (self.config.atol + self.config.rtol * size)).square().mean().sqrt().item()

    def _first_step(
        self, slope_at: Callable[[Tensor, float], Tensor], time: float, state: Tensor, slope: Tensor
    ) -> float:
        """Hairer, Norsett and Wanner, "Solving ordinary differential equations I", II.4: starting step size."""
        size, speed = self._norm(state, state), self._norm(slope, state)
        if not math.isfinite(size + speed):
            raise ValueError(f"The sample or its velocity is not finite at t = {time:g}.")
        trial = 1e-6 if min(size, speed) < 1e-5 else 0.01 * size / speed
        ahead = slope_at(state + trial * slope, time + trial)
        bend = self._norm(ahead - slope, state) / trial
        fastest = max(speed, bend)
        guess = max(1e-6, trial * 1e-3) if fastest <= 1e-15 else (0.01 / fastest) ** (1 / 5)
        return min(100 * trial, guess)


def _step_factor(error: float) -> float:
    """How much longer the next step is to be, from the scaled error of this one (at most 1: it was taken)."""
    if error == 0:
        return 10.0
    shortest = 0.2 if error >= 1 else 1.0
    return min(10.0, max(0.9 * error ** (-1 / 5), shortest))


def _advance(state: Tensor | None, step: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """state + step (sum of weights times slopes); without the state where that is None."""
    total = slopes[0] * (step * weights[0]) if state is None else state + slopes[0] * (step * weights[0])
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total.add_(slope, alpha=step * weight)
    return total


def _interpolate(
    place: float, step: float, start: Tensor, middle: Tensor, end: Tensor, slope: Tensor, end_slope: Tensor
) -> Tensor:
    """The quartic through three states and the slopes at both ends, at `place` in [0, 1] of the step.

    It is the cubic of Hermite plus what that lacks in the middle, carried by a term that vanishes doubly at both ends.
    """
    rest = 1 - place
    hermite_middle = (start + end) / 2 + (slope - end_slope) * (step / 8)
    return (
        start * (rest**2 * (1 + 2 * place))
        + end * (place**2 * (1 + 2 * rest))
        + (slope * rest - end_slope * place) * (step * place * rest)
        + (middle - hermite_middle) * (16 * (place * rest) ** 2)
    )
