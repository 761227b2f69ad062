"""Runs of the command `gpstoken` in this process, with what they are given: tiny models and made-up photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from model_zoo import tiny_model
from PIL import Image

from gpstoken_diffusers import GPSTokenImageProcessor, cli


def save_tiny_model(folder: Path, kind: str = "map") -> Path:
    """A tiny random model of 32-px tiles and 6 tokens, as a user would keep it."""
    tiny_model(kind).save_pretrained(folder)
    GPSTokenImageProcessor(tile_size=32, num_tokens=6).save_pretrained(folder)
    return folder


def photo(path: Path, height: int = 40, width: int = 56, seed: int = 0) -> Path:
    """Write a picture with smooth and with busy places; 2 x 2 tiles unless said otherwise."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    noise = random.uniform(-1, 1, (height, width, 3)) * np.linspace(0, 90, height)[:, None, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((ramp + noise).clip(0, 255).astype(np.uint8)).save(path)
    return path


def odd_picture(path: Path) -> Path:
    """Write a picture that makes Pillow raise what it raises for no other: NotImplementedError."""
    Image.new("RGB", (8, 8)).save(path, "DDS")
    data = bytearray(path.read_bytes())
    data[80:88] = (4).to_bytes(4, "little") + b"odd?"  # flags of the pixel format: a code, and the code
    path.write_bytes(data)
    return path


def run(*argv: object) -> int:
    """Returns the exit code."""
    return cli.main([str(argument) for argument in argv])


def names_in(folder: Path) -> set[str]:
    """The files of a folder and its subfolders."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def raising(error: BaseException):
    """A function that raises it, whatever it is given."""

    def function(*args, **kwargs):
        raise error

    return function
