"""Tokens made better after encoding: optimised through the decoder, for the picture at hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .refinement import add_in_logit_space

# Steps of Adam, on a cosine to nothing: of a geometry in logits, of a texture in shares of the tile's root mean square.
RATES = (0.01, 0.1)


def polish_tiles(
    decode: Callable[[Tensor, Tensor], Tensor],
    targets: Tensor,
    geometry: Tensor,
    texture: Tensor,
    steps: int,
    after_step: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """Moves tokens so that pictures decoded from them have a smaller squared error.

    Args:
        decode: geometry (T, n, 5) and texture (T, n, C), both float32 -> (T, channels, H, W), differentiable.
        targets: the pictures, (T, channels, H, W) in [-1, 1].
        geometry, texture: where to start.
        steps: how many.
        after_step: called after each with how many there were; what it raises ends the work.

    Returns: geometry and texture of the least error that was met, tile by tile, the start included.
    """
    # A caller's inference mode allows no gradients, nor through tensors that were made in it.
    with torch.inference_mode(False), torch.enable_grad():
        targets, start, given = (tensor.detach().float().clone() for tensor in (targets, geometry, texture))
        scale = given.square().mean((1, 2), keepdim=True).sqrt()
        moves = [torch.zeros_like(tensor, requires_grad=True) for tensor in (start, given)]
        optimizer = torch.optim.Adam([{"params": [move]} for move in moves])
        best, least = (start, given), None
        for step in range(steps + 1):
            tokens = (add_in_logit_space(start, moves[0]), given + scale * moves[1])
            errors = (decode(*tokens).float() - targets).square().mean((1, 2, 3))
            if least is None:
                least = errors.detach()
            better = (errors.detach() < least)[:, None, None]
            best = tuple(torch.where(better, new.detach(), old) for new, old in zip(tokens, best, strict=True))
            least = torch.minimum(least, errors.detach())
            if step == steps:
                break
            for move, gradient in zip(moves, torch.autograd.grad(errors.sum(), moves), strict=True):
                move.grad = gradient
            for group, rate in zip(optimizer.param_groups, RATES, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.step()
            after_step(step + 1)
    return best[0], best[1].to(texture.dtype)
