"""What autoencoders are compared with: regions in one colour, principal components of patches, JPEG, WebP."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from gpstoken_diffusers import GPSTokenImageProcessor
from gpstoken_diffusers.layouts.of_pictures import partition_tiles
from gpstoken_diffusers.tiling import tile_grid_for
from gpstoken_diffusers.training.data import TrainingCrops, to_pixel_values

from .methods import Cost, GPSTokenMethod, Method, latent_cost

CROPS = 1200
"""Crops of training pictures that principal components are fitted to."""
CROPS_AT_ONCE = 16
LARGEST_PATCH = 3 * 32 * 64
"""Numbers in a patch, at most (32 patches in 256 px): covariances of larger ones take gigabytes."""
SPARE = 8
"""Directions followed beside the wanted ones: the more, the faster it converges."""
ITERATIONS = 40
"""On photographs, the captured variance is then right to six digits."""

QUALITIES = (1, 100)
CODECS = {
    "jpeg": partial(Image.Image.save, format="JPEG", optimize=True, progressive=True),
    "webp": partial(Image.Image.save, format="WEBP", method=6),
}
TITLES = {"jpeg": "JPEG", "webp": "WebP"}


# ---------------------------------------------------------------------------------------------------- regions


@dataclass(frozen=True)
class PaintedRegions:
    """Code of [`RegionMeans`]: boxes (B, N, 4), inclusive pixel indices x0, y0, x1, y1, and colours (B, N, 3)."""

    boxes: Tensor
    colours: Tensor
    size: tuple[int, int]


class RegionMeans(Method):
    """Each region of an autoencoder's partition in its mean colour.

    Counts as a box and a colour per token. In the compact form a colour has 8 bits per channel, and the partition is a
    tree of halvings, of at most three bits per region: whether nodes are cut (2 N - 1), and along which axis (N - 1).
    """

    def __init__(self, method: GPSTokenMethod):
        self.name = f"{method.name}, region means"
        self.tile, self.num_tokens = method.model.config.sample_size, method.num_tokens
        self.settings = method.model.partition_settings

    def encode(self, images: Tensor, places: list[int]) -> PaintedRegions:
        tile, size = self.tile, tuple(images.shape[-2:])
        rows, cols = tile_grid_for(*size, tile)
        regions = partition_tiles(images.cpu(), tile, self.num_tokens, **self.settings).regions
        corners = torch.tensor([[tile * col, tile * row] * 2 for row in range(rows) for col in range(cols)])
        boxes = (regions.unflatten(0, (-1, rows * cols)) + corners[:, None]).flatten(1, 2)
        return PaintedRegions(boxes, region_means(images.cpu(), boxes), size)

    def decode(self, code: PaintedRegions) -> Tensor:
        painted = torch.empty(len(code.boxes), 3, *code.size)
        for boxes, colours, out in zip(code.boxes.tolist(), code.colours, painted, strict=True):
            for (x0, y0, x1, y1), colour in zip(boxes, colours, strict=True):
                out[:, y0 : y1 + 1, x0 : x1 + 1] = colour[:, None, None]
        return painted

    def cost(self, code: PaintedRegions) -> Cost:
        batch, count, _ = code.boxes.shape
        sizes = {"coded": 3 * count + math.ceil(3 * count / 8), "float16": 2 * 7 * count, "float32": 4 * 7 * count}
        rounded = ((code.colours + 1) * 127.5).round() / 127.5 - 1
        by_picture = {key: [size] * batch for key, size in sizes.items()}
        return Cost(count, 7 * count, by_picture, PaintedRegions(code.boxes, rounded, code.size))


def region_means(images: Tensor, boxes: Tensor) -> Tensor:
    """Mean colours (B, N, 3) of boxes (B, N, 4); 0 for a box that lies outside its image, in its padding."""
    means = torch.zeros(*boxes.shape[:2], 3)
    for image, rows, out in zip(images, boxes.tolist(), means, strict=True):
        for place, (x0, y0, x1, y1) in enumerate(rows):
            window = image[:, y0 : y1 + 1, x0 : x1 + 1]
            if window.numel():
                out[place] = window.mean(dim=(1, 2))
    return means


# ---------------------------------------------------------------------------------------------------- patches


@dataclass(frozen=True)
class PatchGrid:
    """Equal patches of a square picture, and how many numbers each keeps."""

    height: int
    width: int
    components: int

    def cut(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) -> (B, patches, 3 height width)."""
        size = (self.height, self.width)
        return F.unfold(images, size, stride=size).transpose(1, 2)


def patch_grid(resolution: int, tokens: int, components: int) -> PatchGrid | None:
    """Patches as square as can be, as many as `tokens`.

    None if a square of this side cannot be cut into so many, or they have fewer numbers than `components`, or more
    than LARGEST_PATCH.
    """
    fitting = [
        (resolution // rows, resolution // (tokens // rows))
        for rows in range(1, tokens + 1)
        if tokens % rows == 0 and resolution % rows == 0 and resolution % (tokens // rows) == 0
    ]
    if not fitting:
        return None
    # Wide rather than tall if both are equally near to a square: horizons are more frequent than trunks.
    height, width = min(fitting, key=lambda sides: (abs(math.log(sides[0] / sides[1])), sides[0]))
    return PatchGrid(height, width, components) if components <= 3 * height * width <= LARGEST_PATCH else None


class PatchPCA(Method):
    """Principal components of equal patches; made by [`fit_patch_pcas`].

    Args:
        grid: the patches.
        mean: (3 height width,).
        basis: (3 height width, components), orthonormal.
    """

    def __init__(self, grid: PatchGrid, mean: Tensor, basis: Tensor):
        self.name = f"PCA of {grid.height}x{grid.width} patches, {grid.components} numbers"
        self.grid, self.mean, self.basis = grid, mean.float(), basis.float()
        self.parameters = mean.numel() + basis.numel()

    def encode(self, images: Tensor, places: list[int]) -> Tensor:
        """Maps of coefficients (B, components, rows, columns)."""
        coefficients = (self.grid.cut(images.cpu()) - self.mean) @ self.basis
        return coefficients.transpose(1, 2).unflatten(2, (-1, images.shape[-1] // self.grid.width))

    def decode(self, code: Tensor) -> Tensor:
        patches = code.flatten(2).transpose(1, 2) @ self.basis.T + self.mean
        size = (self.grid.height, self.grid.width)
        output_size = (code.shape[2] * size[0], code.shape[3] * size[1])
        return F.fold(patches.transpose(1, 2), output_size, size, stride=size)

    def cost(self, code: Tensor) -> Cost:
        return latent_cost(code)


def fit_patch_pcas(folder: Path, resolution: int, grids: Sequence[PatchGrid], crops: int = CROPS) -> list[PatchPCA]:
    """Fits to random crops of a folder's pictures, all grids in one pass; only sums are kept.

    Raises:
        ValueError: no such folder, or no picture in it.
        OSError: its pictures cannot be read.
    """
    sums = [torch.zeros(3 * grid.height * grid.width, dtype=torch.float64) for grid in grids]
    products = [torch.zeros(len(total), len(total), dtype=torch.float64) for total in sums]
    counts = [0] * len(grids)
    for images in _crops(folder, resolution, crops):
        for number, grid in enumerate(grids):
            patches = grid.cut(images).flatten(0, 1)
            sums[number] += patches.sum(dim=0, dtype=torch.float64)
            products[number] += patches.T @ patches
            counts[number] += len(patches)
    fitted = []
    for grid, total, product, count in zip(grids, sums, products, counts, strict=True):
        mean = total / count
        covariance = product.div_(count).addr_(mean, mean, alpha=-1)
        fitted.append(PatchPCA(grid, mean, principal_directions(covariance, grid.components)))
    return fitted


def _crops(folder: Path, resolution: int, count: int) -> Iterator[Tensor]:
    dataset = TrainingCrops(folder, resolution, num_tokens=1, length=count)
    with tqdm(total=count, desc=f"crops of {resolution} px for PCA", unit="crop") as progress:
        for start in range(0, count, CROPS_AT_ONCE):
            places = range(start, min(count, start + CROPS_AT_ONCE))
            yield torch.stack([dataset[place]["pixel_values"] for place in places])
            progress.update(len(places))


def principal_directions(covariance: Tensor, count: int) -> Tensor:
    """The `count` leading eigenvectors (d, count) of (d, d) float64, by orthogonal iteration.

    All of them, as `eigh` gives them, take minutes for the patches of 32 tokens.
    """
    size = len(covariance)
    start = torch.randn(size, min(size, count + SPARE), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(covariance @ basis).Q
    vectors = torch.linalg.eigh(basis.T @ covariance @ basis).eigenvectors
    return basis @ vectors[:, -count:]


# ---------------------------------------------------------------------------------------------------- files


class TooFewBytes(ValueError):
    """No file of the format is that small, not even of a single pixel."""


@dataclass(frozen=True)
class Files:
    """Code of the file formats: one file per picture, which may show it smaller than its `side`."""

    contents: list[bytes]
    side: int


class FileFormat(Method):
    """JPEG (progressive, optimised) or WebP (method 6) at one quality, by Pillow.

    Args:
        codec: "jpeg" or "webp".
        quality: 1 to 100.

    Raises:
        ValueError: another codec or quality.
    """

    def __init__(self, codec: str, quality: int):
        if codec not in CODECS:
            raise ValueError(f"the format must be one of {', '.join(CODECS)}, not {codec!r}")
        if not QUALITIES[0] <= quality <= QUALITIES[1]:
            raise ValueError(f"the quality of {codec} must be {QUALITIES[0]} to {QUALITIES[1]}, not {quality}")
        self.name = f"{TITLES[codec]}, quality {quality}"
        self.codec, self.quality = codec, quality

    def encode(self, images: Tensor, places: list[int]) -> Files:
        pictures = GPSTokenImageProcessor().postprocess(images)
        contents = [self._file(picture, place) for picture, place in zip(pictures, places, strict=True)]
        return Files(contents, images.shape[-1])

    def _file(self, picture: Image.Image, place: int) -> bytes:
        return file_bytes(picture, self.codec, self.quality)

    def decode(self, code: Files) -> Tensor:
        pictures = []
        for content in code.contents:
            with Image.open(io.BytesIO(content)) as image:
                picture = image.convert("RGB")
            if picture.width != code.side:
                picture = picture.resize((code.side, code.side), Image.Resampling.BICUBIC)
            pictures.append(to_pixel_values(picture))
        return torch.stack(pictures)

    def cost(self, code: Files) -> Cost:
        return Cost(None, None, {"coded": [len(content) for content in code.contents]})


class FileFormatWithin(FileFormat):
    """The same at the highest quality that stays within a number of bytes, picture by picture.

    Where even the lowest quality is too large, the picture is halved until it fits, and enlarged when it is decoded;
    encoding raises TooFewBytes where that does not help.

    Args:
        codec: "jpeg" or "webp".
        limits: bytes allowed, by the picture's place in its folder.
        of: whose bytes they are, for the name.
    """

    def __init__(self, codec: str, limits: dict[int, int], of: str):
        super().__init__(codec, QUALITIES[0])
        self.name = f"{TITLES[codec]}, bytes of {of}"
        self.limits = limits

    def _file(self, picture: Image.Image, place: int) -> bytes:
        side = picture.width
        while side >= 1:
            smaller = picture if side == picture.width else picture.resize((side, side), Image.Resampling.BICUBIC)
            if (content := largest_within(smaller, self.codec, self.limits[place])) is not None:
                return content
            side //= 2
        raise TooFewBytes(f"{self.name}: no {TITLES[self.codec]} file has only {self.limits[place]} bytes")


def file_bytes(picture: Image.Image, codec: str, quality: int) -> bytes:
    """The file of a picture."""
    buffer = io.BytesIO()
    CODECS[codec](picture, buffer, quality=quality)
    return buffer.getvalue()


def largest_within(picture: Image.Image, codec: str, limit: int) -> bytes | None:
    """The file of a quality with at most `limit` bytes where the next quality has more; None if none is that small.

    Found by bisection: where sizes do not grow with each step of quality, another such quality may exist.
    """
    low, high = QUALITIES[0] - 1, QUALITIES[1] + 1  # a quality that fits, and one that does not; both as yet untried
    best = None
    while high - low > 1:
        middle = (low + high) // 2
        content = file_bytes(picture, codec, middle)
        if len(content) <= limit:
            low, best = middle, content
        else:
            high = middle
    return best
