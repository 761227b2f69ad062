"""The samplers as parts of a pipeline: steps, noise, settings, mistakes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from gpstoken_diffusers.schedulers.flow_time import data_times, mix_noise, set_timesteps, to_model_output
from gpstoken_diffusers.schedulers.presets import SAMPLER_PRESETS, make_sampler
from gpstoken_diffusers.schedulers.scheduling_dopri5 import FlowMatchDopri5Scheduler
from gpstoken_diffusers.schedulers.scheduling_gpstoken_sde import GPSTokenSDEScheduler

SOLVERS = ["exponential", "euler_maruyama"]
STEPPED = [name for name in SAMPLER_PRESETS if name != "official-ode"]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise_like_tokens(batch_size, seed=0):
    return torch.randn(batch_size, 6, 5, generator=torch.Generator().manual_seed(seed))


def pull(sample, time):
    """A velocity that is not linear and mixes nothing across the batch."""
    return torch.tanh(sample) - sample * time


def run(scheduler, sample, generator, num_steps=6):
    set_timesteps(scheduler, num_steps)
    times = data_times(scheduler)
    for index, timestep in enumerate(scheduler.timesteps):
        model_output = to_model_output(pull(sample, times[index]))
        sample = scheduler.step(model_output, timestep, sample, generator=generator).prev_sample
    return sample


# Times


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("num_steps", [2, 7, 30])
def test_grids_lead_from_noise_to_data(name, num_steps):
    scheduler, num_inference_steps = make_sampler(name, num_steps)
    assert set_timesteps(scheduler, num_inference_steps) == 0
    times = data_times(scheduler)
    assert len(times) == len(scheduler.timesteps) == SAMPLER_PRESETS[name].evaluations(num_steps)
    assert scheduler.sigmas[-1] == 0
    if name == "official-sde":
        assert times == torch.linspace(1e-3, 0.96, num_steps).tolist()
        return
    # The multistep solvers of diffusers need a little of the data to be there.
    assert 0 <= times[0] <= 1.1e-6
    ends = [*sorted(set(times)), 1.0]
    sizes = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    assert max(sizes) - min(sizes) < 2e-3
    assert len(sizes) == num_inference_steps


@pytest.mark.parametrize("name", STEPPED)
def test_times_are_where_the_solver_takes_the_network_to_be(name):
    """With v = 1 - t^2 in place of a network, a wrong time shows: every solver must come near the integral, 2/3."""
    scheduler, num_inference_steps = make_sampler(name, 200)
    set_timesteps(scheduler, num_inference_steps)
    times, sample = data_times(scheduler), torch.zeros(1, 1, 1)
    for time, timestep in zip(times, scheduler.timesteps, strict=True):
        if isinstance(scheduler, GPSTokenSDEScheduler):
            # Its noise is part of the equation: ask for the time alone.
            assert timestep.item() == pytest.approx(1000 * (1 - time), abs=1e-3)
            continue
        velocity = torch.full_like(sample, 1 - time**2)
        sample = scheduler.step(to_model_output(velocity), timestep, sample).prev_sample
    if not isinstance(scheduler, GPSTokenSDEScheduler):
        assert sample.item() == pytest.approx(2 / 3, abs=4e-3)


def test_small_times_keep_their_digits():
    scheduler = GPSTokenSDEScheduler(sde_solver="euler_maruyama")
    set_timesteps(scheduler, 250)
    assert torch.equal(torch.tensor(data_times(scheduler)), torch.linspace(1e-3, 1 - 0.04, 250))


def test_shift_is_applied_once():
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchHeunDiscreteScheduler(shift=3.0)):
        set_timesteps(scheduler, 4)
        sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25])
        expected = 1 - 3 * sigmas / (1 + 2 * sigmas)
        torch.testing.assert_close(torch.tensor(sorted(set(data_times(scheduler)))), expected)


@pytest.mark.parametrize("name, begin", [("sde", 6), ("heun", 12), ("unipc", 6), ("official-sde", 6)])
def test_strength_leaves_out_the_first_steps(name, begin):
    scheduler, num_steps = make_sampler(name, 10)
    assert set_timesteps(scheduler, num_steps, strength=0.4) == begin
    assert scheduler.begin_index == begin
    sample = torch.zeros(1, 6, 5)
    # The timestep is not looked up: the place is known.
    scheduler.step(sample, scheduler.timesteps[begin], sample)
    assert scheduler.step_index == begin + 1
    assert set_timesteps(scheduler, num_steps, strength=1e-9) == begin // 6 * 9
    # To the nearest whole step: 0.99 of ten steps are ten.
    assert set_timesteps(scheduler, 10, strength=0.99) == 0


def test_scale_noise_is_the_path():
    data, noise = noise_like_tokens(2, 1), noise_like_tokens(2, 2)
    for scheduler in (GPSTokenSDEScheduler(), FlowMatchDopri5Scheduler(), FlowMatchEulerDiscreteScheduler()):
        mixed = scheduler.scale_noise(data, torch.tensor([1000.0, 1000.0]), noise)
        torch.testing.assert_close(mixed, noise)
    for scheduler in (GPSTokenSDEScheduler(), FlowMatchDopri5Scheduler()):
        for timestep in (250.0, torch.tensor(250.0), torch.tensor([250.0, 250.0])):
            torch.testing.assert_close(scheduler.scale_noise(data, timestep, noise), 0.75 * data + 0.25 * noise)
        assert scheduler.scale_noise(data.bfloat16(), torch.tensor([250.0]), noise).dtype == torch.bfloat16
    each = mix_noise(data, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(each[0], noise[0]) and torch.equal(each[1], data[1])


# Steps of the SDE


def test_one_exponential_step_by_hand():
    scheduler = GPSTokenSDEScheduler()
    set_timesteps(scheduler, 4, strength=0.75)
    sample, velocity, noise = noise_like_tokens(1, 1), noise_like_tokens(1, 2), noise_like_tokens(1, 3)
    # From t = 1/4 to 1/2: odds 1/3 and 1, so r = 1/3; the prediction of the data is x + 3/4 v.
    stepped = scheduler.step(-velocity, scheduler.timesteps[1], sample, noise=noise).prev_sample
    expected = (0.5 / 0.75) / 3 * sample + 0.5 * (8 / 9) * (sample + 0.75 * velocity) + 0.5 * math.sqrt(8 / 9) * noise
    torch.testing.assert_close(stepped, expected)


def test_first_and_last_exponential_step():
    scheduler = GPSTokenSDEScheduler()
    sample, velocity, noise = noise_like_tokens(1, 1), noise_like_tokens(1, 2), noise_like_tokens(1, 3)
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


# Noise


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_depends_on_its_seed_alone(solver):
    samples = noise_like_tokens(3)
    scheduler = GPSTokenSDEScheduler(sde_solver=solver)
    batch = run(scheduler, samples, generators(1, 2, 3))
    alone = run(scheduler, samples[1:2], generators(2))
    reversed_batch = run(scheduler, samples.flip(0), tuple(generators(3, 2, 1)))
    assert torch.equal(batch[1:2], alone)
    assert torch.equal(batch, reversed_batch.flip(0))
    assert torch.equal(run(scheduler, samples[1:2], generators(2)[0]), alone)
    assert not torch.equal(run(scheduler, samples[1:2], generators(4)), alone)


def test_without_a_generator_the_global_one_draws():
    samples = noise_like_tokens(2)
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(run(GPSTokenSDEScheduler(), samples, None))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_samples(solver, dtype):
    scheduler = GPSTokenSDEScheduler(sde_solver=solver)
    sample, velocity, noise = noise_like_tokens(2, 1), noise_like_tokens(2, 2), noise_like_tokens(2, 3)
    sample, velocity = sample.to(dtype), velocity.to(dtype)
    results = []
    for cast in (dtype, torch.float32):
        set_timesteps(scheduler, 10)
        arguments = (-velocity.to(cast), scheduler.timesteps[0], sample.to(cast))
        results.append(scheduler.step(*arguments, noise=noise).prev_sample)
    # One rounding, of the result: the arithmetic and the noise were in float32.
    assert results[0].dtype == dtype
    assert torch.equal(results[0], results[1].to(dtype))
    assert run(scheduler, sample, generators(1, 2)).dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_seed_means_the_same_on_a_gpu():
    scheduler, samples = GPSTokenSDEScheduler(), noise_like_tokens(2)
    on_cpu = run(scheduler, samples, generators(1, 2))
    on_gpu = run(scheduler, samples.cuda(), generators(1, 2))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-5, rtol=1e-5)


# Mistakes


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [0, -1, 2.5, None])
def test_impossible_numbers_of_steps(solver, num_steps):
    scheduler = GPSTokenSDEScheduler(sde_solver=solver)
    with pytest.raises(ValueError, match="num_inference_steps must be an integer of at least [12], got"):
        scheduler.set_timesteps(num_steps)
    with pytest.raises(ValueError, match="at least"):
        set_timesteps(FlowMatchEulerDiscreteScheduler(), num_steps)


@pytest.mark.parametrize("strength", [0, -0.5, 1.5, float("nan")])
def test_impossible_strengths(strength):
    with pytest.raises(ValueError, match="strength must be greater than 0 and at most 1"):
        set_timesteps(GPSTokenSDEScheduler(), 10, strength=strength)


def test_wrong_noise():
    scheduler, sample = GPSTokenSDEScheduler(), noise_like_tokens(3)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="There are 3 samples but 2 generators"):
        scheduler.step(sample, scheduler.timesteps[0], sample, generator=generators(1, 2))
    with pytest.raises(ValueError, match="There are 3 samples but 1 generators"):
        scheduler.step(sample, scheduler.timesteps[0], sample, generator=generators(1))
    with pytest.raises(ValueError, match=r"sample's shape \(3, 6, 5\), got \(1, 6, 5\)"):
        scheduler.step(sample, scheduler.timesteps[0], sample, noise=sample[:1])


def test_steps_out_of_turn():
    scheduler, sample = GPSTokenSDEScheduler(), noise_like_tokens(1)
    with pytest.raises(ValueError, match="Call set_timesteps before step"):
        scheduler.step(sample, 1000.0, sample)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="700 is none of this run's timesteps, which lead from 1000 to 500"):
        scheduler.step(sample, 700.0, sample)
    (stepped,) = scheduler.step(sample, 500.0, sample, return_dict=False)
    assert stepped.shape == sample.shape
    with pytest.raises(ValueError, match="All 2 steps have been taken"):
        scheduler.step(sample, 500.0, sample)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sde_solver": "heun"}, 'sde_solver must be "exponential" or "euler_maruyama", got \'heun\''),
        ({"solver_order": 3}, "solver_order must be 1 or 2, got 3"),
        ({"prediction_type": "epsilon"}, "GPSTokenSDEScheduler has prediction_type='epsilon'"),
        ({"use_flow_sigmas": False}, "use_flow_sigmas=False, but these networks predict"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GPSTokenSDEScheduler(**settings)


def test_schedulers_of_another_diffusion_are_refused():
    for scheduler in (UniPCMultistepScheduler(), DDIMScheduler(), EulerDiscreteScheduler()):
        with pytest.raises(ValueError, match=f"{type(scheduler).__name__} has .* Make it with prediction_type="):
            set_timesteps(scheduler, 10)
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler has .*use_flow_sigmas=False"):
        set_timesteps(DPMSolverMultistepScheduler(prediction_type="flow_prediction"), 10)


# Files and swapping


@pytest.mark.parametrize(
    "scheduler",
    [GPSTokenSDEScheduler(sde_solver="euler_maruyama", solver_order=1), FlowMatchDopri5Scheduler(1e-4, 0.1)],
)
def test_saved_settings_come_back(tmp_path, scheduler):
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == type(scheduler).__name__
    for name in ("sde_solver", "solver_order", "atol", "rtol", "num_train_timesteps"):
        assert loaded.config.get(name) == scheduler.config.get(name) == saved.get(name)
    assert len(loaded) == 1000


@pytest.mark.parametrize("ours", [GPSTokenSDEScheduler, FlowMatchDopri5Scheduler])
@pytest.mark.parametrize("name", ["euler", "heun", "unipc", "dpm++"])
def test_swapping_with_diffusers_schedulers(ours, name):
    other, _ = make_sampler(name)
    assert isinstance(ours.from_config(other.config), ours)
    assert type(other) in ours().compatibles
    swapped = type(other).from_config(ours().config)
    # A scheduler that is not one for flows would be refused here.
    set_timesteps(swapped, 10)
    set_timesteps(other, 10)
    assert torch.equal(swapped.sigmas, other.sigmas)


def test_swapping_there_and_back_keeps_the_settings():
    scheduler = GPSTokenSDEScheduler(sde_solver="euler_maruyama")
    there = UniPCMultistepScheduler.from_config(scheduler.config)
    assert GPSTokenSDEScheduler.from_config(there.config).config.sde_solver == "euler_maruyama"
    with pytest.raises(ValueError, match="has prediction_type='epsilon'"):
        GPSTokenSDEScheduler.from_config(UniPCMultistepScheduler(prediction_type="epsilon").config | {})


def test_the_official_solver_takes_two_steps_or_more():
    """Its grid has a first time and a last one; make_sampler refuses a single step, and so does the scheduler."""
    with pytest.raises(ValueError, match="at least 2"):
        GPSTokenSDEScheduler(sde_solver="euler_maruyama").set_timesteps(1)
