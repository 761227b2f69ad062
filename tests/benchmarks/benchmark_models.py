"""Times the models, stage by stage and the whole way, against the references, and against this device's best.

    python -m gpstoken_diffusers.benchmark                       # from a checkout: every size and stage, on the CPU
    python tests/benchmarks/benchmark_models.py                                     # the same
    python -m gpstoken_diffusers.benchmark --device cuda --batch_size 8 --peers --compile reduce-overhead
    python -m gpstoken_diffusers.benchmark --sizes l256 --stages reconstruction --dtype bfloat16 float32

Writes results.md, results.json and plot.png. Weights are made up: nothing is downloaded, times do not depend on them.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import references
import torch
from harness import REFERENCE, Case, conditions, main, make_parser, positive, run_cases
from made_up import autoencoder_config, copy_in, generator_config, made_up_model, made_up_pictures
from peers import PEERS, make_peer
from roofline import tensor_bytes, weight_bytes
from torch import Tensor, nn

from gpstoken_diffusers.models.autoencoder_gpstoken import AutoencoderGPSToken
from gpstoken_diffusers.models.transformer_gpstoken import GPSTokenTransformerModel
from gpstoken_diffusers.ops.backend.native import BACKEND_VARIABLE
from gpstoken_diffusers.ops.partition import partition_image
from gpstoken_diffusers.ops.splat import splat_gaussians
from gpstoken_diffusers.schedulers.flow_time import data_times, set_timesteps
from gpstoken_diffusers.schedulers.guidance import guided_velocity
from gpstoken_diffusers.schedulers.integration import integrate_flow
from gpstoken_diffusers.schedulers.presets import make_sampler

SIZES = ("s64", "m128", "l256", "mini", "xl")
AUTOENCODER_STAGES = ("partition", "stem", "regions", "splat", "decoder", "reconstruction")
GENERATOR_STAGES = ("network", "sampling")
STAGES = AUTOENCODER_STAGES + GENERATOR_STAGES
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# As released: guidance 1.5 from t = 0.2 on.
GUIDANCE_SCALE, GUIDANCE_INTERVAL = 1.5, (0.2, 1.0)
SAMPLER = "euler"
LAYOUT_PICTURE_PX = 256
# Unless asked for otherwise; XL takes seconds for each on a CPU.
SAMPLING_STEPS = {"mini": 20, "xl": 4}


@dataclass(frozen=True)
class Settings:
    """What all stages are made for.

    Attributes:
        device: where they run.
        dtypes: of ours; references are float32.
        batch_size: pictures at once.
        sampling_steps: of "sampling", 1 or more; None takes the size's own.
        toy: small networks in place of the sizes named.
        compile_mode: of `torch.compile`, for ours; None compiles nothing.
    """

    device: torch.device
    dtypes: Sequence[torch.dtype]
    batch_size: int = 1
    sampling_steps: int | None = None
    toy: bool = False
    compile_mode: str | None = None


def stage_names(size: str, names: Sequence[str]) -> list[str]:
    """Those of `names` that a size has, in the order of `STAGES`."""
    has = AUTOENCODER_STAGES if autoencoder_config(size, toy=False) else ()
    has += GENERATOR_STAGES if generator_config(size, toy=False) else ()
    return [name for name in has if name in names]


def make_stages(size: str, names: Sequence[str], settings: Settings) -> list[Case]:
    """The stages of a size that are among `names`, in the order of `STAGES`."""
    wanted, cases = stage_names(size, names), []
    if set(wanted) & set(AUTOENCODER_STAGES):
        cases += autoencoder_stages(size, settings)
    if set(wanted) & set(GENERATOR_STAGES):
        cases += generator_stages(size, settings)
    return [case for case in cases if case.labels["stage"].split(",")[0] in wanted]


class Stages:
    """Makes cases of one model: the reference in float32, and copies of it in each dtype as ours."""

    def __init__(self, size: str, model_class: type[nn.Module], config: dict, settings: Settings):
        self.size, self.settings = size, settings
        self.reference = made_up_model(model_class, config, settings.device)
        self.models = {
            f"ours, {str(d).removeprefix('torch.')}": copy_in(self.reference, config, d) for d in settings.dtypes
        }
        for model in self.models.values() if settings.compile_mode else ():
            model.compile(mode=settings.compile_mode, dynamic=False)

    def case(
        self,
        stage: str,
        reference: Callable[..., Sequence[Tensor]],
        ours: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        cast: Sequence[Tensor] = (),
        modules: Callable[[nn.Module], Sequence[nn.Module]] = lambda model: (),
        computes_in: torch.dtype | None = None,
        weight_reads: int = 1,
    ) -> Case:
        """One stage.

        Args:
            reference, ours: functions of the model and of the inputs, first those that stay float32, then `cast`.
            cast: inputs that ours takes in its own dtype, maps with channels innermost.
            modules: those whose weights it reads, `weight_reads` times.
            computes_in: ours, if not in its model's dtype.
        """

        @torch.no_grad()
        def by_reference() -> Sequence[Tensor]:
            with references.reference_operations():
                return reference(self.reference, *inputs, *cast)

        ways, dtypes, read = {}, {}, {}
        for way, model in self.models.items():
            maps = [
                x.to(model.dtype, memory_format=torch.channels_last) if x.ndim == 4 else x.to(model.dtype) for x in cast
            ]
            ways[way] = torch.no_grad()(partial(ours, model, *inputs, *maps))
            dtypes[way] = computes_in or model.dtype
            read[way] = tensor_bytes([*inputs, *maps]) + weight_reads * weight_bytes(modules(model), model.dtype)
        ways[REFERENCE], dtypes[REFERENCE] = by_reference, torch.float32
        weights = weight_bytes(modules(self.reference), torch.float32)
        read[REFERENCE] = tensor_bytes([*inputs, *cast]) + weight_reads * weights
        # One call compiles, one warms up a CUDA graph, one records it.
        warm_up_calls = 3 if self.settings.compile_mode else 0
        labels = {"size": self.size, "stage": stage}
        heading = "Ours against the reference"
        return Case(heading, labels, ways, self.settings.device, dtypes, read, warm_up_calls=warm_up_calls)


@torch.no_grad()
def autoencoder_stages(size: str, settings: Settings) -> list[Case]:
    stages = Stages(size, AutoencoderGPSToken, autoencoder_config(size, settings.toy), settings)
    model = stages.reference
    config, side = model.config, model.config.map_size
    lattice = config.decoder_type == "lattice"
    images = made_up_pictures(settings.batch_size, config.sample_size, settings.device)

    # What each stage hands to the next, by the reference, so that all ways of a stage start from the same.
    with references.reference_operations():
        regions, geometry = references.partition(model, images)
        features = references.stem(model.stem, images)
        refined, texture = references.refinement(model.refiner, features, geometry, regions)
        feature_map = references.splat(model, refined, texture)

    def partition(model: AutoencoderGPSToken, images: Tensor) -> Sequence[Tensor]:
        settings = {"min_region_size": config.min_region_size, "entropy_exponent": config.entropy_exponent}
        return partition_image(images, config.num_tokens, **settings)

    def splat(model: AutoencoderGPSToken, geometry: Tensor, texture: Tensor) -> Sequence[Tensor]:
        if lattice:
            return (model.decoder.paint(geometry, texture, (side, side)),)
        return (splat_gaussians(geometry, texture, side, side, config.support),)

    return [
        stages.case("partition", references.partition, partition, [images]),
        stages.case(
            "stem",
            lambda model, images: (references.stem(model.stem, images),),
            lambda model, images: (model.stem(images.to(model.dtype, memory_format=torch.channels_last)),),
            [images],
            modules=lambda model: [model.stem],
        ),
        stages.case(
            "regions",
            lambda model, geometry, regions, features: references.refinement(
                model.refiner, features, geometry, regions
            ),
            lambda model, geometry, regions, features: model.refiner(features, geometry, regions),
            [geometry, regions],
            [features],
            modules=lambda model: [model.refiner],
        ),
        stages.case(
            "splat",
            lambda model, geometry, texture: (references.splat(model, geometry, texture),),
            splat,
            [refined],
            [texture],
            modules=lambda model: [model.decoder.unfold_texture] if lattice else [],
            computes_in=torch.float32,
        ),
        stages.case(
            "decoder",
            lambda model, feature_map: (references.decoder(model, feature_map),),
            lambda model, feature_map: (model.decoder(feature_map),),
            [],
            [feature_map],
            # The lattice decoder paints and convolves in one module: each stage is told its own parts.
            modules=lambda model: [part for name, part in model.decoder.named_children() if name != "unfold_texture"],
        ),
        stages.case(
            "reconstruction",
            lambda model, images: (references.reconstruction(model, images),),
            lambda model, images: (model(images).sample,),
            [images],
            modules=lambda model: [model],
        ),
    ]


@torch.no_grad()
def generator_stages(size: str, settings: Settings) -> list[Case]:
    stages = Stages(size, GPSTokenTransformerModel, generator_config(size, settings.toy), settings)
    model = stages.reference
    device, batch_size, steps = settings.device, settings.batch_size, settings.sampling_steps or SAMPLING_STEPS[size]
    count, channels = model.config.num_tokens, 5 + model.config.texture_channels
    layout = partition_image(made_up_pictures(batch_size, LAYOUT_PICTURE_PX, device), count).geometry
    noise = torch.randn(batch_size, count, channels, generator=torch.Generator().manual_seed(2)).to(device)
    labels = torch.arange(batch_size, device=device) % model.null_class
    both, where = torch.cat([noise, noise]), torch.cat([layout, layout])
    both_labels = torch.cat([labels, torch.full_like(labels, model.null_class)])
    halfway = torch.full((2 * batch_size,), 0.5, device=device)

    def network(model: GPSTokenTransformerModel, latents: Tensor, layout: Tensor) -> Sequence[Tensor]:
        return (model(latents, halfway, both_labels, layout).sample,)

    def reference_sampling(model: GPSTokenTransformerModel, noise: Tensor, layout: Tensor) -> Sequence[Tensor]:
        scheduler, inference_steps = make_sampler(SAMPLER, steps)
        set_timesteps(scheduler, inference_steps, device)
        times = [*data_times(scheduler), 1.0]
        return (references.sampling(model, noise, labels, layout, times, GUIDANCE_SCALE, GUIDANCE_INTERVAL),)

    def sampling(model: GPSTokenTransformerModel, noise: Tensor, layout: Tensor) -> Sequence[Tensor]:
        def velocity_of(latents: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
            return model(latents, time, class_labels, layout if len(latents) == batch_size else where).sample

        velocity = guided_velocity(velocity_of, labels, model.null_class, GUIDANCE_SCALE, GUIDANCE_INTERVAL)
        scheduler, inference_steps = make_sampler(SAMPLER, steps)
        return (integrate_flow(scheduler, velocity, noise, inference_steps),)

    reads_all = {"modules": lambda model: [model]}
    return [
        stages.case("network", network, network, [both, where], **reads_all),
        stages.case(
            f"sampling, {steps} steps", reference_sampling, sampling, [noise, layout], weight_reads=steps, **reads_all
        ),
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.set_defaults(output=Path("outputs/benchmark"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="tokenizers and generators")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="parts, and whole ways")
    parser.add_argument("--peers", action="store_true", help="diffusers' AutoencoderKL, DC and Tiny too")
    parser.add_argument("--device", default="cpu", help='"cpu", "cuda" or "cuda:1" (default: cpu)')
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="of ours (default: bfloat16)")
    parser.add_argument("--batch_size", type=positive, default=1, help="pictures at once (default: 1)")
    parser.add_argument("--compile", choices=MODES, help="ours by torch.compile; a CPU's memory is then not measured")
    parser.add_argument("--sampling_steps", type=positive, help="of the stage sampling (default: mini 20, xl 4)")
    parser.add_argument("--skip_memory", action="store_true", help="do not measure memory: on a CPU it takes as long")
    parser.add_argument("--quick", action="store_true", help="toy networks: whether it runs, in seconds")
    parser.add_argument("--backend", choices=("native", REFERENCE), default="native", help="of ours (default: native)")
    return parser


def run(argv: Sequence[str]) -> None:
    args = build_parser().parse_args(argv)
    settings = _settings(args)
    if args.backend == REFERENCE:
        os.environ[BACKEND_VARIABLE] = REFERENCE
    backend = "ours in plain PyTorch, without native code" if args.backend == REFERENCE else None
    count = sum(len(stage_names(size, args.stages)) for size in args.sizes) + len(PEERS) * args.peers
    compiled = f"compiled ({args.compile})" if args.compile else "not compiled"
    lines = [
        *conditions(args, settings.device, backend),
        f"batches of {args.batch_size}; ours {compiled}; the reference is eager float32 PyTorch and NumPy, not the "
        "released code: see `tests/benchmarks/references.py`",
    ]
    in_processes = settings.device.type == "cpu" and not (args.skip_memory or args.compile)
    run_cases(
        args,
        "Speed of gpstoken_diffusers" + " (toy networks: the times mean nothing)" * args.quick,
        lines,
        _all_cases(args, settings),
        count,
        list(dict.fromkeys([*settings.dtypes, torch.float32])),
        settings.device,
        args.quick,
        [__file__, *argv] if in_processes else (),
    )


def _all_cases(args: argparse.Namespace, settings: Settings) -> Iterator[Case]:
    """Each stage. A model is built when its first stage is asked for."""
    for size in args.sizes:
        yield from make_stages(size, args.stages, settings)
        gc.collect()
    for name in PEERS if args.peers else ():
        yield make_peer(name, settings)
        gc.collect()


def _settings(args: argparse.Namespace) -> Settings:
    try:
        device = torch.device(args.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {args.device}: expected cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise ValueError(f"--device {args.device}: torch sees {there} CUDA devices. Use another, or --device cpu.")
    if not args.peers and not any(stage_names(size, args.stages) for size in args.sizes):
        raise ValueError(
            f"nothing to measure: {', '.join(args.sizes)} has no stage {', '.join(args.stages)}. The sizes mini and xl "
            "have network and sampling; all sizes but xl have the other stages."
        )
    dtypes = [DTYPES[name] for name in args.dtype]
    return Settings(device, dtypes, args.batch_size, args.sampling_steps, args.quick, args.compile)


if __name__ == "__main__":
    sys.exit(main(lambda: run(sys.argv[1:])))
