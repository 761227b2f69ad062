"""The CUDA partition, run on the host by emulation: the same regions, in the same order, as the CPU library's.

Tests on a GPU are in test_partition_gpu.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from emulation.checkers import sanitised_program
from emulation.toolchain import compile_emulation, find_compiler
from golden_files import golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout_judge import noise
from partition_cases import KINDS, mirrored, pattern
from safetensors.torch import load_file

from gpstoken_diffusers.ops import partition_cuda
from gpstoken_diffusers.ops.backend import native
from gpstoken_diffusers.ops.partition import max_tokens, partition_image
from gpstoken_diffusers.ops.partition_cuda import partition_on_cuda
from gpstoken_diffusers.ops.partition_reference import (
    _power,
    partition_image_reference,
    region_complexity,
)

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: the emulation cannot be built"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulation and its sanitisers are for Linux"),
]
NONE, SOME, ALL = 0, 2, 1_000_000  # regions measured beforehand, for each token


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/partition_cuda.cu, whole, as a library for the CPU. Like nvcc here, the compiler may fuse nothing."""
    target = tmp_path_factory.mktemp("emulation") / "libpartition.so"
    compile_emulation("emulated_partition.cpp", target, "-O2", "-march=native", "-ffp-contract=off")
    library = ctypes.CDLL(str(target))
    for name, arguments in native._SIGNATURES["cuda"].items():
        if "partition" in name:
            getattr(library, name).argtypes = arguments
    library.gpstoken_cuda_error_string.restype = ctypes.c_char_p
    library.emulation_set_beforehand.argtypes = [ctypes.c_int64]
    library.emulation_power.argtypes, library.emulation_power.restype = [ctypes.c_double] * 2, ctypes.c_double
    return library


@pytest.fixture
def emulated(emulated_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """Lets tensors on the CPU take the way of those on a GPU, through the emulation."""
    real = native.library
    monkeypatch.setattr(native, "library", lambda kind: emulated_library if kind == "cuda" else real(kind))
    monkeypatch.setattr(partition_cuda, "serves", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=None))
    emulated_library.emulation_set_seed(0)
    emulated_library.emulation_set_beforehand(SOME)
    partition_cuda._entropy_terms.cache_clear()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns, so that what is not written shows
    yield emulated_library
    torch.use_deterministic_algorithms(False)
    partition_cuda._entropy_terms.cache_clear()


def on_cpu(
    grey: torch.Tensor, num_tokens: int, min_region_size: int, exponent: float = 2.5, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The CPU library's regions; the reference's without it."""
    options = num_tokens, min_region_size, exponent
    if native.library("cpu") is None:
        expected = partition_image_reference(grey.numpy(), *options, None if bias is None else bias.numpy())
        return torch.from_numpy(expected)
    regions = torch.empty((len(grey), num_tokens, 4), dtype=torch.int32)
    addresses = grey.data_ptr(), None if bias is None else bias.data_ptr(), regions.data_ptr()
    native.call("cpu", "gpstoken_partition_cpu", *addresses, *grey.shape, *options, 1)
    return regions


def random_bias(kind: str, shape: torch.Size, seed: int) -> torch.Tensor | None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return {"none": None, "mask": (values > 0).float() * 10, "noise": values * 3}[kind]


# ---- equal regions ----

sides = st.one_of(st.sampled_from((8, 16, 32, 64, 128)), st.integers(2, 140))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_the_cpu(emulated: ctypes.CDLL, data: st.DataObject) -> None:
    height = data.draw(sides, "height")
    width = data.draw(st.one_of(st.just(height), sides), "width")
    min_region_size = data.draw(st.integers(2, 17), "min_region_size")
    exponent = data.draw(st.sampled_from((2.5, 2.5, 0.0, 1.0, 1.2, 7.0)), "exponent")
    seed = data.draw(st.integers(0, 1000), "seed")
    picture = pattern(data.draw(st.sampled_from(KINDS), "kind"), height, width, seed)
    if data.draw(st.booleans(), "mirrored"):
        picture = mirrored(picture)
    grey = torch.from_numpy(picture)
    largest = max_tokens(*grey.shape[1:], min_region_size)
    num_tokens = data.draw(st.integers(1, min(largest, 60)), "num_tokens")
    bias = random_bias(data.draw(st.sampled_from(("none", "mask", "noise")), "bias"), grey.shape, seed)
    emulated.emulation_set_beforehand(data.draw(st.sampled_from((NONE, SOME, 128)), "beforehand"))
    found, _ = partition_on_cuda(grey, num_tokens, min_region_size, exponent, bias)
    assert torch.equal(found, on_cpu(grey, num_tokens, min_region_size, exponent, bias))


@pytest.mark.parametrize("beforehand", (NONE, SOME, ALL))
@pytest.mark.parametrize(
    ("height", "width", "min_region_size", "num_tokens"),
    (
        (2, 2, 2, 1),
        (3, 200, 2, None),  # a strip: all cuts along x. None: all tokens that there can be
        (300, 9, 8, None),
        (31, 33, 2, None),
        (64, 64, 8, None),
        (37, 37, 4, None),
        (150, 300, 64, None),
        (256, 256, 16, 1),
        (257, 130, 16, 2),
    ),
)
def test_sizes(
    emulated: ctypes.CDLL, height: int, width: int, min_region_size: int, num_tokens: int | None, beforehand: int
) -> None:
    grey = noise(1, height, width, seed=height)
    grey[:, : height // 2] *= 0.1
    num_tokens = max_tokens(height, width, min_region_size) if num_tokens is None else num_tokens
    emulated.emulation_set_beforehand(beforehand)
    found, complexity = partition_on_cuda(grey, num_tokens, min_region_size, 2.5)
    assert torch.equal(found, on_cpu(grey, num_tokens, min_region_size))
    expected = region_complexity(grey[0].numpy(), found[0].numpy())
    assert np.array_equal(complexity[0].numpy(), expected)  # to the last bit


@pytest.mark.parametrize(("height", "width"), ((2, 2), (13, 21), (40, 9), (70, 130)))
def test_bias_is_added_up_in_the_order_of_the_reference(emulated: ctypes.CDLL, height: int, width: int) -> None:
    """Each complexity to the last bit, though the bias is a thousand times as large as the rest."""
    grey, bias = noise(2, height, width), noise(2, height, width, seed=1) * 1e4
    num_tokens = min(max_tokens(height, width, 3), 30)
    found, complexity = partition_on_cuda(grey, num_tokens, 3, 2.5, bias)
    assert torch.equal(found, on_cpu(grey, num_tokens, 3, bias=bias))
    for i in range(2):
        expected = region_complexity(grey[i].numpy(), found[i].numpy(), bias=bias[i].numpy())
        assert np.array_equal(complexity[i].numpy(), expected)


@pytest.mark.parametrize("num_tokens", (64, 256))
def test_photographs(emulated: ctypes.CDLL, num_tokens: int) -> None:
    """As the official code divides them; some measured beforehand, the rest when needed."""
    goldens = load_file(golden("partition.safetensors"))
    names = ("astronaut", "coffee", "chelsea", "rocket", "camera")
    pictures = torch.stack([goldens[f"{name}.image_u8"].permute(2, 0, 1) for name in names])
    expected = torch.cat([goldens[f"{name}.n{num_tokens}.regions"] for name in names]).reshape(5, num_tokens, 4)
    found = partition_image(pictures, num_tokens).regions
    assert torch.equal(found, ((expected + 1) / 2 * 255).round().int())


# ---- what must not matter ----


@pytest.mark.parametrize("beforehand", (NONE, SOME, ALL))
def test_order_of_threads(emulated: ctypes.CDLL, beforehand: int) -> None:
    """A missing barrier shows as a difference between orders."""
    grey = noise(2, 33, 50) * torch.linspace(0.1, 1, 50)
    expected = on_cpu(grey, 30, 4)
    emulated.emulation_set_beforehand(beforehand)
    for seed in range(3):
        emulated.emulation_set_seed(seed)
        assert torch.equal(partition_on_cuda(grey, 30, 4, 2.5)[0], expected)


def test_batch(emulated: ctypes.CDLL) -> None:
    grey, bias = noise(9, 40, 56) * torch.rand(9, 1, 1), noise(9, 40, 56) * 3
    found, complexity = partition_on_cuda(grey, 12, 4, 2.5, bias)
    for i in range(9):
        alone = partition_on_cuda(grey[i : i + 1], 12, 4, 2.5, bias[i : i + 1])
        assert torch.equal(alone[0][0], found[i]) and torch.equal(alone[1][0], complexity[i])


def test_values_that_should_not_be_there(emulated: ctypes.CDLL) -> None:
    """A captured graph cannot refuse them: they must do no harm."""
    grey = noise(1, 40, 56) * 3
    assert torch.equal(partition_on_cuda(grey, 12, 4, 2.5)[0], on_cpu(grey.clamp(-1, 1), 12, 4))
    for value in (float("nan"), float("inf"), -float("inf")):
        spoilt = torch.where(noise(1, 40, 56, seed=1) > 0.9, value, grey)
        for bias in (None, spoilt):
            found, _ = partition_on_cuda(spoilt, 12, 4, 2.5, bias)
            area = ((found[..., 2:] - found[..., :2] + 1).prod(-1)).sum()
            assert area == 40 * 56


# ---- the public function ----


def test_partition_image_takes_this_way(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = ((noise(2, 3, 48, 80) + 1) * 127.5).to(torch.uint8)
    overshooting = noise(2, 1, 48, 80) * 1.1
    importance, bias = noise(48, 80).abs(), noise(2, 48, 80, seed=4)
    cases = (
        (picture, {}),
        (picture[0, 0].numpy(), {"min_region_size": 3, "entropy_exponent": 1.0}),
        (overshooting, {"importance": importance, "importance_strength": 3}),
        (overshooting, {"importance": importance > 0.5, "complexity_bias": bias}),
        (picture[:0], {"importance": importance}),
    )
    found = [partition_image(image, 20, **options) for image, options in cases]
    with pytest.raises(ValueError, match="NaN"):
        partition_image(torch.full((32, 32), float("nan")), 4)
    monkeypatch.setattr(partition_cuda, "serves", lambda device: False)
    for partition, (image, options) in zip(found, cases, strict=True):
        expected = partition_image(image, 20, **options)
        assert torch.equal(partition.regions, expected.regions)
        assert torch.equal(partition.geometry, expected.geometry)


def test_graph_before_the_first_call(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call it once before a CUDA graph"):
        partition_on_cuda(noise(1, 32, 32), 4, 8, 2.5)


def test_arguments(emulated: ctypes.CDLL) -> None:
    for tokens, words in ((17, "too many tokens"), (0, "invalid argument")):
        with pytest.raises(RuntimeError, match=words):
            partition_on_cuda(noise(1, 32, 32), tokens, 8, 2.5)
    with pytest.raises(RuntimeError, match="invalid argument"):
        partition_on_cuda(noise(1, 32, 32), 4, 1, 2.5)
    assert partition_on_cuda(noise(0, 32, 32), 4, 8, 2.5)[0].shape == (0, 4, 4)


# ---- the parts ----


def test_power_is_the_nearest_number(emulated: ctypes.CDLL) -> None:
    source = random.Random(0)
    for exponent in (0.0, 0.5, 0.7, 1.0, 1e-3, 2.5, 3.14159, 7.0, 30.0):
        for _ in range(300):
            base = source.uniform(3e-9, 8) if source.random() < 0.8 else source.uniform(3e-9, 1e-8)
            assert emulated.emulation_power(base, exponent) == _power(base, exponent), (base, exponent)


def test_no_access_outside_buffers(tmp_path: Path) -> None:
    """Address and undefined-behaviour sanitisers over all kernels, NaN and infinite values included."""
    run = sanitised_program("partition_out_of_bounds.cpp", tmp_path / "program", "-ffp-contract=off")
    done = run()
    assert done.returncode == 0 and "18 calls" in done.stdout, done.stdout + done.stderr
    for what in ("regions", "scratch"):
        done = run(what)
        assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, what
