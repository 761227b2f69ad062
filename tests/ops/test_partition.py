"""The partition: golden regions, the native library against its reference, and the rules of cutting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_files import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_judge import noise
from package_process import run_code_on
from partition_cases import KINDS, pattern
from safetensors.numpy import load_file

from gpstoken_diffusers.ops.backend import native
from gpstoken_diffusers.ops.partition import (
    grayscale,
    initial_gaussians,
    max_tokens,
    partition_image,
)
from gpstoken_diffusers.ops.partition_reference import partition_image_reference, region_complexity

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "camera")
BACKENDS = ("native", "reference")


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    return load_file(golden("partition.safetensors"))


@pytest.fixture
def backend(request, monkeypatch) -> str:
    """Runs a test on the native library or on the reference."""
    if request.param == "reference":
        monkeypatch.setenv(native.BACKEND_VARIABLE, "reference")
    elif native.library("cpu") is None:
        pytest.skip(native.why_missing("cpu"))
    return request.param


both_backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


@pytest.fixture
def needs_library() -> None:
    if native.library("cpu") is None:
        pytest.skip(native.why_missing("cpu"))


def as_batch(image_u8: np.ndarray) -> torch.Tensor:
    """(H, W, 3) -> (1, 3, H, W)."""
    return torch.tensor(image_u8).permute(2, 0, 1)[None]


def boxes(partition_or_regions) -> list[tuple[int, ...]]:
    regions = getattr(partition_or_regions, "regions", partition_or_regions)
    return [tuple(box) for box in np.asarray(regions)[0].tolist()]


# ---- golden regions ----


def assert_golden(goldens: dict[str, np.ndarray], name: str, image: torch.Tensor, **settings) -> None:
    """Regions and their order are exact; codes and [-1, 1] regions agree to a float32 rounding."""
    regions_ndc, geometry = goldens[f"{name}.regions"], goldens[f"{name}.gpscodes"]
    partition = partition_image(image, len(geometry) // len(image), **settings)
    height, width = image.shape[-2:]
    last = np.array([width - 1, height - 1, width - 1, height - 1])
    expected = np.rint((regions_ndc + 1) / 2 * last).astype(np.int32)
    assert np.array_equal(partition.regions.numpy().reshape(-1, 4), expected)
    assert np.abs(partition.regions.numpy().reshape(-1, 4) / last * 2 - 1 - regions_ndc).max() < 1e-7
    assert np.abs(partition.geometry.numpy().reshape(-1, 5) - geometry).max() < 1e-7


@pytest.mark.parametrize("num_tokens", (64, 128, 256))
@pytest.mark.parametrize("name", (*PHOTOGRAPHS, "grey", "step"))
def test_golden_regions(goldens, name, num_tokens):
    assert_golden(goldens, f"{name}.n{num_tokens}", as_batch(goldens[f"{name}.image_u8"]))


@both_backends
@pytest.mark.parametrize(
    ("name", "source", "settings"),
    (
        ("coffee.n128", "coffee", {}),  # the order of two nearly equal regions hangs on one rounding
        ("extra.minhw16_w2.5_n100", "coffee", {"min_region_size": 16}),
        ("extra.minhw4_w1.0_n200", "coffee", {"min_region_size": 4, "entropy_exponent": 1.0}),
        ("extra.full1024", "astronaut", {}),
        ("nonsquare.n96", "nonsquare", {}),
    ),
)
def test_golden_settings(goldens, backend, name, source, settings):
    assert_golden(goldens, name, as_batch(goldens[f"{source}.image_u8"]), **settings)


@both_backends
@pytest.mark.parametrize("num_tokens", (64, 128))
def test_golden_complexity_bias(goldens, backend, num_tokens):
    image, bias = as_batch(goldens["astronaut.image_u8"]), goldens["cdbias.map"]
    assert_golden(goldens, f"cdbias.n{num_tokens}", image, complexity_bias=bias)


@pytest.mark.parametrize("num_tokens", (64, 128))
def test_golden_batch_of_tiles(goldens, num_tokens):
    tiles = as_batch(goldens["astronaut512.image_u8"]).unfold(2, 256, 256).unfold(3, 256, 256)
    tiles = tiles.permute(0, 2, 3, 1, 4, 5).reshape(4, 3, 256, 256)
    assert_golden(goldens, f"astronaut512.n{num_tokens}", tiles)


def test_golden_grey(goldens):
    image = (as_batch(goldens["astronaut.image_u8"]).double() / 127.5 - 1).float()
    assert torch.equal(grayscale(image)[0], torch.tensor(goldens["grey_check"]))


@pytest.mark.parametrize("name", ("astronaut", "step"))
@pytest.mark.parametrize("exponent", (1.0, 2.5))
def test_golden_complexity(goldens, name, exponent):
    grey = grayscale((as_batch(goldens[f"{name}.image_u8"]).double() / 127.5 - 1).float())[0].numpy()
    y, x, height, width = goldens["complexity.boxes_yxhw"].T
    regions = np.stack([x, y, x + width - 1, y + height - 1], axis=1)
    # Equal but for the last digits of log2 and pow: a wrong histogram bin would show at 1e-5 or more.
    expected = goldens[f"complexity.{name}.weight{exponent}"]
    np.testing.assert_allclose(region_complexity(grey, regions, exponent), expected, rtol=1e-12)


# ---- the native library against the reference ----


sides = st.one_of(st.sampled_from((8, 16, 32, 64, 128)), st.integers(2, 140))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_native_equals_reference(data):
    if native.library("cpu") is None:
        pytest.skip(native.why_missing("cpu"))
    height = data.draw(sides, "height")
    width = data.draw(st.one_of(st.just(height), sides), "width")
    min_region_size = data.draw(st.integers(2, 17), "min_region_size")
    exponent = data.draw(st.sampled_from((2.5, 2.5, 0.0, 1.0, 7.0)), "exponent")
    seed = data.draw(st.integers(0, 1000), "seed")
    grey = pattern(data.draw(st.sampled_from(KINDS), "kind"), height, width, seed)
    largest = max_tokens(height, width, min_region_size)
    num_tokens = data.draw(st.integers(1, min(largest, 60)), "num_tokens")
    bias = None
    bias_kind = data.draw(st.sampled_from(("none", "mask", "noise")), "bias")
    if bias_kind != "none":
        bias = np.random.default_rng(seed).normal(size=grey.shape).astype(np.float32)
        bias = (bias > 0).astype(np.float32) * 10 if bias_kind == "mask" else bias
    expected = partition_image_reference(grey, num_tokens, min_region_size, exponent, bias)
    found = partition_image(
        grey, num_tokens, min_region_size=min_region_size, entropy_exponent=exponent, complexity_bias=bias
    )
    assert np.array_equal(found.regions.numpy(), expected)


ONE_INSTRUCTION_SET = """
from partition_cases import KINDS, pattern
from gpstoken_diffusers.ops.backend import native
from gpstoken_diffusers.ops.partition import partition_image
from gpstoken_diffusers.ops.partition_reference import partition_image_reference
for seed, kind in enumerate(KINDS):
    for size in ((96, 130), (64, 64)):
        grey = pattern(kind, *size, seed)
        found = partition_image(grey, 40, min_region_size=4).regions.numpy()
        assert (found == partition_image_reference(grey, 40, 4)).all(), (kind, size)
print(native.library("cpu").gpstoken_cpu_isa().decode())
"""


@pytest.mark.parametrize("isa", ("avx512", "avx2", "baseline"))
def test_every_instruction_set(needs_library, isa):
    """One process each, since a process settles on one."""
    used = run_code_on(isa, ONE_INSTRUCTION_SET)
    if used != isa:
        pytest.skip(f"this processor has no {isa}; {used} was tested in its place")


def test_threads_do_not_matter(needs_library):
    images = noise(5, 60, 72)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(partition_image(images, 17).regions)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    alone = torch.cat([partition_image(image, 17).regions for image in images])
    assert torch.equal(results[0], alone)


def test_native_refuses_more_tokens_than_leaves(needs_library):
    """The C interface by itself: an error code, and no endless loop."""
    grey = np.zeros((1, 32, 32), np.float32)
    regions = np.empty((1, 17, 4), np.int32)
    sizes_and_settings = (1, 32, 32, 17, 8, 2.5, 1)
    addresses = (grey.ctypes.data, None, regions.ctypes.data)
    with pytest.raises(RuntimeError, match="too many tokens"):
        native.call("cpu", "gpstoken_partition_cpu", *addresses, *sizes_and_settings)


# ---- the rules ----


@both_backends
def test_ties_keep_list_order(backend):
    """A constant image, worked out by hand: only area decides, and among equals the place in the list."""
    top, bottom = (0, 0, 31, 15), (0, 16, 31, 31)
    quarters = [(0, 0, 15, 15), (16, 0, 31, 15), (0, 16, 15, 31), (16, 16, 31, 31)]
    expected = {
        1: [(0, 0, 31, 31)],
        2: [top, bottom],  # a square whose halves tie is cut along y
        3: [bottom, *quarters[:2]],
        4: quarters,
        5: [*quarters[1:], (0, 0, 15, 7), (0, 8, 15, 15)],
    }
    for num_tokens, regions in expected.items():
        assert boxes(partition_image(torch.zeros(32, 32), num_tokens)) == regions


@both_backends
def test_square_is_cut_where_the_simpler_half_is_simpler(backend):
    image = torch.zeros(32, 32)
    image[:, 16:] = noise(32, 16)
    assert boxes(partition_image(image, 2)) == [(0, 0, 15, 31), (16, 0, 31, 31)]
    assert boxes(partition_image(image.T, 2)) == [(0, 0, 31, 15), (0, 16, 31, 31)]


@both_backends
def test_first_half_of_an_odd_side_is_shorter(backend):
    assert boxes(partition_image(torch.zeros(4, 11), 2)) == [(0, 0, 4, 3), (5, 0, 10, 3)]
    assert boxes(partition_image(torch.zeros(11, 4), 2)) == [(0, 0, 3, 4), (0, 5, 3, 10)]


@both_backends
@pytest.mark.parametrize(
    ("height", "width", "min_region_size"),
    ((2, 2, 8), (2, 17, 8), (17, 9, 8), (40, 33, 4), (23, 23, 2), (50, 31, 64)),
)
def test_any_number_of_tokens_covers_the_image(backend, height, width, min_region_size):
    image = noise(height, width)
    largest = max_tokens(height, width, min_region_size)
    for num_tokens in {1, 2, 3, largest // 2, largest - 1, largest} & set(range(1, largest + 1)):
        partition = partition_image(image, num_tokens, min_region_size=min_region_size)
        covered = torch.zeros(height, width, dtype=torch.int32)
        for x0, y0, x1, y1 in boxes(partition):
            covered[y0 : y1 + 1, x0 : x1 + 1] += 1
        assert (covered == 1).all()
        assert partition.regions.shape == (1, num_tokens, 4) and partition.regions.dtype == torch.int32
        assert (partition.geometry[..., :2] > 0).all() and (partition.geometry[..., :2] < 1).all()
        assert partition.geometry[..., 3:].abs().max() < 1


def test_max_tokens():
    assert max_tokens(256, 256) == 1024 and max_tokens(256, 256, 4) == 4096 and max_tokens(9, 9) == 1
    assert max_tokens(2, 2) == 1 and max_tokens(288, 512) == 32 * 64  # 9 and 8 px: neither is split
    assert max_tokens(10, 10, 8) == 4 and max_tokens(3, 3, 2) == 1 and max_tokens(4096, 4096) == 512 * 512


def test_number_of_leaves_does_not_depend_on_choices():
    """All ways to cut squares, enumerated: each size has one number of leaves, and max_tokens knows it."""

    def counts(height: int, width: int, smallest: int) -> frozenset[int]:
        key = (height, width, smallest)
        if key not in known:
            if max(height, width) - 1 <= smallest:
                known[key] = frozenset({1})
            else:
                ways = []
                if width >= height:
                    ways.append([(height, width // 2), (height, width - width // 2)])
                if height >= width:
                    ways.append([(height // 2, width), (height - height // 2, width)])
                known[key] = frozenset(
                    a + b for first, second in ways for a in counts(*first, smallest) for b in counts(*second, smallest)
                )
        return known[key]

    known: dict[tuple[int, int, int], frozenset[int]] = {}
    for smallest in (2, 3, 5, 8):
        for height in range(2, 70):
            for width in (height, height + 1, 2 * height + 1, 65):
                assert counts(height, width, smallest) == {max_tokens(height, width, smallest)}


def test_initial_gaussians():
    regions = torch.tensor([[[0, 0, 31, 15], [8, 4, 15, 7]]])
    geometry = initial_gaussians(regions, 16, 32)
    whole = [31 / 32 * 2 / 3, 15 / 16 * 2 / 3, 0, 0, 0]
    part = [7 / 32 * 2 / 3, 3 / 16 * 2 / 3, 0, 23 / 31 - 1, 11 / 15 - 1]
    expected = torch.tensor([[whole, part]])
    torch.testing.assert_close(geometry, expected, rtol=0, atol=1e-7)  # one float32 rounding
    assert geometry.dtype == torch.float32
