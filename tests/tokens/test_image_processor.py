"""GPSTokenImageProcessor: pictures of every kind in, pictures out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from model_zoo import load_golden, pixel_values, region_pixels
from PIL import Image

from gpstoken_diffusers import GPSTokenImageProcessor

SMALL = {"tile_size": 32, "num_tokens": 5}


def picture(height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_reference_images_give_reference_partitions():
    reference = load_golden("partition.safetensors")
    processor = GPSTokenImageProcessor(num_tokens=128)
    for name in ("astronaut", "astronaut512"):
        image = reference[f"{name}.image_u8"]
        features = processor(Image.fromarray(image.numpy()))
        assert torch.equal(features["pixel_values"], pixel_values(image))
        assert torch.equal(features["regions"].flatten(0, 1), region_pixels(reference[f"{name}.n128.regions"]))
        torch.testing.assert_close(
            features["geometry"].flatten(0, 1), reference[f"{name}.n128.gpscodes"], rtol=0, atol=1e-6
        )


def test_all_kinds_of_input_agree():
    array, processor = picture(), GPSTokenImageProcessor(**SMALL)
    expected = processor(Image.fromarray(array))
    chw = torch.from_numpy(array).permute(2, 0, 1)
    for image in (array, array[None], chw, chw[None], [array], array / 255.0, (chw / 255.0).double()):
        features = processor(image)
        # Floats in [0, 1] are rounded once more than 8-bit values: up to an ulp of 1.
        torch.testing.assert_close(features["pixel_values"], expected["pixel_values"], rtol=0, atol=2e-7)
        assert features["regions"].shape == (1, 5, 4)
    both = processor([array, picture(seed=1)])
    assert both["pixel_values"].shape == (2, 3, 32, 32)
    assert torch.equal(both["regions"][:1], expected["regions"])


def test_gray_palette_and_sixteen_bits():
    gray = picture()[..., 0]
    expected = GPSTokenImageProcessor(**SMALL)(np.repeat(gray[..., None], 3, axis=2))["pixel_values"]
    wide = Image.fromarray(gray.astype(np.uint16) * 257)
    for image in (Image.fromarray(gray), gray, gray[..., None], Image.fromarray(gray).convert("P"), wide):
        assert torch.equal(GPSTokenImageProcessor(**SMALL)(image)["pixel_values"], expected)
    bits = Image.fromarray(gray).convert("1")
    assert set(GPSTokenImageProcessor(**SMALL)(bits)["pixel_values"].unique().tolist()) <= {-1.0, 1.0}


@pytest.mark.parametrize("background", [(300, 0, 0), (-1, 0, 0), (1, 2), (0.5, 0, 0), (1, 2, 3, 4)])
@pytest.mark.parametrize("takes", [GPSTokenImageProcessor, GPSTokenImageProcessor.load_image])
def test_a_background_that_is_no_colour_is_refused(tmp_path, takes, background):
    """And is no fault of the picture."""
    Image.new("RGBA", (4, 4)).save(path := tmp_path / "a.png")
    place = () if takes is GPSTokenImageProcessor else (path,)
    with pytest.raises(ValueError, match="^background must be three integers from 0 to 255"):
        takes(*place, background=background)


def test_transparency_is_laid_on_the_background():
    array = np.dstack([picture(), np.zeros((32, 32), np.uint8)])
    array[:, 16:, 3] = 255
    for image in (Image.fromarray(array), array, array / 255.0):
        pixels = GPSTokenImageProcessor(**SMALL, background=(255, 0, 0))(image)["pixel_values"]
        torch.testing.assert_close(pixels[0, :, :, :16], torch.tensor([1.0, -1, -1])[:, None, None].expand(3, 32, 16))
        torch.testing.assert_close(pixels[..., 16:], pixel_values(torch.from_numpy(array[..., :3]))[..., 16:])


def test_resize_crop_and_tiles():
    processor = GPSTokenImageProcessor(**SMALL, shortest_edge=48)
    features = processor(picture(96, 120))
    assert features["pixel_values"].shape == (1, 3, 48, 60)
    assert features["regions"].shape == (2 * 2, 5, 4)  # 2 x 2 tiles of 32
    assert features["pixel_values"].abs().max() <= 1
    cropped = GPSTokenImageProcessor(**SMALL, shortest_edge=32, center_crop=True)(picture(96, 120))
    assert cropped["pixel_values"].shape == (1, 3, 32, 32)
    centre = GPSTokenImageProcessor(**SMALL, center_crop=True)(picture(32, 48))["pixel_values"]
    assert torch.equal(centre, pixel_values(torch.from_numpy(picture(32, 48)[:, 8:40])))


def test_importance_draws_tokens_and_follows_the_picture():
    processor = GPSTokenImageProcessor(tile_size=64, num_tokens=12)
    image = picture(64, 64)
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:16, :16] = 255

    def inside(**kwargs) -> int:
        regions = processor(image, **kwargs)["regions"][0]
        return int(((regions[:, 2] < 16) & (regions[:, 3] < 16)).sum())

    for importance in (mask, mask / 255.0, mask > 0, Image.fromarray(mask), torch.from_numpy(mask)):
        assert inside(importance=importance, importance_strength=20.0) > inside()
    resized = GPSTokenImageProcessor(tile_size=64, num_tokens=12, shortest_edge=64)
    assert resized(picture(128, 128), importance=np.ones((128, 128)))["regions"].shape == (1, 12, 4)


def test_there_and_back_is_exact():
    array = picture(31, 33)
    processor = GPSTokenImageProcessor(**SMALL)
    pixels = processor(array)["pixel_values"]
    assert np.array_equal(np.asarray(processor.postprocess(pixels)[0]), array)
    unit = processor.postprocess(pixels * 1.5, output_type="pt")
    assert unit.shape == pixels.shape
    assert unit.min() == 0
    assert unit.max() == 1
    assert processor.postprocess(pixels, output_type="np").shape == (1, 31, 33, 3)
    # 8-bit values are rounded: 0.6 of a step above 100 is 101 (the official code truncates it).
    level = torch.full((1, 3, 1, 1), 100.6 / 127.5 - 1)
    assert np.asarray(processor.postprocess(level)[0])[0, 0, 0] == 101


def test_save_and_load(tmp_path):
    processor = GPSTokenImageProcessor(tile_size=64, num_tokens=7, shortest_edge=64, background=(1, 2, 3))
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "GPSTokenImageProcessor"
    loaded = GPSTokenImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert GPSTokenImageProcessor.from_pretrained(tmp_path, num_tokens=9).num_tokens == 9


BAD_INPUTS = {
    "text": (lambda p: p("photo.jpg"), TypeError, "PIL images, numpy arrays or tensors"),
    "none": (lambda p: p([]), ValueError, "empty"),
    "two channels": (lambda p: p(np.zeros((32, 32, 2))), ValueError, r"1\|3\|4"),
    "NaN": (lambda p: p(np.full((32, 32), np.nan)), ValueError, "without NaN"),
    "signed floats": (lambda p: p(torch.full((3, 32, 32), -1.0)), ValueError, r"\[0, 1\]"),
    "integers": (lambda p: p(np.zeros((32, 32), np.int32)), TypeError, "uint8"),
    "two sizes": (lambda p: p([picture(32, 32), picture(32, 40)]), ValueError, "one size"),
    "map of another size": (lambda p: p(picture(), importance=np.ones((31, 32))), ValueError, "image's size"),
    "map beyond 1": (lambda p: p(picture(), importance=np.full((32, 32), 2.0)), ValueError, r"\[0, 1\]"),
    "too many maps": (lambda p: p(picture(), importance=[np.ones((32, 32))] * 2), ValueError, "1 images but 2"),
    "too many tokens": (lambda p: p(picture(), num_tokens=17), ValueError, "16"),
    "no tokens": (lambda p: p(picture(), num_tokens=0), ValueError, "num_tokens"),
    "output type": (lambda p: p.postprocess(torch.zeros(1, 3, 4, 4), "latent"), ValueError, "output_type"),
    "NaN picture": (lambda p: p.postprocess(torch.full((1, 3, 4, 4), torch.nan)), ValueError, "NaN"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused(name):
    call, error, message = BAD_INPUTS[name]
    with pytest.raises(error, match=message):
        call(GPSTokenImageProcessor(**SMALL))


@pytest.mark.parametrize("height, width", [(1, 3000), (3000, 1), (6, 999), (999, 5), (40, 400)])
def test_a_strip_is_cut_before_it_is_scaled(monkeypatch, height, width):
    """At a tile's height, the whole of a 1 x 3000 px picture would take hundreds of times the memory of the tile."""
    real, largest = torch.nn.functional.interpolate, []

    def interpolate(image, size, **how):
        largest.append(max(size))
        return real(image, size, **how)

    monkeypatch.setattr("gpstoken_diffusers.image_processor.F.interpolate", interpolate)
    strip = Image.fromarray(picture(3, 12)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = GPSTokenImageProcessor(**SMALL, shortest_edge=32, center_crop=True)(strip)["pixel_values"]
    assert max(largest) <= 32 * 9
    scale = 32 / min(height, width)
    whole = pixel_values(torch.from_numpy(np.array(strip)))
    scaled = real(whole, (round(height * scale), round(width * scale)), mode="bicubic", antialias=True)
    top, left = ((side - 32) // 2 for side in scaled.shape[-2:])
    # Rounded lengths move one against the other by up to half a pixel.
    torch.testing.assert_close(pixels, scaled[..., top : top + 32, left : left + 32].clamp(-1, 1), atol=0.1, rtol=0)
