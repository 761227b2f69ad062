"""What the tests of splatting share: implementations, cases, random tokens, comparison with the reference."""

from __future__ import annotations

import ctypes
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulation.toolchain import SplatLibrary, compile_emulation, find_compiler
from torch import Tensor

from gpstoken_diffusers.ops.backend import native
from gpstoken_diffusers.ops.splat import splat_gaussians
from gpstoken_diffusers.ops.splat_reference import (
    pixel_centers,
    splat_gaussians_backward_reference,
    splat_gaussians_reference,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Splat = Callable[..., Tensor]  # as `splat_gaussians`

needs_native = pytest.mark.skipif(native.library("cpu") is None, reason=native.why_missing("cpu") or "it is there")
needs_emulation = pytest.mark.skipif(
    sys.platform != "linux" or find_compiler() is None, reason="the emulation needs Linux and a C++ compiler"
)

# batch, tokens, channels, height, width, support, dtype, sigma. Each number of channels takes another kernel, or the
# tail of one.
CASES = {
    "one of everything": (1, 1, 1, 1, 1, 3.0, F32, 0.5),
    "no tokens": (1, 0, 3, 4, 5, 3.0, F32, 0.1),
    "no images": (0, 4, 3, 8, 9, 3.0, F32, 0.1),
    "no channels": (1, 17, 0, 3, 3, 3.0, F32, 0.1),
    "one row": (2, 17, 5, 1, 40, 3.0, F16, 0.3),
    "one column": (2, 17, 32, 40, 1, 5.0, BF16, 0.3),
    "one pixel, many tokens": (3, 257, 1, 1, 1, 3.0, F32, 0.5),
    "primes": (3, 17, 5, 17, 31, 5.0, F32, 0.2),
    "checkpoint S64": (2, 64, 16, 64, 64, 3.0, F32, 0.08),
    "support 5": (2, 17, 16, 33, 65, 5.0, F32, 0.1),
    "support 0.5": (2, 64, 16, 33, 47, 0.5, F32, 0.1),
    "tokens below a pixel": (1, 257, 33, 33, 65, 3.0, F32, 0.004),
    "tokens larger than the image": (1, 9, 4, 40, 24, 3.0, F32, 5.0),
    "float16": (2, 64, 16, 33, 47, 3.0, F16, 0.1),
    "bfloat16": (1, 257, 16, 33, 65, 3.0, BF16, 0.1),
    "130 channels": (1, 17, 130, 7, 5, 3.0, F16, 0.2),
    "blocks of tokens, the last not full": (5, 257, 32, 7, 5, 3.0, F32, 0.1),
    "256 tiles: slices of 16 channels": (256, 2, 13, 2, 2, 3.0, F16, 0.3),
    "260 tiles: slices of 32 channels": (130, 5, 33, 3, 3, 3.0, F32, 0.3),
    "more tokens in a tile than its list holds": (3, 700, 4, 5, 5, 5.0, F16, 0.3),
}
LARGE_CASES = {  # too slow for the emulation
    "checkpoint L256": (2, 256, 32, 64, 64, 3.0, F32, 0.04),
    "wide": (1, 64, 16, 8, 200, 3.0, F32, 0.05),
    "tall": (1, 64, 16, 200, 8, 3.0, F32, 0.05),
    "many bands and images": (5, 40, 3, 130, 70, 3.0, F32, 0.1),
    "a buffer per image": (3, 4, 1, 600, 600, 3.0, F32, 0.1),
}


def of_library(library: SplatLibrary | SimpleNamespace, device: str = "cpu") -> Splat:
    """`library`'s forward and backward functions as one that autograd differentiates, from and to the CPU."""

    class Splatting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, geometry: Tensor, texture: Tensor, height: int, width: int, support: float = 3.0) -> Tensor:
            ctx.inputs, ctx.support = (geometry.contiguous().to(device), texture.contiguous().to(device)), support
            return library.forward(*ctx.inputs, height, width, support).cpu()

        @staticmethod
        def backward(ctx, grad_out: Tensor) -> tuple:
            grads = library.backward(*ctx.inputs, grad_out.contiguous().to(device), ctx.support)
            return *(grad.cpu() for grad in grads), None, None, None

    return Splatting.apply


@functools.cache
def emulated_library() -> ctypes.CDLL:
    """csrc/splat_cuda.cu, whole, as a library for the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        options = "-O2", "-march=native"
        return ctypes.CDLL(str(compile_emulation("emulated_library.cpp", Path(folder, "libsplat.so"), *options)))


def real_library() -> SplatLibrary:
    """The kernels on the current GPU; skips the test, saying so, where they cannot run."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if native.library("cuda") is None:
        pytest.skip(f"the CUDA library is not there: {native.why_missing('cuda')}")
    return SplatLibrary(native.library("cuda"))


reference = of_library(SimpleNamespace(forward=splat_gaussians_reference, backward=splat_gaussians_backward_reference))
# Each is called when a test asks for it.
IMPLEMENTATIONS = {
    "native": lambda: splat_gaussians,
    "reference": lambda: reference,
    "reference by autograd": lambda: splat_gaussians_reference,
    "emulated CUDA": lambda: of_library(SplatLibrary(emulated_library())),
    "CUDA": lambda: of_library(real_library(), "cuda"),
}
_MARKS = {"native": needs_native, "emulated CUDA": needs_emulation, "CUDA": pytest.mark.gpu}


def implementations(*names: str) -> pytest.MarkDecorator:
    """Parametrizes a test by the fixture `splat`, over all implementations or the named ones."""
    params = [pytest.param(name, marks=_MARKS.get(name, ())) for name in names or IMPLEMENTATIONS]
    return pytest.mark.parametrize("splat", params, indirect=True)


def make_tokens(batch: int, tokens: int, channels: int, seed: int = 0, sigma: float = 0.1) -> tuple[Tensor, Tensor]:
    """Random tokens: sigmas from a tenth to ten times `sigma`, |rho| < 0.95, some centres off the image."""
    g = torch.Generator().manual_seed(seed)
    sigmas = sigma * torch.exp(torch.randn(batch, tokens, 2, generator=g).clamp(-2.3, 2.3))
    rho = 0.95 * (2 * torch.rand(batch, tokens, 1, generator=g) - 1)
    centers = 2.4 * torch.rand(batch, tokens, 2, generator=g) - 1.2
    return torch.cat([sigmas, rho, centers], -1), torch.randn(batch, tokens, channels, generator=g)


def away_from_edges(geometry: Tensor, height: int, width: int, support: float) -> Tensor:
    """Widens tokens with a pixel so near to their box's edge that float32 may decide either way."""
    geometry = geometry.double()
    for axis, n in enumerate([width, height]):
        while True:
            sigma, center = geometry[..., axis, None], geometry[..., 3 + axis, None]
            to_edge = ((pixel_centers(n) - center).abs() - support * sigma).abs().amin(-1)
            near = to_edge < 2e-6 * (1 + support * geometry[..., axis])
            if not near.any():
                break
            geometry[..., axis] *= torch.where(near, 1.001, 1.0)
    return geometry.float()


def tolerance(geometry: Tensor, pixels: int, dtype: torch.dtype = F32) -> float:
    """What a result in float32 may be off by, relative to the largest entry of its tensor.

    Of the weights: some roundings (2^-24 each), times what 1 / sqrt(1 - rho^2) makes of them. Of a sum over n pixels
    with either sign: about sqrt(n) / 2.5 roundings if one term is added after the other. Libraries for matrices do so
    on some processors and for some shapes, in small blocks on others: sqrt(n) covers both. At the end one rounding to
    `dtype`, half a unit in the last place.
    """
    slanted = (1 - geometry[..., 2].double() ** 2).clamp(min=1e-30).rsqrt().max().item() if geometry.numel() else 1.0
    rounding = {F32: 0.0, F16: 2.0**-11, BF16: 2.0**-8}[dtype]
    return (16 * slanted + pixels**0.5) * 2**-24 + rounding


def run(splat: Splat, geometry: Tensor, texture: Tensor, upstream: Tensor, support: float = 3.0) -> tuple[Tensor, ...]:
    """(map, grad_geometry, grad_texture), where `upstream` is the gradient of the map."""
    leaves = geometry.detach().clone().requires_grad_(), texture.detach().clone().requires_grad_()
    out = splat(*leaves, *upstream.shape[2:], support)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def random_upstream(texture: Tensor, height: int, width: int, seed: int = 1) -> Tensor:
    """A gradient for the map of these textures."""
    shape = len(texture), texture.shape[2], height, width
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(texture.dtype)


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], allowed: float) -> None:
    """Compares maps, each geometry gradient by itself (their scales differ by far) and texture gradients."""
    names = ["map", "grad sigma_x", "grad sigma_y", "grad rho", "grad x", "grad y", "grad texture"]
    split = [(a, *b.unbind(-1), c) for a, b, c in (actual, expected)]
    far = {n: d for n, x, y in zip(names, *split, strict=True) if not (d := distance(x, y)) <= allowed}
    assert not far, f"beyond {allowed:.1e}: {far}"


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry of `expected`."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-30))


def assert_is_reference(
    splat: Splat, geometry: Tensor, texture: Tensor, height: int, width: int, support: float = 3.0, slack: float = 1.0
) -> None:
    """Map and gradients against the reference in float64, within `slack` times [`tolerance`]."""
    geometry = away_from_edges(geometry, height, width, support)
    upstream = random_upstream(texture, height, width)
    actual = run(splat, geometry, texture, upstream, support)
    assert actual[0].dtype == actual[2].dtype == texture.dtype and actual[1].dtype == F32
    expected = run(reference, geometry.double(), texture.double(), upstream.double(), support)
    assert_close(actual, expected, slack * tolerance(geometry, height * width, texture.dtype))


def assert_case(splat: Splat, case: tuple) -> None:
    """[`assert_is_reference`] for one of CASES."""
    batch, tokens, channels, height, width, support, dtype, sigma = case
    geometry, texture = make_tokens(batch, tokens, channels, sigma=sigma)
    assert_is_reference(splat, geometry, texture.to(dtype), height, width, support)
