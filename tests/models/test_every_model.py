"""What every class of model does as a model of diffusers: saving, checkpointing, backends, weights others manage.

Casting, offloading, quantising and adapters replace or move the weights of a layer around its `forward`. A weight that
is read anywhere else, or a dtype that is taken from a weight, fails there or, worse, gives another picture.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from model_zoo import noise_images, tiny_model
from pipeline_zoo import tiny_layout_model, tiny_transformer
from torch import Tensor, nn


def autoencoder_outputs(model: nn.Module) -> list[Tensor]:
    """Both halves by themselves, as pipelines call them, for pictures of one tile and of several."""
    found = []
    for size in ((32, 32), (70, 64)):
        tokens = model.encode(noise_images(1, *size)).tokens
        found += [tokens.geometry, tokens.texture, model.decode(tokens).sample]
    return found


def generator_outputs(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    is_layout_model = not hasattr(model, "layout_embedding")
    latents = torch.randn(2, 6, 4 if is_layout_model else 9, generator=generator)
    layout = torch.rand(2, 6, 5, generator=generator) * 0.5 + 0.1
    arguments = (latents, torch.tensor([0.2, 0.8]), torch.tensor([0, 3]))
    return [model(*arguments, *(() if is_layout_model else (layout,))).sample]


# Every class of model, with every kind of part: how to make it, and what it computes.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], list[Tensor]]]] = {
    "map autoencoder": (lambda: tiny_model("map", decode_mode="merge"), autoencoder_outputs),
    "lattice autoencoder": (lambda: tiny_model("lattice", region_reading="flatten"), autoencoder_outputs),
    "transformer": (lambda: tiny_transformer(layout_frequencies=2), generator_outputs),
    "transformer, shared modulation": (lambda: tiny_transformer(shared_modulation=True), generator_outputs),
    "layout model": (tiny_layout_model, generator_outputs),
}


def cast_layers(model: nn.Module, folder: str) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


def offload_groups(level: str, to_disk: bool) -> Callable[[nn.Module, str], None]:
    def offload(model: nn.Module, folder: str) -> None:
        options = {"num_blocks_per_group": 1} if level == "block_level" else {}
        model.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_type=level,
            offload_to_disk_path=folder if to_disk else None,
            **options,
        )

    return offload


def offload_in_sequence(model: nn.Module, folder: str) -> None:
    import accelerate

    accelerate.cpu_offload(model, execution_device="cpu")


def quantise_dynamically(model: nn.Module, folder: str) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


def quantise_by_torchao(model: nn.Module, folder: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def quantise_by_bitsandbytes(model: nn.Module, folder: str) -> None:
    """As diffusers replaces layers, whose own way asks for a GPU on some versions."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            quantised = bitsandbytes.nn.Linear8bitLt(
                module.in_features, module.out_features, has_fp16_weights=False, threshold=6.0
            )
            quantised.load_state_dict(module.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantised.to("cpu"))


# How weights are managed, and by how much results may differ, as a share of their deviation. Weights that are only
# moved give the same sums. float16 has 11 bits of mantissa, int8 with a scale per row 7, through some ten layers; the
# dynamic way rounds activations as well, with one scale for a whole tensor.
WAYS: dict[str, tuple[Callable[[nn.Module, str], None], float]] = {
    "layerwise casting": (cast_layers, 0.01),
    "group offload by blocks": (offload_groups("block_level", False), 1e-5),
    "group offload by blocks to disk": (offload_groups("block_level", True), 1e-5),
    "group offload by leaves": (offload_groups("leaf_level", False), 1e-5),
    "group offload by leaves to disk": (offload_groups("leaf_level", True), 1e-5),
    "sequential offload": (offload_in_sequence, 1e-5),
    "dynamic int8": (quantise_dynamically, 0.4),
    "torchao int8": (quantise_by_torchao, 0.2),
    "bitsandbytes int8": (quantise_by_bitsandbytes, 0.2),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_model_computes_the_same_whoever_manages_its_weights(name, way, tmp_path):
    make, outputs = MODELS[name]
    model, (manage, tolerance) = make(), WAYS[way]
    expected = outputs(model)
    manage(model, str(tmp_path))
    for found, plain in zip(outputs(model), expected, strict=True):
        assert (found.float() - plain).std() <= tolerance * plain.std()


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_on_every_linear_layer_acts_and_trains(name):
    peft = pytest.importorskip("peft")
    make, outputs = MODELS[name]
    model = make()
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        expected = outputs(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear"))
    adapters = {path: weight for path, weight in model.named_parameters() if "lora_" in path}
    assert len(adapters) == 2 * len(linear) and all(weight.requires_grad for weight in adapters.values())
    # A fresh adapter adds zero.
    for found, plain in zip(outputs(model), expected, strict=True):
        # Where gradients are kept, other kernels sum in another order.
        torch.testing.assert_close(found.detach(), plain, rtol=1e-4, atol=1e-4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapters.values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    sum(found.square().sum() for found in outputs(model)).backward()
    # A gradient that is not zero says both: the output depends on this adapter, and training moves it.
    assert [path for path, weight in adapters.items() if weight.grad is None or not weight.grad.any()] == []


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_loaded_model_gives_the_same_numbers(name, tmp_path):
    """Bit for bit, on any processor: loaded weights lie as evenly in memory as fresh ones."""
    make, outputs = MODELS[name]
    model = make()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for (path, own), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(own, other) and other.data_ptr() % 64 == 0, path
    for own, other in zip(outputs(model), outputs(loaded), strict=True):
        assert torch.equal(own, other)
    loaded.save_pretrained(tmp_path / "again")
    saved = (tmp_path / "again" / "config.json").read_text()
    assert saved == (tmp_path / "config.json").read_text() and str(tmp_path) not in saved


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter_and_checkpointing_keeps_them(name):
    make, outputs = MODELS[name]
    plain, checkpointed = make().train(), make().train()
    checkpointed.enable_gradient_checkpointing()
    for model in (plain, checkpointed):
        sum(found.square().mean() for found in outputs(model)).backward()
    for (path, parameter), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert parameter.grad is not None and parameter.grad.any(), path
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6, msg=path)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_attention_backends_can_be_chosen(name, keep_attention_backend):
    make, outputs = MODELS[name]
    model = make()
    expected = outputs(model)
    model.set_attention_backend("_native_math")
    for found, plain in zip(outputs(model), expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
