"""PSNR and SSIM against scikit-image and against values worked out by hand."""

import pytest
import skimage.data
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from gpstoken_diffusers.evaluation.metrics import psnr, ssim


def photographs(height: int, width: int) -> torch.Tensor:
    """(3, 3, height, width) in [-1, 1], float32."""
    pictures = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    pixels = [torch.from_numpy(picture[-height:, -width:].copy()) for picture in pictures]
    return torch.stack(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def degraded(pixels: torch.Tensor) -> torch.Tensor:
    """Each picture worse than the one before."""
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    strength = torch.tensor([0.02, 0.1, 0.4]).reshape(3, 1, 1, 1)
    return (0.9 * pixels + strength * noise).clamp(-1, 1)


@pytest.mark.parametrize("size", [(64, 64), (11, 11), (13, 101), (120, 37)])
def test_both_equal_scikit_image(size):
    a = photographs(*size)
    b = degraded(a)
    for image in range(3):
        # The pictures as scikit-image's users have them, in [0, 1].
        channels = [(pixels[image].permute(1, 2, 0).double().numpy() + 1) / 2 for pixels in (a, b)]
        expected_psnr = peak_signal_noise_ratio(*channels, data_range=1)
        expected_ssim = structural_similarity(
            *channels,
            data_range=1,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        # float64 on both sides: only the order of sums of 1e5 values differs.
        assert psnr(a, b)[image].item() == pytest.approx(expected_psnr, rel=1e-11)
        assert ssim(a, b)[image].item() == pytest.approx(expected_ssim, rel=1e-9)


def test_psnr_by_hand():
    # An error of 0.2 everywhere: 10 log10(4 / 0.04) = 20 dB; of 2, the whole range: 0 dB.
    a = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    b = torch.tensor([0.2, 2.0], dtype=torch.float64).reshape(2, 1, 1, 1).expand_as(a)
    assert psnr(a, b).tolist() == pytest.approx([20.0, 0.0], abs=1e-12)


def test_ssim_by_hand():
    # Constant images have no structure: (2 a b + C1) / (a^2 + b^2 + C1), C1 = 0.01^2, a and b counted from black in
    # units of the whole range: 0.625 and 0.25.
    a, b = torch.full((1, 1, 16, 16), 0.25), torch.full((1, 1, 16, 16), -0.5)
    expected = (2 * 0.625 * 0.25 + 1e-4) / (0.625**2 + 0.25**2 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, rel=1e-12)


def test_identical_images():
    a = photographs(32, 40)
    assert psnr(a, a).tolist() == [float("inf")] * 3
    assert ssim(a, a).tolist() == [1.0] * 3


def test_images_of_a_batch_do_not_mix():
    a = photographs(32, 40)
    b = degraded(a)
    for metric in (psnr, ssim):
        together = metric(a, b)
        assert together.shape == (3,) and together.dtype == torch.float64
        assert together.tolist() == sorted(together.tolist(), reverse=True)
        alone = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


def test_both_are_symmetric_and_take_any_float():
    a = photographs(32, 40)
    b = degraded(a)
    for metric in (psnr, ssim):
        torch.testing.assert_close(metric(a, b), metric(b, a), rtol=1e-12, atol=0)
        half = metric(a.bfloat16(), b.bfloat16())
        assert torch.equal(half, metric(a.bfloat16().float(), b.bfloat16().float()))
        assert torch.equal(metric(a.mT, b.mT), metric(a.mT.contiguous(), b.mT.contiguous()))


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        ((1, 3, 16, 16), (1, 3, 16, 17), ValueError, r"\(1, 3, 16, 16\) and \(1, 3, 16, 17\)"),
        ((2, 3, 16, 16), (1, 3, 16, 16), ValueError, "one shape"),
        ((3, 16, 16), (3, 16, 16), ValueError, r"\(B, C, H, W\)"),
    ],
)
def test_shapes_must_agree(metric, a, b, error, message):
    with pytest.raises(error, match=message):
        metric(torch.zeros(a), torch.zeros(b))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_bytes_are_refused(metric):
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"in \[-1, 1\], not torch.uint8"):
        metric(pixels, pixels)


@pytest.mark.parametrize("size", [(10, 64), (64, 10), (1, 1)])
def test_ssim_needs_its_window(size):
    with pytest.raises(ValueError, match="at least 11 x 11 pixels"):
        ssim(torch.zeros(1, 3, *size), torch.zeros(1, 3, *size))
