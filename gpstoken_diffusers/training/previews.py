"""Pictures that show how far a generator has come, drawn while it trains."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Generator, Tensor

from ..image_processor import GPSTokenImageProcessor
from ..layouts.calibration import calibrate_layout
from ..models.autoencoder_gpstoken import AutoencoderGPSToken
from ..models.transformer_gpstoken import GPSTokenTransformerModel
from ..models.transformer_gpstoken_layout import LAYOUT_CHANNELS, GPSTokenLayoutModel
from ..schedulers.guidance import Network, guided_velocity
from ..schedulers.integration import integrate_flow
from ..schedulers.noise import draw_noise, sample_generators
from ..schedulers.presets import make_sampler
from ..tokens import GEOMETRY_CHANNELS, GPSTokens
from ..visualization import picture_grid, visualize_gaussians, write_png
from .token_dataset import TokenDataset

# Few steps, so that training is not held up, of a solver that is right with few.
PREVIEW_SAMPLER, PREVIEW_STEPS = "unipc", 12
TEXTURE_GUIDANCE, LAYOUT_GUIDANCE = 2.0, 1.0
COLUMNS = 4


def _rows(dataset: TokenDataset) -> list[list[int]]:
    """The items that a preview shows, a row for each class that has any; small classes repeat themselves."""
    rows = []
    for label in sorted(dataset.id2label):
        items = (dataset.labels == label).nonzero()[:, 0]
        if len(items):
            rows.append(items[torch.arange(COLUMNS) % len(items)].tolist())
    return rows


def _sample(network: Network, shape: tuple[int, int], labels: Tensor, null_class: int, guidance: float) -> Tensor:
    """Latents (B, *shape) as the pipeline draws them, with the seeds 0, 1, ... so that previews can be compared."""
    seeds = [Generator().manual_seed(column) for column in range(len(labels))]
    generators = sample_generators(seeds, len(labels))
    scheduler, steps = make_sampler(PREVIEW_SAMPLER, PREVIEW_STEPS)
    velocity = guided_velocity(network, labels, null_class, guidance)
    return integrate_flow(scheduler, velocity, draw_noise(generators, shape, labels.device), steps, generators)


@torch.no_grad()
def save_texture_preview(
    model: GPSTokenTransformerModel, autoencoder: AutoencoderGPSToken, dataset: TokenDataset, path: Path
) -> None:
    """Draws textures for real layouts of each class, a row per class, and saves the picture as `path`."""
    device = next(model.parameters()).device
    pictures = []
    processor = GPSTokenImageProcessor()
    for row in _rows(dataset):
        layout = torch.stack([dataset[index]["initial_geometry"] for index in row]).to(device)

        def network(noisy: Tensor, time: Tensor, labels: Tensor, layout: Tensor = layout) -> Tensor:
            return model(noisy, time, labels, layout.repeat(len(noisy) // len(layout), 1, 1)).sample

        shape = (layout.shape[1], GEOMETRY_CHANNELS + model.config.texture_channels)
        labels = dataset.labels[row].to(device)
        latents = _sample(network, shape, labels, model.null_class, TEXTURE_GUIDANCE)
        tokens = GPSTokens(*model.from_latents(layout, latents), dataset.image_size)
        pictures += processor.postprocess(autoencoder.to(device).decode(tokens.to(autoencoder.dtype)).sample)
    write_png(picture_grid(pictures, COLUMNS), path)


@torch.no_grad()
def save_layout_preview(model: GPSTokenLayoutModel, dataset: TokenDataset, min_region_size: int, path: Path) -> None:
    """Draws layouts of each class and calibrates them, a row per class, and saves the picture as `path`."""
    device = next(model.parameters()).device
    pictures = []
    for row in _rows(dataset):
        labels = dataset.labels[row].to(device)

        def network(noisy: Tensor, time: Tensor, labels: Tensor) -> Tensor:
            return model(noisy, time, labels).sample

        shape = (model.config.num_tokens, LAYOUT_CHANNELS)
        latents = _sample(network, shape, labels, model.null_class, LAYOUT_GUIDANCE)
        layout = calibrate_layout(
            model.from_latents(latents).cpu(), image_size=dataset.image_size, min_region_size=min_region_size
        ).geometry
        pictures += visualize_gaussians(layout, style="ellipses", size=dataset.image_size)
    write_png(picture_grid(pictures, COLUMNS), path)
