"""Pictures that show how far a generator has come, drawn while it trains."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..image_processor import GPSTokenImageProcessor
from ..layouts.calibration import calibrate_layout
from ..models.autoencoder_gpstoken import AutoencoderGPSToken
from ..models.transformer_gpstoken import GPSTokenTransformerModel
from ..models.transformer_gpstoken_layout import GPSTokenLayoutModel
from ..pipelines.flow_sampling import draw_noise, guided_velocity, integrate_flow
from ..schedulers.presets import make_sampler
from ..tokens import GPSTokens
from ..visualization import picture_grid, visualize_gaussians
from .token_dataset import TokenDataset

# Few enough not to hold up training, of a solver that is right with few.
PREVIEW_STEPS = 12
COLUMNS = 4


def _rows(dataset: TokenDataset) -> list[list[int]]:
    """The items that a preview shows, a row per class that has any; small classes repeat themselves."""
    rows = []
    for label in sorted(dataset.id2label):
        items = (dataset.labels == label).nonzero()[:, 0]
        if len(items):
            rows.append(items[torch.arange(COLUMNS) % len(items)].tolist())
    return rows


def _sample(network, shape: tuple[int, int], labels: Tensor, null_class: int, guidance_scale: float) -> Tensor:
    """Latents of one seed per place in a row, so that a run's previews can be compared."""
    generators = [torch.Generator().manual_seed(place) for place in range(len(labels))]
    scheduler, steps = make_sampler("unipc", PREVIEW_STEPS)
    velocity = guided_velocity(network, labels, null_class, guidance_scale, (0.0, 1.0))
    noise = draw_noise(generators, shape, labels.device)
    return integrate_flow(scheduler, velocity, noise, steps, generators, on_step=lambda *step: step[-1])


@torch.no_grad()
def save_texture_preview(
    model: GPSTokenTransformerModel, autoencoder: AutoencoderGPSToken, dataset: TokenDataset, path: Path
) -> None:
    """Draw texture for some real layouts of each class, a row per class, to the picture `path`."""
    device = next(model.parameters()).device
    pictures = []
    processor = GPSTokenImageProcessor()
    for row in _rows(dataset):
        layout = torch.stack([dataset[index]["initial_geometry"] for index in row]).to(device)

        def network(noisy: Tensor, time: Tensor, labels: Tensor, layout: Tensor = layout) -> Tensor:
            return model(noisy, time, labels, layout.repeat(len(noisy) // len(layout), 1, 1)).sample

        shape = (layout.shape[1], 5 + model.config.texture_channels)
        labels = dataset.labels[row].to(device)
        latents = _sample(network, shape, labels, model.null_class, guidance_scale=2.0)
        tokens = GPSTokens(*model.from_latents(layout, latents), dataset.image_size)
        pictures += processor.postprocess(autoencoder.to(device).decode(tokens.to(autoencoder.dtype)).sample)
    picture_grid(pictures, COLUMNS).save(path)


@torch.no_grad()
def save_layout_preview(
    model: GPSTokenLayoutModel, dataset: TokenDataset, min_region_size: int, path: Path
) -> None:
    """Draw some layouts of each class and calibrate them, a row per class, to the picture `path`."""
    device = next(model.parameters()).device
    pictures = []
    for row in _rows(dataset):
        labels = dataset.labels[row].to(device)

        def network(noisy: Tensor, time: Tensor, labels: Tensor) -> Tensor:
            return model(noisy, time, labels).sample

        latents = _sample(network, (model.config.num_tokens, 4), labels, model.null_class, guidance_scale=1.0)
        layout = calibrate_layout(
            model.from_latents(latents).cpu(), image_size=dataset.image_size, min_region_size=min_region_size
        ).geometry
        nothing = torch.zeros_like(layout[..., :1])
        pictures += visualize_gaussians(GPSTokens(layout, nothing, dataset.image_size), style="ellipses")
    picture_grid(pictures, COLUMNS).save(path)
