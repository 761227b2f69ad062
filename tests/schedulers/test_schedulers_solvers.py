"""The adaptive solver by itself, and samplers by name."""

from __future__ import annotations

import math

import pytest
import torch

from gpstoken_diffusers.schedulers.presets import SAMPLER_PRESETS, make_sampler
from gpstoken_diffusers.schedulers.scheduling_dopri5 import FlowMatchDopri5Scheduler

START = torch.linspace(-1, 1, 12).view(1, 4, 3)

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


@pytest.mark.parametrize("start_time", [-0.1, 1.0, float("nan")])
def test_impossible_starts(start_time):
    with pytest.raises(ValueError, match="start_time must be at least 0 and less than 1"):
        FlowMatchDopri5Scheduler().integrate(lambda sample, time: sample, START, start_time=start_time)


@pytest.mark.parametrize("tolerances", [(0, 1e-3), (-1e-6, 1e-3), (1e-6, -1.0), (float("nan"), 1e-3)])
def test_impossible_tolerances(tolerances):
    with pytest.raises(ValueError, match="atol must be greater than 0, and rtol at least 0"):
        FlowMatchDopri5Scheduler(*tolerances)


def test_settings_of_another_diffusion():
    with pytest.raises(ValueError, match="FlowMatchDopri5Scheduler has prediction_type='epsilon'"):
        FlowMatchDopri5Scheduler(prediction_type="epsilon")


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


# Samplers by name


@pytest.mark.parametrize("name", SAMPLER_PRESETS)
def test_every_preset_makes_a_fresh_scheduler(name):
    preset = SAMPLER_PRESETS[name]
    first, num_inference_steps = make_sampler(name)
    second, _ = make_sampler(name)
    assert type(first) is type(second) and first is not second
    if preset.num_steps is None:
        assert num_inference_steps is None and preset.evaluations is None
        assert make_sampler(name, 7)[1] is None
    else:
        assert num_inference_steps == preset.inference_steps(preset.num_steps)
        assert make_sampler(name, 7)[1] == preset.inference_steps(7)
    assert name in make_sampler.__doc__ and preset.description


def test_official_defaults():
    scheduler, num_steps = make_sampler("official-sde")
    assert (scheduler.config.sde_solver, num_steps) == ("euler_maruyama", 250)
    scheduler, _ = make_sampler("official-ode")
    assert (scheduler.config.atol, scheduler.config.rtol) == (1e-6, 1e-3)
    assert make_sampler("official-ode-euler")[1] == 249
    assert make_sampler("sde")[0].config.sde_solver == "exponential"


@pytest.mark.parametrize(
    "name, message",
    [
        ("uni-pc", "There is no sampler 'uni-pc'. Did you mean 'unipc'"),
        ("Heun", "Did you mean 'heun'"),
        ("offical-sde", "Did you mean 'official-sde'"),
        ("xyzzy", "There is no sampler 'xyzzy'. Choose one of official-sde, official-ode, "),
        (None, "There is no sampler None"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(name)


@pytest.mark.parametrize("name, num_steps", [("sde", 0), ("official-sde", 1), ("official-ode-euler", 1), ("heun", 1.5)])
def test_too_few_steps(name, num_steps):
    with pytest.raises(ValueError, match="num_inference_steps must be an integer of at least"):
        make_sampler(name, num_steps)
