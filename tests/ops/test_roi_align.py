"""RoIAlign: the native version and the reference against torchvision's kernel itself, values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torchvision
from package_process import run_code_on
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from gpstoken_diffusers.ops.backend import native
from gpstoken_diffusers.ops.roi_align import roi_align

needs_native = pytest.mark.skipif(native.library("cpu") is None, reason=native.why_missing("cpu") or "none")

# (B, C, h, w), cells along an axis, scale: one of everything, channels that leave vectors half filled or fill several,
# cells that fill no vector, maps that are not square, the shipped model's and the released models' sizes.
CASES = [
    ((1, 1, 1, 1), 1, 1.0),
    ((2, 17, 9, 13), 3, 0.5),
    ((3, 32, 17, 5), 7, 0.25),
    ((1, 37, 33, 64), 8, 1.0),
    ((2, 128, 64, 64), 4, 0.25),
]
# What a result may be off by, of its largest value. Positions are float32: on a map of 64 features they are rounded by
# 4e-6, which changes a blend by as much of the difference of two features; then sums of some dozen terms, and one
# rounding of the type, half a unit of its last place.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
DTYPES = list(TOLERANCE)


def regions_for(shape: tuple[int, ...], scale: float, seed: int = 0) -> Tensor:
    """(B, N, 4) int32: at random, in the corners, all of the map, single pixels, thin ones, and beyond the borders."""
    batch_size, _, height, width = shape
    right, bottom = int(width / scale) - 1, int(height / scale) - 1
    random = torch.Generator().manual_seed(seed)
    ends = torch.rand(batch_size, 12, 2, 2, generator=random).sort(dim=2).values
    ends = (ends * torch.tensor([right + 1, bottom + 1])).int().clamp(max=torch.tensor([right, bottom]))
    special = [
        [0, 0, right, bottom],
        [0, 0, 0, 0],
        [right, bottom, right, bottom],
        [0, 0, right // 2, bottom // 3],
        [right - right // 3, bottom - bottom // 2, right, bottom],
        [right // 2, 0, right // 2, bottom],
        [0, bottom // 2, right, bottom // 2 + 1],
        [-7, -5, right // 2, bottom + 9],
        [2 * right + 9, 0, 2 * right + 13, bottom],
    ]
    special = torch.tensor(special, dtype=torch.int32).expand(batch_size, -1, -1)
    return torch.cat([special, ends.flatten(2).int()], dim=1)


def inputs(case: tuple, dtype: torch.dtype, layout: str = "channels_last") -> tuple[Tensor, Tensor, Tensor]:
    """Features, regions and a gradient for the cells."""
    shape, size, scale = case
    random = torch.Generator().manual_seed(1)
    features = torch.randn(shape, generator=random).to(dtype)
    regions = regions_for(shape, scale)
    grad = torch.randn(*regions.shape[:2], shape[1], size, size, generator=random).to(dtype)
    if layout == "sliced":  # every other column of a wider map, with other numbers between
        wide = torch.full((*shape[:3], 2 * shape[3]), 1e4, dtype=dtype)
        wide[..., ::2] = features
        features = wide[..., ::2]
        grad = grad.transpose(3, 4).contiguous().transpose(3, 4)
    elif layout == "channels_last":
        features = features.contiguous(memory_format=torch.channels_last)
    return features, regions, grad


def torchvisions(features: Tensor, regions: Tensor, size: int, scale: float) -> Tensor:
    cells = torchvision.ops.roi_align(features, list(regions.to(features.dtype)), size, scale, aligned=True)
    return cells.unflatten(0, regions.shape[:2])


def with_gradient(function, features: Tensor, regions: Tensor, grad: Tensor, *settings) -> list[Tensor]:
    leaf = features.clone(memory_format=torch.preserve_format).requires_grad_()
    cells = function(leaf, regions, *settings)
    return [cells.detach(), *torch.autograd.grad(cells, leaf, grad.to(cells.dtype))]


def check(case: tuple, dtype: torch.dtype, layout: str) -> None:
    _, size, scale = case
    features, regions, grad = inputs(case, dtype, layout)
    expected = with_gradient(torchvisions, features.double(), regions, grad.double(), size, scale)
    actual = with_gradient(roi_align, features, regions, grad, size, scale)
    assert actual[0].is_contiguous() and actual[1].is_contiguous(memory_format=torch.channels_last)
    for name, ours, theirs in zip(("cells", "gradient"), actual, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        error, scale_of = (ours.double() - theirs).abs().max().item(), theirs.abs().max().clamp(min=1e-3).item()
        assert error <= TOLERANCE[dtype] * scale_of, (name, error / scale_of)
    # A single pixel has no extent from its index to its index, and what lies outside the map has no features.
    assert not actual[0][:, [1, 2, 8]].any()


@needs_native
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "sliced"])
def test_native_equals_torchvision(case, dtype, layout):
    check(case, dtype, layout)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_library(monkeypatch, case, dtype):
    monkeypatch.setenv("GPSTOKEN_BACKEND", "reference")
    check(case, dtype, "contiguous")


ONE_INSTRUCTION_SET = """
import itertools, torch
from gpstoken_diffusers.ops.backend import native
from test_roi_align import CASES, DTYPES, check
for case, dtype in itertools.product(CASES, DTYPES):
    check(case, dtype, "channels_last")
print(native.library("cpu").gpstoken_cpu_isa().decode())
"""


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    used = run_code_on(isa, ONE_INSTRUCTION_SET)
    if used != isa:
        pytest.skip(f"this processor has no {isa}; {used} was tested in its place")


@needs_native
@pytest.mark.parametrize("scale", [1 / 3, 1 / 7, 0.3])
def test_roundings_decide_as_in_torchvision(scale):
    """Where a scale is no power of two, extents are rounded, and one may ask for one sample more: here 24 / 3 = 8."""
    features = torch.randn(1, 5, 30, 30, generator=torch.Generator().manual_seed(0))
    starts = torch.arange(0, 40, dtype=torch.int32)
    boxes = [starts, starts, starts + round(8 / scale), starts + round(16 / scale)]
    regions = torch.stack(boxes, dim=-1)[None]
    theirs = torchvisions(features, regions, 4, scale)
    # The same positions in float32, so that only the order of a sum's terms differs: some units of its last place.
    torch.testing.assert_close(roi_align(features, regions, 4, scale), theirs, rtol=0, atol=2e-6)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128, 64, 64), (1, 70, 64, 64), (3, 33, 50, 64)])
def test_threads_do_not_matter(dtype, shape):
    before, results = torch.get_num_threads(), []
    case = (shape, 4, 0.25)
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(with_gradient(roi_align, *inputs(case, dtype), *case[1:]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(first, tensor) for first, tensor in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_kinds_of_regions_do_not_matter(monkeypatch, backend):
    monkeypatch.setenv("GPSTOKEN_BACKEND", backend)
    features, regions, _ = inputs(CASES[1], torch.float32)
    expected = roi_align(features, regions, 3, 0.5)
    for kind in (torch.int64, torch.float32, torch.float64, torch.float16):
        assert torch.equal(roi_align(features, regions.to(kind), 3, 0.5), expected)
    strided = torch.stack([regions, regions + 5], dim=-1)[..., 0]
    assert torch.equal(roi_align(features, strided, 3, 0.5), expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("batch_size, number", [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_read(monkeypatch, backend, batch_size, number):
    monkeypatch.setenv("GPSTOKEN_BACKEND", backend)
    features = torch.randn(batch_size, 8, 4, 4, requires_grad=True)
    cells = roi_align(features, torch.zeros(batch_size, number, 4), 2, 1.0)
    assert cells.shape == (batch_size, number, 8, 2, 2)
    (grad,) = torch.autograd.grad(cells.sum(), features)
    assert grad.shape == features.shape and not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    ops = torch.ops.gpstoken
    for layout in ("channels_last", "contiguous"):
        features, regions, grad = inputs(((2, 5, 6, 4), 3, 0.5), dtype, layout)
        torch.library.opcheck(ops.roi_align.default, (features.requires_grad_(), regions, 3, 0.5))
        torch.library.opcheck(ops.roi_align_backward.default, (grad.requires_grad_(), regions, 6, 4, 0.5))


def test_compile_fullgraph():
    def function(features: Tensor, regions: Tensor) -> Tensor:
        return roi_align(features * 2, regions, 3, 0.5).flatten(0, 1) + 1

    features, regions, grad = inputs(CASES[1], torch.float32)
    grad = grad.flatten(0, 1)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        with_gradient(compiled, features, regions, grad), with_gradient(function, features, regions, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()


@needs_native
def test_derivative_of_the_gradient():
    """torchvision has none. The cells' gradient is linear, and its derivative is the function itself."""
    features, regions, grad = inputs(CASES[1], torch.float32)
    grad.requires_grad_()
    leaf = features.clone().requires_grad_()
    (first,) = torch.autograd.grad(roi_align(leaf, regions, 3, 0.5), leaf, grad, create_graph=True)
    (second,) = torch.autograd.grad(first, grad, features)
    assert torch.equal(second, roi_align(features, regions, 3, 0.5))


def test_checkpointing_and_autocast():
    """The map's type decides, and a second forward pass for the gradient gives what the first would have."""
    features, regions, grad = inputs(CASES[2], torch.bfloat16)
    expected = with_gradient(roi_align, features, regions, grad, 7, 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        again = with_gradient(
            lambda *arguments: checkpoint(roi_align, *arguments, use_reentrant=False), features, regions, grad, 7, 0.25
        )
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, expected, strict=True))
        assert roi_align(features.float(), regions, 7, 0.25).dtype == torch.float32


FEATURES, REGIONS = torch.zeros(1, 3, 4, 4), torch.tensor([[[0.0, 0.0, 3.0, 3.0]]])
WRONG_REGIONS = [[3.0, 0, 2, 3], [0, 3, 3, 2.5], [float("nan"), 0, 3, 3], [0, 0, float("inf"), 3], [0, 0, 3, 1e9]]


@pytest.mark.parametrize("error, arguments, message", [
    (ValueError, (FEATURES[0], REGIONS, 2, 1.0), r"\(3, 4, 4\)"),
    (ValueError, (FEATURES, REGIONS[0], 2, 1.0), r"\(1, 4\)"),
    (ValueError, (FEATURES, REGIONS[..., :3], 2, 1.0), r"\(1, 1, 3\)"),
    (ValueError, (FEATURES, REGIONS.expand(2, -1, -1), 2, 1.0), r"\(2, 1, 4\)"),
    (ValueError, (FEATURES, REGIONS.to("meta"), 2, 1.0), "on meta"),
    (ValueError, (FEATURES, REGIONS, 0, 1.0), "positive"),
    (ValueError, (FEATURES, REGIONS, 2, -1.0), "positive"),
    (ValueError, (FEATURES, REGIONS, 2, float("nan")), "positive"),
    (TypeError, (FEATURES.int(), REGIONS, 2, 1.0), "int32"),
    (TypeError, (FEATURES, REGIONS > 1, 2, 1.0), "bool"),
    *((ValueError, (FEATURES, torch.tensor([[box]]), 2, 1.0), "expected finite regions") for box in WRONG_REGIONS),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input(monkeypatch, backend, error, arguments, message):
    monkeypatch.setenv("GPSTOKEN_BACKEND", backend)
    with pytest.raises(error, match=message):
        roi_align(*arguments)


def test_another_device_takes_the_reference():
    """torchvision's operation there; tensors without data show that types and shapes come out the same."""
    with FakeTensorMode():
        features = torch.empty(2, 17, 9, 13, device="cuda", dtype=torch.bfloat16)
        regions = torch.empty(2, 5, 4, device="cuda", dtype=torch.int32)
        cells = roi_align(features, regions, 3, 0.5)
    assert cells.shape == (2, 5, 17, 3, 3) and cells.dtype == torch.bfloat16 and cells.device.type == "cuda"


def test_cases_have_awkward_regions():
    for (shape, _, scale), seed in itertools.product(CASES[1:], (0, 1)):
        extents = regions_for(shape, scale, seed)[..., 2:] - regions_for(shape, scale, seed)[..., :2]
        assert (extents >= 0).all() and (extents == 0).any() and (extents > 0).any()
