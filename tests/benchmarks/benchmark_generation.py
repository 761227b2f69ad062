"""Steps against quality of every sampler, and time against the official way of sampling, on a trained pipeline.

    python tests/benchmarks/benchmark_generation.py                       # the shipped gpstoken-mini
    python tests/benchmarks/benchmark_generation.py --pipeline FOLDER --images 8 --steps 10 20 50 250
    python tests/benchmarks/benchmark_generation.py --tables guidance

Three tables: the time against the official way; every sampler at several steps; UniPC, the pipeline's own, with
guidance off for a part of the way.

Distance: root mean square, over standardised latents (whose own deviation is about 1), between what a sampler reaches
and the 1,000-step Euler solution of the same ODE from the same noise, under the pipeline's own guidance; and the PSNR
between the pictures of both. A stochastic sampler draws another picture, so its distance does not go to 0; its spread,
the latents' standard deviation over that of the ODE's, goes to 1. Rows: of the network's batches, for one image;
guidance takes two an evaluation.

Time: one image at a time, same sampler and steps, guidance 1.5 as the released settings have it (from t = 0.2 on). The
official way evaluates both guidance branches in float32 at every step, and twice per step of the SDE.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from harness import Case, conditions, main, make_parser, positive, run_cases, table
from torch import Tensor
from tqdm.auto import tqdm

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
TABLES = ("speed", "samplers", "guidance")
ALWAYS = (0.0, 1.0)
INTERVALS = (ALWAYS, (0.1, 1.0), (0.2, 1.0), (0.3, 1.0), (0.0, 0.9), (0.0, 0.8), (0.0, 0.7))


@dataclass(frozen=True)
class Setting:
    """What is sampled: layouts (B, N, 5), their classes (B,), and how strongly the classes guide."""

    pipe: GPSTokenPipeline
    layout: Tensor
    labels: Tensor
    guidance_scale: float

    def sample(self, sampler: str, steps: int, interval: tuple[float, float] = ALWAYS) -> Tensor:
        network, null = self.pipe.texture_network(self.layout), self.pipe.transformer.null_class
        velocity = guided_velocity(network, self.labels, null, self.guidance_scale, interval)
        generators = sample_generators(torch.Generator().manual_seed(0), len(self.labels))
        channels = 5 + self.pipe.transformer.config.texture_channels
        noise = draw_noise(generators, (self.layout.shape[1], channels), self.layout.device)
        scheduler, inference_steps = make_sampler(sampler, steps)
        return integrate_flow(scheduler, velocity, noise, inference_steps, generators)

    def pictures(self, latents: Tensor) -> Tensor:
        side = self.pipe.autoencoder.config.sample_size
        tokens = GPSTokens(*self.pipe.transformer.from_latents(self.layout, latents), (side, side))
        return self.pipe.autoencoder.decode(tokens).sample.clamp(-1, 1)


def quality_tables(setting: Setting, tables: list[str], all_steps: list[int], cheaper_steps: list[int]) -> None:
    solution = setting.sample("euler", REFERENCE_STEPS)
    expected = setting.pictures(solution)

    def compare(latents: Tensor) -> list[str]:
        distance = (latents - solution).square().mean().sqrt().item()
        spread = (latents.std() / solution.std()).item()
        return [f"{distance:.4f}", f"{spread:.3f}", f"{psnr(setting.pictures(latents), expected).mean().item():.1f}"]

    columns = ["distance", "spread", "PSNR, dB"]
    if "samplers" in tables:
        rows = []
        for sampler in tqdm(SAMPLERS, unit="sampler"):
            for steps in all_steps:
                evaluations = SAMPLER_PRESETS[sampler].evaluations(steps)
                rows.append([sampler, steps, evaluations, *compare(setting.sample(sampler, steps))])
        print(table(["sampler", "steps", "evaluations", *columns], rows), "\n")
    if "guidance" in tables:
        rows = []
        for steps in tqdm(cheaper_steps, unit="steps"):
            scheduler, inference_steps = make_sampler("unipc", steps)
            set_timesteps(scheduler, inference_steps)
            for first, last in INTERVALS:
                batches = sum(2 if first <= time <= last else 1 for time in data_times(scheduler))
                found = compare(setting.sample("unipc", steps, (first, last)))
                rows.append([f"from {first:g} to {last:g}", steps, batches, *found])
        print(table(["unipc, guidance", "steps", "rows", *columns], rows))


def official_loop(pipe: GPSTokenPipeline, layout: Tensor, label: Tensor, steps: int, evaluations: int) -> None:
    """The work of the released sampling script: doubled batch, float32, whatever the time."""
    model, null = pipe.transformer, pipe.transformer.null_class
    labels = torch.cat([label, torch.full_like(label, null)])
    latents = torch.randn(2, layout.shape[1], 5 + model.config.texture_channels, device=layout.device)
    for step in range(steps):
        for _ in range(evaluations):
            both = torch.cat([latents[:1], latents[:1]])
            times = torch.full((2,), step / steps, device=layout.device)
            velocity = model(both, times, labels, torch.cat([layout, layout])).sample
            conditional, unconditional = velocity.chunk(2)
            guided = unconditional + 1.5 * (conditional - unconditional)
        latents = latents + torch.cat([guided, guided]) / steps


def speed(pipe: GPSTokenPipeline, layout: Tensor, label: Tensor, steps: int) -> Iterator[Case]:
    def ours(sampler: str, count: int, dtype: torch.dtype) -> Callable[[], None]:
        def run() -> None:
            pipe.scheduler, inference_steps = make_sampler(sampler, count)
            options = {"guidance_scale": 1.5, "guidance_interval": (0.2, 1.0)}
            with torch.autocast(layout.device.type, dtype, enabled=dtype != torch.float32):
                pipe.generate_texture(layout, [int(label)], inference_steps, **options)

        return run

    ways = {f"ours, {str(dtype)[6:]}": dtype for dtype in (torch.float32, torch.bfloat16)}
    for evaluations, official in ((1, f"official ODE, Euler, {steps} steps"), (2, f"official SDE, {steps} steps")):
        for name, sampler, count in ((f"Euler, {steps} steps", "euler", steps), ("UniPC, 20 steps", "unipc", 20)):
            runs = {way: ours(sampler, count, dtype) for way, dtype in ways.items()}
            runs["official"] = lambda evaluations=evaluations: official_loop(pipe, layout, label, steps, evaluations)
            yield Case("One image", {"ours": name, "official": official}, runs, layout.device)


@torch.no_grad()
def run() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--pipeline", default=str(MINI_PIPELINE))
    parser.add_argument("--images", type=positive, default=9)
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--steps", type=positive, nargs="+", default=[10, 20, 50, 250])
    parser.add_argument("--cheaper_steps", type=positive, nargs="+", default=[10, 15, 20, 30], help="of the last table")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="default: the pipeline's")
    parser.add_argument("--timed_steps", type=positive, default=50)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = conditions(args, device)
    pipe = GPSTokenPipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    labels = torch.arange(args.images, device=device) % pipe.transformer.config.num_classes
    layout = pipe.generate_layout(labels.tolist(), generator=torch.Generator().manual_seed(0))
    if "speed" in args.tables:
        cases = speed(pipe, layout[:1], labels[:1], args.timed_steps)
        run_cases(args, f"Second stage, {layout.shape[1]} tokens", lines, cases, 4, device=device)
    if set(args.tables) - {"speed"}:
        print(f"\n{args.images} images, guidance {args.guidance_scale:g}, against {REFERENCE_STEPS} Euler steps\n")
        quality_tables(Setting(pipe, layout, labels, args.guidance_scale), args.tables, args.steps, args.cheaper_steps)


if __name__ == "__main__":
    sys.exit(main(run))
