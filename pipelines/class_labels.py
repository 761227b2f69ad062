"""Classes by number or by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from numbers import Integral

import numpy as np
from torch import Tensor

Labels = int | str | Sequence[int | str] | np.ndarray | Tensor | None


def imagenet_labels() -> dict[int, str]:
    """ImageNet's 1,000 classes by number, in the order of the official generator; each name is there once."""
    from torchvision.models import ResNet18_Weights

    return dict(enumerate(ResNet18_Weights.DEFAULT.meta["categories"]))


def label_ids(labels: Labels, id2label: Mapping[int, str], null_class: int) -> list[int]:
    """Class labels as numbers.

    Args:
        labels: a number, a name (upper and lower case are alike), or a list, array or tensor of them; None is no class
            in particular.
        id2label: the model's classes. A part of a name between commas or "&" will do if no other class has it: "Food"
            for "Food & Drink".
        null_class: the number that stands for no class.

    Raises:
        ValueError: a number out of range, or an unknown or ambiguous name; close matches are named.
        TypeError: a label of another type.
    """
    if labels is None:
        return [null_class]
    if isinstance(labels, (Tensor, np.ndarray)):
        labels = labels.tolist()
    if isinstance(labels, Integral | str):
        labels = [labels]
    if len(labels) == 0:
        raise ValueError("class_labels is empty: give at least one label, or None for no class in particular.")
    return [_label_id(label, id2label, null_class) for label in labels]


def _label_id(label: int | str, id2label: Mapping[int, str], null_class: int) -> int:
    if isinstance(label, bool) or not isinstance(label, Integral | str):
        raise TypeError(f"A class label must be a number or a name, got {type(label).__name__}.")
    if isinstance(label, Integral):
        if not 0 <= label <= null_class:
            raise ValueError(
                f"Class labels run from 0 to {null_class - 1} ({null_class} is no class in particular), got {label}."
            )
        return int(label)
    exact = [int(number) for number, name in id2label.items() if name == label]
    if len(exact) == 1:
        return exact[0]  # ImageNet has a dog Cardigan and a cardigan
    wanted = label.strip().casefold()
    names: dict[str, set[int]] = {}
    parts: dict[str, set[int]] = {}
    for number, name in id2label.items():
        names.setdefault(name.casefold(), set()).add(int(number))
        for part in name.replace("&", ",").split(","):
            parts.setdefault(part.strip().casefold(), set()).add(int(number))
    found = names.get(wanted) or parts.get(wanted, set())
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise ValueError(f"{label!r} names several classes: {', '.join(id2label[number] for number in sorted(found))}.")
    if not id2label:
        raise ValueError(f"This pipeline has no names for its {null_class} classes: give a number, got {label!r}.")
    close = difflib.get_close_matches(wanted, [*names, *parts], n=3)
    shown = [id2label[min(names.get(match) or parts[match])] for match in close]
    hint = f" Did you mean {' or '.join(repr(name) for name in dict.fromkeys(shown))}?" if shown else ""
    some = ", ".join(list(id2label.values())[:10])
    raise ValueError(f"There is no class {label!r}.{hint} Classes: {some}{', ...' if len(id2label) > 10 else ''}.")
