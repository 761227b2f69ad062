"""The samplers against the reference's traces, and on Gaussian data, where the answer is known."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from golden_files import golden
from model_zoo import load_golden
from pipeline_zoo import SMALL_GENERATOR

from gpstoken_diffusers import GPSTokenTransformerModel
from gpstoken_diffusers.schedulers.flow_time import data_times, mix_noise, set_timesteps, to_model_output
from gpstoken_diffusers.schedulers.guidance import guided_velocity
from gpstoken_diffusers.schedulers.integration import integrate_flow
from gpstoken_diffusers.schedulers.presets import make_sampler
from gpstoken_diffusers.schedulers.scheduling_dopri5 import FlowMatchDopri5Scheduler
from gpstoken_diffusers.schedulers.scheduling_gpstoken_sde import GPSTokenSDEScheduler


def tokens_first(latents):
    """The reference's (..., C, N, 1) as ours, (..., N, C)."""
    return latents[..., 0].transpose(-1, -2)


class Run:
    """The reference's small network under guidance, and its start; keeps the times at which the network is asked."""

    def __init__(self):
        path = golden("sit_small_weights.safetensors")
        self.network = GPSTokenTransformerModel.from_single_file(path, config=SMALL_GENERATOR)
        self.trace = load_golden("sit_small_sampling.safetensors")
        self.start = tokens_first(self.trace["z_cond"])
        self.labels = self.trace["y"][:2]
        self.times = []
        self.velocity = guided_velocity(self.evaluate, self.labels, 10, 1.5, (0.2, 1.0))

    @torch.no_grad()
    def evaluate(self, latents, time, labels):
        self.times.append(time[0].item())
        layout = self.trace["g_init"].repeat(len(latents) // 2, 1, 1)
        return self.network(latents, time, labels, layout).sample

    def sample(self, name, num_steps=None, velocity=None):
        scheduler, steps = make_sampler(name, num_steps)
        return integrate_flow(scheduler, velocity or self.velocity, self.start, steps)

    def check(self, name, sample, tolerance, time_tolerance, evaluations=slice(None)):
        torch.testing.assert_close(sample, tokens_first(self.trace[f"{name}.final"]), atol=tolerance, rtol=0)
        times = self.trace[f"{name}.model_eval_t"][evaluations]
        torch.testing.assert_close(torch.tensor(self.times), times, atol=time_tolerance, rtol=0)


@pytest.fixture
def run():
    return Run()


@pytest.mark.parametrize("num_steps", [10, 50])
def test_official_sde_step_by_step(run, num_steps):
    name = f"sde_em{num_steps}"
    states, indices = run.trace[f"{name}.states"], run.trace[f"{name}.states_index"].tolist()
    noises = tokens_first(run.trace[f"{name}.noise"])
    scheduler, num_inference_steps = make_sampler("official-sde", num_steps)
    set_timesteps(scheduler, num_inference_steps)
    times, sample = data_times(scheduler), run.start
    for index, timestep in enumerate(scheduler.timesteps):
        noise = noises[index, :2] if index < num_steps - 1 else None
        model_output = to_model_output(run.velocity(sample, times[index]))
        sample = scheduler.step(model_output, timestep, sample, noise=noise).prev_sample
        if index in indices:
            reference = tokens_first(states[indices.index(index)])[:2]
            torch.testing.assert_close(sample, reference, atol=1e-4, rtol=0)
    # The reference asks twice for each step.
    run.check(name, sample, 1e-4, 0, slice(None, None, 2))


def test_official_euler(run):
    # Times are 1 - sigma of float32 sigmas.
    run.check("ode_euler", run.sample("official-ode-euler", 10), 1e-5, 1e-7)


def test_official_dopri5(run):
    # Sizes of later steps depend on the rounding of small errors.
    run.check("ode_dopri5", run.sample("official-ode"), 1e-3, 3e-4)


def test_dopri5_without_the_companions_is_another_run(run):
    """The errors of both halves set the step size: what the tolerance above can tell apart."""
    sample = FlowMatchDopri5Scheduler().integrate(run.velocity, run.start)
    assert (sample - tokens_first(run.trace["ode_dopri5.final"])).abs().max() > 2e-3


def test_official_heun_by_its_formula():
    """No reference run has it; the formula, written out: noise, then the mean of the drifts at both ends of a step."""
    velocity, count = gaussian_velocity(2.0, 0.5), 8
    times = torch.linspace(1e-3, 0.96, count, dtype=torch.float64).tolist()
    step = times[1] - times[0]
    state, noises = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    noises = torch.randn(count - 1, *state.shape, generator=torch.Generator().manual_seed(1))

    def drift(sample, time):
        return 2 * velocity(sample, time) - sample / time

    expected = state
    for time, noise in zip(times, noises, strict=False):
        expected = expected + (2 * (1 - time) / time * step) ** 0.5 * noise
        first = drift(expected, time)
        expected = expected + step / 2 * (first + drift(expected + step * first, time + step))
    expected = expected + 0.04 * drift(expected, times[-1])

    scheduler, _ = make_sampler("official-sde-heun", count)
    set_timesteps(scheduler, count)
    sample = scheduler.add_first_noise(state, noise=noises[0])
    for index, (timestep, time) in enumerate(zip(scheduler.timesteps, data_times(scheduler), strict=True)):
        # The noise of a step is added at the end of the one before it.
        noise = noises[min((index + 1) // 2, count - 2)]
        sample = scheduler.step(to_model_output(velocity(sample, time)), timestep, sample, noise=noise).prev_sample
    # The drift at the start is a thousand times the state, in float32.
    torch.testing.assert_close(sample, expected, atol=1e-3, rtol=1e-3)


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
    arguments, peak = {}, 0.0
    if isinstance(scheduler, GPSTokenSDEScheduler):
        arguments = {"generator": generator}
        sample = scheduler.add_first_noise(sample, generator)
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
    "official-sde-heun": (291, 8.21, 0.650, 0.494),
}


@pytest.mark.parametrize("name", SPREADS)
def test_mean_and_spread_of_gaussian_data(name):
    for num_steps, expected in zip((5, 10, 20, 50), SPREADS[name], strict=True):
        mean, spread, _ = sample_gaussian(*make_sampler(name, num_steps))
        # Four standard errors of 100,000 samples: 0.004 of the spread for it, 0.013 for the mean.
        assert mean == pytest.approx(2, abs=0.013 * max(expected, 0.5))
        # That of the official solvers is far too large with few steps.
        assert spread == pytest.approx(expected, rel=0.012)


def test_spread_of_standard_normal_data():
    for num_steps, error in ((10, 0.08), (20, 0.04), (50, 0.015)):
        assert sample_gaussian(GPSTokenSDEScheduler(), num_steps, 0.0, 1.0)[1] == pytest.approx(1, abs=error)


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


@pytest.mark.parametrize("name", SPREADS)
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
