"""What a user would pick instead: diffusers' own autoencoders with made-up weights, encode and decode of a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from .made_up import copy_in, made_up_model, made_up_pictures
from .roofline import tensor_bytes, weight_bytes
from .stages import OURS, TWIN, Settings, Stage, warm_up_calls

PICTURE_PX = 256
STAGE = "encode + decode"

_SDXL_BLOCKS = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
_DC_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3

# As released: stabilityai/sdxl-vae, mit-han-lab/dc-ae-f32c32-sana-1.0, madebyollin/taesdxl.
PEERS: dict[str, tuple[type[nn.Module], dict]] = {
    "AutoencoderKL (SDXL)": (
        AutoencoderKL,
        {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": _SDXL_BLOCKS[0],
            "up_block_types": _SDXL_BLOCKS[1],
            "layers_per_block": 2,
            "latent_channels": 4,
        },
    ),
    "AutoencoderDC (f32c32)": (
        AutoencoderDC,
        {
            "encoder_block_types": _DC_BLOCKS,
            "decoder_block_types": _DC_BLOCKS,
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
        },
    ),
    "AutoencoderTiny": (AutoencoderTiny, {}),
}
_TOYS = {
    AutoencoderKL: {"block_out_channels": (32,) * 4, "layers_per_block": 1},
    AutoencoderDC: {
        "encoder_block_out_channels": (32,) * 6,
        "decoder_block_out_channels": (32,) * 6,
        "encoder_layers_per_block": (1,) * 6,
        "decoder_layers_per_block": (1,) * 6,
    },
    AutoencoderTiny: {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4},
}


def make_peer(name: str, settings: Settings) -> Stage:
    """A row: the peer in float32 as it comes, and in the dtype of the settings, compiled where ours is."""
    model_class, config = PEERS[name]
    if settings.toy:
        config = config | _TOYS[model_class]
    plain = made_up_model(model_class, config, settings.device)
    images = made_up_pictures(settings.batch_size, 64 if settings.toy else PICTURE_PX, settings.device)
    dtypes = {TWIN: torch.float32, OURS: settings.dtype}
    models = {way: copy_in(plain, config, dtype) for way, dtype in dtypes.items()}
    if settings.compile_mode:
        for network in (models[OURS].encoder, models[OURS].decoder):
            network.compile(mode=settings.compile_mode, dynamic=False)
    runs = {way: _round_trip(model, images.to(dtypes[way])) for way, model in models.items()}
    weights = {way: weight_bytes([plain], dtype) for way, dtype in dtypes.items()}
    read = dict.fromkeys(dtypes, tensor_bytes([images]))
    return Stage(name, STAGE, settings.device, runs, dtypes, read, weights, warm_up_calls=warm_up_calls(settings))


def _round_trip(model: nn.Module, images: Tensor) -> Callable[[], Sequence[Tensor]]:
    @torch.no_grad()
    def run() -> Sequence[Tensor]:
        encoded = model.encode(images)
        # The mean where it is a distribution: sampling would make the two precisions differ.
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
        # A copy: compiled, they may lie in memory that the next graph uses.
        return (model.decode(latents.clone()).sample,)

    return run
