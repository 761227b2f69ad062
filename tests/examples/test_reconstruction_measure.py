"""Measuring a method: exact for an identity, the same as scikit-image for files, and independent of the batches."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import skimage.metrics
import torch
from model_zoo import tiny_model
from PIL import Image
from reconstruction.baselines import FileFormat
from reconstruction.judges import Judges
from reconstruction.measure import (
    CODED,
    CODED_PSNR,
    DECODED_PER_SECOND,
    ENCODED_PER_SECOND,
    FLOAT16,
    FLOAT32,
    MEMORY,
    PSNR,
    SSIM,
    Cases,
    describe_pictures,
    measure,
    peak_memory,
)
from reconstruction.methods import Cost, GPSTokenMethod, Method
from reconstruction.squares import Squares
from reconstruction_zoo import MeanColours, MeanDifference, write_pictures

from gpstoken_diffusers.training.data import center_crop

JUDGES = Judges(MeanDifference(), MeanColours())


class Identity(Method):
    """Keeps the pictures themselves, of 8 bits per channel in the compact form."""

    name = "identity"

    def encode(self, images, places):
        return images

    def decode(self, code):
        return code

    def cost(self, code):
        numbers = code[0].numel()
        return Cost(None, numbers, {"coded": [numbers] * len(code), "float32": [4 * numbers] * len(code)})


@pytest.fixture
def squares(tmp_path):
    return Squares(write_pictures(tmp_path / "pictures", [(70, 50)] * 5), 32)


def test_an_identity_loses_nothing(squares):
    row = measure(Identity(), squares, JUDGES, describe_pictures(squares, JUDGES, 2, "cpu"), batch_size=2)
    assert row.figures[PSNR] == math.inf
    assert row.figures[SSIM] == pytest.approx(1, abs=1e-12)
    assert row.figures["mean difference"] == 0
    assert row.figures["Frechet distance, mean colours"] == pytest.approx(0, abs=1e-6)
    assert row.figures["kernel distance x 1000, mean colours"] == 0
    assert row.figures[CODED_PSNR] == math.inf
    assert (row.pictures, row.tokens, row.numbers) == (5, None, 3 * 32 * 32)
    assert (row.figures[CODED], row.figures[FLOAT16], row.figures[FLOAT32]) == (3 * 1024, None, 12 * 1024)
    assert row.psnr == dict.fromkeys(range(5), math.inf)
    assert row.figures[ENCODED_PER_SECOND] > 0 and row.figures[DECODED_PER_SECOND] > 0


def test_files_have_the_figures_that_scikit_image_gives(squares):
    row = measure(FileFormat("jpeg", 30), squares)
    expected = []
    for path in squares.paths:
        with Image.open(path) as image:
            picture = center_crop(image, 32)
        picture.save(path.with_suffix(".small.jpg"), quality=30, progressive=True, optimize=True)
        with Image.open(path.with_suffix(".small.jpg")) as file:
            a, b = np.asarray(picture), np.asarray(file.convert("RGB"))
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
        expected.append(
            (
                skimage.metrics.peak_signal_noise_ratio(a, b, data_range=255),
                skimage.metrics.structural_similarity(a, b, data_range=255, **settings),
                path.with_suffix(".small.jpg").stat().st_size,
            )
        )
    means = np.mean(expected, axis=0)
    assert row.figures[PSNR] == row.figures[CODED_PSNR] == pytest.approx(means[0], rel=1e-5)
    assert row.figures[SSIM] == pytest.approx(means[1], rel=1e-5)
    assert row.figures[CODED] == means[2]
    assert list(row.psnr.values()) == pytest.approx([value for value, _, _ in expected], rel=1e-5)


def test_batches_make_no_difference(squares):
    method = GPSTokenMethod("ours", tiny_model("lattice"), 9)
    rows = []
    for batch_size in (1, 3):
        sets = describe_pictures(squares, JUDGES, batch_size, "cpu")
        rows.append(measure(method, squares, JUDGES, sets, batch_size, num_cases=2))
    for row in rows:
        for name in (ENCODED_PER_SECOND, DECODED_PER_SECOND, MEMORY):
            row.figures.pop(name)
    # Convolutions round otherwise in batches, by 1e-6: now and then a number falls on the other side of a code's edge,
    # and a file is a byte longer.
    assert rows[0].figures.pop(CODED) == pytest.approx(rows[1].figures.pop(CODED), abs=3)
    assert rows[0].figures == pytest.approx(rows[1].figures, rel=1e-4)
    assert rows[0].coded_bytes == pytest.approx(rows[1].coded_bytes, abs=3)
    assert [case.place for case in rows[0].cases.worst] == [case.place for case in rows[1].cases.worst]


def test_the_coded_form_has_a_figure_of_its_own(squares):
    class Coarse(Identity):
        def cost(self, code):
            return Cost(None, 1, {"coded": [1] * len(code)}, coded=code.round())

    row = measure(Coarse(), squares)
    assert row.figures[PSNR] == math.inf
    assert row.figures[CODED_PSNR] < 20


def test_pictures_of_another_size_are_refused(squares):
    class Cropping(Identity):
        def decode(self, code):
            return code[..., 1:, 1:]

    with pytest.raises(ValueError, match=re.escape("makes pictures of (31, 31) px from those of (32, 32) px")):
        measure(Cropping(), squares)


def test_the_worst_and_best_are_kept():
    cases = Cases(2)
    images = torch.zeros(6, 3, 4, 4)
    cases.add([5.0, 3.0, math.inf], [0, 1, 2], images[:3], images[:3])
    cases.add([9.0, 1.0, 4.0], [3, 4, 5], images[3:], images[3:])
    assert [case.psnr for case in cases.worst] == [1, 3]
    assert [case.psnr for case in cases.best] == [math.inf, 9]
    assert cases.worst[0].place == 4
    none = Cases(0)
    none.add([1.0], [0], images[:1], images[:1])
    assert none.worst == none.best == []


def test_memory_is_that_of_the_work():
    grown = peak_memory(lambda: torch.ones(50, 2**18).sum(), "cpu")
    if grown is None:
        pytest.skip("this system does not tell a process's memory")
    assert 45 < grown < 80
    assert peak_memory(lambda: None, "cpu") < 10
