"""What a user would pick instead: diffusers' own autoencoders with made-up weights, encode and decode of a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from harness import Case
from made_up import copy_in, made_up_model, made_up_pictures
from roofline import tensor_bytes, weight_bytes
from torch import Tensor, nn

PICTURE_PX = 256

_DC_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
# As released: stabilityai/sdxl-vae, mit-han-lab/dc-ae-f32c32-sana-1.0, madebyollin/taesdxl. Then what a toy changes.
PEERS: dict[str, tuple[type[nn.Module], dict, dict]] = {
    "AutoencoderKL (SDXL)": (
        AutoencoderKL,
        {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "latent_channels": 4,
        },
        {"block_out_channels": (32,) * 4, "layers_per_block": 1},
    ),
    "AutoencoderDC (f32c32)": (
        AutoencoderDC,
        {
            "encoder_block_types": _DC_BLOCKS,
            "decoder_block_types": _DC_BLOCKS,
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
        },
        {f"{part}_block_out_channels": (32,) * 6 for part in ("encoder", "decoder")}
        | {f"{part}_layers_per_block": (1,) * 6 for part in ("encoder", "decoder")},
    ),
    "AutoencoderTiny": (
        AutoencoderTiny,
        {},
        {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4},
    ),
}


def make_peer(name: str, settings) -> Case:
    """The peer in the dtypes of the settings, compiled where ours is, and in float32 as it comes."""
    model_class, config, toy = PEERS[name]
    config = config | (toy if settings.toy else {})
    made = made_up_model(model_class, config, settings.device)
    images = made_up_pictures(settings.batch_size, 64 if settings.toy else PICTURE_PX, settings.device)
    dtypes = {str(d).removeprefix("torch."): d for d in settings.dtypes if d != torch.float32} | {
        "float32": torch.float32
    }
    models = {way: copy_in(made, config, dtype) for way, dtype in dtypes.items()}
    for way in list(models)[:-1] if settings.compile_mode else ():
        for network in (models[way].encoder, models[way].decoder):
            network.compile(mode=settings.compile_mode, dynamic=False)

    @torch.no_grad()
    def run(way: str) -> Sequence[Tensor]:
        encoded = models[way].encode(images.to(dtypes[way]))
        # The mean where it is a distribution: sampling would make the precisions differ.
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
        # A copy: compiled, they may lie in memory that the next graph uses.
        return (models[way].decode(latents.clone()).sample,)

    return Case(
        "What else there is: diffusers' autoencoders",
        {"size": name, "stage": "encode + decode"},
        {way: lambda way=way: run(way) for way in dtypes},
        settings.device,
        dtypes,
        {way: weight_bytes([made], dtype) + tensor_bytes([images]) for way, dtype in dtypes.items()},
        warm_up_calls=3 if settings.compile_mode else 0,
    )
