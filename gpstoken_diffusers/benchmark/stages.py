"""The stages: what each is, done by ours and by its plain twin on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.autoencoder_gpstoken import AutoencoderGPSToken
from ..models.transformer_gpstoken import GPSTokenTransformerModel
from ..ops.partition import partition_image
from ..ops.splat import splat_gaussians
from ..schedulers.flow_time import data_times, set_timesteps
from ..schedulers.guidance import guided_velocity
from ..schedulers.integration import integrate_flow
from ..schedulers.presets import make_sampler
from . import twins
from .made_up import autoencoder_config, copy_in, generator_config, made_up_model, made_up_pictures
from .roofline import tensor_bytes, weight_bytes

SIZES = ("s64", "m128", "l256", "mini", "xl")
AUTOENCODER_STAGES = ("partition", "stem", "regions", "splat", "decoder", "reconstruction")
GENERATOR_STAGES = ("network", "sampling")
STAGES = AUTOENCODER_STAGES + GENERATOR_STAGES

# As released: guidance 1.5 from t = 0.2 on.
GUIDANCE_SCALE, GUIDANCE_INTERVAL = 1.5, (0.2, 1.0)
SAMPLER = "euler"
LAYOUT_PICTURE_PX = 256
# Unless asked for otherwise; XL takes seconds for each on a CPU.
SAMPLING_STEPS = {"mini": 20, "xl": 4}

TWIN, OURS = WAYS = ("twin", "ours")


@dataclass(frozen=True)
class Settings:
    """What all stages are made for.

    Attributes:
        device: where they run.
        dtype: of ours; twins are float32.
        batch_size: pictures at once.
        sampling_steps: of "sampling", 1 or more; None takes the size's own.
        toy: small networks in place of the sizes named.
        compile_mode: of `torch.compile`, for ours; None compiles nothing.
    """

    device: torch.device
    dtype: torch.dtype
    batch_size: int
    sampling_steps: int | None
    toy: bool
    compile_mode: str | None = None


@dataclass(frozen=True)
class Stage:
    """Something that two ways do alike.

    Attributes:
        size, name, note: what is done, as rows of the table name it.
        device: where it runs.
        runs: by way, functions that return tensors. For peers the twin is their float32, ours their other dtype.
        dtypes: by way, in which it computes, for its floor.
        input_bytes, weights_bytes: by way, what it must read.
        warm_up_calls: of ours, before it is timed.
    """

    size: str
    name: str
    device: torch.device
    runs: dict[str, Callable[[], Sequence[Tensor]]]
    dtypes: dict[str, torch.dtype]
    input_bytes: dict[str, int]
    weights_bytes: dict[str, int]
    note: str = ""
    warm_up_calls: int = 0


def _stage(
    size: str,
    name: str,
    settings: Settings,
    twin: Callable[[], Sequence[Tensor]],
    ours: Callable[[], Sequence[Tensor]],
    inputs: tuple[Sequence[Tensor], Sequence[Tensor]],
    modules: Sequence[nn.Module] = (),
    computes_in: torch.dtype | None = None,
    weight_reads: int = 1,
    note: str = "",
) -> Stage:
    """A stage of the package. inputs: the twin's and ours. computes_in: ours, if not in the dtype of the settings."""

    @torch.no_grad()
    def plainly() -> Sequence[Tensor]:
        with twins.plain_definitions():
            return twin()

    dtypes = {TWIN: torch.float32, OURS: settings.dtype}
    return Stage(
        size,
        name,
        settings.device,
        {TWIN: plainly, OURS: torch.no_grad()(ours)},
        dtypes | ({OURS: computes_in} if computes_in else {}),
        dict(zip(WAYS, map(tensor_bytes, inputs), strict=True)),
        {way: weight_reads * weight_bytes(modules, dtype) for way, dtype in dtypes.items()},
        note,
        warm_up_calls(settings),
    )


def warm_up_calls(settings: Settings) -> int:
    """Calls of what may be compiled before it is timed: one compiles, one warms up a CUDA graph, one records it."""
    return 3 if settings.compile_mode else 0


def _ours(plain: nn.Module, config: dict, settings: Settings) -> nn.Module:
    """A copy of a float32 model as ours is timed."""
    model = copy_in(plain, config, settings.dtype)
    if settings.compile_mode:
        model.compile(mode=settings.compile_mode, dynamic=False)
    return model


def stage_names(size: str, names: Sequence[str]) -> list[str]:
    """Those of `names` that a size has, in the order of `STAGES`."""
    has = []
    if autoencoder_config(size, toy=False) is not None:
        has += AUTOENCODER_STAGES
    if generator_config(size, toy=False) is not None:
        has += GENERATOR_STAGES
    return [name for name in has if name in names]


def make_stages(size: str, names: Sequence[str], settings: Settings) -> list[Stage]:
    """The stages of a size that are among `names`, in the order of `STAGES`."""
    wanted = stage_names(size, names)
    stages = []
    if set(wanted) & set(AUTOENCODER_STAGES):
        stages += _autoencoder_stages(size, autoencoder_config(size, settings.toy), settings)
    if set(wanted) & set(GENERATOR_STAGES):
        stages += _generator_stages(size, generator_config(size, settings.toy), settings)
    return [stage for stage in stages if stage.name in wanted]


@torch.no_grad()
def _autoencoder_stages(size: str, config: dict, settings: Settings) -> list[Stage]:
    dtype = settings.dtype
    plain = made_up_model(AutoencoderGPSToken, config, settings.device)
    model = _ours(plain, config, settings)
    settings_of = plain.config
    side, count = settings_of.map_size, settings_of.num_tokens
    lattice = settings_of.decoder_type == "lattice"
    images = made_up_pictures(settings.batch_size, settings_of.sample_size, settings.device)

    # What each stage hands to the next, from the twin, so that both ways of a stage start from the same.
    partition_settings = (count, settings_of.min_region_size, settings_of.entropy_exponent)
    with twins.plain_definitions():
        regions, geometry = twins.plain_partition(images, *partition_settings)
        features = twins.plain_stem(plain.stem, images)
        refined, texture = twins.plain_refinement(plain.refiner, features, geometry, regions)
        feature_map = twins.plain_splat(plain, refined, texture)
    our_features, our_map = (x.to(dtype, memory_format=torch.channels_last) for x in (features, feature_map))
    our_texture = texture.to(dtype)

    def ours_partition() -> Sequence[Tensor]:
        _, min_region_size, exponent = partition_settings
        return partition_image(images, count, min_region_size=min_region_size, entropy_exponent=exponent)

    def ours_splat() -> Sequence[Tensor]:
        if lattice:
            return (model.decoder.paint(refined, our_texture, (side, side)),)
        return (splat_gaussians(refined, our_texture, side, side, settings_of.support),)

    # The lattice decoder paints and convolves in one module: each stage is told its own parts.
    convolving = [part for name, part in model.decoder.named_children() if name != "unfold_texture"]
    return [
        _stage(
            size, "partition", settings,
            twin=lambda: twins.plain_partition(images, *partition_settings),
            ours=ours_partition,
            inputs=([images], [images]),
        ),
        _stage(
            size, "stem", settings,
            twin=lambda: (twins.plain_stem(plain.stem, images),),
            ours=lambda: (model.stem(images.to(dtype, memory_format=torch.channels_last)),),
            inputs=([images], [images]),
            modules=[model.stem],
        ),
        _stage(
            size, "regions", settings,
            twin=lambda: twins.plain_refinement(plain.refiner, features, geometry, regions),
            ours=lambda: model.refiner(our_features, geometry, regions),
            inputs=([features, geometry, regions], [our_features, geometry, regions]),
            modules=[model.refiner],
        ),
        _stage(
            size, "splat", settings,
            twin=lambda: (twins.plain_splat(plain, refined, texture),),
            ours=ours_splat,
            inputs=([refined, texture], [refined, our_texture]),
            modules=[model.decoder.unfold_texture] if lattice else [],
            computes_in=torch.float32,
        ),
        _stage(
            size, "decoder", settings,
            twin=lambda: (twins.plain_decoder(plain, feature_map),),
            ours=lambda: (model.decoder(our_map),),
            inputs=([feature_map], [our_map]),
            modules=convolving,
        ),
        _stage(
            size, "reconstruction", settings,
            twin=lambda: (twins.plain_reconstruction(plain, images),),
            ours=lambda: (model(images).sample,),
            inputs=([images], [images]),
            modules=[model],
        ),
    ]  # fmt: skip


@torch.no_grad()
def _generator_stages(size: str, config: dict, settings: Settings) -> list[Stage]:
    device, batch_size, steps = settings.device, settings.batch_size, settings.sampling_steps or SAMPLING_STEPS[size]
    plain = made_up_model(GPSTokenTransformerModel, config, device)
    model = _ours(plain, config, settings)
    count, channels = plain.config.num_tokens, 5 + plain.config.texture_channels
    layout = partition_image(made_up_pictures(batch_size, LAYOUT_PICTURE_PX, device), count).geometry
    noise = torch.randn(batch_size, count, channels, generator=torch.Generator().manual_seed(2)).to(device)
    labels = torch.arange(batch_size, device=device) % plain.null_class
    scheduler, inference_steps = make_sampler(SAMPLER, steps)
    set_timesteps(scheduler, inference_steps, device)
    times = [*data_times(scheduler), 1.0]

    both, where = torch.cat([noise, noise]), torch.cat([layout, layout])
    both_labels = torch.cat([labels, torch.full_like(labels, plain.null_class)])
    halfway = torch.full((2 * batch_size,), 0.5, device=device)

    def network(latents: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
        return model(latents, time, class_labels, layout if len(latents) == batch_size else where).sample

    def ours_sampling() -> Sequence[Tensor]:
        velocity = guided_velocity(network, labels, model.null_class, GUIDANCE_SCALE, GUIDANCE_INTERVAL)
        own, count_of_steps = make_sampler(SAMPLER, steps)
        return (integrate_flow(own, velocity, noise, count_of_steps),)

    def twin_sampling() -> Sequence[Tensor]:
        guidance = (GUIDANCE_SCALE, GUIDANCE_INTERVAL)
        return (twins.plain_sampling(plain, noise, labels, layout, times, *guidance),)

    return [
        _stage(
            size, "network", settings,
            twin=lambda: (plain(both, halfway, both_labels, where).sample,),
            ours=lambda: (model(both, halfway, both_labels, where).sample,),
            inputs=([both, where], [both, where]),
            modules=[model],
        ),
        _stage(
            size, "sampling", settings,
            twin=twin_sampling,
            ours=ours_sampling,
            inputs=([noise, layout], [noise, layout]),
            modules=[model],
            weight_reads=steps,
            note=f"{steps} steps",
        ),
    ]  # fmt: skip
