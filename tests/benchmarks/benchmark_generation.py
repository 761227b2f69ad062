"""Steps against quality of every sampler, and time against the official way of sampling, on a trained pipeline.

    python tests/benchmarks/benchmark_generation.py                       # the shipped gpstoken-mini
    python tests/benchmarks/benchmark_generation.py --pipeline FOLDER --images 8 --steps 10 20 50 250
    python tests/benchmarks/benchmark_generation.py --tables guidance caching --cheaper_steps 10 14 20

Four tables: every sampler at several steps; UniPC, the pipeline's own, with cheaper guidance (off for a part of the
way, or with the difference between both branches reused for a step or two), and with what the network's inner blocks
add reused for a step or two; and the time against the official way.

Distance: root mean square, over standardised latents (whose own deviation is about 1), between what a sampler reaches
and the 1,000-step Euler solution of the same ODE from the same noise, under the pipeline's own guidance; and the PSNR
between the pictures of both. A stochastic sampler draws another picture, so its distance does not go to 0; its spread,
the latents' standard deviation over that of the ODE's, goes to 1. Rows: of the network's batches, for one image;
guidance takes two an evaluation. Blocks: of the network that are computed, over all steps, against all of UniPC's 20.

Time: one image at a time, same sampler and steps, guidance 1.5 as the released settings have it (from t = 0.2 on). The
official way evaluates both guidance branches in float32 at every step, and twice per step of the SDE.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpstoken_diffusers import GPSTokenPipeline, GPSTokens
from gpstoken_diffusers.assets import MINI_PIPELINE
from gpstoken_diffusers.evaluation.metrics import psnr
from gpstoken_diffusers.schedulers.flow_time import data_times, set_timesteps
from gpstoken_diffusers.schedulers.guidance import guided_velocity
from gpstoken_diffusers.schedulers.integration import integrate_flow
from gpstoken_diffusers.schedulers.noise import draw_noise, sample_generators
from gpstoken_diffusers.schedulers.presets import SAMPLER_PRESETS, make_sampler

SAMPLERS = ("euler", "heun", "unipc", "dpm++", "sde", "official-sde")
REFERENCE_STEPS = 1000
TABLES = ("speed", "samplers", "guidance", "caching")
INTERVALS = ((0.0, 1.0), (0.1, 1.0), (0.2, 1.0), (0.3, 1.0), (0.0, 0.9), (0.0, 0.8), (0.0, 0.7))
REUSES = (2, 3)
# Of the network's blocks, how many at either end are computed at every step; the others are at each `REUSES`-th.
OUTER_BLOCKS = (1, 2, 3)

Flow = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Setting:
    """What is sampled: layouts (B, N, 5), their classes (B,), and how strongly the classes guide."""

    pipe: GPSTokenPipeline
    layout: Tensor
    labels: Tensor
    guidance_scale: float

    def velocity(self, interval: tuple[float, float] = (0.0, 1.0)) -> Flow:
        network, null = self.pipe.texture_network(self.layout), self.pipe.transformer.null_class
        return guided_velocity(network, self.labels, null, self.guidance_scale, interval)

    def reusing_velocity(self, every: int) -> Flow:
        """Both branches at each `every`-th evaluation; between them the conditional one and their last difference."""
        network, null = self.pipe.texture_network(self.layout), self.pipe.transformer.null_class
        guided, unguided = (guided_velocity(network, self.labels, null, s, (0, 1)) for s in (self.guidance_scale, 1.0))
        count, difference = 0, None

        def velocity(latents: Tensor, time: float) -> Tensor:
            nonlocal count, difference
            count += 1
            if (count - 1) % every:
                return unguided(latents, time) + difference
            # c + (scale - 1)(c - u), less c. A pipeline would take c from the same batch; here it is run once more.
            result = guided(latents, time)
            difference = result - unguided(latents, time)
            return result

        return velocity

    @contextlib.contextmanager
    def caching_velocity(self, every: int, outer: int) -> Iterator[Flow]:
        """Within it: what the inner blocks add to the tokens is computed at each `every`-th evaluation and kept.

        outer: blocks at either end that are computed at every evaluation.
        """
        transformer, velocity, count = self.pipe.transformer, self.velocity(), 0
        blocks = transformer.blocks
        inner = InnerBlocks(blocks[outer:-outer])

        def caching(latents: Tensor, time: float) -> Tensor:
            nonlocal count
            inner.reuses = count % every > 0
            count += 1
            return velocity(latents, time)

        transformer.blocks = torch.nn.ModuleList([*blocks[:outer], inner, *blocks[-outer:]])
        try:
            yield caching
        finally:
            transformer.blocks = blocks

    def sample(self, sampler: str, steps: int, velocity: Flow) -> Tensor:
        generators = sample_generators(torch.Generator().manual_seed(0), len(self.labels))
        channels = 5 + self.pipe.transformer.config.texture_channels
        noise = draw_noise(generators, (self.layout.shape[1], channels), self.layout.device)
        scheduler, inference_steps = make_sampler(sampler, steps)
        return integrate_flow(scheduler, velocity, noise, inference_steps, generators)

    def pictures(self, latents: Tensor) -> Tensor:
        side = self.pipe.autoencoder.config.sample_size
        tokens = GPSTokens(*self.pipe.transformer.from_latents(self.layout, latents), (side, side))
        return self.pipe.autoencoder.decode(tokens).sample.clamp(-1, 1)


class InnerBlocks(torch.nn.Module):
    """Blocks in a row; while `reuses` is set, they add what they added last."""

    def __init__(self, blocks: torch.nn.ModuleList):
        super().__init__()
        self.blocks, self.reuses, self.added = blocks, False, None

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        if not self.reuses:
            result = tokens
            for block in self.blocks:
                result = block(result, condition)
            self.added = result - tokens
        return tokens + self.added


@dataclass(frozen=True)
class Reference:
    """The solution that others are measured by, and its pictures."""

    latents: Tensor
    pictures: Tensor

    def compare(self, setting: Setting, latents: Tensor) -> str:
        """The last columns of a row."""
        distance = (latents - self.latents).square().mean().sqrt().item()
        spread = (latents.std() / self.latents.std()).item()
        close = psnr(setting.pictures(latents), self.pictures).mean().item()
        return f"{distance:.4f} | {spread:.3f} | {close:.1f} |"


def compare_samplers(setting: Setting, reference: Reference, all_steps: list[int]) -> None:
    print("\n| sampler | steps | evaluations | distance | spread | PSNR, dB |\n|---|---|---|---|---|---|")
    for sampler in SAMPLERS:
        for steps in all_steps:
            latents = setting.sample(sampler, steps, setting.velocity())
            evaluations = SAMPLER_PRESETS[sampler].evaluations(steps)
            print(f"| {sampler} | {steps} | {evaluations} | {reference.compare(setting, latents)}", flush=True)


def compare_guidance(setting: Setting, reference: Reference, all_steps: list[int]) -> None:
    print("\n| unipc, guidance | steps | rows | distance | spread | PSNR, dB |\n|---|---|---|---|---|---|")
    for steps in all_steps:
        scheduler, inference_steps = make_sampler("unipc", steps)
        set_timesteps(scheduler, inference_steps)
        times = data_times(scheduler)
        for first, last in INTERVALS:
            rows = sum(2 if first <= time <= last else 1 for time in times)
            latents = setting.sample("unipc", steps, setting.velocity((first, last)))
            columns = reference.compare(setting, latents)
            print(f"| from {first:g} to {last:g} | {steps} | {rows} | {columns}", flush=True)
        for every in REUSES:
            rows = steps + -(-steps // every)
            latents = setting.sample("unipc", steps, setting.reusing_velocity(every))
            columns = reference.compare(setting, latents)
            print(f"| its difference anew each {every} steps | {steps} | {rows} | {columns}", flush=True)


def compare_caching(setting: Setting, reference: Reference, all_steps: list[int]) -> None:
    print("\n| unipc, inner blocks | steps | blocks | distance | spread | PSNR, dB |\n|---|---|---|---|---|---|")
    count = len(setting.pipe.transformer.blocks)
    for steps in all_steps:
        columns = reference.compare(setting, setting.sample("unipc", steps, setting.velocity()))
        print(f"| at each step | {steps} | {steps / 20:.0%} | {columns}", flush=True)
        for every, outer in itertools.product(REUSES, OUTER_BLOCKS):
            with setting.caching_velocity(every, outer) as velocity:
                latents = setting.sample("unipc", steps, velocity)
            computed = -(-steps // every) * (count - 2 * outer) + steps * 2 * outer
            columns = reference.compare(setting, latents)
            name = f"all but {outer} at both ends anew each {every} steps"
            print(f"| {name} | {steps} | {computed / (20 * count):.0%} | {columns}", flush=True)


def official_loop(pipe: GPSTokenPipeline, layout: Tensor, label: Tensor, steps: int, evaluations: int) -> None:
    """The work of the released sampling script: doubled batch, float32, whatever the time."""
    model, null = pipe.transformer, pipe.transformer.null_class
    labels = torch.cat([label, torch.full_like(label, null)])
    latents = torch.randn(2, layout.shape[1], 5 + model.config.texture_channels)
    for step in range(steps):
        for _ in range(evaluations):
            both = torch.cat([latents[:1], latents[:1]])
            velocity = model(both, torch.full((2,), step / steps), labels, torch.cat([layout, layout])).sample
            conditional, unconditional = velocity.chunk(2)
            guided = unconditional + 1.5 * (conditional - unconditional)
        latents = latents + torch.cat([guided, guided]) / steps


def speed(pipe: GPSTokenPipeline, layout: Tensor, label: Tensor, steps: int, rounds: int) -> None:
    def ours(sampler: str, count: int, dtype: torch.dtype) -> None:
        pipe.scheduler, inference_steps = make_sampler(sampler, count)
        options = {"guidance_scale": 1.5, "guidance_interval": (0.2, 1.0)}
        with torch.autocast(layout.device.type, dtype, enabled=dtype != torch.float32):
            pipe.generate_texture(layout, [int(label)], inference_steps, **options)

    cases = {
        f"official way, ODE Euler, {steps} steps": lambda: official_loop(pipe, layout, label, steps, 1),
        f"official way, SDE, {steps} steps": lambda: official_loop(pipe, layout, label, steps, 2),
        f"ours, euler, {steps} steps, float32": lambda: ours("euler", steps, torch.float32),
        f"ours, euler, {steps} steps, bfloat16": lambda: ours("euler", steps, torch.bfloat16),
        "ours, unipc, 20 steps, float32": lambda: ours("unipc", 20, torch.float32),
        "ours, unipc, 20 steps, bfloat16": lambda: ours("unipc", 20, torch.bfloat16),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    base = statistics.median(seconds[next(iter(cases))])
    print("\n| one image | seconds | times faster |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.2f} | {base / statistics.median(values):.2f} |")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=str(MINI_PIPELINE))
    parser.add_argument("--images", type=int, default=9)
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50, 250])
    parser.add_argument("--cheaper_steps", type=int, nargs="+", default=[10, 15, 20, 30], help="Of both last tables.")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="Default: the pipeline's.")
    parser.add_argument("--timed_steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pipe = GPSTokenPipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    labels = torch.arange(args.images, device=pipe.device) % pipe.transformer.config.num_classes
    layout = pipe.generate_layout(labels.tolist(), generator=torch.Generator().manual_seed(0))
    print(f"{args.pipeline}, {layout.shape[1]} tokens, {pipe.device}, {torch.get_num_threads()} threads")
    if "speed" in args.tables:
        speed(pipe, layout[:1], labels[:1], args.timed_steps, args.rounds)
    if args.tables == ["speed"]:
        return
    setting = Setting(pipe, layout, labels, args.guidance_scale)
    latents = setting.sample("euler", REFERENCE_STEPS, setting.velocity())
    reference = Reference(latents, setting.pictures(latents))
    print(f"\n{args.images} images, guidance {args.guidance_scale:g}, against {REFERENCE_STEPS} Euler steps")
    if "samplers" in args.tables:
        compare_samplers(setting, reference, args.steps)
    if "guidance" in args.tables:
        compare_guidance(setting, reference, args.cheaper_steps)
    if "caching" in args.tables:
        compare_caching(setting, reference, args.cheaper_steps)


if __name__ == "__main__":
    main()
