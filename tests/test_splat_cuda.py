"""The CUDA splatting kernels: run on the host by emulation, and on a GPU where there is one (-m gpu).

Both are compared with the plain PyTorch definition in float64, values and gradients.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import golden
from emulation.toolchain import SplatLibrary, compile_emulation, find_compiler
from safetensors.torch import load_file
from torch import Tensor

from gpstoken_diffusers.ops import native
from gpstoken_diffusers.ops.splat import splat_gaussians
from gpstoken_diffusers.ops.splat_reference import (
    pixel_centers,
    splat_gaussians_backward_reference,
    splat_gaussians_reference,
)

NAN, INF = float("nan"), float("inf")

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: the emulation cannot be built")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the emulation and its sanitisers are for Linux")


@pytest.fixture(scope="session")
def emulated_cdll(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/splat_cuda.cu, whole, as a library for the CPU."""
    target = tmp_path_factory.mktemp("emulation") / "libsplat.so"
    return ctypes.CDLL(str(compile_emulation("emulated_library.cpp", target, "-O2", "-march=native")))


@pytest.fixture
def emulated(emulated_cdll: ctypes.CDLL) -> SplatLibrary:
    emulated_cdll.emulation_set_seed(0)
    return SplatLibrary(emulated_cdll)


@pytest.fixture(scope="session")
def gpu() -> SplatLibrary:
    """The real library, on the current GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    library = native.library("cuda")
    if library is None:
        pytest.skip(f"the CUDA library is not there: {native.why_missing('cuda')}")
    return SplatLibrary(library)


def random_tokens(batch: int, count: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens from a fraction of a pixel to half the image, some centred outside it; |rho| up to 0.95."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(5, batch, count, generator=generator)
    sigma = 0.004 * 100.0 ** uniform[:2]
    geometry = torch.stack([*sigma, 1.9 * uniform[2] - 0.95, *(2.6 * uniform[3:] - 1.3)], dim=-1)
    return geometry, torch.randn(batch, count, channels, generator=generator)


def away_from_edges(geometry: Tensor, height: int, width: int, support: float) -> Tensor:
    """Widens tokens with a pixel within 2e-6 of their box's edge, where float32 may decide either way."""
    geometry = geometry.double()
    for axis, n in enumerate([width, height]):
        while True:
            sigma, center = geometry[..., axis, None], geometry[..., 3 + axis, None]
            to_edge = (pixel_centers(n, geometry.device) - center).abs() - support * sigma
            near = to_edge.abs().amin(-1) < 2e-6
            if not near.any():
                break
            geometry[..., axis] *= torch.where(near, 1.001, 1.0)
    return geometry.float()


def expect_close(result: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Largest difference, relative to the largest expected value, below tolerance."""
    assert result.shape == expected.shape
    assert result.isfinite().all(), f"{name}: {int((~result.isfinite()).sum())} elements not written or not finite"
    if expected.numel() == 0:
        return
    scale = expected.abs().max().clamp(min=1e-30)
    error = ((result.to(expected) - expected).abs().max() / scale).item()
    assert error <= tolerance, f"{name}: error {error:.2e} of the largest value, allowed {tolerance:.0e}"


def expect_definition(
    library: SplatLibrary, geometry: Tensor, texture: Tensor, height: int, width: int, support: float
) -> None:
    """Forward and backward against the plain definition in float64."""
    # float32 sums of up to some hundred terms: 5e-6 is five times what was seen. Then one rounding to
    # 16 bits, half an ulp: 2^-11 in float16, 2^-8 in bfloat16.
    rounding = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[texture.dtype]
    geometry = away_from_edges(geometry, height, width, support)
    batch, _, channels = texture.shape
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(batch, channels, height, width, generator=generator).to(texture)
    out = library.forward(geometry, texture, height, width, support)
    grad_geometry, grad_texture = library.backward(geometry, texture, grad_out, support)

    exact_tokens = geometry.double(), texture.double()
    expected = splat_gaussians_reference(*exact_tokens, height, width, support)
    expected_grads = splat_gaussians_backward_reference(*exact_tokens, grad_out.double(), support)
    expect_close(out, expected, 5e-6 + rounding, "map")
    expect_close(grad_texture, expected_grads[1], 5e-6 + rounding, "texture gradient")
    for i, name in enumerate(["sigma_x", "sigma_y", "rho", "x", "y"]):
        expect_close(grad_geometry[..., i], expected_grads[0][..., i], 2e-5, f"gradient of {name}")


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# batch, tokens, channels, height, width, support, dtype. Each number of channels takes another kernel, or the
# tail of one.
CASES = [
    (1, 0, 3, 4, 5, 3.0, F32),
    (1, 1, 1, 1, 1, 3.0, F32),
    (2, 17, 3, 7, 5, 5.0, F32),
    (2, 17, 16, 33, 65, 5.0, F32),
    (1, 257, 33, 33, 65, 3.0, F32),
    (1, 257, 16, 33, 65, 3.0, BF16),
    (1, 17, 130, 7, 5, 3.0, F16),
    (3, 257, 1, 1, 1, 3.0, F32),
    (2, 17, 5, 1, 40, 3.0, F16),
    (2, 17, 32, 40, 1, 5.0, BF16),
    (1, 17, 0, 3, 3, 3.0, F32),  # no channels: nothing to paint, gradients of geometry are zero
    (5, 257, 32, 7, 5, 3.0, F32),  # 1285 tokens: eight to a block, the last one not full
    (256, 2, 13, 2, 2, 3.0, F16),  # 256 tiles: slices of 16 channels
    (130, 5, 33, 3, 3, 3.0, F32),  # 260 tiles: slices of 32 channels
    (3, 700, 4, 5, 5, 5.0, F16),  # more survivors in a tile than its list can hold
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "b{}-n{}-c{}-{}x{}-s{:g}-{}".format(*case))
class TestDefinition:
    """Values and gradients at awkward sizes."""

    @needs_compiler
    @needs_linux
    def test_emulated(self, emulated: SplatLibrary, case: tuple) -> None:
        self.check(emulated, case, "cpu")

    @pytest.mark.gpu
    def test_gpu(self, gpu: SplatLibrary, case: tuple) -> None:
        self.check(gpu, case, "cuda")

    @staticmethod
    def check(library: SplatLibrary, case: tuple, device: str) -> None:
        *sizes, height, width, support, dtype = case
        geometry, texture = random_tokens(*sizes)
        expect_definition(library, geometry.to(device), texture.to(device, dtype), height, width, support)


def golden_cases() -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor, float]]:
    tensors = load_file(golden("splat.safetensors"))
    for entry in json.loads(golden("splat_deviation.json").read_text()):
        name = entry["case"]
        parts = ["tokens", "upstream", "rendered", "grad_tokens"]
        yield name, *(tensors[f"{name}.{part}"] for part in parts), float(name.rpartition("_d")[2])


class TestGolden:
    """Against stored values: rho = +-0.999, centres outside the image, boxes narrower than a pixel."""

    @needs_compiler
    @needs_linux
    def test_emulated(self, emulated: SplatLibrary) -> None:
        self.check(emulated, "cpu")

    @pytest.mark.gpu
    def test_gpu(self, gpu: SplatLibrary) -> None:
        self.check(gpu, "cuda")

    @staticmethod
    def check(library: SplatLibrary, device: str) -> None:
        count = 0
        for name, tokens, upstream, rendered, grad_tokens, support in golden_cases():
            geometry, texture = (t.contiguous().to(device) for t in (tokens[..., :5], tokens[..., 5:]))
            height, width = rendered.shape[2:]
            out = library.forward(geometry, texture, height, width, support).cpu()
            grads = torch.cat(library.backward(geometry, texture, upstream.to(device), support), dim=-1).cpu()
            # Expected of float32 by those who stored them: 1e-6, with tokens of |rho| = 0.999 1e-4 and 5e-4.
            correlated = bool((geometry[..., 2].abs() > 0.99).any())
            expect_close(out, rendered, 1e-4 if correlated else 1e-6, f"{name} map")
            expect_close(grads, grad_tokens, 5e-4 if correlated else 1e-6, f"{name} gradient")
            count += 1
        assert count > 0


class TestPeculiarTokens:
    """Geometry that makes no sense paints nothing, gets zero gradients and leaves all other tokens alone."""

    SENSELESS = [
        *([NAN if i == j else 0.3 for j in range(5)] for i in range(5)),
        *([INF if i == j else 0.3 for j in range(5)] for i in range(5)),
        [0.3, 0.3, 0.0, -INF, 0.0],
        [0.0, 0.3, 0.0, 0.0, 0.0],
        [0.3, -0.3, 0.0, 0.0, 0.0],
        [0.3, 1e-39, 0.0, 0.0, 0.0],  # a subnormal sigma has no finite reciprocal
        [0.3, 0.3, 1.0, 0.0, 0.0],
        [0.3, 0.3, -1.0, 0.0, 0.0],
        [0.3, 0.3, 1.5, 0.0, 0.0],
    ]
    EXTREME = [
        [2e-38, 2e-38, 0.5, -1.0, 1.0],  # on the centre of a corner pixel
        [2e-38, 0.5, 0.0, -1.0, 0.1],
        [1e30, 0.5, 0.0, 0.0, 0.0],
        [0.3, 0.3, 0.99999, 0.0, 0.0],
        [0.5, 0.5, 0.0, 1e30, 0.0],
        [0.5, 0.5, 0.0, 2.0, -2.0],  # outside, reaching in
    ]

    @needs_compiler
    @needs_linux
    def test_emulated(self, emulated: SplatLibrary) -> None:
        self.check(emulated, "cpu")

    @pytest.mark.gpu
    def test_gpu(self, gpu: SplatLibrary) -> None:
        self.check(gpu, "cuda")

    def check(self, library: SplatLibrary, device: str) -> None:
        sensible, _ = random_tokens(1, 9, 1)
        senseless = torch.tensor([self.SENSELESS])
        geometry = torch.cat([senseless, torch.tensor([self.EXTREME]), sensible], dim=1)
        texture = torch.randn(1, geometry.shape[1], 3, generator=torch.Generator().manual_seed(2))
        grad_out = torch.randn(1, 3, 9, 17, generator=torch.Generator().manual_seed(3))
        inputs = geometry.to(device), texture.to(device)
        grad_geometry, grad_texture = library.backward(*inputs, grad_out.to(device))
        assert (grad_geometry[:, : senseless.shape[1]] == 0).all()
        assert (grad_texture[:, : senseless.shape[1]] == 0).all()

        def without_senseless(tensor: Tensor) -> Tensor:
            return tensor[:, senseless.shape[1] :].contiguous()

        kept = [without_senseless(t) for t in inputs]
        assert torch.equal(library.forward(*inputs, 9, 17), library.forward(*kept, 9, 17))
        expected = splat_gaussians_reference(*(t.double().cpu() for t in kept), 9, 17)
        # float32 with |rho| = 0.99999 loses a factor of 1 / sqrt(1 - rho^2) = 220.
        expect_close(library.forward(*kept, 9, 17).cpu(), expected, 1e-4, "map")
        expected_grads = splat_gaussians_backward_reference(*(t.double().cpu() for t in kept), grad_out.double())
        expect_close(without_senseless(grad_texture).cpu(), expected_grads[1], 1e-4, "texture gradient")
        assert without_senseless(grad_geometry).isfinite().all()


class TestRepeatability:
    """Not a bit depends on the order of threads, on the run, or on the batch."""

    @needs_compiler
    @needs_linux
    @pytest.mark.parametrize("sizes", [(2, 150, 33, 21, 35), (4, 260, 4, 18, 18)])
    def test_order_of_threads(self, emulated: SplatLibrary, sizes: tuple[int, ...]) -> None:
        """A missing barrier shows as a difference between orders. A block per token, and eight to a block;
        boxes for one warp, and for all warps of a block, several in the same block."""
        *shape, height, width = sizes
        geometry, texture = random_tokens(*shape)
        geometry[..., :2] *= 3.0
        generator = torch.Generator().manual_seed(1)
        grad_out = torch.randn(shape[0], shape[2], height, width, generator=generator)
        results = []
        for seed in range(4):
            emulated.library.emulation_set_seed(seed)
            out = emulated.forward(geometry, texture, height, width, 5.0)
            results.append((out, *emulated.backward(geometry, texture, grad_out, 5.0)))
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))

    @needs_compiler
    @needs_linux
    def test_batch_emulated(self, emulated: SplatLibrary) -> None:
        self.check_batch(emulated, "cpu")

    @pytest.mark.gpu
    def test_batch_gpu(self, gpu: SplatLibrary) -> None:
        self.check_batch(gpu, "cuda")

    @staticmethod
    def check_batch(library: SplatLibrary, device: str) -> None:
        """One image alone (narrow slices, a block per token) and among 70 (wide slices, eight to a block)."""
        geometry, texture = (t.to(device) for t in random_tokens(70, 15, 33))
        grad_out = torch.randn(70, 33, 17, 20, generator=torch.Generator().manual_seed(1)).to(device)
        out = library.forward(geometry, texture, 17, 20)
        grads = library.backward(geometry, texture, grad_out)
        alone = geometry[69:].contiguous(), texture[69:].contiguous()
        assert torch.equal(library.forward(*alone, 17, 20), out[69:])
        for one, many in zip(library.backward(*alone, grad_out[69:].contiguous()), grads, strict=True):
            assert torch.equal(one, many[69:])

    @pytest.mark.gpu
    def test_runs_on_gpu(self, gpu: SplatLibrary) -> None:
        geometry, texture = (t.cuda() for t in random_tokens(8, 256, 32))
        grad_out = torch.randn(8, 32, 64, 64, device="cuda")
        first = gpu.forward(geometry, texture, 64, 64), *gpu.backward(geometry, texture, grad_out)
        for _ in range(50):
            again = gpu.forward(geometry, texture, 64, 64), *gpu.backward(geometry, texture, grad_out)
            assert all(map(torch.equal, again, first))


@needs_compiler
@needs_linux
def test_pixel_centers_are_those_of_the_definition(emulated_cdll: ctypes.CDLL) -> None:
    """The correction that replaces a division gives the very bits that float64 does."""
    for n in [*range(1, 1100), 2047, 2048, 4096, 5000]:
        centers = torch.full((n,), float("nan"))
        emulated_cdll.emulation_axis(n, ctypes.c_void_p(centers.data_ptr()))
        assert torch.equal(centers, pixel_centers(n)), n


@needs_compiler
@needs_linux
def test_arguments(emulated_cdll: ctypes.CDLL) -> None:
    """Result codes for what the kernels cannot do, and for having nothing to do."""
    SplatLibrary(emulated_cdll)  # declares the argument types
    pointers = [None] * 3

    def code(*sizes: int, dtype: int = 0) -> int:
        return emulated_cdll.gpstoken_splat_forward_cuda(*pointers, *sizes, 3.0, dtype, None)

    assert emulated_cdll.gpstoken_abi_version() == native.ABI_VERSION
    assert code(1, 0, 3, 4, -1) == 1
    assert code(1, 0, 3, 2**24, 4) == 1
    assert code(2**40, 0, 3, 4, 4) == 1  # more blocks than a grid has
    assert code(1, 0, 3, 4, 4, dtype=3) == 2
    assert code(0, 5, 3, 4, 4) == code(1, 5, 0, 4, 4) == code(1, 5, 3, 0, 4) == 0


@needs_compiler
@needs_linux
def test_no_access_outside_buffers(tmp_path: Path) -> None:
    """Address and undefined-behaviour sanitisers over both kernels, NaN and infinite geometry included."""
    sanitisers = "-fsanitize=address,undefined,float-cast-overflow"
    try:
        program = compile_emulation("out_of_bounds.cpp", tmp_path / "program", "-O1", "-g1", sanitisers,
                                    "-fno-sanitize-recover=all")  # fmt: skip
    except RuntimeError as error:
        if "cannot find" in str(error):
            pytest.skip(f"the compiler comes without sanitisers: {error}")
        raise

    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment)

    done = run()
    assert done.returncode == 0 and "20 launches" in done.stdout, done.stdout + done.stderr
    for direction in ("forward", "backward"):
        done = run(direction)
        assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, direction


# ---- On a GPU only ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("sizes", [(1, 64, 16), (8, 256, 32), (64, 128, 16), (2, 4096, 130)])
def test_gpu_real_sizes(gpu: SplatLibrary, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    geometry, texture = random_tokens(*sizes)
    expect_definition(gpu, geometry.cuda(), texture.to("cuda", dtype), 64, 80, 3.0)


@pytest.mark.gpu
def test_gpu_operator(gpu: SplatLibrary) -> None:
    """The public operator on CUDA: autograd, dense copies of strided inputs, torch's own checks."""
    geometry, texture = (t.cuda() for t in random_tokens(2, 17, 6))
    strided = texture.transpose(1, 2).contiguous().transpose(1, 2)
    inputs = geometry.requires_grad_(), strided.requires_grad_()
    out = splat_gaussians(*inputs, 33, 20)
    assert torch.equal(out, gpu.forward(geometry.detach(), texture, 33, 20))
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    assert all(map(torch.equal, grads, gpu.backward(geometry.detach(), texture, weight)))
    torch.library.opcheck(torch.ops.gpstoken.splat_gaussians, (*inputs, 33, 20, 3.0))


@pytest.mark.gpu
def test_gpu_stream(gpu: SplatLibrary) -> None:
    """The work waits for what its own stream does before it, and is not queued on another."""
    geometry, texture = (t.cuda() for t in random_tokens(4, 256, 32))
    expected = splat_gaussians(geometry, texture, 64, 64)
    late = torch.zeros_like(texture)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        late.copy_(texture)
        out = splat_gaussians(geometry, late, 64, 64)
        late.zero_()  # must not overtake the kernel either
    assert not stream.query(), "the call waited for the device"
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_gpu_graph(gpu: SplatLibrary) -> None:
    """Launches can be captured in a CUDA graph."""
    geometry, texture = (t.cuda() for t in random_tokens(1, 64, 16))
    expected = splat_gaussians(geometry, texture, 64, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = splat_gaussians(geometry, texture, 64, 64)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_gpu_large_batch(gpu: SplatLibrary) -> None:
    """More images than the second and third dimension of a grid can count."""
    geometry, texture = (t.cuda() for t in random_tokens(70_000, 2, 4))
    out = gpu.forward(geometry, texture, 3, 3)
    grads = gpu.backward(geometry, texture, torch.ones_like(out))
    assert torch.equal(out[-1:], gpu.forward(geometry[-1:].contiguous(), texture[-1:].contiguous(), 3, 3))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_gpu_sanitizer(gpu: SplatLibrary, tool: str) -> None:
    """Both kernels under NVIDIA's checkers."""
    code = (
        "import torch; from test_splat_cuda import *; library = SplatLibrary(native.library('cuda'))\n"
        "for case in CASES: TestDefinition.check(library, case, 'cuda')"
    )
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    # Without torch's pool of memory, so that every tensor is an allocation whose ends are known.
    environment = {"PYTHONPATH": os.pathsep.join(folders), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
