"""The references: the same functions of the same weights, computed as the released research code computes them.

Partition in Python, image by image; a dense splat in a loop over the batch; eager float32 in contiguous memory with
torch's own operations; every RoI cell embedded before it is pooled block by block; both halves of guidance at every
step. Nothing here is slow on purpose: where it is not known how the release does a step, torch's fastest operation does
it. Three things differ in speed from the release. Its partition calls OpenCV (92 ms for 256 tokens of a 256-px image on
one core of a 2.3-GHz Xeon, where NumPy takes twice as long). On a GPU it has a splat kernel of its own where this is
dense. Its SDE sampler evaluates the network twice per step where this does once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from gpstoken_diffusers.models.autoencoder_gpstoken import AutoencoderGPSToken
from gpstoken_diffusers.models.map_decoder import DecoderBlock, MapAttention, MapDecoder
from gpstoken_diffusers.models.norms import GroupNorm, TileGroupNorm
from gpstoken_diffusers.models.refinement import GaussianRefiner, PooledRegionReader, add_in_logit_space
from gpstoken_diffusers.models.stem import ImageStem
from gpstoken_diffusers.models.transformer_gpstoken import GPSTokenTransformerModel
from gpstoken_diffusers.ops.backend.native import BACKEND_VARIABLE
from gpstoken_diffusers.ops.partition import grayscale, initial_gaussians
from gpstoken_diffusers.ops.partition_reference import partition_image_reference
from gpstoken_diffusers.ops.splat_reference import splat_gaussians_reference


@contextlib.contextmanager
def reference_operations() -> Iterator[None]:
    """Within it, this process's native functions run by their references."""
    before = os.environ.get(BACKEND_VARIABLE)
    os.environ[BACKEND_VARIABLE] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ[BACKEND_VARIABLE]
        else:
            os.environ[BACKEND_VARIABLE] = before


# ---- tokenizer ----


def partition(model: AutoencoderGPSToken, images: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) in [-1, 1] -> regions (B, N, 4) int32 and geometry (B, N, 5), on the images' device."""
    config, grey = model.config, grayscale(images).cpu().numpy()
    found = partition_image_reference(grey, config.num_tokens, config.min_region_size, config.entropy_exponent)
    regions = torch.from_numpy(found)
    return regions.to(images.device), initial_gaussians(regions, *images.shape[-2:]).to(images.device)


def stem(stem: ImageStem, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, C, H / patch, W / patch)."""
    x = stem.conv_in(F.pixel_unshuffle(images, stem.patch_size) if stem.patch_size > 1 else images)
    for block in stem.blocks:
        hidden = block.conv1(F.silu(_group_norm(block.norm1, x)))
        x = x + block.conv2(F.silu(_group_norm(block.norm2, hidden)))
    return x


def refinement(refiner: GaussianRefiner, features: Tensor, geometry: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, C, h, w), geometry (B, N, 5), regions (B, N, 4) -> geometry (B, N, 5), texture (B, N, channels)."""
    boxes = [own.float() for own in regions]
    settings = refiner.region_cells
    cells = roi_align(features, boxes, settings.roi_size, 1 / settings.patch_size, aligned=True)
    hidden = refiner.token_embedding + refiner.geometry_embedding(geometry)
    reader = refiner.region_reader
    if isinstance(reader, PooledRegionReader):
        embedded = F.conv2d(cells, reader.proj.weight[:, :, None, None], reader.proj.bias).flatten(2)
        for block, weight, bias in zip(refiner.blocks, reader.pool_weight, reader.pool_bias, strict=True):
            read = F.linear(embedded, weight[None], bias[None])
            hidden = block(hidden, read.reshape(hidden.shape))
    else:
        read = reader.proj(cells.flatten(1)).reshape(hidden.shape)
        for number, block in enumerate(refiner.blocks):
            hidden = block(hidden, None if number else read)
    return add_in_logit_space(geometry, refiner.geometry_head(hidden)), refiner.texture_head(hidden)


def splat(model: AutoencoderGPSToken, geometry: Tensor, texture: Tensor) -> Tensor:
    """(B, N, 5) and (B, N, channels) -> feature map (B, C, map, map)."""
    side, support = model.config.map_size, model.config.support
    maps = []
    for own_geometry, own_texture in zip(geometry.split(1), texture.split(1), strict=True):
        if model.config.decoder_type == "lattice":
            maps.append(model.decoder.paint(own_geometry, own_texture, (side, side)))
        else:
            maps.append(splat_gaussians_reference(own_geometry, own_texture, side, side, support))
    return torch.cat(maps)


def decoder(model: AutoencoderGPSToken, feature_map: Tensor) -> Tensor:
    """Feature map (B, C, map, map) -> pictures (B, 3, H, W). A lattice decoder needs [`reference_operations`]."""
    decoder = model.decoder
    if not isinstance(decoder, MapDecoder):
        return decoder(feature_map)
    x = _decoder_block(decoder.mid_block_1, decoder.conv_in(feature_map))
    x = _decoder_block(decoder.mid_block_2, _map_attention(decoder.mid_attention, x))
    for stage in decoder.stages:
        for block in stage.blocks:
            x = _decoder_block(block, x)
        if stage.conv_up is not None:
            enlarged = F.interpolate(x, scale_factor=2, mode="nearest")
            x = F.conv2d(enlarged, stage.conv_up.weight, stage.conv_up.bias, padding=1)
    return decoder.conv_out(_tile_norm(decoder.norm_out, x))


def reconstruction(model: AutoencoderGPSToken, images: Tensor) -> Tensor:
    """Pictures of one tile (B, 3, H, W) in [-1, 1] there and back, by a float32 model."""
    with reference_operations():
        regions, geometry = partition(model, images)
        refined, texture = refinement(model.refiner, stem(model.stem, images), geometry, regions)
        return decoder(model, splat(model, refined, texture).contiguous())


def _group_norm(norm: GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _tile_norm(norm: TileGroupNorm, x: Tensor) -> Tensor:
    """The release's norm for a map of one tile, by the deviation plus eps, and its x sigmoid(x)."""
    groups = x.unflatten(1, (norm.num_groups, -1))
    std, mean = torch.std_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True)
    x = ((groups - mean) / (std + norm.eps)).flatten(1, 2)
    x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
    return x * torch.sigmoid(x)


def _decoder_block(block: DecoderBlock, x: Tensor) -> Tensor:
    residual = x if block.conv_shortcut is None else block.conv_shortcut(x)
    return residual + block.conv2(_tile_norm(block.norm2, block.conv1(_tile_norm(block.norm1, x))))


def _map_attention(attention: MapAttention, x: Tensor) -> Tensor:
    """As in VQGAN: two batched products with a softmax between them."""
    normed = _group_norm(attention.norm, x)
    query, key, value = (
        projection(normed).flatten(2) for projection in (attention.to_q, attention.to_k, attention.to_v)
    )
    weight = torch.softmax(torch.bmm(query.transpose(1, 2), key) * query.shape[1] ** -0.5, dim=-1)
    return x + attention.to_out(torch.bmm(value, weight.transpose(1, 2)).reshape(x.shape))


# ---- generator ----


def sampling(
    model: GPSTokenTransformerModel,
    latents: Tensor,
    class_labels: Tensor,
    layout: Tensor,
    times: Sequence[float],
    guidance_scale: float,
    guidance_interval: tuple[float, float],
) -> Tensor:
    """Euler steps through `times`, from noise at the first to data at the last, a doubled batch at every step.

    Args:
        model: float32.
        latents: (B, N, C) noise.
        class_labels: (B,) int.
        layout: (B, N, 5).
        guidance_scale, guidance_interval: u + scale (c - u) between the two times, c elsewhere.

    Returns: (B, N, C).
    """
    labels = torch.cat([class_labels, torch.full_like(class_labels, model.null_class)])
    where = torch.cat([layout, layout])
    for time, following in pairwise(times):
        both = torch.cat([latents, latents])
        conditional, unconditional = model(both, both.new_full((len(both),), time), labels, where).sample.chunk(2)
        # Schedulers keep times in float32: a grid's step at an end of the interval is there within rounding.
        scale = guidance_scale if guidance_interval[0] <= round(time, 5) <= guidance_interval[1] else 1.0
        latents = latents + (following - time) * (unconditional + scale * (conditional - unconditional))
    return latents
