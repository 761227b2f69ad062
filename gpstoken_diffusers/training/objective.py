"""What a network is trained for, as the training loop asks for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from .discriminator import PatchCritic
from .run_record import RunState


class Objective(ABC):
    """What a network is trained for. Scripts subclass it; the loop asks it for losses, figures and files.

    Attributes:
        critic: what is trained beside the model, against it; None without one.
        pictures: what the last validation drew, by name: (n, H, W, 3) uint8, for the tracker.
    """

    critic: PatchCritic | None = None
    pictures: dict[str, np.ndarray] = {}

    def trains(self, step: int) -> tuple[bool, bool]:
        """Whether the step after `step` trains (the model, the critic)."""
        return True, False

    @abstractmethod
    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """What the model gives for a batch."""

    @abstractmethod
    def model_loss(self, output: Tensor, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Named numbers, of which "loss" is what the model descends."""

    def validate(self, averaged: nn.Module, step: int) -> dict[str, float]:
        """Figures of the averaged model for the curve; pictures may be written. Only the main process calls it."""
        return {}

    def save(self, averaged: nn.Module, folder: Path, state: RunState) -> None:
        """Writes the averaged model, already in --save_dtype, into an empty folder."""
        averaged.save_pretrained(folder)
