"""Self-attention over tokens, shared by every transformer of this package."""

from __future__ import annotations

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn


class TokenAttnProcessor:
    """Computes [`TokenAttention`] through diffusers' attention dispatcher: any of its backends can be chosen."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: TokenAttention, hidden_states: Tensor) -> Tensor:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (attn.heads, -1))
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        mixed = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out(mixed.flatten(2))


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
    """Two linear layers with GELU between them, exact or by its tanh approximation; (..., in) -> (..., out)."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, approximate: str = "none"):
        super().__init__(
            nn.Linear(in_features, hidden_features),
            nn.GELU(approximate),
            nn.Linear(hidden_features, out_features),
        )


def autocast_disabled(tensor: Tensor) -> torch.autocast:
    """A context in which nothing on `tensor`'s device is cast down: for arithmetic that needs float32."""
    return torch.autocast(tensor.device.type, enabled=False)
