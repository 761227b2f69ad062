"""The operator `gpstoken::splat_gaussians`: gradients, torch's machinery, arguments."""

from __future__ import annotations

import pytest
import torch
from splat_cases import (
    FLOAT32,
    assert_close,
    distance,
    make_tokens,
    needs_native,
    run,
)
from torch import Tensor

from gpstoken_diffusers.ops.splat import splat_gaussians
from gpstoken_diffusers.ops.splat_reference import (
    pixel_centers,
    splat_gaussians_backward_reference,
    splat_gaussians_reference,
)


def test_backward_definition_is_the_gradient_of_the_forward_one() -> None:
    geometry, texture = (tensor.double() for tensor in make_tokens(2, 17, 3))
    out, *expected = run(splat_gaussians_reference, geometry, texture, (13, 18), seed=5)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).double()
    actual = splat_gaussians_backward_reference(geometry, texture, upstream)
    assert_close((out, *actual), (out, *expected), 1e-12)


def test_definition_in_several_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, texture = make_tokens(2, 17, 3)
    upstream = torch.randn(2, 3, 13, 18)
    whole = splat_gaussians_backward_reference(geometry, texture, upstream)
    expected = (splat_gaussians_reference(geometry, texture, 13, 18), *whole)
    monkeypatch.setattr("gpstoken_diffusers.ops.splat_reference._WEIGHTS_PER_BAND", 3 * 2 * 17 * 18)
    banded = splat_gaussians_backward_reference(geometry, texture, upstream)
    assert_close((splat_gaussians_reference(geometry, texture, 13, 18), *banded), expected, FLOAT32)


def test_gradcheck_float64() -> None:
    """The operator on its plain float64 path. Support 40 keeps pixels from crossing a box edge."""
    geometry, texture = (tensor.double().requires_grad_() for tensor in make_tokens(2, 3, 2, sigma=0.4))
    assert torch.autograd.gradcheck(lambda g, t: splat_gaussians(g, t, 5, 7, 40.0), (geometry, texture))


@needs_native
@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # gradcheck would rather have float64
def test_gradcheck_native() -> None:
    """Finite differences of the native forward in float32: steps of 1e-2 err by 1e-4 through curvature."""
    geometry, texture = (tensor.requires_grad_() for tensor in make_tokens(1, 3, 2, sigma=0.8))
    with torch.no_grad():
        geometry[..., 2] *= 0.5
    assert torch.autograd.gradcheck(
        lambda g, t: splat_gaussians(g, t, 5, 7, 40.0),
        (geometry, texture),
        eps=1e-2,
        atol=5e-3,
        rtol=5e-3,
        nondet_tol=0.0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    geometry, texture = make_tokens(2, 6, 3)
    geometry = geometry.double() if dtype == torch.float64 else geometry
    texture = texture.to(dtype)
    leaves = (geometry.clone().requires_grad_(), texture.clone().requires_grad_())
    torch.library.opcheck(torch.ops.gpstoken.splat_gaussians.default, (*leaves, 9, 11, 3.0))
    upstream = torch.randn(2, 3, 9, 11).to(dtype)
    torch.library.opcheck(torch.ops.gpstoken.splat_gaussians_backward.default, (geometry, texture, upstream, 3.0))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(backend: str) -> None:
    def loss(geometry: Tensor, texture: Tensor, height: int) -> Tensor:
        return (splat_gaussians(geometry.sigmoid(), texture * 2, height, 10) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
    for tokens, height in ((6, 8), (9, 12)):  # the second with other sizes
        leaves = [tensor.requires_grad_() for tensor in make_tokens(2, tokens, 3)]
        expected = torch.autograd.grad(loss(*leaves, height), leaves)
        actual = torch.autograd.grad(compiled(*leaves, height), leaves)
        for a, b in zip(actual, expected, strict=True):
            assert distance(a, b) < 1e-5  # inductor fuses the sigmoid its own way


@pytest.mark.parametrize("backend", [pytest.param("auto", marks=needs_native), "reference"])
def test_autocast_changes_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPSTOKEN_BACKEND", backend)
    geometry, texture = make_tokens(2, 17, 3)
    expected = run(splat_gaussians, geometry, texture, (13, 18))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(splat_gaussians, geometry, texture, (13, 18))
    assert_close(actual, expected, 0.0)


def test_float64_geometry_is_evaluated_in_float64() -> None:
    geometry, texture = make_tokens(1, 17, 3)
    out, grad_geometry, grad_texture = run(splat_gaussians, geometry.double(), texture, (13, 18))
    exact = splat_gaussians_reference(geometry.double(), texture.double(), 13, 18)
    assert out.dtype == grad_texture.dtype == torch.float32 and grad_geometry.dtype == torch.float64
    assert torch.equal(out, exact.float())


def test_half_precision_geometry_is_evaluated_in_float32() -> None:
    geometry, texture = make_tokens(1, 17, 3)
    half = geometry.bfloat16().requires_grad_()
    out = splat_gaussians(half, texture, 13, 18)
    assert torch.equal(out, splat_gaussians(half.detach().float(), texture, 13, 18))
    out.sum().backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


def test_meta_tensors() -> None:
    geometry, texture = (tensor.to("meta") for tensor in make_tokens(2, 6, 3))
    out = splat_gaussians(geometry, texture.bfloat16(), 9, 11)
    assert out.shape == (2, 3, 9, 11) and out.dtype == torch.bfloat16 and out.device.type == "meta"


def test_forced_reference_gives_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, texture = make_tokens(2, 17, 3)
    monkeypatch.setenv("GPSTOKEN_BACKEND", "reference")
    assert torch.equal(splat_gaussians(geometry, texture, 9, 11), splat_gaussians_reference(geometry, texture, 9, 11))


# ---- pixel centres and arguments ----


def test_pixel_centers() -> None:
    assert pixel_centers(1).tolist() == [0.0]
    assert pixel_centers(2).tolist() == [-1.0, 1.0]
    assert pixel_centers(5).tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    centers = pixel_centers(1001)
    expected = torch.tensor([2.0 * i / 1000 - 1.0 for i in range(1001)], dtype=torch.float64).float()
    assert centers.dtype == torch.float32 and torch.equal(centers, expected)


def test_one_pixel_axes_sit_at_zero() -> None:
    geometry = torch.tensor([[[0.5, 0.5, 0.0, 0.0, 0.0]]])
    assert splat_gaussians(geometry, torch.ones(1, 1, 1), 1, 1).item() == 1.0


GEOMETRY, TEXTURE = torch.zeros(2, 4, 5), torch.zeros(2, 4, 3)
BAD_ARGUMENTS = {
    "geometry is a list": (
        [[1.0] * 5],
        TEXTURE,
        4,
        4,
        3.0,
        TypeError,
        "geometry: expected a floating-point tensor",
    ),
    "integer texture": (
        GEOMETRY,
        TEXTURE.int(),
        4,
        4,
        3.0,
        TypeError,
        "texture: expected a floating-point tensor",
    ),
    "no batch": (GEOMETRY[0], TEXTURE[0], 4, 4, 3.0, ValueError, r"\(batch, tokens, 5\)"),
    "six numbers": (torch.zeros(2, 4, 6), TEXTURE, 4, 4, 3.0, ValueError, r"got \(2, 4, 6\)"),
    "other token count": (GEOMETRY, TEXTURE[:, :3], 4, 4, 3.0, ValueError, r"\(2, 4, any\).*got \(2, 3, 3\)"),
    "other batch": (GEOMETRY, TEXTURE[:1], 4, 4, 3.0, ValueError, r"got \(1, 4, 3\)"),
    "other device": (
        GEOMETRY,
        TEXTURE.to("meta"),
        4,
        4,
        3.0,
        ValueError,
        "geometry is on cpu but texture on meta",
    ),
    "no height": (GEOMETRY, TEXTURE, 0, 4, 3.0, ValueError, "at least 1, got 0 x 4"),
    "negative width": (GEOMETRY, TEXTURE, 4, -1, 3.0, ValueError, "at least 1, got 4 x -1"),
    "support 0": (GEOMETRY, TEXTURE, 4, 4, 0.0, ValueError, "support must be a positive"),
    "support NaN": (GEOMETRY, TEXTURE, 4, 4, float("nan"), ValueError, "support must be a positive"),
    "support infinite": (GEOMETRY, TEXTURE, 4, 4, float("inf"), ValueError, "support must be a positive"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments(case: tuple) -> None:
    *arguments, error, message = case
    with pytest.raises(error, match=message):
        splat_gaussians(*arguments)
