"""What the tests of `splat_gaussians` share: implementations, random tokens, comparison."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpstoken_diffusers.ops.backend import native
from gpstoken_diffusers.ops.splat import splat_gaussians
from gpstoken_diffusers.ops.splat_reference import (
    splat_gaussians_backward_reference,
    splat_gaussians_reference,
)

needs_native = pytest.mark.skipif(
    native.library("cpu") is None, reason=f"no native CPU version: {native.why_missing('cpu')}"
)
ImplementationOf = Callable[..., Tensor]


class WrittenGradient(torch.autograd.Function):
    """The definition with its own gradient, as the operator uses them where no native library serves."""

    @staticmethod
    def forward(ctx, geometry: Tensor, texture: Tensor, height: int, width: int, support: float = 3.0) -> Tensor:
        ctx.save_for_backward(geometry, texture)
        ctx.support = support
        return splat_gaussians_reference(geometry, texture, height, width, support)

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple:
        return *splat_gaussians_backward_reference(*ctx.saved_tensors, grad_out, ctx.support), None, None, None


IMPLEMENTATIONS = [
    pytest.param(splat_gaussians, id="native", marks=needs_native),
    pytest.param(WrittenGradient.apply, id="twin"),
    pytest.param(splat_gaussians_reference, id="twin by autograd"),
]

# Two float32 evaluations of the same sums in another order: some 20 roundings of 6e-8 each, relative to the
# largest entry of a tensor.
FLOAT32 = 2e-6
# One rounding to the output's type on top: half a unit in the last place, at most doubled where two float32
# values straddle a rounding boundary.
ROUNDING = {torch.float32: FLOAT32, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def make_tokens(batch: int, tokens: int, channels: int, seed: int = 0, sigma: float = 0.1) -> tuple[Tensor, Tensor]:
    """Random tokens: sigmas around `sigma`, |rho| < 0.95, some centres off the image."""
    g = torch.Generator().manual_seed(seed)
    sigmas = sigma * torch.exp(0.7 * torch.randn(batch, tokens, 2, generator=g))
    rho = 0.95 * (2 * torch.rand(batch, tokens, 1, generator=g) - 1)
    centers = 2.4 * torch.rand(batch, tokens, 2, generator=g) - 1.2
    return torch.cat([sigmas, rho, centers], -1), torch.randn(batch, tokens, channels, generator=g)


def run(
    splat: ImplementationOf,
    geometry: Tensor,
    texture: Tensor,
    size: tuple[int, int],
    support: float = 3.0,
    seed: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """(map, grad_geometry, grad_texture) for a random upstream gradient."""
    geometry, texture = geometry.detach().requires_grad_(), texture.detach().requires_grad_()
    out = splat(geometry, texture, *size, support)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, (geometry, texture), upstream)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry of `expected`."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-30))


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """Maps, each geometry gradient by itself (their scales differ by far), texture gradients."""
    names = ["map", "grad sigma_x", "grad sigma_y", "grad rho", "grad x", "grad y", "grad texture"]
    split = [(a, *b.unbind(-1), c) for a, b, c in (actual, expected)]
    far = {n: d for n, x, y in zip(names, *split, strict=True) if not (d := distance(x, y)) <= tolerance}
    assert not far, f"beyond {tolerance}: {far}"
