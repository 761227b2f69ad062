"""Progress and Cancel, as ComfyUI's page shows and asks for them."""

from __future__ import annotations

import comfy.model_management
import comfy.utils


class Progress:
    """Progress and Cancel of a node that takes steps."""

    def __init__(self, total: int):
        self._bar = comfy.utils.ProgressBar(total)
        self._done = 0

    def step(self, preview=None, total: int | None = None) -> None:
        """One step is done, of `total` if it is another than before. Raises ComfyUI's interruption on Cancel."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._done += 1
        self._bar.update_absolute(self._done, total, preview)

    def share(self, done: float) -> None:
        """That share of the total is done, at most 1. Raises ComfyUI's interruption on Cancel."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(round(done * self._bar.total))
