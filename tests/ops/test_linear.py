"""`run_linear`: the layers' own values, where oneDNN is taken, and that no change of a layer or sight of it is lost."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gpstoken_diffusers.ops import linear
from gpstoken_diffusers.ops.linear import LEAST_ROWS, run_linear

pytestmark = pytest.mark.skipif(linear._OPERATOR is None, reason="this PyTorch has no linear layer of oneDNN's own")
has_bfloat16 = pytest.mark.skipif(torch.bfloat16 not in linear._DTYPES, reason="no products in bfloat16")
ROWS = 2 * LEAST_ROWS


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def made(inputs=12, outputs=20, bias=True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias)


def rows(*shape, inputs=12) -> torch.Tensor:
    return torch.randn(*shape, inputs, generator=torch.Generator().manual_seed(1))


def is_fused(layer, x, activation=None) -> bool:
    """Whether oneDNN's operator was called, once the values were found to be the modules' own."""
    with Operators() as operators:
        found = run_linear(layer, x, activation)
    expected = layer(x) if activation is None else activation(layer(x))
    torch.testing.assert_close(found, expected)
    return operators.calls["mkldnn::_linear_pointwise"] == 1


@pytest.mark.parametrize("activation", [None, nn.GELU(), nn.GELU("tanh")])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=has_bfloat16)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (ROWS, 3), (7, 5), (33, 320)])
@torch.no_grad()
def test_values(activation, dtype, bias, shape):
    layer = made(*shape, bias=bias).to(dtype)
    x = rows(3, 17, inputs=shape[0]).to(dtype)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    exact = exact if activation is None else activation(exact)
    # One rounding of the result to its 24 or 8 bits; before it, sums and GELU in float32.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    strided = torch.stack([x, x], dim=-1)[..., 0]
    for given in (x, strided, x.transpose(0, 1).contiguous().transpose(0, 1)):
        with Operators() as operators:
            found = run_linear(layer, given, activation)
        assert operators.calls["mkldnn::_linear_pointwise"] == 1 and found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_it_is_taken_from_some_rows_on():
    layer = made()
    assert is_fused(layer, rows(LEAST_ROWS)) and is_fused(layer, rows(2, LEAST_ROWS // 2), nn.GELU())
    assert not is_fused(layer, rows(LEAST_ROWS - 1)) and not is_fused(layer, rows())
    assert not is_fused(layer, rows(0))
    assert is_fused(nn.Linear(12, 8).to(memory_format=torch.contiguous_format), rows(ROWS).expand(2, ROWS, 12))


@torch.no_grad()
def test_errors_are_torchs_own():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_linear(made(), rows(ROWS, inputs=11))
    with pytest.raises(RuntimeError, match="dtype"):
        run_linear(made(), rows(ROWS).bfloat16())


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.GELU):
    def forward(self, x):
        return super().forward(x) / 2


def patched(layer: nn.Linear) -> nn.Linear:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


def hooked(layer: nn.Module, hook: str) -> nn.Module:
    change = {"forward": lambda module, args, result: 2 * result, "forward_pre": lambda module, args: (2 * args[0],)}
    getattr(layer, f"register_{hook}_hook")(change[hook])
    return layer


def parametrised(layer: nn.Linear) -> nn.Linear:
    return nn.utils.parametrizations.weight_norm(layer)


def quantised(layer: nn.Linear) -> nn.Linear:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear})[0]


PLAIN = {
    "a subclass": lambda: (Scaled(12, 20), nn.GELU()),
    "a patched forward": lambda: (patched(made()), nn.GELU()),
    "a hook": lambda: (hooked(made(), "forward"), nn.GELU()),
    "a hook before": lambda: (hooked(made(), "forward_pre"), nn.GELU()),
    "a hook on the activation": lambda: (made(), hooked(nn.GELU(), "forward")),
    "a patched activation": lambda: (made(), patched(nn.GELU())),
    "another kind of GELU": lambda: (made(), Halved()),
    "another activation": lambda: (made(), nn.SiLU()),
    "a parametrised weight": lambda: (parametrised(made()), nn.GELU()),
    "a quantised layer": lambda: (quantised(made()), nn.GELU()),
    "float64": lambda: (made().double(), nn.GELU()),
    "float16": lambda: (made().half(), nn.GELU()),
}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("what", PLAIN)
@torch.no_grad()
def test_what_is_no_bare_layer_is_called(what):
    layer, activation = PLAIN[what]()
    dtype = next((parameter.dtype for parameter in layer.parameters()), torch.float32)
    assert not is_fused(layer, rows(ROWS).to(dtype), activation)


@torch.no_grad()
def test_hooks_for_all_modules_see_these_layers():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, result: seen.append(type(module)))
    try:
        assert not is_fused(made(), rows(ROWS), nn.GELU())
    finally:
        handle.remove()
    assert seen[:2] == [nn.Linear, nn.GELU]


def test_gradients():
    """Of a layer that is trained, of the input alone, and none where nothing asks for any."""
    layer, x = made(), rows(ROWS)
    assert not is_fused(layer, x, nn.GELU())
    run_linear(layer, x, nn.GELU()).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    layer.requires_grad_(False)
    assert is_fused(layer, x, nn.GELU())
    assert not is_fused(layer, x.clone().requires_grad_(), nn.GELU())
    layer.bias.requires_grad_()
    assert not is_fused(layer, x, nn.GELU())
    with torch.inference_mode():
        assert is_fused(layer, x, nn.GELU())


@torch.no_grad()
def test_autocast_is_followed():
    with torch.autocast("cpu", torch.bfloat16):
        assert run_linear(made(), rows(ROWS), nn.GELU()).dtype == torch.bfloat16


@torch.no_grad()
def test_derivatives_without_autograd():
    layer, x = made(), rows(ROWS)
    with Operators() as operators:
        assert torch.vmap(lambda row: run_linear(layer, row))(x.expand(2, *x.shape)).shape == (2, ROWS, 20)
        _, tangent = torch.func.jvp(lambda x: run_linear(layer, x), (x,), (x,))
        with forward_ad.dual_level():
            dual = run_linear(layer, forward_ad.make_dual(x, x))
            of_dual = forward_ad.unpack_dual(dual).tangent
    assert operators.calls["mkldnn::_linear_pointwise"] == 0
    for found in (tangent, of_dual):
        torch.testing.assert_close(found, x @ layer.weight.T)


@pytest.mark.filterwarnings("ignore:`?torch.jit.trace")
@torch.no_grad()
def test_graphs_are_of_plain_operators():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.activation = made(), nn.GELU("tanh")

        def forward(self, x):
            return run_linear(self.layer, x, self.activation)

    network, x = Network(), rows(ROWS)
    expected = network(x)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    traced = torch.jit.trace(network, (x,))
    for graph in (program.graph, traced.inlined_graph):
        assert "mkldnn" not in str(graph) and "gelu" in str(graph)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for ours in (program.module(), traced, compiled):
        torch.testing.assert_close(ours(x), expected)
        torch.testing.assert_close(ours(rows(40)), network(rows(40)))


@pytest.mark.filterwarnings("ignore:TF32")
@torch.no_grad()
def test_it_can_be_turned_off(monkeypatch):
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_fused(made(), rows(ROWS), nn.GELU())
    monkeypatch.setattr(linear, "_OPERATOR", None)  # as with a PyTorch that lacks it
    assert not is_fused(made(), rows(ROWS), nn.GELU())


def test_operations_are_counted():
    """torch's counter hooks all modules, and so sees their own calls, which it knows."""
    layer, x, counts = made(), rows(3, ROWS), []
    for is_inference in (True, False):
        with torch.inference_mode(is_inference), FlopCounterMode(display=False) as counter:
            run_linear(layer, x, nn.GELU())
        counts.append(counter.get_total_flops())
    assert counts == [2 * 3 * ROWS * 12 * 20] * 2


def edit_in_place(layer):
    layer.weight[3] = 0


def edit_data(layer):
    layer.weight.data.mul_(2)


def edit_by_numpy(layer):
    layer.weight.numpy()[:] = 1


def swap_data(layer):
    layer.weight.data = torch.ones(20, 12)


def swap_parameter(layer):
    layer.weight = nn.Parameter(torch.ones(20, 12))


def transpose(layer):
    layer.weight = nn.Parameter(torch.ones(12, 20).T)


def change_bias(layer):
    layer.bias += 1


def drop_bias(layer):
    layer.bias = None


def load(layer):
    layer.load_state_dict(nn.Linear(12, 20).state_dict())


def load_assigned(layer):
    layer.load_state_dict(nn.Linear(12, 20).state_dict(), assign=True)


def cast_and_back(layer):
    layer.to(torch.bfloat16).to(torch.float32)


def offload_and_back(layer):
    state = {name: value + 1 for name, value in layer.state_dict().items()}
    layer.to("meta").to_empty(device="cpu").load_state_dict(state)


def take_a_step(layer):
    with torch.enable_grad():
        layer(rows(4)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def prune_weights(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def prune_for_good(layer):
    prune_weights(layer)
    prune.remove(layer, "weight")


@pytest.mark.parametrize(
    "change",
    [
        edit_in_place, edit_data, edit_by_numpy, swap_data, swap_parameter, transpose, change_bias, drop_bias, load,
        load_assigned, cast_and_back, offload_and_back, take_a_step, prune_weights, prune_for_good,
    ],
)  # fmt: skip
@torch.no_grad()
def test_every_change_of_a_layer_is_seen_at_the_next_call(change):
    layer, x = made(), rows(ROWS)
    before = run_linear(layer, x, nn.GELU())
    change(layer)
    is_fused(layer, x, nn.GELU())  # compares
    assert (run_linear(layer, x, nn.GELU()) - before).abs().max() > 1e-4


@torch.no_grad()
def test_adapters_are_seen_merged_and_unloaded():
    peft = pytest.importorskip("peft")
    network, x = nn.Sequential(made(), nn.GELU()), rows(ROWS)

    def run(model):
        return run_linear(model[0], x, model[1])

    plain = run(network)
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), network)
    torch.testing.assert_close(run(adapted), plain)  # a fresh adapter adds zero
    nn.init.ones_(adapted[0].lora_B["default"].weight)
    changed = run(adapted)
    assert (changed - plain).abs().max() > 0.01
    adapted[0].merge()
    torch.testing.assert_close(run(adapted), changed)
    base = adapted[0].get_base_layer()
    torch.testing.assert_close(run_linear(base, x, nn.GELU()), changed)
    adapted[0].unmerge()
    torch.testing.assert_close(run_linear(base, x, nn.GELU()), plain)
