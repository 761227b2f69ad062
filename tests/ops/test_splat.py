"""`splat_gaussians` in all implementations: golden tensors, awkward sizes, tokens at the edge of sense.

Native on the CPU, the reference with its own gradient and with autograd's, the CUDA kernels by emulation on the host,
and on a GPU where there is one (-m gpu).
"""

from __future__ import annotations

import json

import pytest
import torch
from golden_files import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from package_process import run_code_on
from safetensors.torch import load_file
from splat_cases import (
    CASES,
    IMPLEMENTATIONS,
    LARGE_CASES,
    Splat,
    assert_case,
    assert_close,
    assert_is_reference,
    distance,
    implementations,
    make_tokens,
    needs_native,
    random_upstream,
    reference,
    run,
    tolerance,
)

from gpstoken_diffusers.ops.splat import splat_gaussians
from gpstoken_diffusers.ops.splat_reference import splat_gaussians_reference


@pytest.fixture
def splat(request: pytest.FixtureRequest) -> Splat:
    return IMPLEMENTATIONS[request.param]()


# ---- values ----


def golden_cases() -> list[str]:
    try:
        entries = json.loads(golden("splat_deviation.json").read_text())
    except pytest.skip.Exception:
        return ["reference tensors"]  # the test then skips and says why
    return [entry["case"] for entry in entries]


@pytest.mark.parametrize("case", golden_cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@implementations()
def test_golden(splat: Splat, case: str, dtype: torch.dtype) -> None:
    """rho = +-0.999, centres off the image, boxes narrower than a pixel. The stored tensors are exact but for their
    own rounding to float32, and float64 shows the formula without any other."""
    if dtype == torch.float64 and splat not in (reference, splat_gaussians_reference, splat_gaussians):
        pytest.skip("the kernels are for float32")
    tensors = load_file(golden("splat.safetensors"))
    tokens, upstream, grads = (tensors[f"{case}.{part}"].to(dtype) for part in ("tokens", "upstream", "grad_tokens"))
    result = run(splat, tokens[..., :5], tokens[..., 5:], upstream, float(case.split("_d")[1]))
    allowed = tolerance(tokens, upstream[0, 0].numel()) if dtype == torch.float32 else 2**-24
    assert_close(result, (tensors[f"{case}.rendered"], grads[..., :5], grads[..., 5:]), allowed)


@pytest.mark.parametrize("case", CASES)
@implementations("native", "emulated CUDA", "CUDA")
def test_awkward_sizes(splat: Splat, case: str) -> None:
    assert_case(splat, CASES[case])


@pytest.mark.parametrize("case", LARGE_CASES)
@implementations("native", "CUDA")
def test_large_sizes(splat: Splat, case: str) -> None:
    assert_case(splat, LARGE_CASES[case])


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(8, 24),
    channels=st.integers(1, 40),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    log_sigma=st.floats(-4.0, 1.0),
    support=st.floats(0.3, 6.0),
    seed=st.integers(0, 2**31),
)
def test_any_size(
    batch: int, tokens: int, channels: int, size: tuple[int, int], log_sigma: float, support: float, seed: int
) -> None:
    geometry, texture = make_tokens(batch, tokens, channels, seed, sigma=10.0**log_sigma)
    # Of so many draws some have sums that cancel far below the size of their terms. With several tokens some do not.
    assert_is_reference(splat_gaussians, geometry, texture, *size, support, slack=15)


@implementations("native", "emulated CUDA", "CUDA")
@pytest.mark.parametrize("rho", [0.999, -0.999, 0.99999])
def test_rho_near_one(splat: Splat, rho: float) -> None:
    geometry, texture = make_tokens(1, 20, 4, sigma=0.3)
    geometry[..., 2] = rho
    exact = splat_gaussians_reference(geometry.double(), texture.double(), 30, 30, 100.0)
    assert distance(splat(geometry, texture, 30, 30, 100.0), exact) < tolerance(geometry, 900)


# ---- tokens at the edge of sense ----

NAN, INF = float("nan"), float("inf")
GOOD = [0.3, 0.3, 0.0, 0.1, -0.2]
SENSELESS = [
    [bad if i == component else number for i, number in enumerate(GOOD)]
    for component, values in enumerate(
        [(NAN, INF, 0.0, -0.1, 1e-40), (NAN, INF, 0.0, -0.1, 1e-40), (NAN, INF, 1, -1, 1.5), (NAN, INF), (NAN, -INF)]
    )
    for bad in values
]
FAR_OFF = [
    [bad if i == component else number for i, number in enumerate(GOOD)]
    for component in (3, 4)
    for bad in (1e38, -1e38)
]


@implementations()
def test_tokens_that_make_no_sense_paint_nothing(splat: Splat) -> None:
    """They have zero gradients, and leave all other tokens alone."""
    geometry, texture = make_tokens(1, 30, 5, sigma=0.3)
    bad = torch.tensor([SENSELESS + FAR_OFF])
    count = bad.shape[1]
    upstream = random_upstream(texture, 20, 21)
    bad_texture = torch.ones(1, count, 5)
    out, *grads = run(splat, torch.cat([bad, geometry], 1), torch.cat([bad_texture, texture], 1), upstream)
    assert not any(grad[:, :count].any() for grad in grads)
    expected = run(splat, geometry, texture, upstream)
    assert_close((out, *(grad[:, count:] for grad in grads)), expected, tolerance(geometry, 420))


@implementations()
def test_extreme_tokens_stay_finite(splat: Splat) -> None:
    """Saturated but legal geometry: gradients may be large, never NaN."""
    almost = 1 - 2.0**-24
    tokens = [
        [1e-30, 1e-30, 0.0, 0.0, 0.0],  # exactly on the centre pixel of an odd grid
        [2e-38, 2e-38, 0.5, -1.0, 1.0],  # on a corner
        [2e-38, 0.5, 0.0, -1.0, 0.1],
        [1e30, 1e30, 0.5, 0.0, 0.0],
        [0.3, 0.3, almost, 0.1, 0.1],
        [0.3, 0.3, -almost, 0.1, 0.1],
        [1e37, 1e37, 0.9, 1e37, -1e37],
        [1e-6, 0.97, 0.999, 0.0, 3.0],
        [0.5, 0.5, 0.0, 2.0, -2.0],  # off the image, reaching in
    ]
    geometry, texture = torch.tensor([tokens]), torch.ones(1, len(tokens), 3)
    for tensor in run(splat, geometry, texture, random_upstream(texture, 33, 33)):
        assert tensor.isfinite().all()
    alone = splat(geometry[:, :1], torch.ones(1, 1, 1), 33, 33)
    assert alone.sum() == 1 and alone[0, 0, 16, 16] == 1


@implementations()
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (5, 5)])
def test_a_box_larger_than_float32(splat: Splat, size: tuple[int, int]) -> None:
    """support times sigma overflows; times the extent of an axis of one sample, which is zero, it would be NaN."""
    geometry = torch.tensor([[[2e38, 2e38, 0.0, 0.0, 0.0]]])
    assert torch.equal(splat(geometry, torch.ones(1, 1, 1), *size), torch.ones(1, 1, *size))


@implementations()
def test_box_edges_belong_to_the_box(splat: Splat) -> None:
    """Half width 0.5 on the grid -1, -0.5, 0, 0.5, 1: exactly the inner nine pixels, all numbers being exact."""
    geometry = torch.tensor([[[0.25, 0.25, 0.0, 0.0, 0.0]]])
    painted = splat(geometry, torch.ones(1, 1, 1), 5, 5, 2.0)[0, 0] > 0
    assert torch.equal(painted, torch.nn.functional.pad(torch.ones(3, 3, dtype=torch.bool), (1, 1, 1, 1)))
    # On an even grid a box between two pixels paints nothing, and gradients are zero.
    geometry = torch.tensor([[[0.1, 0.1, 0.0, 0.0, 0.0]]])
    assert not any(tensor.any() for tensor in run(splat, geometry, torch.ones(1, 1, 1), torch.ones(1, 1, 4, 4)))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_conversions(dtype: torch.dtype) -> None:
    """All 65536 numbers of a type through a token of weight 1, and sums of two that must be rounded."""
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    shuffled = numbers[torch.randperm(65536, generator=torch.Generator().manual_seed(0))]
    pair = torch.stack([numbers, shuffled])
    token = torch.tensor([[[0.5, 0.5, 0.0, 0.0, 0.0]]])
    for textures, expected in ((pair[:1], numbers), (pair, pair.float().sum(0).to(dtype))):
        out = splat_gaussians(token.expand(1, len(textures), 5), textures[None], 1, 1).flatten()
        # NaN stays NaN, of whichever kind; all else, infinities and subnormals too, comes through as it was.
        assert torch.equal(out.nan_to_num(12345.0, 54321.0), expected.nan_to_num(12345.0, 54321.0))


# ---- threads and instruction sets ----


@needs_native
def test_same_bits_for_any_number_of_threads() -> None:
    geometry, texture = make_tokens(6, 300, 19)  # enough work for all threads to run at the same time
    upstream, before, results = random_upstream(texture, 150, 100), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8, 2):
            torch.set_num_threads(threads)
            results.append(run(splat_gaussians, geometry, texture, upstream))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


ONE_INSTRUCTION_SET = """
import torch
from gpstoken_diffusers.ops.backend import native
from splat_cases import BF16, F16, F32, assert_case
from gpstoken_diffusers.ops.splat import splat_gaussians
for channels, dtype in ((1, F32), (16, F32), (37, F16), (130, BF16)):
    for poison in [torch.full((n,), float("nan")) for n in (1000, 4000, 16000, 64000, 256000) for _ in range(9)]:
        del poison
    assert_case(splat_gaussians, (2, 40, channels, 31, 45, 3.0, dtype, 0.2))
print(native.library("cpu").gpstoken_cpu_isa().decode())
"""


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    """Each copy of the inner loops, in a process of its own because the choice is made once.

    Memory that was freed full of NaN is handed out again there, so that padding which nobody cleared shows.
    """
    used = run_code_on(isa, ONE_INSTRUCTION_SET, MALLOC_MMAP_THRESHOLD_=str(2**26))
    if used != isa:
        pytest.skip(f"this processor has no {isa}; {used} was tested in its place")
