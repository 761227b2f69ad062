"""Compiled networks: the same results, which outlast the next call even where memory is used again and again.

On a GPU `mode="reduce-overhead"` records CUDA graphs, whose results lie where the last ones lay. Here a backend that
does the same stands in for them; with a GPU, the tests at the end use the real ones.
"""

from __future__ import annotations

import copy

import pytest
import torch
from emulation.toolchain import find_compiler
from model_zoo import noise_images, tiny_model
from pipeline_zoo import tiny_pipeline

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenPipeline
from gpstoken_diffusers.schedulers.presets import SAMPLER_PRESETS, make_sampler


class ReusedMemory:
    """A backend of `torch.compile` whose graphs share their memory: a call spoils the results of every call before."""

    def __init__(self):
        self.results: list[list[torch.Tensor]] = []
        self.calls = 0

    def __call__(self, graph, example_inputs):
        own: list[torch.Tensor] = []
        self.results.append(own)

        def run(*inputs):
            self.calls += 1
            for result in (result for results in self.results for result in results if result.is_floating_point()):
                result.fill_(torch.nan)
            outputs = graph(*inputs)
            if not own:
                own.extend(output.clone() for output in outputs)
            for result, output in zip(own, outputs, strict=True):
                result.copy_(output)
            return own

        return run


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(model: AutoencoderGPSToken, images: torch.Tensor) -> list[torch.Tensor]:
    tokens = model.encode(images).tokens
    return [tokens.geometry, tokens.texture, model.decode(tokens).sample]


KINDS = [("map", {}), ("map", {"decode_mode": "merge"}), ("lattice", {})]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "settings"), KINDS)
@pytest.mark.parametrize("size", [(32, 32), (50, 70)])
def test_results_outlast_the_next_call(kind, settings, size):
    plain = tiny_model(kind, **settings)
    first, second = noise_images(2, *size), noise_images(2, *size, seed=1)
    expected = [tensors(plain, first), tensors(plain, second)]
    model = copy.deepcopy(plain)
    model.compile(backend=ReusedMemory(), fullgraph=True, dynamic=False)
    found = [tensors(model, first), tensors(model, second)]
    for own, wanted in zip(found, expected, strict=True):
        for one, other in zip(own, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_tile_by_tile(kind, settings):
    """A budget makes one network be called several times for one result."""
    plain = tiny_model(kind, **settings)
    images = noise_images(1, 100, 130)
    plain.set_memory_budget("26MB" if kind == "map" else "18MB")
    expected = tensors(plain, images)
    model, backend = copy.deepcopy(plain), ReusedMemory()
    model.compile(backend=backend, dynamic=False)
    for one, other in zip(tensors(model, images), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert backend.calls > 3


def sample(pipe: GPSTokenPipeline, sampler: str, guidance_scale: float) -> list[torch.Tensor]:
    pipe.scheduler, pipe.layout_scheduler = (make_sampler(sampler, 4)[0] for _ in range(2))
    scales = {"guidance_scale": guidance_scale, "layout_guidance_scale": guidance_scale}
    lengths = {"num_inference_steps": 4, "layout_num_inference_steps": 4}
    tokens = pipe(1, generator=torch.Generator().manual_seed(0), output_type="tokens", **scales, **lengths).tokens
    return [tokens.geometry, tokens.texture]


@pytest.mark.parametrize("sampler", SAMPLER_PRESETS)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_samplers_keep_what_they_need(sampler, guidance_scale):
    pipe, backend = tiny_pipeline(), ReusedMemory()
    expected = sample(pipe, sampler, guidance_scale)
    pipe.transformer.compile(backend=backend, fullgraph=True, dynamic=False)
    pipe.layout_model.compile(backend=backend, fullgraph=True, dynamic=False)
    for one, other in zip(sample(pipe, sampler, guidance_scale), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert backend.calls >= 8


def test_saving_and_copying_go_on(tmp_path):
    model = tiny_model()
    names = list(model.state_dict())
    model.compile(backend=ReusedMemory())
    images = noise_images(1, 32, 32)
    with torch.no_grad():
        expected = tensors(model, images)
        assert list(model.state_dict()) == names
        model.save_pretrained(tmp_path)
        for other in (AutoencoderGPSToken.from_pretrained(tmp_path).eval(), copy.deepcopy(model)):
            for one, wanted in zip(tensors(other, images), expected, strict=True):
                torch.testing.assert_close(one, wanted, rtol=0, atol=0)


def test_training_goes_through():
    """Gradients of a compiled model are those of a plain one."""
    plain, images = tiny_model("lattice"), noise_images(2, 32, 32)
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="aot_eager", fullgraph=True)
    gradients = []
    for model in (plain, compiled):
        model.train()(images).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, wanted in gradients[0].items():
        # The same operations, some of them put together from others by the tracer: float32 rounding.
        torch.testing.assert_close(gradients[1][name], wanted, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler, which torch.compile needs on a CPU")
@pytest.mark.parametrize("kind", ["map", "lattice"])
def test_by_torchs_own_compiler(kind):
    plain, images = tiny_model(kind), noise_images(1, 32, 32)
    expected = tensors(plain, images)
    plain.compile(fullgraph=True)
    for one, other in zip(tensors(plain, images), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # float32 in another order


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_cuda_graphs(kind, settings):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    plain = tiny_model(kind, **settings).cuda()
    pictures = [noise_images(2, 32, 32, seed=seed).cuda() for seed in range(4)]
    expected = [tensors(plain, images) for images in pictures]
    plain.compile(mode="reduce-overhead", fullgraph=True)
    for _ in range(3):  # warmed up, recorded, replayed
        found = [tensors(plain, images) for images in pictures]
    for own, wanted in zip(found, expected, strict=True):
        for one, other in zip(own, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)  # float32 in another order, perhaps TF32


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", ["unipc", "dopri5"])
def test_cuda_graphs_while_sampling(sampler):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pipe = tiny_pipeline().to("cuda")
    expected = sample(pipe, sampler, 1.0)
    pipe.transformer.compile(mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        found = sample(pipe, sampler, 1.0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
