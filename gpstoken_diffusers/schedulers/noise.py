"""Start noise: the same for the same seed, whatever the batch, the device and the machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def sample_generators(generator: Generator | Sequence[Generator] | None, batch_size: int) -> list[Generator]:
    """One CPU generator per sample, so that a sample depends on its own seed alone.

    Args:
        generator: one for all, which gives the samples their seeds in turn (the first sample of a batch is that of a
            batch of one); a list with one per sample; or None for random seeds. Generators of other devices only give
            seeds: the noise itself is drawn on the CPU, where every machine draws the same.
        batch_size: number of samples.

    Raises:
        TypeError: something that is no generator.
        ValueError: a list of another length.
    """
    sources = generator if isinstance(generator, (list, tuple)) else [generator] * batch_size
    for source in sources:
        if not isinstance(source, Generator | None):
            raise TypeError(
                f"generator must be a torch.Generator or a list of them, got {source!r}: for a seed, pass "
                "torch.Generator().manual_seed(seed)."
            )
    if len(sources) != batch_size:
        raise ValueError(
            f"generator must be one torch.Generator or a list of {batch_size}, one per sample, got {len(sources)}."
        )
    generators = []
    for source in sources:
        device = "cpu" if source is None else source.device
        seed = torch.randint(2**62, (), generator=source, device=device).item()
        generators.append(Generator().manual_seed(seed))
    return generators


def draw_noise(generators: Sequence[Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal noise (B, *shape) float32: row i from generator i, drawn on the CPU."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
