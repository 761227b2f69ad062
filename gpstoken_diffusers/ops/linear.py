"""`run_linear`: a linear layer in inference on the CPU, with GELU in the same pass, by oneDNN.

torch sends float32 layers to MKL, which on some processors runs at half speed, and takes GELU in passes of its own,
which cost as much as the layer (docs/speed.md). The reference is the layers' own calls. They are taken wherever more
than values is asked for: gradients, a graph, or a hook's sight of what goes between them.

The layer's weight is read at each call, so whatever changes it is seen. oneDNN also takes weights that were put in an
order of its own before, which saves 3 to 7% of the time at 256 rows: too little for a second copy of all weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["LEAST_ROWS", "run_linear"]

LEAST_ROWS = 16
"""With fewer rows MKL is faster."""


# Private to torch, which may lack it, or have been built without oneDNN.
_OPERATOR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_TYPES = (Tensor, nn.Parameter)
_DTYPES = [torch.float32]
if _OPERATOR is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _DTYPES.append(torch.bfloat16)


def run_linear(layer: nn.Module, x: Tensor, activation: nn.Module | None = None) -> Tensor:
    """activation(layer(x)), or layer(x) without an activation.

    One call of oneDNN in inference on the CPU, where a bare `nn.Linear`, and a bare `nn.GELU` if any, get at least
    [`LEAST_ROWS`] rows in float32, or in bfloat16 on processors that multiply it. Else the modules are called.
    """
    # Asked first: a graph that is being recorded must not hang on what is asked next.
    is_recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not is_recorded and _OPERATOR is not None and _is_served(layer, x):
        if activation is None:
            return _OPERATOR(x, layer.weight, layer.bias, "none", [], "")
        if _is_bare(activation, nn.GELU):
            return _OPERATOR(x, layer.weight, layer.bias, "gelu", [], activation.approximate)
    x = layer(x)
    return x if activation is None else activation(x)


def _is_served(layer: nn.Module, x: Tensor) -> bool:
    if not _is_bare(layer, nn.Linear) or _has_any_global_hook() or not torch.backends.mkldnn.enabled:
        return False
    weight: Tensor = layer.weight
    asks_gradients = False
    for tensor in (x, weight) if layer.bias is None else (x, weight, layer.bias):
        # Quantised weights, and tensors that only stand for some while a graph is recorded, are of other types.
        if type(tensor) not in _TYPES or not tensor.is_cpu or tensor.dtype != x.dtype or tensor.layout != torch.strided:
            return False
        asks_gradients |= tensor.requires_grad
    return (
        x.dtype in _DTYPES
        and x.ndim > 1
        and x.shape[-1] == weight.shape[1]
        and x.numel() >= LEAST_ROWS * x.shape[-1] > 0
        and not (asks_gradients and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        # Derivatives that autograd does not record: `torch.func` and forward mode.
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def _is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is just that: no subclass, no hook, no other forward that an adapter or offloading put in."""
    return type(module) is kind and not (
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._compiled_call_impl is not None
    )
