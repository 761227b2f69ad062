"""Pictures for comparing implementations of the partition: many are full of exact ties and of values on edges."""

from __future__ import annotations

import numpy as np


def pattern(kind: str, height: int, width: int, seed: int) -> np.ndarray:
    """(1, height, width) float32 grey values of one of KINDS."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    if kind == "noise":
        image = random.random((height, width)) * 2 - 1
    elif kind == "binary":
        image = random.integers(0, 2, (height, width)) * 2.0 - 1
    elif kind == "constant":
        image = np.full((height, width), random.random())
    elif kind == "blocks":
        cells = random.integers(0, 3, (height // 8 + 1, width // 8 + 1)) - 1.0
        image = np.kron(cells, np.ones((8, 8)))[:height, :width]
    elif kind == "waves":
        image = np.rint(np.sin(x / 7.0) * np.cos(y / 7.0) * 2) / 2
    elif kind == "ramp":  # most gradients within a rounding of an edge of the histogram's bins
        image = (0.95 - x % 32 * 11 / 512 + random.random((height, width)) * 1e-7) * 2 - 1
    elif kind == "edges":  # some on the edges
        image = np.minimum(random.integers(0, 60, (height, width)) * 11 / 512, 1.0) * 2 - 1
    else:
        image = (x == width // 2) * 1.0  # "line"
    return image.astype(np.float32)[None]


KINDS = ("noise", "binary", "constant", "blocks", "waves", "ramp", "edges", "line")


def mirrored(image: np.ndarray) -> np.ndarray:
    """Square pictures that are their own transposes: what is cut off on both sides of the diagonal ties."""
    side = min(image.shape[1:])
    upper = np.triu(image[:, :side, :side])
    return np.ascontiguousarray(upper + np.triu(upper, 1).swapaxes(1, 2))
