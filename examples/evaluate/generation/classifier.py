"""A linear classifier on features of a fixed network: what pictures show, judged by real ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def fit_classifier(
    features: Tensor, labels: Tensor, num_classes: int, decay: float = 0.1
) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression on standardised features.

    Args:
        features: (n, D).
        labels: (n,) int64 in [0, num_classes).
        num_classes: how many.
        decay: half of it times the sum of the squared weights is added to the mean cross entropy.

    Returns: a function of features (m, D) that gives classes (m,) int64.
    """
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    standard = (features - mean) / std
    weight = torch.zeros(features.shape[1], num_classes, requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(standard @ weight + bias, labels) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = weight.detach(), bias.detach()
    return lambda features: ((features - mean) / std @ weight + bias).argmax(dim=1)


def classification(predicted: Tensor, labels: Tensor, names: list[str]) -> dict:
    """How well predictions (n,) of classes fit the true ones.

    Returns: `accuracy`; `largest_class`, its share, which is the accuracy of always saying that class;
    `accuracy_by_class` of the classes that occur; `confusion`, counts, a row per true class.
    """
    confusion = torch.bincount(labels * len(names) + predicted, minlength=len(names) ** 2).reshape(len(names), -1)
    rows = zip(names, confusion.tolist(), strict=True)
    return {
        "accuracy": (confusion.trace() / len(labels)).item(),
        "largest_class": (confusion.sum(dim=1).max() / len(labels)).item(),
        "accuracy_by_class": {name: row[place] / sum(row) for place, (name, row) in enumerate(rows) if any(row)},
        "confusion": confusion.tolist(),
    }
