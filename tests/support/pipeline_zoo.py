"""Tiny pipelines that several test files use."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from model_zoo import tiny_model

from gpstoken_diffusers import (
    GPSTokenImageProcessor,
    GPSTokenLayoutModel,
    GPSTokenPipeline,
    GPSTokenTransformerModel,
)

# The sizes of the reference's small generator (sit_small_config.json), in this package's names.
SMALL_GENERATOR = {
    "texture_channels": 16,
    "num_tokens": 128,
    "num_classes": 10,
    "hidden_size": 96,
    "num_layers": 3,
    "num_attention_heads": 4,
    "learn_sigma": True,
    "position_table": True,
}

LABELS = {0: "Animals & Nature", 1: "Food & Drink", 2: "tench, Tinca tinca"}


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, those that start at zero included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def tiny_transformer(seed: int = 0, **overrides) -> GPSTokenTransformerModel:
    sizes = {"texture_channels": 4, "num_tokens": 6, "num_classes": 3, "hidden_size": 32, "num_layers": 2}
    extra = {"num_attention_heads": 2, "geometry_residual": "relative", "latents_std": [0.1] * 5 + [2.0] * 4}
    return randomise(GPSTokenTransformerModel(**sizes | extra | overrides), seed)


def tiny_layout_model(seed: int = 1, **overrides) -> GPSTokenLayoutModel:
    sizes = {"num_tokens": 6, "num_classes": 3, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}
    scale = {"latents_mean": [-2.0, -2.0, 0.0, 0.0], "latents_std": [0.6, 0.6, 0.5, 0.5]}
    return randomise(GPSTokenLayoutModel(**sizes | scale | overrides), seed)


def tiny_pipeline(**components) -> GPSTokenPipeline:
    """A pipeline for pictures of 32 x 32 pixels and three classes, without a progress bar."""
    parts = {
        "autoencoder": tiny_model("lattice"),
        "transformer": tiny_transformer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "image_processor": GPSTokenImageProcessor(tile_size=32, num_tokens=6),
        "layout_model": tiny_layout_model(),
        "layout_scheduler": FlowMatchEulerDiscreteScheduler(),
        "id2label": LABELS,
    }
    pipe = GPSTokenPipeline(**parts | components)
    pipe.set_progress_bar_config(disable=True)
    return pipe
