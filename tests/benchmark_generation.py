"""Steps against quality of every sampler, and time against the official way of sampling, on a trained pipeline.

    python tests/benchmark_generation.py                       # the shipped gpstoken-mini
    python tests/benchmark_generation.py --pipeline FOLDER --images 8 --steps 10 20 50 250

Distance: root mean square, over standardised latents (whose own deviation is about 1), between what a sampler reaches
and the 1,000-step Euler solution of the same ODE from the same noise, under the pipeline's own guidance; and the PSNR
between the pictures of both. A stochastic sampler draws another picture, so its distance does not go to 0; its spread,
the latents' standard deviation over that of the ODE's, goes to 1.

Time: one image at a time, same sampler and steps, guidance 1.5 as the released settings have it (from t = 0.2 on). The
official way evaluates both guidance branches in float32 at every step, and twice per step of the SDE.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from gpstoken_diffusers.pipelines.flow_sampling import draw_noise, guided_velocity, integrate_flow, sample_generators
from torch import Tensor

from gpstoken_diffusers import GPSTokenPipeline, GPSTokens
from gpstoken_diffusers.assets import MINI_PIPELINE
from gpstoken_diffusers.metrics import psnr
from gpstoken_diffusers.schedulers.presets import SAMPLER_PRESETS, make_sampler

SAMPLERS = ("euler", "heun", "unipc", "dpm++", "sde", "official-sde")
REFERENCE_STEPS = 1000


def sample(
    pipe: GPSTokenPipeline, layout: Tensor, labels: Tensor, sampler: str, steps: int, guidance_scale: float
) -> Tensor:
    generators = sample_generators(torch.Generator().manual_seed(0), len(labels))
    noise = draw_noise(generators, (layout.shape[1], 5 + pipe.transformer.config.texture_channels), layout.device)
    network, null = pipe.texture_network(layout), pipe.transformer.null_class
    velocity = guided_velocity(network, labels, null, guidance_scale, (0.0, 1.0))
    scheduler, inference_steps = make_sampler(sampler, steps)
    return integrate_flow(scheduler, velocity, noise, inference_steps, generators, on_step=lambda *step: step[3])


def quality(
    pipe: GPSTokenPipeline, layout: Tensor, labels: Tensor, all_steps: list[int], guidance_scale: float
) -> None:
    def pictures(latents: Tensor) -> Tensor:
        side = pipe.autoencoder.config.sample_size
        tokens = GPSTokens(*pipe.transformer.from_latents(layout, latents), (side, side))
        return pipe.autoencoder.decode(tokens).sample.clamp(-1, 1)

    reference = sample(pipe, layout, labels, "euler", REFERENCE_STEPS, guidance_scale)
    expected = pictures(reference)
    print(f"\n{len(labels)} images, guidance {guidance_scale:g}, against {REFERENCE_STEPS} Euler steps\n")
    print("| sampler | steps | evaluations | distance | spread | PSNR, dB |\n|---|---|---|---|---|---|")
    for sampler in SAMPLERS:
        for steps in all_steps:
            latents = sample(pipe, layout, labels, sampler, steps, guidance_scale)
            distance = (latents - reference).square().mean().sqrt().item()
            spread = (latents.std() / reference.std()).item()
            evaluations = SAMPLER_PRESETS[sampler].evaluations(steps)
            close = psnr(pictures(latents), expected).mean().item()
            print(f"| {sampler} | {steps} | {evaluations} | {distance:.4f} | {spread:.3f} | {close:.1f} |", flush=True)


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
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50, 250])
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
    speed(pipe, layout[:1], labels[:1], args.timed_steps, args.rounds)
    quality(pipe, layout, labels, args.steps, args.guidance_scale)


if __name__ == "__main__":
    main()
