"""Attention over tokens: two ways that give the same, and which is taken when."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.overrides import TorchFunctionMode

from gpstoken_diffusers.models.attention import (
    HAS_BFLOAT16_PRODUCTS,
    MAX_TOKENS_OF_PRODUCTS,
    TokenAttention,
    attention_by_products,
)


def fused(query, key, value):
    """torch's own, (B, N, heads, D) as ours."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def value_and_gradients(function, inputs, weights, dtype):
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    result = function(*inputs)
    return [result, *torch.autograd.grad(result, inputs, weights.to(dtype))]


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 7, 3, 40), (3, 129, 2, 72), (1, 512, 4, 64), (5, 32, 1, 3)])
def test_products_are_attention(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    # bfloat16 holds the inputs exactly, so that what is compared is the arithmetic alone.
    inputs = [torch.randn(shape, generator=generator).bfloat16() for _ in range(3)]
    weights = torch.randn(shape, generator=generator)
    exact = value_and_gradients(fused, inputs, weights, torch.float64)
    for ours, expected in zip(
        value_and_gradients(attention_by_products, inputs, weights, torch.float64), exact, strict=True
    ):
        torch.testing.assert_close(ours, expected)
    for ours, expected in zip(
        value_and_gradients(attention_by_products, inputs, weights, torch.bfloat16), exact, strict=True
    ):
        # Scores, weights and results are rounded to 8 bits each: some roundings of 2^-9 of the largest numbers.
        assert (ours - expected).norm() <= 0.02 * expected.norm() + 1e-6


class FusedCalls(TorchFunctionMode):
    """Counts calls of torch's fused attention."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.nn.functional.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not HAS_BFLOAT16_PRODUCTS, reason="this processor does not multiply in bfloat16")
def test_which_way_is_taken(keep_attention_backend):
    attention = TokenAttention(16, 2)

    def is_fused(count=8, dtype=torch.bfloat16):
        with FusedCalls() as calls, torch.no_grad():
            attention.to(dtype)(torch.zeros(1, count, 16, dtype=dtype))
        return calls.count == 1

    assert not is_fused() and not is_fused(MAX_TOKENS_OF_PRODUCTS)
    assert is_fused(MAX_TOKENS_OF_PRODUCTS + 1) and is_fused(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fused(dtype=torch.float32)
    with attention_backend("_native_math"):
        assert is_fused()
    attention.set_attention_backend("native")
    assert is_fused()


def test_a_compiled_and_an_exported_block_give_the_same():
    """Compiled it may take the products; exported for any number of tokens it must not hang on how many there are."""
    attention = TokenAttention(16, 2).bfloat16()
    tokens = torch.randn(2, 9, 16).bfloat16()
    with torch.no_grad():
        expected = attention(tokens)
        compiled = torch.compile(attention, fullgraph=True, backend="eager")
        program = torch.export.export(attention, (tokens,), dynamic_shapes=({1: torch.export.Dim("N", max=2048)},))
        exported = program.module()
        for ours in (compiled(tokens), exported(tokens)):
            torch.testing.assert_close(ours, expected, atol=0.01, rtol=0.02)  # roundings to 8 bits, see above
        assert exported(torch.zeros(2, 1000, 16).bfloat16()).shape == (2, 1000, 16)
