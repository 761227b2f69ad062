"""PSNR and SSIM against scikit-image and against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import skimage.data
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from gpstoken_diffusers.evaluation.metrics import psnr, ssim

BOTH = pytest.mark.parametrize("metric", [psnr, ssim])


def photographs(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, 3, height, width) in [-1, 1], and the same with noise, each picture worse than the one before."""
    pictures = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    pixels = torch.stack([torch.from_numpy(picture[-height:, -width:].copy()) for picture in pictures])
    a = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    return a, (0.9 * a + torch.tensor([0.02, 0.1, 0.4]).reshape(3, 1, 1, 1) * noise).clamp(-1, 1)


@pytest.mark.parametrize("size", [(64, 64), (11, 11), (13, 101)])
def test_both_equal_scikit_image(size):
    a, b = photographs(*size)
    for image in range(3):
        # The pictures as scikit-image's users have them, in [0, 1].
        channels = [(pixels[image].permute(1, 2, 0).double().numpy() + 1) / 2 for pixels in (a, b)]
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
        # float64 on both sides: only the order of sums of 1e5 values differs.
        expected = peak_signal_noise_ratio(*channels, data_range=1)
        assert psnr(a, b)[image].item() == pytest.approx(expected, rel=1e-11)
        expected = structural_similarity(*channels, data_range=1, **settings)
        assert ssim(a, b)[image].item() == pytest.approx(expected, rel=1e-9)


def test_values_by_hand():
    # An error of 0.2 everywhere: 10 log10(4 / 0.04) = 20 dB; of 2, the whole range: 0 dB.
    a = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    b = torch.tensor([0.2, 2.0], dtype=torch.float64).reshape(2, 1, 1, 1).expand_as(a)
    assert psnr(a, b).tolist() == pytest.approx([20.0, 0.0], abs=1e-12)
    # Constant images have no structure: (2 a b + C1) / (a^2 + b^2 + C1), C1 = 0.01^2, a and b counted from black in
    # units of the whole range: 0.625 and 0.25.
    a, b = torch.full((1, 1, 16, 16), 0.25), torch.full((1, 1, 16, 16), -0.5)
    expected = (2 * 0.625 * 0.25 + 1e-4) / (0.625**2 + 0.25**2 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, rel=1e-12)
    a, _ = photographs(32, 40)
    assert psnr(a, a).tolist() == [math.inf] * 3
    assert ssim(a, a).tolist() == [1.0] * 3


def test_psnr_under_a_mask():
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    b[:, :, :2] = 0.2
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True
    assert psnr(a, b, mask).tolist() == pytest.approx([20] * 2, abs=1e-5)  # 0.2 in float32
    assert psnr(a, b, ~mask).tolist() == [math.inf] * 2
    for wrong in (mask[:2], mask.float(), mask & False):
        with pytest.raises(ValueError, match="the mask must be boolean"):
            psnr(a, b, wrong)


@BOTH
def test_images_do_not_mix_and_any_float_is_taken(metric):
    a, b = photographs(32, 40)
    together = metric(a, b)
    assert together.dtype == torch.float64
    assert together.tolist() == sorted(together.tolist(), reverse=True)
    alone = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)  # float64, another order of sums
    torch.testing.assert_close(together, metric(b, a), rtol=1e-12, atol=0)
    half = metric(a.bfloat16(), b.bfloat16())
    assert torch.equal(half, metric(a.bfloat16().float(), b.bfloat16().float()))
    assert torch.equal(metric(a.mT, b.mT), metric(a.mT.contiguous(), b.mT.contiguous()))


@BOTH
def test_wrong_pictures_are_named(metric):
    cases = [
        ((1, 3, 16, 16), (1, 3, 16, 17), r"\(1, 3, 16, 16\) and \(1, 3, 16, 17\)"),
        ((2, 3, 16, 16), (1, 3, 16, 16), "one shape"),
        ((3, 16, 16), (3, 16, 16), r"\(B, C, H, W\)"),
    ]
    for a, b, message in cases:
        with pytest.raises(ValueError, match=message):
            metric(torch.zeros(a), torch.zeros(b))
    with pytest.raises(TypeError, match=r"in \[-1, 1\], not torch.uint8"):
        metric(torch.zeros(1, 3, 16, 16).byte(), torch.zeros(1, 3, 16, 16).byte())
    for size in ((10, 64), (64, 10)):
        with pytest.raises(ValueError, match="at least 11 x 11 pixels"):
            ssim(torch.zeros(1, 3, *size), torch.zeros(1, 3, *size))
