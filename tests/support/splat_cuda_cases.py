"""What the tests of the CUDA splatting kernels share: cases, random tokens, comparison with the definition."""

from __future__ import annotations

import pytest
import torch
from emulation.toolchain import SplatLibrary
from torch import Tensor

from gpstoken_diffusers.ops.backend import native
from gpstoken_diffusers.ops.splat_reference import (
    pixel_centers,
    splat_gaussians_backward_reference,
    splat_gaussians_reference,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# batch, tokens, channels, height, width, support, dtype. Each number of channels takes another kernel, or the
# tail of one.
CASES = [
    (1, 0, 3, 4, 5, 3.0, F32),
    (1, 1, 1, 1, 1, 3.0, F32),
    (2, 17, 3, 7, 5, 5.0, F32),
    (2, 17, 16, 33, 65, 5.0, F32),
    (1, 257, 33, 33, 65, 3.0, F32),
    (1, 257, 16, 33, 65, 3.0, BF16),
    (1, 17, 130, 7, 5, 3.0, F16),
    (3, 257, 1, 1, 1, 3.0, F32),
    (2, 17, 5, 1, 40, 3.0, F16),
    (2, 17, 32, 40, 1, 5.0, BF16),
    (1, 17, 0, 3, 3, 3.0, F32),  # no channels: nothing to paint, gradients of geometry are zero
    (5, 257, 32, 7, 5, 3.0, F32),  # 1285 tokens: eight to a block, the last one not full
    (256, 2, 13, 2, 2, 3.0, F16),  # 256 tiles: slices of 16 channels
    (130, 5, 33, 3, 3, 3.0, F32),  # 260 tiles: slices of 32 channels
    (3, 700, 4, 5, 5, 5.0, F16),  # more survivors in a tile than its list can hold
]


def real_library() -> SplatLibrary:
    """The kernels on the current GPU; skips the test, saying so, where they cannot run."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    library = native.library("cuda")
    if library is None:
        pytest.skip(f"the CUDA library is not there: {native.why_missing('cuda')}")
    return SplatLibrary(library)


def random_tokens(batch: int, count: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens from a fraction of a pixel to half the image, some centred outside it; |rho| up to 0.95."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(5, batch, count, generator=generator)
    sigma = 0.004 * 100.0 ** uniform[:2]
    geometry = torch.stack([*sigma, 1.9 * uniform[2] - 0.95, *(2.6 * uniform[3:] - 1.3)], dim=-1)
    return geometry, torch.randn(batch, count, channels, generator=generator)


def away_from_edges(geometry: Tensor, height: int, width: int, support: float) -> Tensor:
    """Widens tokens with a pixel within 2e-6 of their box's edge, where float32 may decide either way."""
    geometry = geometry.double()
    for axis, n in enumerate([width, height]):
        while True:
            sigma, center = geometry[..., axis, None], geometry[..., 3 + axis, None]
            to_edge = (pixel_centers(n, geometry.device) - center).abs() - support * sigma
            near = to_edge.abs().amin(-1) < 2e-6
            if not near.any():
                break
            geometry[..., axis] *= torch.where(near, 1.001, 1.0)
    return geometry.float()


def expect_close(result: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Largest difference, relative to the largest expected value, below tolerance."""
    assert result.shape == expected.shape
    assert result.isfinite().all(), f"{name}: {int((~result.isfinite()).sum())} elements not written or not finite"
    if expected.numel() == 0:
        return
    scale = expected.abs().max().clamp(min=1e-30)
    error = ((result.to(expected) - expected).abs().max() / scale).item()
    assert error <= tolerance, f"{name}: error {error:.2e} of the largest value, allowed {tolerance:.0e}"


def expect_definition(
    library: SplatLibrary, geometry: Tensor, texture: Tensor, height: int, width: int, support: float
) -> None:
    """Forward and backward against the plain definition in float64."""
    # float32 sums of up to some hundred terms: 5e-6 is five times what was seen. Then one rounding to
    # 16 bits, half an ulp: 2^-11 in float16, 2^-8 in bfloat16.
    rounding = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[texture.dtype]
    geometry = away_from_edges(geometry, height, width, support)
    batch, _, channels = texture.shape
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(batch, channels, height, width, generator=generator).to(texture)
    out = library.forward(geometry, texture, height, width, support)
    grad_geometry, grad_texture = library.backward(geometry, texture, grad_out, support)

    exact_tokens = geometry.double(), texture.double()
    expected = splat_gaussians_reference(*exact_tokens, height, width, support)
    expected_grads = splat_gaussians_backward_reference(*exact_tokens, grad_out.double(), support)
    expect_close(out, expected, 5e-6 + rounding, "map")
    expect_close(grad_texture, expected_grads[1], 5e-6 + rounding, "texture gradient")
    for i, name in enumerate(["sigma_x", "sigma_y", "rho", "x", "y"]):
        expect_close(grad_geometry[..., i], expected_grads[0][..., i], 2e-5, f"gradient of {name}")


def expect_case(library: SplatLibrary, case: tuple, device: str) -> None:
    """[`expect_definition`] for one of CASES."""
    *sizes, height, width, support, dtype = case
    geometry, texture = random_tokens(*sizes)
    expect_definition(library, geometry.to(device), texture.to(device, dtype), height, width, support)
