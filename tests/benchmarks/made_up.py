"""Models with made-up weights, at released sizes or as toys, and pictures for them: times do not depend on either."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpstoken_diffusers.assets import MINI, MINI_PIPELINE
from gpstoken_diffusers.models import official_checkpoints

# What the toys of --quick change.
_TOY_MAP = {
    "sample_size": 32,
    "map_size": 16,
    "num_tokens": 6,
    "texture_channels": 4,
    "stem_channels": 32,
    "stem_num_layers": 1,
    "roi_size": 2,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "decoder_block_out_channels": (32, 32),
    "decoder_num_layers": 1,
}
_TOY_LATTICE = {
    **_TOY_MAP,
    "map_size": 8,
    "decoder_block_out_channels": (8, 16),
    "lattice_size": 2,
    "lattice_channels": 8,
}
_TOY_GENERATOR = {
    "texture_channels": 4,
    "num_tokens": 6,
    "num_classes": 5,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "latents_mean": None,
    "latents_std": None,
}


def autoencoder_config(size: str, toy: bool) -> dict | None:
    """Constructor arguments of a size's autoencoder; None for a size that has none."""
    config = _saved_config(MINI) if size == "mini" else official_checkpoints.PRESETS.get(size)
    toys = _TOY_LATTICE if size == "mini" else _TOY_MAP
    return {**config, **(toys if toy else {})} if config else None


def generator_config(size: str, toy: bool) -> dict | None:
    """Constructor arguments of a size's second stage; None for a size that has none."""
    folder = MINI_PIPELINE / "transformer"
    config = _saved_config(folder) if size == "mini" else official_checkpoints.GENERATOR_PRESETS.get(size)
    return {**config, **(_TOY_GENERATOR if toy else {})} if config else None


def _saved_config(folder: Path) -> dict:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in config.items() if not name.startswith("_")}


@torch.no_grad()
def made_up_model(model_class: type[nn.Module], config: dict, device: torch.device) -> nn.Module:
    """A float32 model whose every weight is random, of a size that keeps signals alive; always the same one."""
    with torch.device("meta"):
        model = model_class(**config).eval().requires_grad_(False)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            # The head that moves Gaussians is small, as a trained one: each moves by a part of its own size.
            small = 0.02 if name.endswith("geometry_head.weight") else 1.0
            parameter.normal_(0.0, small * fan_in**-0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.05, generator=generator)
        else:
            parameter.normal_(1.0, 0.1, generator=generator)
    return model


@torch.no_grad()
def copy_in(model: nn.Module, config: dict, dtype: torch.dtype) -> nn.Module:
    """The same model in another dtype; tensors that need no conversion are shared."""
    with torch.device("meta"):
        copy = type(model)(**config).eval().requires_grad_(False)
    copy.load_state_dict({name: value.to(dtype) for name, value in model.state_dict().items()}, assign=True)
    return copy.requires_grad_(False)


def made_up_pictures(batch_size: int, side: int, device: torch.device) -> Tensor:
    """(B, 3, side, side) in [-1, 1]: blurred noise, rough on the right, so that regions differ."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(batch_size, 3, 32, 32, generator=generator) * 2 - 1
    pictures = F.interpolate(coarse, size=side, mode="bicubic").clamp(-1, 1)
    noise = torch.randn(pictures.shape, generator=generator) * torch.linspace(0, 1, side)
    return (pictures + 0.2 * noise).clamp(-1, 1).to(device)
