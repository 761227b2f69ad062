"""Models and images that several test files use."""

from __future__ import annotations

import json
import zlib

import numpy as np
import torch
from golden_files import golden
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from gpstoken_diffusers import AutoencoderGPSToken

# The sizes of the reference's small autoencoder (ae_small_config.json), in this package's names.
SMALL_CONFIG = {
    "num_tokens": 64,
    "texture_channels": 16,
    "hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 8,
    "decoder_block_out_channels": (32, 64, 64),
    "decoder_num_layers": 2,
    "decode_mode": "merge",
}

# A few thousand parameters, for everything that does not depend on size.
TINY_MAP_CONFIG = {
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
TINY_LATTICE_CONFIG = {
    **TINY_MAP_CONFIG,
    "map_size": 8,
    "stem_patch_size": 4,
    "decoder_type": "lattice",
    "decoder_block_out_channels": (8, 16),
    "decoder_num_layers": 2,
    "lattice_size": 2,
    "lattice_channels": 8,
    "decode_mode": "merge",
}

TINY_PATCH_CONFIG = {
    **TINY_LATTICE_CONFIG,
    "min_region_size": 4,
    "partition_criterion": "error",
    "region_pixels": 4,
    "decoder_type": "patch",
    "lattice_size": 4,
    "lattice_channels": 5,
}
TINY_CONFIGS = {"map": TINY_MAP_CONFIG, "lattice": TINY_LATTICE_CONFIG, "patch": TINY_PATCH_CONFIG}


def tiny_model(kind: str = "map", seed: int = 0, **overrides) -> AutoencoderGPSToken:
    """A tiny model with every parameter random, the heads that start at zero included."""
    torch.manual_seed(seed)
    model = AutoencoderGPSToken(**{**TINY_CONFIGS[kind], **overrides}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model


def small_model() -> AutoencoderGPSToken:
    return AutoencoderGPSToken.from_single_file(golden("ae_small_weights.safetensors"), config=SMALL_CONFIG)


def weights_by_name(preset: str) -> dict[str, Tensor]:
    """Official-size weights drawn from their names, by the rule in the reference's README."""
    names = json.loads(golden(f"official_autoencoder_keys_{preset}.json").read_text())["keys"]
    weights = {}
    for name, shape in names.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        value = torch.randn(shape, generator=generator)
        if len(shape) >= 2:
            value *= float(torch.tensor(shape[1:]).prod()) ** -0.5
            if name == "to_gps.0.weight":
                value *= 0.1
        elif name.endswith("bias"):
            value *= 0.05
        else:
            value = 1 + 0.1 * value
        weights[name] = value
    return weights


def pixel_values(image: Tensor) -> Tensor:
    """uint8 (H, W, 3) or (B, H, W, 3) -> (B, 3, H, W) float32 in [-1, 1]."""
    batch = image if image.ndim == 4 else image[None]
    return (batch.double() / 127.5 - 1).float().permute(0, 3, 1, 2)


def region_pixels(regions: Tensor, size: int = 256) -> Tensor:
    """Regions in [-1, 1] -> inclusive pixel indices."""
    return torch.round((regions.double() + 1) / 2 * (size - 1)).int()


def load_golden(name: str) -> dict[str, Tensor]:
    return load_file(golden(name))


def noise_images(batch_size: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images whose regions differ in roughness, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch_size, 3, height, width, generator=generator) * 2 - 1
    ramp = torch.linspace(0, 1, width) * torch.linspace(0.2, 1, height)[:, None]
    return noise * ramp


def smooth_picture(seed: int, size: tuple[int, int] = (44, 36), channels: int = 3) -> Image.Image:
    """Blurred noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
