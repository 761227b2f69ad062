"""The CUDA splatting kernels: run on the host by emulation, and on a GPU where there is one (-m gpu).

Both are compared with the plain PyTorch definition in float64, values and gradients.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import golden
from emulation.checkers import sanitised_program
from emulation.toolchain import SplatLibrary, compile_emulation, find_compiler
from safetensors.torch import load_file
from splat_cuda_cases import CASES, expect_case, expect_close, random_tokens, real_library
from torch import Tensor

from gpstoken_diffusers.ops.backend import native
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
    return real_library()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "b{}-n{}-c{}-{}x{}-s{:g}-{}".format(*case))
class TestDefinition:
    """Values and gradients at awkward sizes."""

    @needs_compiler
    @needs_linux
    def test_emulated(self, emulated: SplatLibrary, case: tuple) -> None:
        expect_case(emulated, case, "cpu")

    @pytest.mark.gpu
    def test_gpu(self, gpu: SplatLibrary, case: tuple) -> None:
        expect_case(gpu, case, "cuda")


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
    run = sanitised_program("out_of_bounds.cpp", tmp_path / "program")
    done = run()
    assert done.returncode == 0 and "20 launches" in done.stdout, done.stdout + done.stderr
    for direction in ("forward", "backward"):
        done = run(direction)
        assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, direction
