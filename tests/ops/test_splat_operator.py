"""The operator `gpstoken::splat_gaussians`: gradients, torch's machinery, arguments."""

from __future__ import annotations

import pytest
import torch
from splat_cases import (
    assert_close,
    assert_is_reference,
    distance,
    make_tokens,
    needs_native,
    random_upstream,
    reference,
    run,
    tolerance,
)
from torch import Tensor

from gpstoken_diffusers.ops.splat import splat_gaussians
from gpstoken_diffusers.ops.splat_reference import pixel_centers, splat_gaussians_reference

# ---- gradients ----


def test_the_references_gradient_is_autograds() -> None:
    geometry, texture = (tensor.double() for tensor in make_tokens(2, 17, 3))
    upstream = random_upstream(texture, 13, 18)
    written, found = (run(splat, geometry, texture, upstream) for splat in (reference, splat_gaussians_reference))
    assert_close(written, found, 1e-12)


def test_the_reference_in_several_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, texture = make_tokens(2, 17, 3)
    upstream = random_upstream(texture, 13, 18)
    whole = run(reference, geometry, texture, upstream)
    monkeypatch.setattr("gpstoken_diffusers.ops.splat_reference._WEIGHTS_PER_BAND", 3 * 2 * 17 * 18)
    assert_close(run(reference, geometry, texture, upstream), whole, tolerance(geometry, 13 * 18))


def test_gradcheck_float64() -> None:
    """The operator where the reference serves it. Support 40 keeps pixels from crossing a box edge."""
    geometry, texture = (tensor.double().requires_grad_() for tensor in make_tokens(2, 3, 2, sigma=0.6))
    assert torch.autograd.gradcheck(lambda g, t: splat_gaussians(g, t, 5, 7, 40.0), (geometry, texture))


@needs_native
@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # gradcheck would rather have float64
def test_gradcheck_native() -> None:
    """Finite differences of the native forward in float32: steps of 1e-2 err by 1e-4 through curvature."""
    geometry, texture = (tensor.requires_grad_() for tensor in make_tokens(1, 3, 2, sigma=0.8))
    with torch.no_grad():
        geometry[..., 2] *= 0.5
        geometry[..., :2].clamp_(min=0.4)
    assert torch.autograd.gradcheck(
        lambda g, t: splat_gaussians(g, t, 5, 7, 40.0), (geometry, texture), eps=1e-2, atol=5e-3, rtol=5e-3
    )


# ---- torch's machinery ----


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
    upstream = random_upstream(texture, 13, 18)
    expected = run(splat_gaussians, geometry, texture, upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(run(splat_gaussians, geometry, texture, upstream), expected, 0.0)


def test_inputs_in_other_precisions_and_layouts() -> None:
    """Geometry in float64 is evaluated in float64, geometry in half precision in float32; strides do not matter."""
    geometry, texture = make_tokens(2, 17, 6)
    upstream = random_upstream(texture, 12, 19)
    out, grad_geometry, grad_texture = run(splat_gaussians, geometry.double(), texture, upstream)
    exact = splat_gaussians_reference(geometry.double(), texture.double(), 12, 19)
    assert torch.equal(out, exact.float())
    assert grad_texture.dtype == torch.float32 and grad_geometry.dtype == torch.float64
    half = geometry.bfloat16()
    out, grad_geometry, _ = run(splat_gaussians, half, texture, upstream)
    assert grad_geometry.dtype == torch.bfloat16
    assert torch.equal(out, splat_gaussians(half.float(), texture, 12, 19))
    strided = torch.cat([geometry, texture], -1).transpose(0, 1).contiguous().transpose(0, 1)
    leaves = strided[..., :5].requires_grad_(), strided[..., 5:].requires_grad_()
    assert not any(leaf.is_contiguous() for leaf in leaves)
    out = splat_gaussians(*leaves, 12, 19)
    grads = torch.autograd.grad(out, leaves, upstream.transpose(2, 3).contiguous().transpose(2, 3))
    assert all(map(torch.equal, (out, *grads), run(splat_gaussians, geometry, texture, upstream)))


def test_where_no_library_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device gives the same shapes and types; the reference can be asked for."""
    geometry, texture = make_tokens(2, 6, 3)
    out = splat_gaussians(geometry.to("meta"), texture.bfloat16().to("meta"), 9, 11)
    assert out.shape == (2, 3, 9, 11) and out.dtype == torch.bfloat16 and out.device.type == "meta"
    monkeypatch.setenv("GPSTOKEN_BACKEND", "reference")
    assert torch.equal(splat_gaussians(geometry, texture, 9, 11), splat_gaussians_reference(geometry, texture, 9, 11))
    assert_is_reference(splat_gaussians, geometry, texture, 9, 11)


# ---- pixel centres and arguments ----


def test_pixel_centers() -> None:
    assert pixel_centers(1).tolist() == [0.0]
    assert pixel_centers(2).tolist() == [-1.0, 1.0]
    assert pixel_centers(5).tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    centers = pixel_centers(1001)
    expected = torch.tensor([2.0 * i / 1000 - 1.0 for i in range(1001)], dtype=torch.float64).float()
    assert centers.dtype == torch.float32 and torch.equal(centers, expected)


GEOMETRY, TEXTURE = torch.zeros(2, 4, 5), torch.zeros(2, 4, 3)


@pytest.mark.parametrize("geometry, texture, height, width, support, error, message", [
    ([[1.0] * 5], TEXTURE, 4, 4, 3.0, TypeError, "geometry: expected a floating-point tensor"),
    (GEOMETRY, TEXTURE.int(), 4, 4, 3.0, TypeError, "texture: expected a floating-point tensor"),
    (GEOMETRY[0], TEXTURE[0], 4, 4, 3.0, ValueError, r"\(batch, tokens, 5\)"),
    (torch.zeros(2, 4, 6), TEXTURE, 4, 4, 3.0, ValueError, r"got \(2, 4, 6\)"),
    (GEOMETRY, TEXTURE[:, :3], 4, 4, 3.0, ValueError, r"\(2, 4, any\).*got \(2, 3, 3\)"),
    (GEOMETRY, TEXTURE[:1], 4, 4, 3.0, ValueError, r"got \(1, 4, 3\)"),
    (GEOMETRY, TEXTURE.to("meta"), 4, 4, 3.0, ValueError, "geometry on cpu but texture on meta"),
    (GEOMETRY, TEXTURE, 0, 4, 3.0, ValueError, "at least 1, got 0 x 4"),
    (GEOMETRY, TEXTURE, 4, -1, 3.0, ValueError, "at least 1, got 4 x -1"),
    (GEOMETRY, TEXTURE, 4, 4, 0.0, ValueError, "support: expected a positive"),
    (GEOMETRY, TEXTURE, 4, 4, float("nan"), ValueError, "support: expected a positive"),
    (GEOMETRY, TEXTURE, 4, 4, float("inf"), ValueError, "support: expected a positive"),
])  # fmt: skip
def test_bad_arguments(geometry, texture, height, width, support, error, message) -> None:
    with pytest.raises(error, match=message):
        splat_gaussians(geometry, texture, height, width, support)
