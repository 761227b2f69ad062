"""A start for models with a `patch` decoder: a linear way there and back, before any network is trained."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..geometry import SIGMA
from ..models.autoencoder_gpstoken import AutoencoderGPSToken
from ..models.windows import map_geometry
from ..ops.partition import partition_image
from .optimization import learning_rate_scale

BATCH = 8
LEARNING_RATE = 4e-3


def linear_parameters(model: AutoencoderGPSToken) -> list[Tensor]:
    """The parameters that [`linear_start`] sets. Raises ValueError: a model without these layers."""
    config = model.config
    if config.decoder_type != "patch" or not config.region_pixels:
        raise ValueError(
            'linear layers by size of region need decoder_type="patch" and region_pixels, got '
            f'"{config.decoder_type}" and {config.region_pixels}.'
        )
    reader, painter = model.refiner.region_picture, model.decoder.unfold_texture
    return [reader.direct_weight, reader.direct_bias, painter.colour_weight, painter.colour_bias]


@torch.no_grad()
def principal_start(model: AutoencoderGPSToken, images: Tensor, token_counts: tuple[int, ...], share: int = 64) -> None:
    """Sets the layers between a region's small picture and its texture, and back, to principal components.

    Texture channels are then ordered by variance and have variance 1 over the regions, whatever their size. The
    transformer's heads become zero.

    Args:
        model: with decoder_type "patch", lattice_size equal to region_pixels, in_channels equal to out_channels.
        images: (n, 3, R, R) in [-1, 1] that the components are fitted to.
        token_counts: the partitions that they are cut by.
        share: regions of each image and count, drawn at random.

    Raises ValueError: a model without these layers.
    """
    config = model.config
    linear_parameters(model)
    side, channels, colours = config.region_pixels, config.texture_channels, config.in_channels
    if side != config.lattice_size or colours != config.out_channels:
        raise ValueError(
            f"a linear start needs as many points as pixels, got region_pixels={side}, "
            f"lattice_size={config.lattice_size}, in_channels={colours} and out_channels={config.out_channels}."
        )
    reader, painter = model.refiner.region_picture, model.decoder.unfold_texture
    middle = slice(reader.margin, reader.margin + side)
    rows = []
    for count in token_counts:
        for image in images:
            regions = partition_image(image[None], count, **model.partition_settings).regions
            pictures, _ = reader.read(image[None], regions[:, torch.randperm(count)[:share]])
            square = pictures[0].unflatten(-1, (colours, reader.cells, reader.cells))
            rows.append(square[..., middle, middle].flatten(1))
    pictures = torch.cat(rows)  # (regions, colours side^2)
    mean = pictures.mean(0)
    covariance = (pictures - mean).T.double() @ (pictures - mean).double() / len(pictures)
    variances, directions = torch.linalg.eigh(covariance)
    deviations = variances.flip(0)[:channels].sqrt().float()
    directions = directions.flip(1)[:, :channels].float()  # (colours side^2, channels)

    reading = torch.zeros(channels, colours, reader.cells, reader.cells)
    reading[..., middle, middle] = (directions / deviations).T.unflatten(1, (colours, side, side))
    reader.direct_weight.copy_(reading.flatten(1))
    reader.direct_bias.copy_(-(directions / deviations).T @ mean)
    painting = (directions * deviations).unflatten(0, (colours, side**2)).transpose(0, 1)
    painter.colour_weight.copy_(painting.flatten(0, 1))
    painter.colour_bias.copy_(mean.unflatten(0, (colours, side**2)).T.flatten())
    for head in (model.refiner.texture_head, model.refiner.geometry_head):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)


def linear_start(
    model: AutoencoderGPSToken, crops: Tensor, token_range: tuple[int, int], steps: int, nested_share: float = 0.25
) -> None:
    """Trains the linear layers alone, from [`principal_start`] on: the first picture is to be the picture.

    Nothing else of the model is computed, so that a thousand steps take a minute. What it gains: small regions are
    read and painted otherwise than large ones, and neighbours share what blending makes common.

    Args:
        crops: (n, 3, R, R) in [-1, 1], R a multiple of the decoder's pixels per map pixel.
        token_range: (fewest, most) tokens of a crop, drawn log-uniformly.
        steps: of `BATCH` crops.
        nested_share: share of steps in which only the first channels, a random number of them, are kept.
    """
    reader, decoder = model.refiner.region_picture, model.decoder
    painter, side, upscale = decoder.unfold_texture, crops.shape[-1], decoder.upscale
    map_size = (side // upscale, side // upscale)
    parameters = linear_parameters(model)
    painting = parameters[2]
    channels = model.config.texture_channels
    with torch.no_grad():
        # By the size of the weights at the start: a channel's deviation over the root of a picture's numbers.
        numbers = painting.shape[1]
        size = painting.norm(dim=1).mean().item() / math.sqrt(numbers)
        rates = [LEARNING_RATE / (size * numbers)] * 2 + [4 * LEARNING_RATE * size] * 2
    optimizer = torch.optim.Adam([{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)],
                                 betas=(0.9, 0.99))  # fmt: skip
    for step in tqdm(range(steps), unit="step", desc="linear start"):
        random = np.random.default_rng((5, step))
        count = round(math.exp(random.uniform(*map(math.log, token_range))))
        images = crops[torch.from_numpy(random.integers(len(crops), size=BATCH))]
        regions, geometry = partition_image(images, count, **model.partition_settings)
        texture = reader.straight(*reader.read(images, regions))
        if random.random() < nested_share:
            texture = texture * (torch.arange(channels) < random.integers(1, channels))
        colours = painter.colours(geometry[..., SIGMA] * (side - 1) / 2, texture)
        features = torch.cat([colours, torch.ones_like(colours[..., :1])], dim=-1)
        painted = painter._splat(map_geometry(geometry, (side, side), map_size), features, map_size)
        picture = F.pixel_shuffle(painted[:, : decoder.colour_channels], upscale)
        error = picture - images
        loss = error.abs().mean() + 4 * error.square().mean()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * learning_rate_scale(step, 30, steps, 0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
