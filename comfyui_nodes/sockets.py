"""What travels along the wires of a graph beside ComfyUI's own types, and inputs that several nodes have."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

GPSModelSocket = io.Custom("GPS_MODEL")
"""A `models.GPSModel`."""
GPSTokensSocket = io.Custom("GPS_TOKENS")
"""`GPSTokens` of a batch of pictures, on ComfyUI's intermediate device."""
GPSLayoutSocket = io.Custom("GPS_LAYOUT")
"""`GPSTokens` whose texture is one channel of zeros: initial Gaussians."""

SAMPLERS = ["unipc", "euler", "heun", "dpm++", "sde", "official-sde", "official-ode", "official-ode-euler"]
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
            "The same seed gives the same result on every machine, but for rounding. In a batch it rises by 1 with "
            "each picture."
        ),
    )


def steps_input() -> io.Input:
    """Steps of the sampler."""
    return io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Steps from noise to the result. 20 are plenty.")
