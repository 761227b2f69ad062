"""Flow matching on sets of tokens: samples with their noise and time, the loss, and a plain sampler to look at.

Linear path: z_t = t z + (1 - t) noise, t = 0 noise and t = 1 data; a network learns the velocity z - noise (Y. Lipman
et al., "Flow matching for generative modeling", 2023; time and sign as in SiT, N. Ma et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

TIME_SAMPLINGS = ("uniform", "logit_normal")


class FlowMatchingSamples(Dataset):
    """Data with everything random that a training step needs, drawn from (seed, index) alone.

    So a run that is stopped and resumed, or shared by more processes, sees the same samples in the same order. Every
    pass over the data visits each item once, in an order of its own.

    Args:
        data: items are dicts with `latents` (N, C) float32, `label` int, and other tensors that pass through.
        length: samples in all, over as many passes as that takes.
        null_class: label that stands for no class.
        label_dropout: share of samples whose label becomes `null_class`, for classifier-free guidance.
        time_sampling: "uniform" as SiT does, or "logit_normal", the sigmoid of a normal number, which looks more at the
            middle of the path (P. Esser et al., "Scaling rectified flow transformers", 2024).
        seed: of everything.

    A sample: the item, and `noise` (N, C), `time` () float32, `label` () int64, perhaps dropped.
    """

    def __init__(
        self,
        data: Dataset | Sequence[dict],
        length: int,
        null_class: int,
        label_dropout: float = 0.1,
        time_sampling: str = "logit_normal",
        seed: int = 0,
    ):
        if time_sampling not in TIME_SAMPLINGS:
            raise ValueError(f"time_sampling must be one of {', '.join(TIME_SAMPLINGS)}, got {time_sampling!r}.")
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout is a share between 0 and 1, got {label_dropout}.")
        self.data, self.length, self.null_class = data, length, null_class
        self.label_dropout, self.time_sampling, self.seed = label_dropout, time_sampling, seed
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = dict(self.data[self._place(index)])
        generator = torch.Generator().manual_seed(self.seed * 1_000_000_007 + index)
        item["noise"] = torch.randn(item["latents"].shape, generator=generator)
        uniform, normal = torch.rand(2, generator=generator), torch.randn((), generator=generator)
        item["time"] = torch.sigmoid(normal) if self.time_sampling == "logit_normal" else uniform[0]
        dropped = uniform[1] < self.label_dropout
        item["label"] = torch.tensor(self.null_class if dropped else item["label"])
        return item

    def _place(self, index: int) -> int:
        """The item of the data that sample `index` shows."""
        passes, place = divmod(index, len(self.data))
        if self._order is None or self._order[0] != passes:
            self._order = (passes, np.random.default_rng((self.seed, passes)).permutation(len(self.data)))
        return int(self._order[1][place])


def flow_matching_loss(velocity: Callable[[Tensor, Tensor], Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Mean squared error of the velocity.

    Args:
        velocity: (noisy latents (B, N, C), time (B,)) -> (B, N, C).
        batch: `latents` and `noise` (B, N, C), `time` (B,).

    Returns: (B,), one number per sample, float32.
    """
    latents, noise, time = batch["latents"], batch["noise"], batch["time"]
    along = time[:, None, None]
    predicted = velocity(along * latents + (1 - along) * noise, time)
    return (predicted.float() - (latents - noise)).square().flatten(1).mean(1)
