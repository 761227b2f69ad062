"""How close a reconstruction is to its picture: PSNR and SSIM, per image.

The command line needs them with the core's dependencies alone. torchmetrics' PSNR is the same but knows no mask; its
SSIM counts mirrored pixels beyond the edges, unlike the paper and scikit-image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DATA_RANGE = 2.0
"""Pixels lie in [-1, 1]."""
SSIM_RADIUS = 5
SSIM_SIGMA = 1.5


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio, 10 log10(4 / mean squared error), over an image's pixels and channels.

    Values are compared as they are: clamp a decoder's output to [-1, 1] first, as a saved picture is.

    Args:
        a: (B, C, H, W) floating point, in [-1, 1].
        b: the same shape and device.
        mask: (H, W) boolean; only the pixels where it is true count. None counts all.

    Returns:
        (B,) float64, in dB; infinite for identical images.

    Raises:
        ValueError: the shapes differ, or are not (B, C, H, W), or a mask of another size or without a pixel.
        TypeError: the pixels are not floating point numbers.
    """
    _check(a, b)
    squared_error = (_float64(a) - _float64(b)).square()
    if mask is None:
        mean_squared_error = squared_error.mean(dim=(1, 2, 3))
    else:
        if mask.dtype != torch.bool or mask.shape != a.shape[-2:] or not mask.any():
            raise ValueError(
                f"the mask must be boolean of the size {tuple(a.shape[-2:])}, true somewhere, not {mask.dtype} of "
                f"{tuple(mask.shape)}"
            )
        mean_squared_error = squared_error[:, :, mask.to(squared_error.device)].mean(dim=(1, 2))
    return 10 * torch.log10(DATA_RANGE**2 / mean_squared_error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of Wang, Bovik, Sheikh and Simoncelli (2004), equation 13, averaged.

    Gaussian window of 11 x 11 and sigma 1.5, K1 = 0.01, K2 = 0.03, population covariances. The mean leaves
    out the 5 pixels at each edge where the window does not fit, and each channel counts as an image.
    scikit-image gives the same for the pictures in [0, 1] or in 8 bits, with `gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False` and the data range that belongs to them.

    Args:
        a: (B, C, H, W) floating point, in [-1, 1], H and W at least 11.
        b: the same shape and device.

    Returns:
        (B,) float64, at most 1, which identical images reach.

    Raises:
        ValueError: the shapes differ, are not (B, C, H, W), or an image is smaller than the window.
        TypeError: the pixels are not floating point numbers.
    """
    _check(a, b)
    window = 2 * SSIM_RADIUS + 1
    if min(a.shape[-2:]) < window:
        raise ValueError(f"SSIM needs images of at least {window} x {window} pixels, not {tuple(a.shape[-2:])}")
    # One channel at a time: the twelve maps of a large image in float64 would take gigabytes.
    # SSIM compares means as ratios, so black must be 0, not -1: [-1, 1] is moved to [0, 2].
    channels = [_ssim_of_planes(_float64(a[:, c]) + 1, _float64(b[:, c]) + 1) for c in range(a.shape[1])]
    return torch.stack(channels).mean(dim=0)


def _ssim_of_planes(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of planes (B, H, W): (B,)."""
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = _blur(a * a) - mean_a * mean_a
    variance_b = _blur(b * b) - mean_b * mean_b
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean(dim=(1, 2))


def _blur(planes: Tensor) -> Tensor:
    """Weighted mean under the window, only where the window fits: (B, H, W) -> (B, H - 10, W - 10)."""
    weights = [math.exp(-0.5 * (offset / SSIM_SIGMA) ** 2) for offset in range(-SSIM_RADIUS, SSIM_RADIUS + 1)]
    for axis in (1, 2):
        # Shifted sums: several times faster than a float64 convolution of one channel.
        length = planes.shape[axis] - 2 * SSIM_RADIUS
        total = torch.zeros_like(planes.narrow(axis, 0, length))
        for start, weight in enumerate(weights):
            total.add_(planes.narrow(axis, start, length), alpha=weight / sum(weights))
        planes = total
    return planes


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"both images must have one shape (B, C, H, W), but their shapes are {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise TypeError(f"pixels must be floating point numbers in [-1, 1], not {a.dtype} and {b.dtype}")


def _float64(pixels: Tensor) -> Tensor:
    """float64, because a variance as a difference of squares loses half of float32's digits; MPS has none."""
    return (pixels.cpu() if pixels.device.type == "mps" else pixels).double()
