"""What a training run writes down about itself: running means, its curve, what it skipped, a batch that broke it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from accelerate.utils import gather_object
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..safe_files import write_atomically


class RunState:
    """What a run must remember, beside its networks, to go on as if it had not been stopped.

    Attributes:
        step: how many steps the run has taken, all its parts together.
        averages: running means by name.
        minutes: how long the run has taken, all its parts together.
        skipped: names of samples that could not be read, each once, in the order they were met.
        last_row: of the curve; empty before the first validation.
    """

    def __init__(self):
        self.step = 0
        self.averages: dict[str, float] = {}
        self.minutes = 0.0
        self.skipped: dict[str, None] = {}
        self.last_row: dict[str, float] = {}

    def average(self, numbers: dict[str, float], decay: float) -> None:
        """Moves the running means towards new numbers; the first number of a name is its mean."""
        for name, value in numbers.items():
            old = self.averages.get(name, value)
            self.averages[name] = decay * old + (1 - decay) * value

    def skip(self, names: Iterable[str]) -> None:
        """Notes what could not be read."""
        self.skipped.update(dict.fromkeys(names))

    def share_skipped(self, output_dir: Path, is_main_process: bool) -> None:
        """Brings together what all processes have skipped, and lists it in skipped.txt. Every process must call it."""
        self.skip(gather_object(list(self.skipped)))
        if self.skipped and is_main_process:
            write_atomically(output_dir / "skipped.txt", os.fsencode("".join(f"{name}\n" for name in self.skipped)))

    def state_dict(self) -> dict:
        return {
            "step": self.step,
            "averages": dict(self.averages),
            "minutes": self.minutes,
            "skipped": list(self.skipped),
            "last_row": dict(self.last_row),
        }

    def load_state_dict(self, state: dict) -> None:
        self.step, self.minutes, self.averages = state["step"], state["minutes"], dict(state["averages"])
        self.skipped, self.last_row = dict.fromkeys(state["skipped"]), dict(state["last_row"])


class Curve:
    """A file of one JSON object a line, each with its "step"."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, row: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops the rows of steps that a resumed run will take again, and a line that was cut off."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["step"] <= step:
                kept.append(line + "\n")
        write_atomically(self.path, "".join(kept).encode())


def dump_batch(output_dir: Path, step: int, process: int, batch: dict[str, Tensor]) -> Path:
    """Writes the tensors of a batch to a safetensors file, and returns its path."""
    path = output_dir / f"broken-batch-{step}-process-{process}.safetensors"
    tensors = {name: value.detach().cpu().contiguous() for name, value in batch.items()}
    write_atomically(path, safetensors_bytes(tensors))
    return path
