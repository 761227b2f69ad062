"""What travels along the wires of a graph beside ComfyUI's own types, and inputs that several nodes have."""

from __future__ import annotations

from dataclasses import fields

from comfy_api.v0_0_2 import io

GPSModelSocket = io.Custom("GPS_MODEL")
"""A `models.GPSModel`."""
GPSTokensSocket = io.Custom("GPS_TOKENS")
"""`GPSTokens` of a batch of pictures, on ComfyUI's intermediate device."""
GPSLayoutSocket = io.Custom("GPS_LAYOUT")
"""`GPSTokens` whose texture is one channel of zeros: initial Gaussians."""

SAMPLERS = [
    "unipc",
    "euler",
    "heun",
    "dpm++",
    "sde",
    "official-sde",
    "official-sde-heun",
    "official-ode",
    "official-ode-euler",
]
"""Names that `make_sampler` takes, those that do well in few steps first."""


def model_input() -> io.Input:
    """The model, of Load GPSToken."""
    return GPSModelSocket.Input("model", tooltip="From Load GPSToken.")


def label_input() -> io.Input:
    """A class by name or number."""
    return io.String.Input(
        "label",
        default="Food & Drink",
        tooltip=(
            "The class, by name or number. gpstoken-mini knows Activities, Animals & Nature, Flags, Food & Drink, "
            "Objects, People & Body, Smileys & Emotion, Symbols, Travel & Places; one of the words is enough. Empty: "
            "no class in particular."
        ),
    )


def seed_input() -> io.Input:
    """A seed; picture k of a batch has seed + k."""
    return io.Int.Input(
        "seed",
        default=1,
        min=0,
        max=2**53 - 1,  # what JavaScript holds exactly
        control_after_generate=True,
        tooltip=(
            "The same seed and dtype give the same result, but for rounding; another dtype, which auto may choose "
            "on another machine, a slightly different one. In a batch it rises by 1 with each picture."
        ),
    )


def steps_input() -> io.Input:
    """Steps of the sampler."""
    return io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Steps from noise to the result. 20 are plenty.")


def memory_input() -> io.Input:
    """What a node may work in."""
    return io.Float.Input(
        "memory_gb",
        default=0.0,
        min=0.0,
        max=1024.0,
        step=0.5,
        optional=True,
        tooltip="Memory to work in, in GB, beside the model. 0: what ComfyUI has free. Less is slower, not worse.",
    )


def searched_as(*words: str) -> dict:
    """For a schema: words by which a search finds the node, beside its name."""
    return where_known(search_aliases=["gaussian", "splat", "tokenizer", *words])


def where_known(**settings) -> dict:
    """For a schema: those settings that this version of ComfyUI knows."""
    known = {one.name for one in fields(io.Schema)}
    return {name: value for name, value in settings.items() if name in known}
