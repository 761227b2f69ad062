"""Pictures and tiny autoencoders of diffusers that the tests of reconstruction share."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
from model_zoo import tiny_model
from PIL import Image
from torch import nn


def write_pictures(folder: Path, sizes: list[tuple[int, int]], seed: int = 0) -> Path:
    """Smooth pictures of these sizes (width, height), named 0.png, 1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for index, size in enumerate(sizes):
        coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def tiny_autoencoders() -> dict[str, nn.Module]:
    """Every class of diffusers that can be measured, with random weights; all shrink pictures by 2."""
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
    }
    made = {
        "AutoencoderKL": diffusers.AutoencoderKL(**blocks, latent_channels=3),
        "AutoencoderDC": diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=8,
            encoder_block_out_channels=(8, 16),
            decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
        ),
        "AutoencoderTiny": diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=2,
        ),
        "VQModel": diffusers.VQModel(**blocks, latent_channels=3, num_vq_embeddings=20),
    }
    return {name: model.eval() for name, model in made.items()}


@functools.cache
def autoencoder_folders() -> Path:
    """A folder for each class of autoencoder; not to be changed."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for name, model in {**tiny_autoencoders(), "AutoencoderGPSToken": tiny_model("lattice")}.items():
        model.save_pretrained(root / name)
    return root


class MeanDifference(nn.Module):
    """In place of a perceptual distance."""

    label = "mean difference"

    def forward(self, a, b):
        return (a - b).abs().mean(dim=(1, 2, 3))


class MeanColours(nn.Module):
    """In place of a network of features: the mean colours of the quarters of a picture."""

    frechet, kernel, spatial = "Frechet distance, mean colours", "kernel distance x 1000, mean colours", None

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1), None
