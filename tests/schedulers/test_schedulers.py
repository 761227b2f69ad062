"""The samplers as parts of a pipeline: names, times, guidance, noise, settings, mistakes."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)

from gpstoken_diffusers.schedulers.flow_time import data_times, mix_noise, set_timesteps
from gpstoken_diffusers.schedulers.guidance import guided_velocity
from gpstoken_diffusers.schedulers.integration import integrate_flow
from gpstoken_diffusers.schedulers.noise import sample_generators
from gpstoken_diffusers.schedulers.presets import SAMPLER_PRESETS, make_sampler
from gpstoken_diffusers.schedulers.scheduling_dopri5 import FlowMatchDopri5Scheduler
from gpstoken_diffusers.schedulers.scheduling_gpstoken_sde import GPSTokenSDEScheduler

SOLVERS = ["exponential", "euler_maruyama", "heun"]
STEPPED = [name for name in SAMPLER_PRESETS if name != "official-ode"]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise_like_tokens(batch_size, seed=0):
    return torch.randn(batch_size, 6, 5, generator=torch.Generator().manual_seed(seed))


def run(scheduler, sample, generators, num_steps=6):
    """Along a velocity that is not linear and mixes nothing across the batch."""

    def velocity(sample, time):
        return torch.tanh(sample.float()) - sample * time

    return integrate_flow(scheduler, velocity, sample, num_steps, generators)


# Samplers by name


@pytest.mark.parametrize("name", SAMPLER_PRESETS)
def test_every_preset_makes_a_fresh_scheduler(name):
    preset, (first, steps), (second, other_steps) = SAMPLER_PRESETS[name], make_sampler(name), make_sampler(name, 7)
    assert type(first) is type(second) and first is not second
    assert name in make_sampler.__doc__ and preset.description
    if preset.num_steps is None:
        assert steps is other_steps is preset.evaluations is None
    else:
        assert (steps, other_steps) == (preset.inference_steps(preset.num_steps), preset.inference_steps(7))


def test_official_defaults():
    for name, solver in (("official-sde", "euler_maruyama"), ("official-sde-heun", "heun")):
        scheduler, num_steps = make_sampler(name)
        assert (scheduler.config.sde_solver, num_steps) == (solver, 250)
    scheduler, _ = make_sampler("official-ode")
    assert (scheduler.config.atol, scheduler.config.rtol) == (1e-6, 1e-3)
    assert make_sampler("official-ode-euler")[1] == 249
    assert make_sampler("sde")[0].config.sde_solver == "exponential"


@pytest.mark.parametrize("arguments, message", [
    (("uni-pc",), "There is no sampler 'uni-pc'. Did you mean 'unipc'"),
    (("Heun",), "Did you mean 'heun'"),
    (("offical-sde",), "Did you mean 'official-sde'"),
    (("xyzzy",), "There is no sampler 'xyzzy'. Choose one of official-sde, official-sde-heun, "),
    ((None,), "There is no sampler None"),
    *(((name, steps), "num_inference_steps must be an integer of at least") for name, steps in
      (("sde", 0), ("official-sde", 1), ("official-ode-euler", 1), ("heun", 1.5), ("heun", True), ("heun", "3"))),
])  # fmt: skip
def test_names_and_steps_that_there_are_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(*arguments)


# Times


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("num_steps", [2, 7, 30])
def test_grids_lead_from_noise_to_data(name, num_steps):
    scheduler, num_inference_steps = make_sampler(name, num_steps)
    assert set_timesteps(scheduler, num_inference_steps) == 0
    times = data_times(scheduler)
    assert len(times) == len(scheduler.timesteps) == SAMPLER_PRESETS[name].evaluations(num_steps)
    assert scheduler.sigmas[-1] == 0
    if name.startswith("official-sde"):
        # Small times keep their digits.
        assert sorted(set(times)) == torch.linspace(1e-3, 0.96, num_steps).tolist()
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
    if isinstance(scheduler, GPSTokenSDEScheduler):
        # Its noise is part of the equation: ask for the time alone.
        set_timesteps(scheduler, num_inference_steps)
        expected = 1000 * (1 - torch.tensor(data_times(scheduler)))
        return torch.testing.assert_close(scheduler.timesteps, expected, atol=1e-3, rtol=0)
    sample = integrate_flow(
        scheduler, lambda sample, time: torch.full_like(sample, 1 - time**2), torch.zeros(1, 1, 1), num_inference_steps
    )
    assert sample.item() == pytest.approx(2 / 3, abs=4e-3)


def test_shift_is_applied_once():
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchHeunDiscreteScheduler(shift=3.0)):
        set_timesteps(scheduler, 4)
        sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25])
        expected = 1 - 3 * sigmas / (1 + 2 * sigmas)
        torch.testing.assert_close(torch.tensor(sorted(set(data_times(scheduler)))), expected)


@pytest.mark.parametrize("name, begin", [
    ("sde", 6), ("heun", 12), ("unipc", 6), ("official-sde", 6), ("official-sde-heun", 12),
])  # fmt: skip
def test_strength_leaves_out_the_first_steps(name, begin):
    scheduler, num_steps = make_sampler(name, 10)
    assert set_timesteps(scheduler, num_steps, strength=0.4) == scheduler.begin_index == begin
    sample = torch.zeros(1, 6, 5)
    if name == "official-sde-heun":
        scheduler.add_first_noise(sample)
    # The timestep is not looked up: the place is known.
    scheduler.step(sample, scheduler.timesteps[begin], sample)
    assert scheduler.step_index == begin + 1
    assert set_timesteps(scheduler, num_steps, strength=1e-9) == begin // 6 * 9
    # To the nearest whole step: 0.99 of ten steps are ten.
    assert set_timesteps(scheduler, 10, strength=0.99) == 0


def test_scale_noise_is_the_path():
    data, noise = noise_like_tokens(2, 1), noise_like_tokens(2, 2)
    for scheduler in (GPSTokenSDEScheduler(), FlowMatchDopri5Scheduler(), FlowMatchEulerDiscreteScheduler()):
        torch.testing.assert_close(scheduler.scale_noise(data, torch.full((2,), 1000.0), noise), noise)
    for scheduler in (GPSTokenSDEScheduler(), FlowMatchDopri5Scheduler()):
        for timestep in (250.0, torch.tensor(250.0), torch.tensor([250.0, 250.0])):
            torch.testing.assert_close(scheduler.scale_noise(data, timestep, noise), 0.75 * data + 0.25 * noise)
        assert scheduler.scale_noise(data.bfloat16(), torch.tensor([250.0]), noise).dtype == torch.bfloat16
    each = mix_noise(data, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(each[0], noise[0]) and torch.equal(each[1], data[1])


# Guidance


@pytest.mark.parametrize("name", ["euler", "heun", "sde", "official-ode-euler"])
def test_guidance_acts_at_both_ends_of_its_interval(name):
    """Bounds on the grid: steps that begin there are guided, their neighbours outside are not."""
    for num_steps in (5, 10, 11, 30, 49):
        scheduler, steps = make_sampler(name, num_steps)
        set_timesteps(scheduler, steps)
        times = sorted(set(data_times(scheduler)))
        for first in range(0, steps, 3):
            last = min(first + 2, steps - 1)
            rows = []

            def network(latents, time, labels, rows=rows):
                rows.append(len(latents))
                return latents

            velocity = guided_velocity(network, torch.tensor([1]), 3, 2.0, (first / steps, last / steps))
            for time in times:
                velocity(torch.zeros(1, 1, 1), time)
            assert rows == [2 if first <= index <= last else 1 for index in range(steps)]


def test_companions_as_in_the_release():
    """Under guidance they get the velocity of their samples; outside of its interval they have no class."""

    def network(latents, time, labels):
        return latents + 10 * labels[:, None, None]

    pair = torch.tensor([1.0, 5.0]).view(2, 1, 1)
    velocity = guided_velocity(network, torch.tensor([1]), 3, 2.0, (0.5, 1.0))
    assert velocity(pair, 0.7).flatten().tolist() == [31 + 2 * (11 - 31)] * 2
    assert velocity(pair, 0.3).flatten().tolist() == [11, 35]
    # Without guidance there is nothing that they would do otherwise.
    assert guided_velocity(network, torch.tensor([1]), 3, 1.0)(pair, 0.7).flatten().tolist() == [11, 11]


# Noise


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_depends_on_its_seed_alone(solver):
    samples = noise_like_tokens(3)
    scheduler = GPSTokenSDEScheduler(sde_solver=solver)
    batch = run(scheduler, samples, generators(1, 2, 3))
    alone = run(scheduler, samples[1:2], generators(2))
    reversed_batch = run(scheduler, samples.flip(0), tuple(generators(3, 2, 1)))
    # Vectorised functions may round the last element of a row otherwise than one in its middle.
    torch.testing.assert_close(batch[1:2], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch, reversed_batch.flip(0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run(scheduler, samples[1:2], generators(4)), alone, atol=1e-2)


def test_without_a_generator_the_global_one_draws():
    scheduler, sample, results = GPSTokenSDEScheduler(), noise_like_tokens(2), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        set_timesteps(scheduler, 2)
        results.append(scheduler.step(sample, scheduler.timesteps[0], sample).prev_sample)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_samples(solver, dtype):
    scheduler = GPSTokenSDEScheduler(sde_solver=solver)
    sample, velocity, noise = (noise_like_tokens(2, seed) for seed in (1, 2, 3))
    sample, velocity = sample.to(dtype), velocity.to(dtype)
    results = []
    for cast in (dtype, torch.float32):
        set_timesteps(scheduler, 10)
        start = scheduler.add_first_noise(sample, noise=noise).to(cast)
        results.append(scheduler.step(-velocity.to(cast), scheduler.timesteps[0], start, noise=noise).prev_sample)
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


def stepping(scheduler, **options):
    sample = noise_like_tokens(3)
    scheduler.set_timesteps(3)
    return scheduler.step(sample, scheduler.timesteps[0], sample, **options)


FLOW = {"prediction_type": "flow_prediction"}
MISTAKES = {
    "a_solver": (lambda: GPSTokenSDEScheduler(sde_solver="rk4"), "or \"heun\", got 'rk4'"),
    "an_order": (lambda: GPSTokenSDEScheduler(solver_order=3), "solver_order must be 1 or 2, got 3"),
    "prediction": (lambda: GPSTokenSDEScheduler(prediction_type="epsilon"), "Scheduler has prediction_type='epsilon'"),
    "prediction_ode": (lambda: FlowMatchDopri5Scheduler(prediction_type="epsilon"), "has prediction_type='epsilon'"),
    "sigmas": (lambda: GPSTokenSDEScheduler(use_flow_sigmas=False), "use_flow_sigmas=False, but these networks"),
    "another_config": (
        lambda: GPSTokenSDEScheduler.from_config(UniPCMultistepScheduler(prediction_type="epsilon").config | {}),
        "has prediction_type='epsilon'",
    ),
    **{
        f"{type(other).__name__}": (lambda other=other: set_timesteps(other, 10), f"{type(other).__name__} .* flow")
        for other in (UniPCMultistepScheduler(), DDIMScheduler(), EulerDiscreteScheduler(), IPNDMScheduler())
    },
    "dpm_without_flow": (lambda: set_timesteps(DPMSolverMultistepScheduler(**FLOW), 10), "use_flow_sigmas=False"),
    **{
        f"{steps}_steps": (lambda steps=steps: GPSTokenSDEScheduler().set_timesteps(steps), "an integer of at least 1")
        for steps in (0, -1, 2.5, None)
    },
    **{
        f"one_{solver}_step": (lambda s=solver: GPSTokenSDEScheduler(sde_solver=s).set_timesteps(1), "at least 2")
        for solver in SOLVERS[1:]
    },
    "no_euler_steps": (lambda: set_timesteps(FlowMatchEulerDiscreteScheduler(), 0), "at least 1"),
    **{
        f"strength_{strength}": (
            lambda strength=strength: set_timesteps(GPSTokenSDEScheduler(), 10, strength=strength),
            "strength must be greater than 0 and at most 1",
        )
        for strength in (0, -0.5, 1.5, float("nan"))
    },
    "generators": (lambda: stepping(GPSTokenSDEScheduler(), generator=generators(1, 2)), "3 samples but 2 generators"),
    "noise": (lambda: stepping(GPSTokenSDEScheduler(), noise=torch.zeros(1, 6, 5)), r"\(3, 6, 5\), got \(1, 6, 5\)"),
    "heun_without_noise": (lambda: stepping(GPSTokenSDEScheduler(sde_solver="heun")), "call add_first_noise before"),
    "interval": (lambda: guided_velocity(None, torch.tensor([1]), 3, 2.0, (0.5, 0.2)), "0 <= first <= last <= 1"),
    **{
        f"scale_{scale}": (
            lambda scale=scale: guided_velocity(None, torch.tensor([1]), 3, scale),
            "guidance_scale must be at least 0 and finite",
        )
        for scale in (float("nan"), float("inf"), -1.0, "3", None)
    },
    **{
        f"interval_{interval}": (
            lambda interval=interval: guided_velocity(None, torch.tensor([1]), 3, 2.0, interval),
            "guidance_interval must be .first, last.",
        )
        for interval in ((0.5,), 0.5, ("0", "1"), (None, 1.0), (0.0, float("nan")), (0.0, 0.5, 1.0))
    },
    "number_of_generators": (lambda: sample_generators(generators(1), 2), "a list of 2, one per sample, got 1"),
}


@pytest.mark.parametrize("act, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(act, message):
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize("generator", [0, 1.5, "seed", [0, 1]])
def test_a_seed_is_no_generator(generator):
    with pytest.raises(TypeError, match=r"must be a torch.Generator .*: for a seed, pass torch"):
        sample_generators(generator, 2)


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
    there = type(other).from_config(GPSTokenSDEScheduler(sde_solver="heun").config)
    assert GPSTokenSDEScheduler.from_config(there.config).config.sde_solver == "heun"
