"""The pictures that reconstructions are measured on: centre squares of a folder's photographs, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from gpstoken_diffusers.picture_files import readable_formats
from gpstoken_diffusers.training.data import center_crop, to_pixel_values
from gpstoken_diffusers.training.pictures import FolderPictures


class Squares:
    """Centre squares of the photographs of a folder, scaled down to one side; read in each pass, in one order.

    Photographs whose shorter side is below the resolution are left out: enlarged ones have no detail to lose.

    Args:
        folder: searched with its subfolders.
        resolution: side in pixels.
        most: at most this many photographs, evenly spread over those that are large enough; None takes all.
        at_least: leaves out photographs below this side too; None takes the resolution.

    Attributes:
        paths: of the photographs; a photograph's number is its place in this list.
        names: the same below the folder, with "/" between its parts.
        left_out: how many are too small.
        damaged: file names and what is wrong with them, of those that cannot be read; complete after one pass.

    Raises:
        ValueError: no such folder, no picture in it, or none that is large enough.
    """

    def __init__(self, folder: Path, resolution: int, most: int | None = None, at_least: int | None = None):
        self.resolution = resolution
        self.damaged: dict[str, str] = {}
        self._pictures = FolderPictures(folder)
        large, largest, self.left_out = [], 0, 0
        for number, path in enumerate(self._pictures.paths):
            try:
                with Image.open(path, formats=readable_formats()) as image:
                    side = min(image.size)
            except Exception as error:  # whatever a picture raises is its own error
                self.damaged[str(path)] = _reason(error)
                continue
            largest = max(largest, side)
            if side >= max(resolution, at_least or 0):
                large.append(number)
            else:
                self.left_out += 1
        if not large:
            found = f"the largest has a shorter side of {largest} px" if largest else "none of the files can be read"
            raise ValueError(f"{folder} has no picture of at least {max(resolution, at_least or 0)} px: {found}")
        count = len(large) if most is None else min(most, len(large))
        self._chosen = [large[index * len(large) // count] for index in range(count)]
        self.paths = [self._pictures.paths[number] for number in self._chosen]
        self.names = [path.relative_to(folder).as_posix() for path in self.paths]

    def __len__(self) -> int:
        """Photographs, including those that turned out to be damaged."""
        return len(self.paths)

    def batches(self, size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Places of up to `size` photographs, and their squares (n, 3, R, R) float32 in [-1, 1].

        Raises ValueError, after the last of them: none could be read.
        """
        places, squares, readable = [], [], 0
        for place, number in enumerate(self._chosen):
            try:
                square = center_crop(self._pictures.load(number), self.resolution)
            except Exception as error:  # whatever a picture raises is its own error
                self.damaged[str(self.paths[place])] = _reason(error)
                continue
            places.append(place)
            squares.append(to_pixel_values(square))
            readable += 1
            if len(places) == size:
                yield places, torch.stack(squares)
                places, squares = [], []
        if places:
            yield places, torch.stack(squares)
        if not readable:
            raise ValueError(f"none of {len(self.paths)} pictures can be read, such as {self.paths[0]}")


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
