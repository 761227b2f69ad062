"""Which optimizer trains which parameter, and how its learning rate runs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from .muon import Muon, split_parameters

OPTIMIZERS = ("muon", "adamw", "adam")
LR_SCHEDULES = ("cosine", "constant", "minutes")


class OptimizerGroup(torch.optim.Optimizer):
    """Several optimizers as one, each with parameters of its own.

    Gradient scaling in float16 counts on this: its scaler looks at all gradients before it lets any step happen, and
    adapts its scale once per step, so that two optimizers beside each other would be scaled twice.

    Args:
        optimizers: at least one; all of them step together.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]):
        # The base class is a name for accelerate and schedules to check: its own constructor would take the parameters
        # over, which belong to the parts.
        self.optimizers = list(optimizers)
        self.defaults: dict = {}

    @property
    def param_groups(self) -> list[dict]:
        """Those of all optimizers, in order; a schedule changes them in place."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict:
        """State by parameter."""
        return {name: value for optimizer in self.optimizers for name, value in optimizer.state.items()}

    def step(self, closure=None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)


def build_optimizer(
    model: nn.Module,
    optimizer: str,
    learning_rate: float,
    adam_learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.99),
) -> torch.optim.Optimizer:
    """One optimizer for everything, or Muon for the weight matrices and AdamW for the rest.

    Args:
        model: parameters that need no gradient are left out.
        optimizer: "muon", "adamw", or "adam", whose weight decay is added to the gradient.
        learning_rate: of the chosen optimizer.
        adam_learning_rate: of what Muon does not train.
        weight_decay: per unit of learning rate.
        betas: of Adam and AdamW.
    """
    adam = {"weight_decay": weight_decay, "betas": betas}
    if optimizer == "muon":
        matrices, others = split_parameters(model)
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            parts.append(Muon(matrices, lr=learning_rate, weight_decay=weight_decay))
        if others:
            parts.append(torch.optim.AdamW(others, lr=adam_learning_rate, **adam))
        return OptimizerGroup(parts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optimizer]
    return kind(trained, lr=learning_rate, **adam)


def learning_rate_scale(
    step: int,
    warmup_steps: int,
    max_train_steps: int,
    final_lr_scale: float,
    schedule: str = "cosine",
    time_share: float = 0.0,
) -> float:
    """Linear warm-up, then a cosine down to `final_lr_scale` at the last step, or a constant; 1 is the full rate.

    "minutes" is a cosine over time: it ends where `time_share`, the share of the run's time that has passed, is 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "minutes":
        progress = time_share
    else:
        progress = (step - warmup_steps) / max(1, max_train_steps - warmup_steps)
    progress = min(1.0, progress)
    return final_lr_scale + (1 - final_lr_scale) * 0.5 * (1 + math.cos(math.pi * progress))
