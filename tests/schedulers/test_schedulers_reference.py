"""The samplers against the reference's traces, and on Gaussian data, where the answer is known."""

from __future__ import annotations

import pytest
import torch
from conftest import golden
from diffusers import FlowMatchEulerDiscreteScheduler
from model_zoo import load_golden

from gpstoken_diffusers import GPSTokenTransformerModel
from gpstoken_diffusers.schedulers.flow_time import data_times, mix_noise, set_timesteps, to_model_output
from gpstoken_diffusers.schedulers.presets import make_sampler
from gpstoken_diffusers.schedulers.scheduling_dopri5 import FlowMatchDopri5Scheduler
from gpstoken_diffusers.schedulers.scheduling_gpstoken_sde import GPSTokenSDEScheduler

SMALL_GENERATOR = {
    "texture_channels": 16,
    "num_tokens": 128,
    "num_classes": 10,
    "hidden_size": 96,
    "num_layers": 3,
    "num_attention_heads": 4,
    "learn_sigma": True,
    "position_table": True,
}


def tokens_first(latents):
    """The reference's (..., C, N, 1) as ours, (..., N, C)."""
    return latents[..., 0].transpose(-1, -2)


class GuidedRun:
    """The reference's guided velocity on its doubled batch, and its start; keeps the times it is asked for."""

    def __init__(self):
        path = golden("sit_small_weights.safetensors")
        self.network = GPSTokenTransformerModel.from_single_file(path, config=SMALL_GENERATOR)
        self.trace = load_golden("sit_small_sampling.safetensors")
        self.start = tokens_first(self.trace["z_cond"]).repeat(2, 1, 1)
        self.layout = self.trace["g_init"].repeat(2, 1, 1)
        self.times = []

    @torch.no_grad()
    def velocity(self, sample, time):
        self.times.append(time)
        timestep = torch.full((4,), time)
        if not 0.2 <= timestep[0].item() <= 1:
            return self.network(sample, timestep, self.trace["y"], self.layout).sample
        doubled = sample[:2].repeat(2, 1, 1)
        conditional, free = self.network(doubled, timestep, self.trace["y"], self.layout).sample.chunk(2)
        return (free + 1.5 * (conditional - free)).repeat(2, 1, 1)

    def check_times(self, expected, tolerance):
        torch.testing.assert_close(torch.tensor(self.times), expected, atol=tolerance, rtol=0)


@pytest.fixture
def run():
    return GuidedRun()


def assert_first_half(sample, reference, tolerance):
    torch.testing.assert_close(sample[:2], tokens_first(reference)[:2], atol=tolerance, rtol=0)


@pytest.mark.parametrize("num_steps", [10, 50])
def test_official_sde_step_by_step(run, num_steps):
    name = f"sde_em{num_steps}"
    states, indices = run.trace[f"{name}.states"], run.trace[f"{name}.states_index"].tolist()
    noises = tokens_first(run.trace[f"{name}.noise"])
    scheduler, num_inference_steps = make_sampler("official-sde", num_steps)
    set_timesteps(scheduler, num_inference_steps)
    times, sample = data_times(scheduler), run.start
    for index, timestep in enumerate(scheduler.timesteps):
        noise = None
        if index < num_steps - 1:
            noise = noises[index]
            # Of the longer run only the first half's noise is kept; the second half does not act on it.
            noise = noise.repeat(4 // len(noise), 1, 1)
        model_output = to_model_output(run.velocity(sample, times[index]))
        sample = scheduler.step(model_output, timestep, sample, noise=noise).prev_sample
        if index in indices:
            assert_first_half(sample, states[indices.index(index)], 1e-4)
    assert_first_half(sample, run.trace[f"{name}.final"], 1e-4)
    # The reference asks twice for each step.
    run.check_times(run.trace[f"{name}.model_eval_t"][::2], 0)
    assert len(run.times) == num_steps


def test_official_euler(run):
    scheduler, num_inference_steps = make_sampler("official-ode-euler", 10)
    set_timesteps(scheduler, num_inference_steps)
    times, sample = data_times(scheduler), run.start
    for index, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.step(to_model_output(run.velocity(sample, times[index])), timestep, sample).prev_sample
        assert_first_half(sample, run.trace["ode_euler.states"][index + 1], 1e-5)
    # 1 - sigma of float32 sigmas.
    run.check_times(run.trace["ode_euler.model_eval_t"], 1e-7)


def test_official_dopri5(run):
    scheduler, _ = make_sampler("official-ode")
    sample = scheduler.integrate(run.velocity, run.start)
    assert_first_half(sample, run.trace["ode_dopri5.final"], 1e-3)
    # The sizes of later steps depend on the rounding of small errors.
    run.check_times(run.trace["ode_dopri5.model_eval_t"], 3e-4)
    assert scheduler.num_evaluations == len(run.times) == 26


def test_dopri5_without_the_second_half_is_another_run(run):
    """Both halves enter the control of the step size: what the tolerance above can tell apart."""

    def first_half(sample, time):
        return run.velocity(sample.repeat(2, 1, 1), time)[:2]

    sample = FlowMatchDopri5Scheduler().integrate(first_half, run.start[:2])
    assert (sample - tokens_first(run.trace["ode_dopri5.final"])).abs().max() > 2e-3


# Gaussian data: every velocity, mean and spread is known.


def gaussian_velocity(mean, spread):
    def velocity(sample, time):
        variance = time**2 * spread**2 + (1 - time) ** 2
        return mean + (time * spread**2 - (1 - time)) / variance * (sample - time * mean)

    return velocity


def sample_gaussian(scheduler, num_inference_steps, mean=2.0, spread=0.5, strength=1.0, num_samples=100_000):
    """Mean and standard deviation reached, and the largest standard deviation on the way."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(num_samples, 1, 1, generator=generator)
    begin = set_timesteps(scheduler, num_inference_steps, strength=strength)
    times, velocity = data_times(scheduler), gaussian_velocity(mean, spread)
    data = mean + spread * torch.randn(num_samples, 1, 1, generator=generator)
    sample = mix_noise(data, noise, times[begin])
    arguments = {"generator": generator} if isinstance(scheduler, GPSTokenSDEScheduler) else {}
    peak = 0.0
    for index in range(begin, len(scheduler.timesteps)):
        model_output = to_model_output(velocity(sample, times[index]))
        sample = scheduler.step(model_output, scheduler.timesteps[index], sample, **arguments).prev_sample
        peak = max(peak, sample.std().item())
    return sample.mean().item(), sample.std().item(), peak


# The spread, to be 0.5, after 5, 10, 20 and 50 steps.
SPREADS = {
    "euler": (0.369, 0.431, 0.464, 0.485),
    "heun": (0.459, 0.491, 0.498, 0.500),
    "unipc": (0.436, 0.502, 0.504, 0.501),
    "dpm++": (0.420, 0.497, 0.505, 0.502),
    "sde": (0.412, 0.508, 0.517, 0.505),
    "official-sde": (5.11, 0.602, 0.500, 0.495),
}


@pytest.mark.parametrize("name", SPREADS)
def test_mean_and_spread_of_gaussian_data(name):
    for num_steps, expected in zip((5, 10, 20, 50), SPREADS[name], strict=True):
        mean, spread, _ = sample_gaussian(*make_sampler(name, num_steps))
        # Four standard errors of 100,000 samples: 0.004 of the spread for it, 0.013 for the mean.
        assert mean == pytest.approx(2, abs=0.013 * max(expected, 0.5))
        # The spread of Euler-Maruyama is that of few far outliers at 5 steps.
        assert spread == pytest.approx(expected, rel=0.012)


def test_spread_of_standard_normal_data():
    assert sample_gaussian(GPSTokenSDEScheduler(), 10, 0.0, 1.0)[1] == pytest.approx(1, abs=0.08)
    assert sample_gaussian(GPSTokenSDEScheduler(), 20, 0.0, 1.0)[1] == pytest.approx(1, abs=0.04)
    assert sample_gaussian(GPSTokenSDEScheduler(), 50, 0.0, 1.0)[1] == pytest.approx(1, abs=0.015)


def test_second_order_beats_the_first():
    for num_steps in (5, 10, 20, 50):
        first = sample_gaussian(GPSTokenSDEScheduler(solver_order=1), num_steps)[1]
        second = sample_gaussian(GPSTokenSDEScheduler(), num_steps)[1]
        assert abs(second - 0.5) < 0.6 * abs(first - 0.5)


@pytest.mark.parametrize("num_steps, peak, final", [(10, 107, 2.44), (50, 20, 1), (250, 4, 1)])
def test_how_the_official_sde_starts(num_steps, peak, final):
    """Its first step multiplies x by about 1 - 1000 dt; few steps never recover."""
    scheduler = GPSTokenSDEScheduler(sde_solver="euler_maruyama")
    _, spread, highest = sample_gaussian(scheduler, num_steps, 0.0, 1.0, num_samples=20_000)
    assert highest == pytest.approx(peak, rel=0.03)
    assert spread == pytest.approx(final, rel=0.03)


@pytest.mark.parametrize("name", ["euler", "heun", "unipc", "dpm++", "sde", "official-sde"])
def test_starting_midway_keeps_the_distribution(name):
    """Data mixed with noise at the time of the first step left, and taken from there: data again."""
    mean, spread, _ = sample_gaussian(*make_sampler(name, 50), strength=0.6)
    assert mean == pytest.approx(2, abs=0.01)
    assert spread == pytest.approx(0.5, abs=0.02)


def test_dopri5_midway_and_its_error():
    noise = torch.randn(1000, 1, 1, generator=torch.Generator().manual_seed(0))
    scheduler = FlowMatchDopri5Scheduler(rtol=1e-6)
    velocity = gaussian_velocity(2.0, 0.5)
    # The flow maps noise z to 2 + 0.5 z.
    torch.testing.assert_close(scheduler.integrate(velocity, noise), 2 + 0.5 * noise, atol=1e-4, rtol=0)
    assert 30 < scheduler.num_evaluations < 80
    # On the way it is 2 t + sqrt(variance) z.
    half = 1 + (0.25 * 0.25 + 0.25) ** 0.5 * noise
    torch.testing.assert_close(scheduler.integrate(velocity, half, start_time=0.5), 2 + 0.5 * noise, atol=1e-4, rtol=0)


def test_euler_alone_would_not_reach_the_ends():
    """Why one function sets the timesteps of every scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[-2] == pytest.approx(1e-3)
    set_timesteps(scheduler, 10)
    assert scheduler.sigmas[-2] == pytest.approx(0.1)
