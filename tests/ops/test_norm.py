"""Normalisation of maps: the native versions against the references, values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from package_process import run_code_on
from torch import Tensor

from gpstoken_diffusers.models.norms import tile_group_norm
from gpstoken_diffusers.ops.backend import native
from gpstoken_diffusers.ops.group_norm import group_norm, group_statistics, tile_norm
from gpstoken_diffusers.ops.norm_reference import (
    group_norm_backward_reference,
    group_norm_reference,
    group_statistics_reference,
    pixel_norm_backward_reference,
    pixel_norm_reference,
    tile_norm_reference,
)
from gpstoken_diffusers.ops.pixel_norm import pixel_norm

needs_native = pytest.mark.skipif(native.library("cpu") is None, reason=native.why_missing("cpu") or "none")

# (B, C, H, W) and groups: one of everything, odd channels that leave vectors half filled, blocks of pixels that are
# not full, real widths.
SHAPES = [
    ((1, 1, 1, 1), 1),
    ((2, 17, 3, 5), 17),
    ((1, 32, 7, 9), 32),
    ((3, 48, 1, 70), 3),
    ((2, 192, 8, 8), 32),
    ((1, 128, 33, 64), 32),
    ((1, 1, 40, 33), 1),
    ((2, 31, 1, 1), 1),
    ((1, 33, 24, 50), 11),
]
# What a result may be off by, of its largest value: a few roundings of the type; float32 sums of some thousand terms.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "channels_last", seed: int = 0) -> list[Tensor]:
    """A map, weight, bias and a gradient for the result."""
    random = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=random) for _ in range(2))
    x = x * 2 + 0.7
    weight, bias = (torch.randn(shape[1], generator=random) for _ in range(2))
    if layout == "sliced":  # every other column of a wider map, with other numbers between
        wide = torch.full((*shape[:3], 2 * shape[3]), 1e6)
        wide[..., ::2] = x
        x = wide.to(dtype)[..., ::2]
    elif layout == "channels_last":
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    return [x.to(dtype), weight, bias, grad.to(dtype)]


def with_gradients(function, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    names = ("out", "grad_x", "grad_weight", "grad_bias")[: len(expected)]
    for name, ours, theirs in zip(names, actual, expected, strict=True):
        scale = theirs.abs().max().clamp(min=1e-3).item()
        error = (ours.double() - theirs.double()).abs().max().item()
        # Gradients of weights are float32 sums whatever the map's type, of products of rounded numbers.
        assert error <= TOLERANCE[dtype] * scale, (name, error / scale)


def norms(num_groups: int, silu: bool):
    """(name, ours, the reference) of everything that normalises."""
    yield (
        "pixel",
        lambda x, w, b: pixel_norm(x, w, b, 1e-5, silu),
        lambda x, w, b: pixel_norm_reference(x, w, b, 1e-5, silu),
    )
    for eps_on_std in (False, True):
        yield (
            f"group {eps_on_std}",
            lambda x, w, b, on=eps_on_std: group_norm(x, w, b, num_groups, 1e-6, eps_on_std=on, silu=silu),
            lambda x, w, b, on=eps_on_std: group_norm_reference(x, w, b, num_groups, 1e-6, on, silu),
        )


def check(shape: tuple[int, ...], num_groups: int, dtype: torch.dtype, silu: bool, layout: str) -> None:
    x, weight, bias, grad = inputs(shape, dtype, layout)
    for name, ours, reference in norms(num_groups, silu):
        if shape[2] * shape[3] * (shape[1] // num_groups) == 1 or (name == "pixel" and shape[1] == 1):
            continue  # a single number has no deviation; see test_flat_maps
        expected = with_gradients(reference, x.double(), weight.double(), bias.double(), grad.double())
        actual = with_gradients(ours, x, weight, bias, grad)
        assert actual[0].dtype == actual[1].dtype == dtype and actual[2].dtype == torch.float32
        assert actual[0].is_contiguous(memory_format=torch.channels_last)
        assert_close(actual, expected, dtype)


@pytest.mark.parametrize("shape, num_groups", SHAPES[1:4])
@pytest.mark.parametrize("silu", [False, True])
def test_the_references_gradients_are_autograds(shape, num_groups, silu):
    x, weight, bias, grad = (tensor.double() for tensor in inputs(shape, torch.float32))
    for name, _, reference in norms(num_groups, silu):
        if name == "pixel":
            actual = pixel_norm_backward_reference(x, weight, bias, grad, 1e-5, silu)
        else:
            actual = group_norm_backward_reference(x, weight, bias, grad, num_groups, 1e-6, name == "group True", silu)
        for ours, theirs in zip(actual, with_gradients(reference, x, weight, bias, grad)[1:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@needs_native
@pytest.mark.parametrize("shape, num_groups", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_equals_reference(shape, num_groups, dtype):
    for silu, layout in itertools.product((False, True), ("channels_last", "contiguous", "sliced")):
        check(shape, num_groups, dtype, silu, layout)


@pytest.mark.parametrize("shape, num_groups", SHAPES[1:4])
def test_without_the_library(monkeypatch, shape, num_groups):
    monkeypatch.setenv("GPSTOKEN_BACKEND", "reference")
    check(shape, num_groups, torch.float32, True, "contiguous")


def times(x: Tensor, weight: Tensor, silu: bool = False) -> Tensor:
    """x times weight, both (C,), by way of a norm whose mean is 0 and deviation 1."""
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    bias = torch.full_like(weight, -0.0)  # 0 would lose the sign of -0
    return tile_norm(x.reshape(1, -1, 1, 1), zero, one, zero[..., 0, 0], weight, bias, 0.0, silu=silu).flatten()


def check_conversions() -> None:
    """Every 16-bit number is read and written as it is, and float32 rounded as torch does."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    # Random bits, numbers halfway between two of 16 bits and beside that, and what is no number with all bits set.
    random = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0))
    wide = every.int()[:, None] * 2**16 + torch.tensor([0x7FFF, 0x8000, 0x8001, 0x1000, 0x3000, 0xFFFF])
    weight = torch.cat([random.int(), wide.int().flatten(), torch.tensor([-1, 2**31 - 1]).int()]).view(torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype)
        for ours, theirs in (
            (times(x, torch.ones(2**16)), x),
            (times(torch.ones_like(weight, dtype=dtype), weight), weight.to(dtype)),
        ):
            assert torch.equal(ours.isnan(), theirs.isnan())
            number = ~theirs.isnan()
            assert torch.equal(ours[number].view(torch.int16), theirs[number].view(torch.int16)), dtype


def check_activation() -> None:
    """SiLU within a few units of float32's last place, and hardly more than a rounding where there are fewer bits."""
    for dtype, allowed in ((torch.float32, 3.5e-7), (torch.float16, 1.01 * 2**-11), (torch.bfloat16, 1.2 * 2**-8)):
        z = torch.linspace(-80, 80, 100_001).to(dtype)
        z = z[(z.abs() > 1e-3) & (z > (-6 if dtype == torch.float16 else -80))]  # below, float16 has fewer bits
        exact = z.double() * z.double().sigmoid()
        ours = times(z, torch.ones(len(z)), silu=True)
        assert ((ours - exact) / exact).abs().max() <= allowed, dtype
        far = torch.tensor([-1e4, -200, 200, 1e4], dtype=dtype)
        torch.testing.assert_close(times(far, torch.ones(4), silu=True), far.clamp(min=0), rtol=allowed, atol=0)


def check_no_number(bad: float, dtype: torch.dtype, channel: int) -> None:
    """One bad number spoils its pixel, or its group, and nothing else."""
    x, weight, bias, _ = inputs((2, 33, 9, 16), dtype)
    x[0, channel, 8, 2] = bad
    out = pixel_norm(x, weight, bias, 1e-5, silu=True)
    assert out[0, :, 8, 2].isnan().all() and out.isnan().sum() == 33
    out = group_norm(x, weight, bias, 11, 1e-6, silu=True)
    group = channel // 3 * 3
    assert out[0, group : group + 3].isnan().all() and out.isnan().sum() == 3 * 9 * 16


ONE_INSTRUCTION_SET = """
import itertools, torch
from gpstoken_diffusers.ops.backend import native
from test_norm import DTYPES, SHAPES, check, check_activation, check_conversions, check_no_number
for (shape, groups), dtype, silu in itertools.product(SHAPES, DTYPES, (False, True)):
    check(shape, groups, dtype, silu, "channels_last")
check_conversions()
check_activation()
for bad, dtype, channel in itertools.product((float("nan"), float("inf"), -float("inf")), DTYPES, (0, 20, 32)):
    check_no_number(bad, dtype, channel)
print(native.library("cpu").gpstoken_cpu_isa().decode())
"""


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    used = run_code_on(isa, ONE_INSTRUCTION_SET)
    if used != isa:
        pytest.skip(f"this processor has no {isa}; {used} was tested in its place")


@needs_native
@pytest.mark.parametrize("tile_grid", [(1, 1), (2, 1), (3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_per_tile(tile_grid, dtype):
    x = inputs((2, 24, 6, 8 * 17), dtype)[0]
    for ours, theirs in zip(
        group_statistics(x, 4, tile_grid), group_statistics_reference(x.double(), 4, *tile_grid), strict=True
    ):
        assert ours.shape == (2, 4, *tile_grid) and ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)  # read exactly, summed in double


@needs_native
@pytest.mark.parametrize("tile_grid", [(1, 1), (2, 2), (3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_between_tiles(tile_grid, dtype):
    x, weight, bias, _ = inputs((2, 24, 6, 35), dtype)
    random = torch.Generator().manual_seed(1)
    mean, std = (torch.randn(2, 4, *tile_grid, generator=random), torch.rand(2, 4, *tile_grid, generator=random) + 0.2)
    std[0, 0, 0, 0] = 9.0  # beside it, the enlarged deviation falls below zero
    floor = 0.5 * std.amin((2, 3))
    wide = [tensor.double() for tensor in (x, mean, std, floor, weight, bias)]
    for silu in (False, True):
        expected = tile_norm_reference(*wide, 1e-6, silu)
        ours = tile_norm(x, mean, std, floor, weight, bias, 1e-6, silu=silu)
        assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
        assert_close([ours], [expected], dtype)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(tile_norm(leaf, mean, std, floor, weight, bias, 1e-6).sum(), leaf)
    assert grad.isfinite().all() and grad.abs().sum() > 0


@needs_native
@pytest.mark.parametrize("mean", [10_000, 1_000_000])
def test_statistics_do_not_cancel(mean):
    """A mean thousands of times the deviation: the difference of two sums would leave nothing."""
    x = torch.randn(1, 32, 64, 64, generator=torch.Generator().manual_seed(0)) + mean
    var, _ = group_statistics(x, 32)
    torch.testing.assert_close(var, group_statistics_reference(x.double(), 32, 1, 1)[0].float(), rtol=1e-5, atol=0)


@needs_native
@pytest.mark.parametrize("size", [(16, 16), (96, 97)])
def test_statistics_of_uneven_maps(size):
    """Numbers that differ from all before or behind them: no pixel, row or part of the map stands for the others."""
    base = torch.randn(1, 48, *size, generator=torch.Generator().manual_seed(0))
    maps = [base.clone() for _ in range(4)]
    maps[0][..., 0, 0] = 1e5
    maps[1][..., 0] = 1e4
    maps[2][..., size[0] // 2 :, :] += 1e5
    maps[3] += 1e3 * torch.arange(48).reshape(48, 1, 1) + torch.arange(size[0])[:, None] ** 2
    for x in maps:
        for ours, theirs in zip(group_statistics(x, 6), group_statistics_reference(x.double(), 6, 1, 1), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)


@needs_native
def test_a_large_mean_is_taken_off_first():
    x = torch.randn(1, 32, 64, 64, generator=torch.Generator().manual_seed(0)) + 10_000
    weight, bias = torch.ones(32), torch.zeros(32)
    exact = group_norm_reference(x.double(), weight, bias, 32, 1e-6, False, False)
    # float32 has steps of 1e-3 at 10,000; the mean is rounded to one.
    assert (group_norm(x, weight, bias, 32, 1e-6) - exact).abs().max() < 1e-3


@needs_native
def test_flat_maps():
    """Nothing deviates: the result is the activated bias, and no gradient is anything but a number."""
    x, weight, bias, grad = inputs((2, 8, 4, 4), torch.float32)
    per_tile = ("tile True", *[lambda x, w, b: tile_group_norm(x, w, b, 4, 1e-6, (2, 2), silu=True)] * 2)
    functions = [(name, function) for name, *both in (*norms(4, True), per_tile) for function in both]
    for name, function in functions:
        flat = torch.full_like(x, 3.3)
        out, grad_x, *others = with_gradients(function, flat, weight, bias, grad)
        expected = torch.nn.functional.silu(bias)[:, None, None].expand_as(x)
        # Of equal numbers the mean is that number or one rounding beside it, 2.4e-7, over sqrt(eps) or eps.
        tolerance = 2.4e-7 * weight.abs().max().item() * (1e6 if name.endswith("True") else 1e3)
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=0)
        assert all(tensor.isfinite().all() for tensor in (grad_x, *others)), name
    single = torch.tensor(5.0).reshape(1, 1, 1, 1)
    assert pixel_norm(single, torch.ones(1), torch.ones(1), 1e-5).item() == 1


@needs_native
def test_large_inputs_of_the_activation():
    """SiLU far out: 0 on one side, the identity on the other, without overflow on the way."""
    x = torch.tensor([-1.0, 1.0]).reshape(1, 2, 1, 1)
    far, zero = torch.full((2,), 1e4), torch.zeros(2)
    out, *gradients = with_gradients(
        lambda *leaves: pixel_norm(*leaves, 0.0, silu=True), x, far, zero, torch.ones_like(x)
    )
    assert out.flatten().tolist() == [0, 1e4]
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_reference_keeps_a_mean_in_float32() -> None:
    """Rounded to bfloat16, a mean of 3 would be off by up to 0.008, here a tenth of a deviation."""
    x = (torch.randn(1, 32, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.08 + 3.01).bfloat16()
    weight, bias = torch.ones(32), torch.zeros(32)
    exact = group_norm_reference(x.double(), weight, bias, 32, 1e-6, False, False)
    error = group_norm_reference(x, weight, bias, 32, 1e-6, False, False) - exact
    assert error.square().mean().sqrt() < 0.003  # rounding of the result alone: 2^-8 / sqrt(12) of numbers around 1


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_matter(dtype):
    tensors = inputs((2, 96, 40, 37), dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append([tensor for _, ours, _ in norms(8, True) for tensor in with_gradients(ours, *tensors)])
            results[-1] += [figure for grid in ((1, 1), (4, 37)) for figure in group_statistics(tensors[0], 8, grid)]
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(first, tensor) for first, tensor in zip(results[0], other, strict=True))


def test_an_empty_batch():
    x, weight, bias = torch.zeros(0, 8, 4, 4), torch.ones(8), torch.zeros(8)
    assert pixel_norm(x, weight, bias, 1e-5).shape == group_norm(x, weight, bias, 4, 1e-5).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    for layout in ("channels_last", "contiguous"):
        x, weight, bias, grad = inputs((2, 8, 3, 5), dtype, layout)
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        ops = torch.ops.gpstoken
        torch.library.opcheck(ops.pixel_norm.default, (*leaves, 1e-5, True))
        torch.library.opcheck(ops.pixel_norm_backward.default, (x, weight, bias, grad, 1e-5, True))
        torch.library.opcheck(ops.group_norm.default, (*leaves, 4, 1e-5, True, True))
        var, mean = ops.group_statistics(x, 4, 1, 1)
        torch.library.opcheck(ops.group_norm_backward.default, (x, weight, bias, grad, var, mean, 4, 1e-5, True, True))
        torch.library.opcheck(ops.group_statistics.default, (x, 4, 1, 1))
        figures = [mean.repeat(1, 1, 3, 5), var.repeat(1, 1, 3, 5), var.flatten(1)]
        torch.library.opcheck(ops.tile_norm.default, (x, *figures, weight, bias, 1e-5, True))


def test_compile_fullgraph():
    x, weight, bias, grad = inputs((2, 8, 4, 6), torch.float32)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm(pixel_norm(x * 2, weight, bias, 1e-5, silu=True), weight, bias, 4, 1e-5, silu=True) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        with_gradients(compiled, x, weight, bias, grad), with_gradients(function, x, weight, bias, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_autocast_leaves_the_type_alone():
    """The map's type decides, with the library and without it."""
    x, weight, bias, _ = inputs((1, 8, 2, 2), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert pixel_norm(x, weight, bias, 1e-5, silu=True).dtype == torch.bfloat16
        assert pixel_norm(x.float(), weight, bias, 1e-5, silu=True).dtype == torch.float32
        assert pixel_norm_reference(x, weight, bias, 1e-5, True).dtype == torch.bfloat16


@pytest.mark.parametrize("call, message", [
    (lambda: pixel_norm(torch.zeros(2, 3, 4), torch.ones(3), torch.ones(3), 1e-5), r"\(B, C, H, W\), .* \(2, 3, 4\)"),
    (lambda: pixel_norm(torch.zeros(1, 3, 2, 2).int(), torch.ones(3), torch.ones(3), 1e-5), "floating-point"),
    (lambda: pixel_norm(torch.zeros(1, 3, 2, 2), torch.ones(4), torch.ones(3), 1e-5), r"expected weight .* got \(4,\)"),
    (lambda: group_norm(torch.zeros(1, 3, 2, 2), torch.ones(3), torch.ones(1), 1, 1e-5), r"bias .* got \(1,\)"),
    (lambda: group_norm(torch.zeros(1, 6, 2, 2), torch.ones(6), torch.ones(6), 4, 1e-5), "divides 6 channels, got 4"),
    (lambda: group_statistics(torch.zeros(1, 6, 5, 4), 2, (2, 2)), "divides 5 x 4 pixels, got 2 x 2"),
    (lambda: tile_norm(torch.zeros(1, 6, 4, 4), *[torch.ones(1, 2, 2, 2)] * 3, *[torch.ones(6)] * 2, 1e-5), "floor"),
])  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
