"""The CUDA partition on a GPU (-m gpu): the CPU's regions at real sizes, streams, graphs, what travels to the host."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from emulation.checkers import expect_clean_on_gpu
from layout_judge import noise, picture
from partition_cases import KINDS, mirrored, pattern

from gpstoken_diffusers.ops.backend import native
from gpstoken_diffusers.ops.partition import initial_gaussians, max_tokens, partition_image
from gpstoken_diffusers.ops.partition_cuda import partition_on_cuda
from gpstoken_diffusers.ops.partition_reference import region_complexity

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if native.library("cuda") is None:
        pytest.skip(f"the CUDA library is not there: {native.why_missing('cuda')}")


def expect_cpu(image: torch.Tensor, num_tokens: int, **options) -> None:
    """The same regions and initial Gaussians as on the CPU."""
    found = partition_image(image.cuda(), num_tokens, **options)
    expected = partition_image(image, num_tokens, **options)
    assert found.regions.is_cuda and found.geometry.is_cuda
    assert torch.equal(found.regions.cpu(), expected.regions)
    assert torch.equal(found.geometry.cpu(), expected.geometry)


@pytest.mark.parametrize(
    ("batch", "height", "width", "num_tokens"),
    (
        (1, 256, 256, 64),
        (1, 256, 256, 1024),
        (8, 256, 256, 256),
        (64, 256, 256, 128),
        (2, 1024, 768, 1000),
        (300, 40, 50, 9),
    ),
)
def test_real_sizes(batch: int, height: int, width: int, num_tokens: int) -> None:
    images = picture(batch, height, width)
    expect_cpu(images, num_tokens)
    expect_cpu(images, num_tokens, complexity_bias=noise(batch, height, width) * 2, min_region_size=5)
    expect_cpu(images, num_tokens, importance=noise(height, width).abs(), importance_strength=2.5)


@pytest.mark.parametrize("kind", KINDS)
def test_awkward_pictures(kind: str) -> None:
    for seed, (height, width) in enumerate(((8, 8), (93, 77), (300, 141), (131, 131), (2, 90))):
        for image in (pattern(kind, height, width, seed), mirrored(pattern(kind, height, width, seed))):
            largest = max_tokens(*image.shape[1:], 4)
            for exponent in (2.5, 1.2):
                expect_cpu(torch.from_numpy(image), min(largest, 70), min_region_size=4, entropy_exponent=exponent)


def test_every_byte_and_type() -> None:
    """Conversions are rounded as on the CPU."""
    image = torch.arange(256, dtype=torch.uint8).repeat(3, 256, 1).permute(0, 2, 1)[None].clone()
    image[:, 1] = image[:, 1].flip(1)
    expect_cpu(image, 200)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        expect_cpu((image.double() / 127.5 - 1).to(dtype), 200)
    regions = torch.randint(0, 4096, (1000, 4), dtype=torch.int32)
    for size in ((37, 4096), (255, 333)):
        assert torch.equal(initial_gaussians(regions.cuda(), *size).cpu(), initial_gaussians(regions, *size))


def test_complexities_are_the_cpus() -> None:
    """To the last bit: they decide ties."""
    grey = picture(1, 200, 300)
    for exponent in (2.5, 0.7, 3.0):
        regions, complexity = partition_on_cuda(grey.cuda(), 100, 8, exponent)
        expected = region_complexity(grey[0].numpy(), regions[0].cpu().numpy(), exponent)
        assert np.array_equal(complexity[0].cpu().numpy(), expected)


def test_stream() -> None:
    """The work waits for what its own stream does before it, and is not queued on another."""
    grey = picture(4, 256, 256).cuda()
    expected, _ = partition_on_cuda(grey, 128, 8, 2.5)
    late = torch.zeros_like(grey)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        late.copy_(grey)
        found, _ = partition_on_cuda(late, 128, 8, 2.5)
        late.zero_()  # must not overtake the kernels either
    assert not stream.query(), "the call waited for the device"
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)


def test_graph() -> None:
    """The whole function is captured once, and replayed on other pictures."""
    images, bias = picture(3, 256, 256).cuda(), noise(3, 256, 256, seed=3).cuda()
    options = {"complexity_bias": bias, "importance": noise(256, 256, seed=4).abs().cuda()}
    others = picture(3, 256, 256, seed=1).cuda()
    expected = partition_image(others, 100, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = partition_image(images, 100, **options)
    images.copy_(others)
    graph.replay()
    assert torch.equal(found.regions, expected.regions) and torch.equal(found.geometry, expected.geometry)


def test_pixels_stay_on_the_device() -> None:
    """Without range checks nothing waits; with them a few numbers travel, however large the picture."""
    images, importance = picture(2, 512, 512).cuda(), noise(512, 512).abs().cuda()
    partition_image(images, 100, importance=importance)
    torch.cuda.set_sync_debug_mode("error")
    try:
        partition_on_cuda(images, 100, 8, 2.5, images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        partition_image(images, 100, importance=importance)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert any("partition_list_kernel" in name for name in names)
    assert not any("HtoD" in name for name in names)
    assert sum("DtoH" in name for name in names) <= 6  # a truth value each, or two numbers


def test_repeats() -> None:
    images = picture(16, 256, 256).cuda()
    first = partition_image(images, 256).regions
    for _ in range(30):
        assert torch.equal(partition_image(images, 256).regions, first)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer(tool: str) -> None:
    """All kernels under NVIDIA's checkers."""
    code = (
        "from layout_judge import picture; from gpstoken_diffusers.ops.partition_cuda import partition_on_cuda\n"
        "for b, h, w, n in ((1, 64, 64, 40), (70, 33, 20, 3), (1, 2, 2, 1), (2, 100, 3, 7)):\n"
        "    grey = picture(b, h, w).cuda(); partition_on_cuda(grey, n, 2, 2.5, grey)[0].cpu()"
    )
    expect_clean_on_gpu(tool, code)
