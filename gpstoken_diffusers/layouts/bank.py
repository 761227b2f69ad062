"""LayoutBank: layouts of real images by class, as the condition of the texture generator.

Stands in for a generator of layouts: drawing a stored layout gives a real partition's initial Gaussians.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from diffusers import SchedulerMixin
from safetensors.torch import save as safetensors_bytes

from ..safe_files import check_format, open_safetensors, write_atomically
from .official_pickle import read_official_layouts

__all__ = ["LayoutBank"]

FILE_FORMAT = "gpstoken.layouts"
FILE_FORMAT_VERSION = 1
FILE_NAME = "diffusion_pytorch_model.safetensors"  # diffusers downloads weights by this name alone
_ADVICE = "Make the layouts again."
_CLASSES_SHOWN = 12


class LayoutBank(SchedulerMixin):
    """Layouts of real images and the class of each; a class without layouts may have a name too.

    It can be a part of a pipeline. diffusers saves and loads only parts whose class stands below one that it knows, and
    the one with least to it is that of schedulers.

    Attributes:
        layouts: (n, N, 5) float32 on the CPU: initial Gaussians (sigma_x, sigma_y, rho, x, y) in [-1, 1]
            coordinates, sigma > 0, |rho| < 1.
        labels: (n,) int64, from 0.
        id2label: names of classes by label; may be empty.
    """

    def __init__(
        self, layouts: torch.Tensor, labels: torch.Tensor | Sequence[int], id2label: Mapping[int, str] | None = None
    ) -> None:
        """Keeps copies of layouts (n, N, 5), any float dtype, n and N >= 1, and of their n labels.

        Raises:
            TypeError: layouts that are not a tensor of floats, labels that are not integers, or id2label of other
                types.
            ValueError: shapes that do not fit, a negative label, or an impossible layout: NaN or infinite values,
                sigma <= 0 or |rho| >= 1 (the message names the first).
        """
        if not isinstance(layouts, torch.Tensor) or not layouts.is_floating_point():
            what = layouts.dtype if isinstance(layouts, torch.Tensor) else type(layouts).__name__
            raise TypeError(f"layouts: expected a torch tensor of floats, got {what}.")
        if layouts.ndim != 3 or layouts.shape[-1] != 5 or 0 in layouts.shape:
            raise ValueError(f"layouts: expected (n, N, 5) with n, N >= 1, got {tuple(layouts.shape)}.")
        self.layouts = layouts.detach().to("cpu", torch.float32, copy=True).contiguous()
        self.labels = _labels("labels", labels)
        if self.labels.shape != layouts.shape[:1]:
            raise ValueError(f"labels: expected one for each of {len(layouts)} layouts, got {len(self.labels)}.")
        possible = (self.layouts[..., :2] > 0).all(-1) & (self.layouts[..., 2].abs() < 1)
        wrong = ~(possible & self.layouts.isfinite().all(-1))
        if wrong.any():
            layout, token = wrong.nonzero()[0].tolist()
            numbers = ", ".join(f"{number:g}" for number in self.layouts[layout, token].tolist())
            raise ValueError(
                "layouts: expected finite numbers, sigma > 0 and |rho| < 1, but in token "
                f"{token} of layout {layout} (sigma_x, sigma_y, rho, x, y) is ({numbers})."
            )
        for label, name in (id2label or {}).items():
            if not isinstance(label, Integral) or not isinstance(name, str):
                raise TypeError(f"id2label: expected names by integers, got {label!r}: {name!r}.")
        self.id2label = {int(label): name for label, name in (id2label or {}).items()}

    def __len__(self) -> int:
        return len(self.layouts)

    def __repr__(self) -> str:
        classes = len(self.classes)
        return f"LayoutBank({len(self)} layouts of {self.num_tokens} tokens, {classes} classes)"

    @property
    def num_tokens(self) -> int:
        """Tokens of each layout, N."""
        return self.layouts.shape[1]

    @property
    def classes(self) -> list[int]:
        """Labels that have layouts, rising."""
        return self.labels.unique().tolist()

    def add(self, layouts: torch.Tensor, labels: torch.Tensor | Sequence[int]) -> None:
        """Append layouts (n, N, 5), with the bank's N, and their labels. Raises as `LayoutBank(...)` does."""
        more = LayoutBank(layouts, labels)
        if more.num_tokens != self.num_tokens:
            raise ValueError(f"layouts: the bank's have {self.num_tokens} tokens each, these {more.num_tokens}.")
        self.layouts = torch.cat([self.layouts, more.layouts])
        self.labels = torch.cat([self.labels, more.labels])

    def sample(
        self,
        class_labels: torch.Tensor | Sequence[int],
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """A layout of each class, drawn evenly among that class's, with replacement: a bank never runs out.

        Args:
            class_labels: (B,) labels.
            generator: CPU generators: one for all samples, or one for each, so that a sample does not depend on its
                batch; None takes torch's global one.

        Returns:
            (B, N, 5) float32 on the CPU.

        Raises:
            TypeError: labels that are not integers, or a generator of another type.
            ValueError: a class without layouts (the message lists those that have some), a list of generators of
                another length, or a generator that is not on the CPU.
        """
        wanted = _labels("class_labels", class_labels).tolist()
        generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * len(wanted)
        if len(generators) != len(wanted):
            raise ValueError(f"generator: expected one, or one per sample ({len(wanted)}), got {len(generators)}.")
        for one in generators:
            if one is not None and not isinstance(one, torch.Generator):
                raise TypeError(f"generator: expected torch.Generator, got {type(one).__name__}.")
            if one is not None and one.device.type != "cpu":
                raise ValueError(f"generator: expected one on the CPU, torch.Generator(), got one on {one.device}.")
        rows = {label: (self.labels == label).nonzero()[:, 0] for label in set(wanted)}
        for label in wanted:
            if len(rows[label]) == 0:
                raise ValueError(f"class_labels: there is no layout of class {self._shown(label)}. {self._inventory()}")
        chosen = [
            rows[label][torch.randint(len(rows[label]), (), generator=one)]
            for label, one in zip(wanted, generators, strict=True)
        ]
        return self.layouts[torch.tensor(chosen, dtype=torch.long)]

    def _shown(self, label: int) -> str:
        return f"{label} ({self.id2label[label]})" if label in self.id2label else str(label)

    def _inventory(self) -> str:
        classes = self.classes
        shown = ", ".join(map(self._shown, classes[:_CLASSES_SHOWN]))
        rest = len(classes) - _CLASSES_SHOWN
        return f"There are layouts of these classes: {shown}{f' and {rest} more' if rest > 0 else ''}."

    # Files

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, whole or not at all; its header says what it is.

        Raises:
            OSError: the file cannot be written.
        """
        header = {
            "format": FILE_FORMAT,
            "format_version": str(FILE_FORMAT_VERSION),
            "id2label": json.dumps(self.id2label),
        }
        write_atomically(path, safetensors_bytes({"layouts": self.layouts, "labels": self.labels}, metadata=header))

    @classmethod
    def load(cls, path: str | os.PathLike) -> LayoutBank:
        """Read a file of `save`. Nothing in it is ever executed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is empty, truncated, of another kind, of a later version, or holds impossible values.
        """
        with open_safetensors(path, advice=_ADVICE) as file:
            header = file.metadata() or {}
            otherwise = (
                "a safetensors file, but not of layouts. Those are written by LayoutBank.save; "
                "LayoutBank.from_official_pickle reads the official initg.pickle."
            )
            check_format(header, path, FILE_FORMAT, FILE_FORMAT_VERSION, otherwise)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        try:
            id2label = {int(label): name for label, name in json.loads(header["id2label"]).items()}
            return cls(tensors["layouts"], tensors["labels"], id2label)
        except KeyError as error:
            raise ValueError(f"{path}: the layouts lack {error}. {_ADVICE}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: the layouts are damaged: {error}. {_ADVICE}") from error

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """`save` to a folder, as diffusers asks parts of a pipeline; the rest is not used."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.save(Path(save_directory, FILE_NAME))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> LayoutBank:
        """`load` from a folder that `save_pretrained` wrote."""
        return cls.load(Path(pretrained_model_name_or_path, FILE_NAME))

    @classmethod
    def from_official_pickle(cls, path: str | os.PathLike) -> LayoutBank:
        """Read the official `initg.pickle`: class -> list of float arrays (N, >= 5); the first 5 columns count.

        Classes are integers or text. Text of digits counts as the integer; if some class is other text, all are
        numbered in the file's order and `id2label` keeps the text. Nothing in the file is executed.

        Raises:
            OSError: the file cannot be read.
            ValueError: the pickle holds anything else; the message says what.
        """
        data = read_official_layouts(path)
        numbered = all(str(name).isdecimal() for name in data)
        arrays, labels = [], []
        largest = 10 * os.path.getsize(path)  # bytes; a small file may list one array a million times
        for number, (name, layouts) in enumerate(data.items()):
            for i, layout in enumerate(layouts):
                fits = layout.dtype.kind == "f" and layout.ndim == 2 and layout.shape[1] >= 5
                if not fits or (arrays and len(layout) != len(arrays[0])):
                    expected = len(arrays[0]) if arrays else "N"
                    raise ValueError(
                        f"{path}: expected float arrays ({expected}, >= 5), but layout {i} of class {name} is "
                        f"{layout.dtype} {layout.shape}."
                    )
                largest -= layout.nbytes
                if largest < 0:
                    raise ValueError(f"{path}: it lists the same layouts again and again.")
                arrays.append(layout[:, :5].astype(np.float32))
                labels.append(int(name) if numbered else number)
        if not arrays:
            raise ValueError(f"{path}: there is no layout in it.")
        id2label = {} if numbered else {number: str(name) for number, name in enumerate(data)}
        try:
            return cls(torch.from_numpy(np.stack(arrays)), labels, id2label)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _labels(name: str, labels: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """(B,) int64 on the CPU, checked; a copy."""
    given = torch.as_tensor(labels)
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        if given.numel() > 0:
            raise TypeError(f"{name}: expected integers, got {given.dtype}.")
    if given.ndim != 1:
        raise ValueError(f"{name}: expected one label per layout, (B,), got the shape {tuple(given.shape)}.")
    given = given.detach().to("cpu", torch.int64, copy=True)
    if (given < 0).any():
        raise ValueError(f"{name}: expected labels from 0, got {given.min().item()}.")
    return given
