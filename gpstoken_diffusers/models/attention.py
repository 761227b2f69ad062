"""Self-attention over tokens, shared by every transformer of this package."""

from __future__ import annotations

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn

from ..ops.linear import run_linear

MAX_TOKENS_OF_PRODUCTS = 512
"""Up to so many tokens [`attention_by_products`] is faster than a fused kernel on a CPU, see docs/speed.md."""
HAS_BFLOAT16_PRODUCTS = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether this CPU multiplies matrices in bfloat16 at speed."""


class TokenAttnProcessor:
    """Computes [`TokenAttention`] through diffusers' attention dispatcher: any of its backends can be chosen.

    Unless one was chosen, few tokens in bfloat16 on a CPU take [`attention_by_products`].
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: TokenAttention, hidden_states: Tensor) -> Tensor:
        if torch.is_autocast_enabled(hidden_states.device.type):  # once, and not in each of the three layers
            hidden_states = hidden_states.to(torch.get_autocast_dtype(hidden_states.device.type))
        query, key, value = (
            run_linear(projection, hidden_states).unflatten(-1, (attn.heads, -1))
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        if self._attention_backend is None and self._parallel_config is None and _suits_products(query):
            mixed = attention_by_products(query, key, value)
        else:
            mixed = dispatch_attention_fn(
                query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
            )
        return run_linear(attn.to_out, mixed.flatten(2))


def attention_by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(D)) value, all weights held at once: (B, N, heads, D) -> (B, N, heads, D)."""
    batch, _, heads, width = query.shape
    query, key, value = (tensor.transpose(1, 2).contiguous().flatten(0, 1) for tensor in (query, key, value))
    # With beta = 0 the first argument is not read; the product is scaled before it is rounded.
    scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.mT, beta=0, alpha=width**-0.5)
    return (scores.softmax(-1) @ value).unflatten(0, (batch, heads)).transpose(1, 2)


def _suits_products(query: Tensor) -> bool:
    """Whether [`attention_by_products`] is the faster way for (B, N, heads, D) and no other backend was asked for."""
    return (
        HAS_BFLOAT16_PRODUCTS
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and not torch.compiler.is_exporting()  # a graph for any number of tokens must not hang on how many these are
        and query.shape[1] <= MAX_TOKENS_OF_PRODUCTS
        and _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
    )


class TokenAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention without positions: permuting the tokens permutes the result.

    Args:
        hidden_size: width of the tokens.
        heads: number of heads; divides `hidden_size`.

    Shapes: (B, N, hidden_size) -> (B, N, hidden_size).
    """

    _default_processor_cls = TokenAttnProcessor
    _available_processors = [TokenAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, hidden_size: int, heads: int):
        super().__init__()
        if hidden_size % heads:
            raise ValueError(f"hidden_size must be a multiple of the number of heads, got {hidden_size} and {heads}.")
        self.heads = heads
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.Linear(hidden_size, hidden_size)
        self.set_processor(TokenAttnProcessor())

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.processor(self, hidden_states)


class FeedForward(nn.Sequential):
    """Two linear layers with an activation between them, GELU unless another is given; (..., in) -> (..., out)."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, activation: nn.Module | None = None):
        super().__init__(
            nn.Linear(in_features, hidden_features),
            nn.GELU() if activation is None else activation,
            nn.Linear(hidden_features, out_features),
        )

    def forward(self, x: Tensor) -> Tensor:
        first, activation, last = self
        return run_linear(last, run_linear(first, x, activation))

    def __getitem__(self, index: int | slice) -> nn.Module:
        # Group offloading takes slices; torch would make one by this class's constructor.
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)


def autocast_disabled(tensor: Tensor) -> torch.autocast:
    """A context in which nothing on `tensor`'s device is cast down: for arithmetic that needs float32."""
    return torch.autocast(tensor.device.type, enabled=False)
