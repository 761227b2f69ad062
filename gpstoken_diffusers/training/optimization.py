"""Which optimizer trains which parameter, and how its learning rate runs."""

from __future__ import annotations

import math

import torch
from torch import nn

from .muon import Muon, split_parameters


def build_optimizers(
    model: nn.Module, optimizer: str, learning_rate: float, adam_learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the weight matrices and AdamW for the rest.

    Args:
        model: parameters that need no gradient are left out.
        optimizer: "adamw" or "muon".
        learning_rate: of the chosen optimizer.
        adam_learning_rate: of what Muon does not train.
        weight_decay: decoupled, per unit of learning rate.
    """
    adam = {"weight_decay": weight_decay, "betas": (0.9, 0.99)}
    if optimizer == "adamw":
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [torch.optim.AdamW(trained, lr=learning_rate, **adam)]
    matrices, others = split_parameters(model)
    return [
        Muon(matrices, lr=learning_rate, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr=adam_learning_rate, **adam),
    ]


def learning_rate_scale(step: int, warmup_steps: int, max_train_steps: int, final_lr_scale: float) -> float:
    """Linear warm-up, then a cosine down to `final_lr_scale` at the last step; 1 is the full learning rate."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_train_steps - warmup_steps))
    return final_lr_scale + (1 - final_lr_scale) * 0.5 * (1 + math.cos(math.pi * progress))
