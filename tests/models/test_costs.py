"""What work is done, counted instead of timed: calls of operators, kernels and networks, memory, breaks of graphs.

The numbers are those of today. A change that lowers one may lower it here; one that raises it should say why.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from model_zoo import noise_images, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenPipeline
from gpstoken_diffusers.assets import MINI, MINI_PIPELINE
from gpstoken_diffusers.ops import partition_reference
from gpstoken_diffusers.ops.backend import native
from gpstoken_diffusers.ops.partition import partition_image

needs_native = pytest.mark.skipif(native.library("cpu") is None, reason=native.why_missing("cpu") or "none")


class Operators(TorchDispatchMode):
    """Counts operators by name, the bytes of tensors that were copied to another type or place, and new memory.

    New is memory of a result that none of the arguments lies in; what an operator takes and gives back within itself
    does not show. Unlike a profiler's record of the allocator, this is the same in every run.
    """

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.copied = self.allocations = self.allocated = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        self.calls[name] += 1
        if name in ("aten::_to_copy", "aten::clone", "aten::copy_", "aten::contiguous"):
            self.copied += result.nbytes
        known = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(result):
            if storage._cdata not in known:
                known.add(storage._cdata)
                self.allocations += 1
                self.allocated += storage.nbytes()
        return result


def storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.fixture(scope="module")
def mini() -> AutoencoderGPSToken:
    model = AutoencoderGPSToken.from_pretrained(MINI, dtype=torch.bfloat16).eval()
    for processor in model.attn_processors.values():
        # One call, as on a GPU; a CPU takes two products, with more calls and copies and less time.
        processor._attention_backend = AttentionBackendName.NATIVE
    return model


@pytest.fixture
def native_calls(monkeypatch) -> Counter[str]:
    """Calls of the native library by function."""
    calls: Counter[str] = Counter()
    call = native.call

    def counted(kind: str, function: str, *arguments: object) -> None:
        calls[function] += 1
        call(kind, function, *arguments)

    monkeypatch.setattr(native, "call", counted)
    return calls


@torch.no_grad()
def counted(function, *args) -> Operators:
    with Operators() as operators:
        function(*args)
    return operators


@needs_native
def test_nothing_is_done_picture_by_picture(mini, native_calls):
    """A batch takes as many calls as one picture: there is no loop over it."""
    found = []
    for batch_size in (1, 4):
        native_calls.clear()
        tokens = mini.encode(torch.rand(batch_size, 3, 256, 256)).tokens
        encoding = counted(mini.encode, torch.rand(batch_size, 3, 256, 256)).calls
        found.append((encoding, counted(mini.decode, tokens).calls, Counter(native_calls)))
    assert found[0] == found[1]


@needs_native
def test_calls_of_one_reconstruction(mini, native_calls):
    encoding = counted(mini.encode, torch.rand(1, 3, 256, 256))
    assert native_calls["gpstoken_partition_cpu"] == 1
    tokens = mini.encode(torch.rand(1, 3, 256, 256)).tokens
    native_calls.clear()
    decoding = counted(mini.decode, tokens)
    assert encoding.calls["aten::convolution"] == 5 and decoding.calls["aten::convolution"] == 17
    assert encoding.calls["gpstoken::roi_align"] == 1 and "torchvision::roi_align" not in encoding.calls
    # Norms of maps and the SiLU behind them are one kernel each; none is left to torch.
    assert encoding.calls["gpstoken::group_norm"] == 4 and native_calls["gpstoken_pixel_norm_cpu"] == 16
    for operators in (encoding, decoding):
        assert not any(name in operators.calls for name in ("aten::silu", "aten::var_mean", "aten::native_group_norm"))
    assert native_calls["gpstoken_splat_forward_cpu"] == 1
    # Small ones beside the networks: an eager call takes microseconds, which a GPU would wait for.
    assert sum(encoding.calls.values()) <= 390 and sum(decoding.calls.values()) <= 135


@needs_native
def test_no_weights_are_copied(mini):
    """Copies are of the picture, of regions and of the painted map; the weights would be 11 MB, the features 1 MB."""
    pixels = torch.rand(1, 3, 256, 256)
    tokens = mini.encode(pixels).tokens
    assert counted(mini.encode, pixels).copied < 1e6
    assert counted(mini.decode, tokens).copied < 1e6


@needs_native
def test_memory_of_one_reconstruction(mini):
    """A tenth is left for versions of torch that take a few operations more to the same; a map in float32 beside the
    one in bfloat16, or a forgotten activation in place, is 2 to 6 MB."""
    pixels = torch.rand(1, 3, 256, 256)
    tokens = mini.encode(pixels).tokens
    encoding, decoding = counted(mini.encode, pixels), counted(mini.decode, tokens)
    assert encoding.allocations <= 1.1 * 204 and encoding.allocated <= 1.1 * 28.0e6
    assert decoding.allocations <= 1.1 * 86 and decoding.allocated <= 1.1 * 60.3e6


@needs_native
@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_the_map_decoder_keeps_its_memory_format(grid):
    """Channels innermost from end to end: else attention holds all its weights, and convolutions copy their maps."""
    model = tiny_model("map", decode_mode="merge")
    tokens = model.encode(noise_images(2, 32 * grid[0], 32 * grid[1])).tokens
    feature_map = model.decoder.paint(tokens.geometry, tokens.texture, grid).to(memory_format=torch.channels_last)
    decoding = counted(model.decoder, feature_map, tokens.tile_grid)
    assert decoding.calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == 1
    assert decoding.calls["aten::_softmax"] == decoding.calls["aten::bmm"] == 0
    # Tiles are cut out for the attention and put together again; one alone is neither.
    attended = feature_map.shape[0] * feature_map[0, 0].numel() * 32 * 4
    assert decoding.copied == (0 if grid == (1, 1) else 2 * attended)


def evaluations(images: Tensor, num_tokens: int) -> int:
    """Regions whose complexity the native partition measures."""
    count = native.library("cpu").gpstoken_partition_evaluations_cpu
    before = count()
    partition_image(images, num_tokens)
    return count() - before


@needs_native
@pytest.mark.parametrize("num_tokens", [1, 2, 64, 100])
def test_each_region_is_measured_once(monkeypatch, num_tokens):
    """Two for each cut, four where a square is cut, along one axis and the other, and the whole picture.

    The definition asks for these; none of them twice, and none a second time for the next picture of a batch.
    """
    noise = torch.rand(4, 1, 96, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ramp = torch.linspace(-1, 1, 128).square()  # so that regions differ, and grow by no pattern
    image = (noise * ramp).clamp(-1, 1)
    boxes: list[tuple[int, ...]] = []
    measure = partition_reference._complexity
    with monkeypatch.context() as patch:
        patch.setenv(native.BACKEND_VARIABLE, "reference")
        patch.setattr(
            partition_reference, "_complexity", lambda unit, box, *rest: boxes.append(box) or measure(unit, box, *rest)
        )
        partition_image(image[:1], num_tokens)
    assert len(boxes) == len(set(boxes)) >= 2 * num_tokens - 1
    assert evaluations(image[:1], num_tokens) == len(boxes)
    assert evaluations(image[:1].expand(4, -1, -1, -1), num_tokens) == 4 * len(boxes)
    assert evaluations(image, num_tokens) == sum(evaluations(own[None], num_tokens) for own in image)


@needs_native
def test_measurements_of_the_shipped_size():
    """256 regions of noise, all alike: 255 cuts, of which 1 + 4 + 16 + 64 are of squares."""
    noise = torch.rand(1, 1, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert evaluations(noise, 256) == 1 + 2 * 255 + 2 * 85


def test_calls_of_the_network_while_sampling():
    """One call a step with both branches in it, and half the rows where guidance is off."""
    pipe = GPSTokenPipeline.from_pretrained(MINI_PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    rows: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    layout = pipe.generate_layout("Food", num_inference_steps=2)
    for settings, expected in (
        ({"guidance_scale": 3.0}, [2] * 8),
        ({"guidance_scale": 1.0}, [1] * 8),
        ({"guidance_scale": 3.0, "guidance_interval": (0.4, 1.0)}, None),
    ):
        rows.clear()
        pipe("Food", layout=layout, num_inference_steps=8, output_type="tokens", **settings)
        assert len(rows) == 8
        if expected is None:
            assert rows == sorted(rows) and set(rows) == {1, 2}
        else:
            assert rows == expected
