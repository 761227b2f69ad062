"""The steps of our solvers, each by itself."""

from __future__ import annotations

import math

import pytest
import torch

from gpstoken_diffusers.schedulers.flow_time import data_times, set_timesteps
from gpstoken_diffusers.schedulers.scheduling_dopri5 import FlowMatchDopri5Scheduler
from gpstoken_diffusers.schedulers.scheduling_gpstoken_sde import GPSTokenSDEScheduler

START = torch.linspace(-1, 1, 12).view(1, 4, 3)

STATES = torch.randn(3, 1, 6, 5, generator=torch.Generator().manual_seed(0))

# The exponential solver of the SDE


def test_one_exponential_step_by_hand():
    scheduler = GPSTokenSDEScheduler()
    set_timesteps(scheduler, 4, strength=0.75)
    sample, velocity, noise = STATES
    # From t = 1/4 to 1/2: odds 1/3 and 1, so r = 1/3; the prediction of the data is x + 3/4 v.
    stepped = scheduler.step(-velocity, scheduler.timesteps[1], sample, noise=noise).prev_sample
    expected = (0.5 / 0.75) / 3 * sample + 0.5 * (8 / 9) * (sample + 0.75 * velocity) + 0.5 * math.sqrt(8 / 9) * noise
    torch.testing.assert_close(stepped, expected)


def test_first_and_last_exponential_step():
    scheduler = GPSTokenSDEScheduler()
    sample, velocity, noise = STATES
    set_timesteps(scheduler, 2)
    assert data_times(scheduler)[0] == 0
    first = scheduler.step(-velocity, scheduler.timesteps[0], sample, noise=noise).prev_sample
    # Of pure noise nothing is kept.
    torch.testing.assert_close(first, 0.5 * (sample + velocity) + 0.5 * noise)
    last = scheduler.step(-velocity, scheduler.timesteps[1], first, noise=noise).prev_sample
    torch.testing.assert_close(last, first + 0.5 * velocity)


@pytest.mark.parametrize("start, end", [(0.002, 0.02), (0.1, 0.15), (0.3, 0.9), (0.9, 0.99)])
def test_second_order_is_exact_for_a_prediction_linear_in_time(start, end):
    """The mean of x for m(t) = t, integrated finely by the first order, in one step of the second."""
    torch.manual_seed(0)
    start_state = torch.randn(1, 3, 2, dtype=torch.float64)
    state, zero = start_state, torch.zeros(1, 3, 2)
    fine = torch.linspace(start, end, 4001, dtype=torch.float64).tolist()
    for time, next_time in zip(fine, fine[1:], strict=False):
        kept = time * (1 - next_time) / (next_time * (1 - time))
        middle = (time + next_time) / 2
        state = (1 - next_time) / (1 - time) * kept * state + next_time * (1 - kept**2) * middle
    scheduler = GPSTokenSDEScheduler()
    scheduler.set_timesteps(3)
    previous = start / 2
    scheduler.sigmas = 1 - torch.tensor([previous, start, end, 1.0], dtype=torch.float64)
    for index, (time, sample) in enumerate([(previous, zero), (start, start_state.float())]):
        velocity = (time - sample) / (1 - time)
        stepped = scheduler.step(-velocity, scheduler.timesteps[index], sample, noise=zero).prev_sample
    torch.testing.assert_close(stepped, state.float(), atol=2e-5, rtol=0)


# The adaptive solver


def test_polynomials_of_degree_four_are_exact():
    """In the steps and in the interpolation back from beyond t = 1."""

    def velocity(sample, time):
        return torch.full_like(sample, 1 - 2 * time + 3 * time**2 - 4 * time**3)

    times = []

    def keep(time, sample):
        times.append(time)
        exact = time - time**2 + time**3 - time**4
        torch.testing.assert_close(sample, START + exact, atol=1e-5, rtol=0)

    ended = FlowMatchDopri5Scheduler().integrate(velocity, START, callback=keep)
    torch.testing.assert_close(ended, START, atol=1e-5, rtol=0)
    assert times == sorted(times) and times[-1] == 1


def test_steps_that_miss_are_repeated():
    """A jolt in the middle: the solver meets it with too large a step."""
    times = []

    def velocity(sample, time):
        times.append(time)
        return torch.full_like(sample, 40 / math.cosh(40 * (time - 0.5)) ** 2)

    scheduler = FlowMatchDopri5Scheduler(atol=1e-5, rtol=1e-5)
    ended = scheduler.integrate(velocity, START)
    # The integral is tanh(20) - tanh(-20) = 2.
    torch.testing.assert_close(ended, START + 2, atol=1e-3, rtol=0)
    assert any(later < earlier for earlier, later in zip(times, times[1:], strict=False))
    assert scheduler.num_evaluations == len(times)
    # Two to begin with, then six a step: the last slope of one step is the first of the next.
    assert len(times) % 6 == 2


def test_tolerances_are_kept():
    errors, evaluations = [], []
    for tolerance in (1e-2, 1e-4, 1e-6):
        scheduler = FlowMatchDopri5Scheduler(atol=tolerance, rtol=tolerance)
        ended = scheduler.integrate(lambda sample, time: -3 * sample + math.cos(9 * time), START.double().float())
        # x' = -3 x + cos 9 t
        exact = (START - 3 / 90) * math.exp(-3) + (3 * math.cos(9) + 9 * math.sin(9)) / 90
        errors.append((ended - exact).abs().max().item())
        evaluations.append(scheduler.num_evaluations)
    assert all(error < 3 * tolerance for error, tolerance in zip(errors, (1e-2, 1e-4, 1e-6), strict=True))
    assert evaluations == sorted(set(evaluations))


def test_the_error_is_that_of_the_whole_batch():
    """As in the official sampling: a sample is in company."""

    def velocity(sample, time):
        return torch.sin(9 * time * sample)

    scheduler = FlowMatchDopri5Scheduler()
    scheduler.integrate(velocity, START * 0.01)
    alone = scheduler.num_evaluations
    scheduler.integrate(velocity, torch.cat([START * 0.01, START * 9]))
    assert scheduler.num_evaluations > alone


def test_no_velocity_no_change():
    scheduler = FlowMatchDopri5Scheduler()
    assert torch.equal(scheduler.integrate(lambda sample, time: torch.zeros_like(sample), START), START)
    # The steps grow tenfold each time.
    assert scheduler.num_evaluations < 60


def test_the_callback_can_end_it():
    calls = []

    def stop(time, sample):
        calls.append((time, sample))
        return True

    ended = FlowMatchDopri5Scheduler().integrate(lambda sample, time: -sample, START, callback=stop)
    assert len(calls) == 1 and calls[0][0] < 0.5
    torch.testing.assert_close(ended, START * math.exp(-calls[0][0]), atol=1e-5, rtol=0)


def test_half_precision_goes_in_and_out():
    seen = set()

    def velocity(sample, time):
        seen.add(sample.dtype)
        return (-sample).bfloat16()

    ended = FlowMatchDopri5Scheduler(rtol=0.01, atol=0.01).integrate(velocity, START.bfloat16())
    assert ended.dtype == torch.bfloat16 and seen == {torch.float32}
    torch.testing.assert_close(ended.float(), START * math.exp(-1), atol=0.02, rtol=0)


@pytest.mark.parametrize("act, message", [
    *((lambda start=start: FlowMatchDopri5Scheduler().integrate(lambda sample, time: sample, START, start_time=start),
       "start_time must be at least 0 and less than 1") for start in (-0.1, 1.0, float("nan"))),
    *((lambda tolerances=tolerances: FlowMatchDopri5Scheduler(*tolerances),
       "atol must be greater than 0, and rtol at least 0")
      for tolerances in ((0, 1e-3), (-1e-6, 1e-3), (1e-6, -1.0), (float("nan"), 1e-3))),
])  # fmt: skip
def test_mistakes(act, message):
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize(
    "broken_from, message", [(0.0, "sample or its velocity is not finite at t = 0"), (0.3, "near")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_velocities_that_are_not_finite(broken_from, message, value):
    def velocity(sample, time):
        return torch.full_like(sample, value) if time >= broken_from else -sample

    with pytest.raises(ValueError, match=message):
        FlowMatchDopri5Scheduler().integrate(velocity, START)


def test_tolerances_that_cannot_be_met():
    # Every evaluation is another one's opposite, however close they are.
    signs = iter(range(10**6))

    def velocity(sample, time):
        return torch.full_like(sample, 1e6 * (-1) ** next(signs))

    with pytest.raises(RuntimeError, match="too rough at t = .*Raise them"):
        FlowMatchDopri5Scheduler(atol=1e-10, rtol=0).integrate(velocity, START)
