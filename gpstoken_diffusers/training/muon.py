"""Muon: momentum whose update is orthogonalised, for the weight matrices of a network."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz iteration: five steps bring every singular value close to 1 (K. Jordan et al., "Muon: an
# optimizer for hidden layers in neural networks", 2024).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# How many steps are taken at a time. A step multiplies X by a polynomial of X X^T, so several can be multiplied
# together before X is touched, which saves work where X is long. All five at once lose too much in bfloat16: singular
# values of up to 6.
_STEPS, _STEPS_OF_LONG = (1, 1, 1, 1, 1), (3, 2)
_LONG = 1.5  # columns per row from which (3, 2) multiplies less
# Makes the update's root mean square that of a typical Adam update, so that one learning rate and weight decay serve
# both (J. Liu et al., "Muon is scalable for LLM training", 2025).
_ADAM_RMS = 0.2


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values of about 1: (rows, columns) -> the same shape, bfloat16."""
    x = matrix.bfloat16()
    transposed = x.shape[0] > x.shape[1]
    if transposed:
        x = x.T.contiguous()
    x = x / (x.norm() + 1e-7)
    for steps in _STEPS_OF_LONG if x.shape[1] > _LONG * x.shape[0] else _STEPS:
        gram = x @ x.T
        factor = product = _step(gram)
        for _ in range(steps - 1):
            gram = factor @ gram @ factor
            factor = _step(gram)
            product = factor @ product
        x = product @ x
    return x.T if transposed else x


def _step(gram: Tensor) -> Tensor:
    """What one step multiplies X by: a + b G + c G^2, where G = X X^T."""
    a, b, c = _COEFFICIENTS
    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal().add_(a)
    return factor


class Muon(torch.optim.Optimizer):
    """Momentum SGD (Nesterov) with orthogonalised updates and decoupled weight decay.

    A convolution's weight counts as a matrix of (output channels, everything else); torch's own `Muon` takes only
    two-dimensional parameters.

    Args:
        params: parameters with two dimensions or more.
        lr: learning rate, on Adam's scale.
        momentum: share of the old direction.
        weight_decay: share of a weight that a step of learning rate 1 takes away.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            if any(parameter.ndim < 2 for parameter in group["params"]):
                raise ValueError("Muon takes matrices and convolutions only; give vectors to another optimizer.")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                direction = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(direction, group["momentum"]).flatten(1)
                update = orthogonalise(direction).to(parameter.dtype)
                scale = _ADAM_RMS * max(direction.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(for Muon, for Adam): hidden weight matrices, and what an orthogonal update does not suit.

    Vectors, embeddings and the layers that give the model's outputs stay with Adam: their rows are not
    interchangeable directions. Parameters that need no gradient are in neither list.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        output = any(part in name for part in ("_head.", "conv_out.", "head.proj."))
        table = id(parameter) in tables or name.endswith("token_embedding")
        (others if parameter.ndim < 2 or output or table else matrices).append(parameter)
    return matrices, others
