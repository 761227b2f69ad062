"""GPSTokenLayoutModel: latents along the Z-curve, any number of tokens, a model of diffusers."""

from __future__ import annotations

import pytest
import torch
from model_zoo import noise_images
from pipeline_zoo import tiny_layout_model

from gpstoken_diffusers import GPSTokenLayoutModel, calibrate_layout, partition_image
from gpstoken_diffusers.models.transformer_gpstoken_layout import z_curve_order


def real_layout(num_tokens=24):
    return partition_image(noise_images(2, 64, 64), num_tokens, min_region_size=8).geometry


def test_the_z_curve_visits_quadrant_after_quadrant():
    # x, y of the centres of 16 cells, row by row.
    axis = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    order = z_curve_order(torch.stack([x, y], dim=-1).reshape(1, 16, 2))[0]
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_latents_and_back_whatever_the_order():
    model = tiny_layout_model()
    layout = real_layout()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    latents = model.to_latents(layout)
    assert latents.shape == (2, 24, 4)
    assert torch.equal(model.to_latents(layout[:, order]), latents)
    back = model.from_latents(latents)
    along = z_curve_order(layout[..., 3:])
    torch.testing.assert_close(back, layout.gather(1, along[..., None].expand(-1, -1, 5)), atol=1e-6, rtol=1e-5)
    # Calibration of what came back is the partition itself.
    regions = calibrate_layout(back, image_size=(64, 64)).regions
    expected = partition_image(noise_images(2, 64, 64), 24, min_region_size=8).regions
    assert [set(map(tuple, rows)) for rows in regions.tolist()] == [set(map(tuple, rows)) for rows in expected.tolist()]


@pytest.mark.parametrize("count", [1, 5, 40])
def test_any_number_of_tokens(count):
    model = tiny_layout_model()
    latents = torch.randn(2, count, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = model(latents, torch.tensor([0.1, 0.9]), torch.tensor([0, 3])).sample
    assert velocity.shape == latents.shape and velocity.isfinite().all()


def test_place_time_and_class_matter():
    model = tiny_layout_model()
    latents = torch.zeros(2, 6, 4)
    time, labels = torch.tensor([0.3, 0.3]), torch.tensor([1, 2])
    with torch.no_grad():
        velocity = model(latents, time, labels).sample
        later = model(latents, time + 0.3, labels).sample
    assert (velocity[0] - velocity[1]).abs().max() > 1e-4
    assert (velocity[0, 0] - velocity[0, 1]).abs().max() > 1e-4
    assert (velocity - later).abs().max() > 1e-4


def load_rounded(model, folder):
    model.save_pretrained(folder)
    return GPSTokenLayoutModel.from_pretrained(folder, torch_dtype=torch.bfloat16)


def cast_layerwise(model, _):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    return model


@pytest.mark.parametrize(
    "round_off",
    [
        load_rounded,
        cast_layerwise,
        lambda model, _: model.to(torch.bfloat16),
        lambda model, _: model.to("cpu", torch.float16),
        lambda model, _: model.half(),
        lambda model, _: model.type(torch.bfloat16),
        lambda model, _: torch.nn.ModuleList([model]).bfloat16()[0],
        lambda model, _: torch.nn.ModuleList([model]).to(torch.bfloat16)[0].to("cpu"),
    ],
)
def test_it_stays_float32(round_off, tmp_path):
    latents = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    inputs = latents, torch.tensor([0.3]), torch.tensor([1])
    with torch.no_grad():
        expected = tiny_layout_model()(*inputs).sample
        model = round_off(tiny_layout_model(), tmp_path)
        ours = model(*inputs).sample
    assert model.dtype == torch.float32
    torch.testing.assert_close(ours, expected)  # rounded weights alone would make it differ by 1e-2


def test_it_can_be_float64():
    assert tiny_layout_model().double().blocks[0].ff[0].weight.dtype == torch.float64


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(B, N, 4\), got \(1, 6, 5\)"):
        tiny_layout_model()(torch.zeros(1, 6, 5), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="latents_mean must have a number for each of 4 channels, got 5"):
        tiny_layout_model(latents_mean=[0.0] * 5)
    with pytest.raises(ValueError, match="latents_std must be positive, got 0"):
        tiny_layout_model(latents_std=[1.0, 1.0, 0.0, 1.0])
