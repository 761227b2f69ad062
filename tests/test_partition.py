"""The partition: golden regions, the native library against its definition, the rules, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from gpstoken_diffusers.ops import native
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
    """Runs a test on the native library or on the definition."""
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


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


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


# ---- the native library against the definition ----


def pattern(kind: str, height: int, width: int, seed: int) -> np.ndarray:
    """Grey images of many kinds, most of them full of exact ties."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    if kind == "noise":
        image = random.random((height, width)) * 2 - 1
    elif kind == "binary":
        image = random.integers(0, 2, (height, width)) * 2.0 - 1
    elif kind == "constant":
        image = np.full((height, width), random.random())
    elif kind == "blocks":
        cells = random.integers(0, 3, (height // 8 + 1, width // 8 + 1)) - 1.0
        image = np.kron(cells, np.ones((8, 8)))[:height, :width]
    elif kind == "waves":
        image = np.rint(np.sin(x / 7.0) * np.cos(y / 7.0) * 2) / 2
    elif kind == "ramp":  # most gradients within a rounding of an edge of the histogram's bins
        image = (0.95 - x % 32 * 11 / 512 + random.random((height, width)) * 1e-7) * 2 - 1
    elif kind == "edges":  # some on the edges
        image = np.minimum(random.integers(0, 60, (height, width)) * 11 / 512, 1.0) * 2 - 1
    else:
        image = (x == width // 2) * 1.0  # "line"
    return image.astype(np.float32)[None]


KINDS = ("noise", "binary", "constant", "blocks", "waves", "ramp", "edges", "line")
sides = st.one_of(st.sampled_from((8, 16, 32, 64, 128)), st.integers(2, 140))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_native_equals_definition(data):
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


@pytest.mark.parametrize("isa", ("avx512", "avx2", "baseline"))
def test_every_instruction_set(needs_library, tmp_path, isa):
    """One process each, since a process settles on one; without torch, so that it starts fast."""
    kinds = [pattern(kind, 96, 130, seed) for seed, kind in enumerate(KINDS)]
    kinds += [pattern(kind, 64, 64, seed) for seed, kind in enumerate(KINDS)]
    expected = []
    for i, grey in enumerate(kinds):
        np.save(tmp_path / f"grey{i}.npy", grey)
        expected.append(partition_image_reference(grey, 40, 4, 2.5).tolist())
    script = """
import ctypes, json, sys
import numpy as np
library, folder, count = ctypes.CDLL(sys.argv[1]), sys.argv[2], int(sys.argv[3])
pointer, size = ctypes.c_void_p, ctypes.c_int64
partition = library.gpstoken_partition_cpu
partition.argtypes = [pointer] * 3 + [size] * 4 + [ctypes.c_int, ctypes.c_double, ctypes.c_int]
library.gpstoken_cpu_isa.restype = ctypes.c_char_p
found = []
for i in range(count):
    grey = np.load(f"{folder}/grey{i}.npy")
    regions = np.empty((1, 40, 4), np.int32)
    code = partition(grey.ctypes.data, None, regions.ctypes.data, *grey.shape, 40, 4, 2.5, 1)
    assert code == 0, code
    found.append(regions.tolist())
print(json.dumps([library.gpstoken_cpu_isa().decode(), found]))
"""
    library = native.library("cpu")._name
    command = [sys.executable, "-c", script, library, str(tmp_path), str(len(kinds))]
    environment = {**os.environ, "GPSTOKEN_CPU_ISA": isa}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    used, found = json.loads(result.stdout)
    if used != isa:
        pytest.skip(f"this processor has no {isa}")
    assert found == expected


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


# ---- what a caller may pass ----


def test_inputs_that_mean_the_same():
    picture = ((noise(2, 3, 48, 80) + 1) * 127.5).to(torch.uint8)
    floats = (picture.double() / 127.5 - 1).float()
    expected = partition_image(floats, 20)
    grey = grayscale(floats)
    channels_last = floats.to(memory_format=torch.channels_last)
    flipped = np.ascontiguousarray(floats.numpy()[..., ::-1])[..., ::-1]  # negative strides
    same = (picture, picture.numpy(), flipped, floats.double(), grey, grey[:, None], channels_last)
    for image in (*same, floats.clone().requires_grad_()):
        found = partition_image(image, 20)
        assert torch.equal(found.regions, expected.regions) and torch.equal(found.geometry, expected.geometry)
        assert not found.geometry.requires_grad
    assert torch.equal(partition_image(grey[0], 20).regions[0], expected.regions[0])
    every_other = partition_image(grey[:, ::2].clone(), 9).regions
    for strided in (floats[:, :, ::2], grey[:, ::2], grey[:, None, ::2], grey.numpy()[:, ::2]):
        assert torch.equal(partition_image(strided, 9).regions, every_other)
    for dtype in (torch.float16, torch.bfloat16):  # equal to what the rounded values give
        found = partition_image(grey.to(dtype), 20)
        assert torch.equal(found.regions, partition_image(grey.to(dtype).float(), 20).regions)


def test_inputs_stay_as_they_are():
    image, importance = noise(1, 1, 40, 40) * 1.1, noise(40, 40).abs()
    copies = image.clone(), importance.clone()
    partition_image(image, 9, importance=importance)
    assert torch.equal(image, copies[0]) and torch.equal(importance, copies[1])


def test_overshoot_is_cut_off():
    image = noise(1, 40, 40) * 1.3
    assert torch.equal(partition_image(image, 9).regions, partition_image(image.clamp(-1, 1), 9).regions)


def test_empty_batch():
    partition = partition_image(torch.zeros(0, 3, 32, 32), 5, importance=torch.ones(32, 32))
    assert partition.regions.shape == (0, 5, 4) and partition.geometry.shape == (0, 5, 5)


def test_compiled_caller():
    @torch.compile(backend="eager")
    def centres(image: torch.Tensor) -> torch.Tensor:
        return partition_image(image * 1.0, 12).geometry[..., 3:] + 0.0

    image = noise(1, 40, 40)
    assert torch.equal(centres(image), partition_image(image, 12).geometry[..., 3:])


@pytest.mark.gpu
def test_gpu_image():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    image = noise(2, 3, 64, 64)
    found, expected = partition_image(image.cuda(), 30, importance=torch.ones(64, 64).cuda()), None
    expected = partition_image(image, 30, importance=torch.ones(64, 64))
    assert found.regions.is_cuda and found.geometry.is_cuda
    assert torch.equal(found.regions.cpu(), expected.regions)
    assert torch.equal(found.geometry.cpu(), expected.geometry)


# ---- importance ----


def tokens_inside(partition, mask: torch.Tensor) -> int:
    """How many regions have their centre inside the mask, in the first image."""
    x0, y0, x1, y1 = partition.regions[0].long().unbind(-1)
    return int(mask[(y0 + y1) // 2, (x0 + x1) // 2].sum())


@pytest.mark.parametrize("contrast", (1.0, 0.1, 0.0))
def test_importance_draws_tokens(contrast):
    """More with more strength, whatever the contrast, even where there is no detail at all."""
    mask = torch.zeros(128, 128)
    mask[32:64, 64:96] = 1
    image = noise(1, 128, 128) * contrast
    counts = []
    for strength in (0, 2, 16):
        partition = partition_image(image, 64, importance=mask, importance_strength=strength)
        counts.append(tokens_inside(partition, mask))
    plain = partition_image(image, 64)
    assert counts[0] == tokens_inside(plain, mask) == 4  # even detail: 1/16 of the area, 1/16 of the tokens
    assert counts[0] < counts[1] <= counts[2] == 16  # all that fit at 8 px


def test_importance_is_a_scaled_bias():
    image = noise(2, 64, 64) * torch.tensor([1.0, 0.2])[:, None, None]
    mask = noise(64, 64, seed=1).abs()
    whole = np.array([[0, 0, 63, 63]])
    per_pixel = [float(region_complexity(grey.numpy(), whole)[0]) / 64**2 for grey in image]
    bias = torch.stack([mask.double() * 3 * value for value in per_pixel])
    found = partition_image(image, 30, importance=mask, importance_strength=3)
    assert torch.equal(found.regions, partition_image(image, 30, complexity_bias=bias).regions)
    # both together add up
    both = partition_image(image, 30, importance=mask, importance_strength=3, complexity_bias=bias)
    assert torch.equal(both.regions, partition_image(image, 30, complexity_bias=2 * bias).regions)


def test_importance_shapes_and_types():
    image = noise(2, 64, 64)
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[10:30, 20:50] = True
    expected = partition_image(image, 25, importance=mask).regions
    batch = mask.float().expand(2, -1, -1)
    for same in (mask.float(), mask.numpy(), mask.double()[None], batch, batch.half()):
        assert torch.equal(partition_image(image, 25, importance=same).regions, expected)
    first_only = torch.stack([mask.float(), torch.zeros(64, 64)])
    mixed = partition_image(image, 25, importance=first_only).regions
    assert torch.equal(mixed[0], expected[0])
    assert torch.equal(mixed[1], partition_image(image, 25).regions[1])


# ---- bad input ----


def with_value(value: float) -> torch.Tensor:
    image = torch.zeros(32, 32)
    image[3, 4] = value
    return image


GOOD = torch.zeros(32, 32)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "words"),
    (
        ((GOOD, 0), {}, ValueError, "1 to 16 tokens"),
        ((GOOD, -3), {}, ValueError, "num_tokens=-3"),
        ((GOOD, 17), {}, ValueError, "1 to 16 tokens"),
        ((GOOD, 2.5), {}, TypeError, "integer"),
        ((torch.zeros(1, 3, 1, 1), 1), {}, ValueError, "2 x 2 px"),
        ((torch.zeros(1, 40), 1), {}, ValueError, "2 x 2 px"),
        ((torch.zeros(0, 0), 1), {}, ValueError, "2 x 2 px"),
        ((with_value(float("nan")), 4), {}, ValueError, "NaN"),
        ((with_value(float("-inf")), 4), {}, ValueError, "NaN or infinite"),
        ((with_value(255.0), 4), {}, ValueError, r"\[-1, 1\], got 0 to 255"),
        ((torch.zeros(32), 4), {}, ValueError, r"\(B, 3, H, W\)"),
        ((torch.zeros(1, 4, 32, 32), 4), {}, ValueError, r"\(B, 3, H, W\)"),
        ((torch.zeros(32, 32, dtype=torch.int64), 4), {}, TypeError, "int64"),
        (("photo.jpg", 4), {}, TypeError, "str"),
        ((GOOD, 4), {"min_region_size": 1}, ValueError, "at least 2 px"),
        ((GOOD, 4), {"min_region_size": 8.0}, TypeError, "integer"),
        ((GOOD, 4), {"entropy_exponent": -1}, ValueError, "entropy_exponent=-1"),
        ((GOOD, 4), {"entropy_exponent": float("nan")}, ValueError, "entropy_exponent=nan"),
        ((GOOD, 4), {"importance": GOOD, "importance_strength": -1}, ValueError, "importance_strength=-1"),
        ((GOOD, 4), {"importance": GOOD, "importance_strength": float("inf")}, ValueError, "strength=inf"),
        ((GOOD, 4), {"importance": torch.zeros(31, 32)}, ValueError, r"\(32, 32\).*got \(31, 32\)"),
        ((GOOD, 4), {"importance": torch.zeros(2, 32, 32)}, ValueError, r"got \(2, 32, 32\)"),
        ((GOOD, 4), {"importance": with_value(-0.5)}, ValueError, r"\[0, 1\], got -0.5 to 0"),
        ((GOOD, 4), {"importance": with_value(2.0)}, ValueError, r"\[0, 1\], got 0 to 2"),
        ((GOOD, 4), {"importance": with_value(float("nan"))}, ValueError, "importance: .*NaN"),
        ((GOOD, 4), {"importance": torch.zeros(32, 32, dtype=torch.uint8)}, TypeError, "uint8"),
        ((GOOD, 4), {"importance": [[0.0]]}, TypeError, "list"),
        ((GOOD, 4), {"complexity_bias": with_value(float("inf"))}, ValueError, "complexity_bias: .*infinite"),
    ),
)  # fmt: skip
def test_bad_input(arguments, settings, error, words):
    with pytest.raises(error, match=words):
        partition_image(*arguments, **settings)


def test_bias_beyond_float32():
    bias = torch.zeros(32, 32, dtype=torch.float64)
    bias[0, 0] = 1e300
    with pytest.raises(ValueError, match="too large"):
        partition_image(GOOD, 4, complexity_bias=bias)


@pytest.mark.parametrize("shape", ((3, 32, 32), (1, 2, 32, 32), (32, 32)))
def test_grayscale_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        grayscale(torch.zeros(shape))


def test_max_tokens_refuses():
    with pytest.raises(ValueError, match="2 x 2 px"):
        max_tokens(1, 50)
    with pytest.raises(ValueError, match="min_region_size=0"):
        max_tokens(50, 50, 0)
