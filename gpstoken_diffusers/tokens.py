"""GPSTokens: the value that travels between encoder, decoder, files, pictures and generators."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor

from . import token_files
from .geometry import CENTER, GEOMETRY_CHANNELS, RHO, SIGMA, merge_tile_geometry, split_tile_geometry

__all__ = ["CENTER", "GEOMETRY_CHANNELS", "RHO", "SIGMA", "GPSTokens"]

_TEXTURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(eq=False, repr=False)
class GPSTokens:
    """A batch of images, each as N Gaussians with a texture vector.

    Shapes, dtypes and sizes are checked on construction. The numbers are not, because that would wait for the device
    at each step: `validate()` checks them, and `save` and `load` call it.

    Attributes:
        geometry: (B, N, 5) float32, (sigma_x, sigma_y, rho, x, y) in [-1, 1] coordinates of the canvas.
        texture: (B, N, C) float32, float16 or bfloat16, on the same device; C = 0 for a layout, which shows nothing.
        image_size: (height, width) in pixels of the picture that the tokens stand for.
        tile_grid: (rows, columns) of the tiles that were encoded separately. Tokens are tile-major: those of the
            first tile, then those of the next in its row, and so on; N = rows * columns * tokens_per_tile.
        canvas_size: (height, width) in pixels of the picture padded at its right and bottom to whole tiles;
            None (the default) stands for `image_size`.

    Raises:
        TypeError: a field has the wrong type or dtype.
        ValueError: shapes or sizes do not fit together.
    """

    geometry: Tensor
    texture: Tensor
    image_size: tuple[int, int]
    tile_grid: tuple[int, int] = (1, 1)
    canvas_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.image_size = _pair("image_size", self.image_size)
        self.tile_grid = _pair("tile_grid", self.tile_grid)
        canvas_size = self.image_size if self.canvas_size is None else self.canvas_size
        self.canvas_size = _pair("canvas_size", canvas_size)
        self._check_layout()

    def _check_layout(self) -> None:
        geometry, texture = self.geometry, self.texture
        for name, value in (("geometry", geometry), ("texture", texture)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
        if geometry.ndim != 3 or geometry.shape[-1] != GEOMETRY_CHANNELS:
            raise ValueError(f"geometry must have the shape (B, N, 5), not {tuple(geometry.shape)}")
        if texture.ndim != 3:
            raise ValueError(f"texture must have the shape (B, N, C), not {tuple(texture.shape)}")
        if geometry.shape[:2] != texture.shape[:2]:
            raise ValueError(
                "geometry and texture must agree in batch size and token count, "
                f"but their shapes are {tuple(geometry.shape)} and {tuple(texture.shape)}"
            )
        if geometry.dtype != torch.float32:
            raise TypeError(f"geometry must be torch.float32, not {geometry.dtype}: pass geometry.float()")
        if texture.dtype not in _TEXTURE_DTYPES:
            raise TypeError(f"texture must be float32, float16 or bfloat16, not {texture.dtype}")
        if geometry.device != texture.device:
            raise ValueError(f"geometry is on {geometry.device} but texture is on {texture.device}")
        rows, cols = self.tile_grid
        if geometry.shape[1] % (rows * cols) != 0:
            raise ValueError(f"{geometry.shape[1]} tokens do not divide evenly into {rows} x {cols} tiles")
        (height, width), (canvas_height, canvas_width) = self.image_size, self.canvas_size
        if canvas_height < height or canvas_width < width:
            raise ValueError(f"canvas_size {self.canvas_size} is smaller than image_size {self.image_size}")
        if canvas_height % rows != 0 or canvas_width % cols != 0:
            raise ValueError(f"canvas_size {self.canvas_size} is not {rows} x {cols} tiles of whole pixels")

    def validate(self) -> GPSTokens:
        """Check the numbers, and return the tokens themselves. Waits for the device once.

        A sigma of 1 or more is allowed: it is a Gaussian wider than the image, drawn like any other.

        Raises:
            ValueError: there is no image or no token, a value is NaN or infinite, sigma <= 0 or |rho| >= 1.
                The message names the first such token.
        """
        if self.batch_size == 0 or self.num_tokens == 0:
            raise ValueError(f"tokens are empty: {self.batch_size} images of {self.num_tokens} tokens each")
        geometry, texture = self.geometry.detach(), self.texture.detach()
        problems = {
            "the geometry must be finite": ~geometry.isfinite().all(-1),
            "sigma_x and sigma_y must be greater than 0": (geometry[..., SIGMA] <= 0).any(-1),
            "rho must lie strictly between -1 and 1": geometry[..., RHO].abs() >= 1,
            "the texture must be finite": ~texture.isfinite().all(-1),
        }
        found = torch.stack([mask.any() for mask in problems.values()]).tolist()
        for (rule, mask), bad in zip(problems.items(), found, strict=True):
            if bad:
                image, token = mask.nonzero()[0].tolist()
                if "texture" in rule:
                    channel = (~texture[image, token].isfinite()).nonzero()[0].item()
                    value = f"its texture channel {channel} is {texture[image, token, channel].item()}"
                else:
                    numbers = ", ".join(f"{number:g}" for number in geometry[image, token].tolist())
                    value = f"its (sigma_x, sigma_y, rho, x, y) is ({numbers})"
                raise ValueError(f"{rule}, but token {token} of image {image} breaks this: {value}")
        return self

    # Sizes

    @property
    def batch_size(self) -> int:
        """Number of images, B."""
        return self.geometry.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, all its tiles together, N."""
        return self.geometry.shape[1]

    @property
    def texture_channels(self) -> int:
        """Length of a token's texture vector, C."""
        return self.texture.shape[2]

    @property
    def is_layout(self) -> bool:
        """Whether these are Gaussians alone, without texture, as `from_geometry` makes."""
        return self.texture_channels == 0

    @property
    def tokens_per_tile(self) -> int:
        """Tokens of one tile: N / (rows * columns)."""
        return self.num_tokens // (self.tile_grid[0] * self.tile_grid[1])

    @property
    def num_floats(self) -> int:
        """Numbers that one image takes: N * (5 + C)."""
        return self.num_tokens * (GEOMETRY_CHANNELS + self.texture_channels)

    @property
    def num_bytes(self) -> int:
        """Bytes that one image takes at the dtypes held here (without the header of a file)."""
        texture_bytes = self.texture_channels * self.texture.element_size()
        return self.num_tokens * (GEOMETRY_CHANNELS * self.geometry.element_size() + texture_bytes)

    @property
    def device(self) -> torch.device:
        """Where geometry and texture are."""
        return self.geometry.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the texture; the geometry is always float32."""
        return self.texture.dtype

    def __repr__(self) -> str:
        (height, width), (rows, cols) = self.image_size, self.tile_grid
        images = "1 image" if self.batch_size == 1 else f"{self.batch_size} images"
        tiles = "" if self.tile_grid == (1, 1) else f" in {rows} x {cols} tiles"
        return (
            f"GPSTokens({images} of {height} x {width} px, {self.num_tokens} tokens{tiles}, "
            f"{self.texture_channels} texture channels in {str(self.dtype).removeprefix('torch.')}, "
            f"on {self.device}; {self.num_floats:,} floats = {self.num_bytes:,} bytes per image)"
        )

    # Moving and selecting

    def to(
        self, device: torch.device | str | int | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> GPSTokens:
        """Move to a device, and cast the texture to a dtype; `to(torch.bfloat16)` works as for tensors.

        The geometry stays float32 whatever the dtype: bfloat16 has steps of 1/256 for a centre near the edge,
        half a pixel of 256 and several pixels of a large image, and it rounds a rho of 0.999 to 1.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        texture = self.texture.to(device=device, dtype=dtype)
        return replace(self, geometry=self.geometry.to(device=device), texture=texture)

    def cpu(self) -> GPSTokens:
        """The tokens in main memory."""
        return self.to("cpu")

    def clone(self) -> GPSTokens:
        """A copy that shares no memory with this one."""
        return replace(self, geometry=self.geometry.clone(), texture=self.texture.clone())

    def detach(self) -> GPSTokens:
        """The same memory, cut from the autograd graph."""
        return replace(self, geometry=self.geometry.detach(), texture=self.texture.detach())

    def __len__(self) -> int:
        return self.batch_size

    def __getitem__(self, index: int | slice | Sequence[int] | Sequence[bool] | Tensor) -> GPSTokens:
        """Choose images: an int (the batch axis stays), a slice, a list of ints, or a mask of B booleans.

        Raises:
            IndexError: no such image, or a mask of another length.
            TypeError: an index of another kind.
        """
        if isinstance(index, Integral) and not isinstance(index, bool):
            if not -self.batch_size <= index < self.batch_size:
                raise IndexError(f"image {index} of a batch of {self.batch_size}")
            index = slice(index, index + 1 or None)
        elif isinstance(index, (Sequence, Tensor)) and not isinstance(index, str):
            index = torch.as_tensor(index, dtype=torch.long if len(index) == 0 else None, device=self.device)
            if index.ndim != 1 or index.is_floating_point():
                raise TypeError("a list of images must hold ints or booleans and have one axis")
        elif not isinstance(index, slice):
            raise TypeError(f"images are chosen by an int, slice, list or mask, not {type(index).__name__}")
        return replace(self, geometry=self.geometry[index], texture=self.texture[index])

    def __iter__(self) -> Iterator[GPSTokens]:
        """The images one by one, each a batch of one."""
        return (self[image] for image in range(self.batch_size))

    @classmethod
    def concatenate(cls, parts: Sequence[GPSTokens]) -> GPSTokens:
        """Join batches; all must agree in everything but the batch size.

        Raises:
            ValueError: no parts, or parts that differ (the message says in what).
        """
        parts = list(parts)
        if not parts:
            raise ValueError("there is nothing to concatenate: the list of GPSTokens is empty")
        sizes = ("num_tokens", "texture_channels", "image_size", "tile_grid", "canvas_size")
        for position, part in enumerate(parts):
            for name in (*sizes, "dtype", "device"):
                ours, theirs = getattr(parts[0], name), getattr(part, name)
                if ours != theirs:
                    raise ValueError(f"parts 0 and {position} differ in {name}: {ours} and {theirs}")
        geometry = torch.cat([part.geometry for part in parts])
        return replace(parts[0], geometry=geometry, texture=torch.cat([part.texture for part in parts]))

    # One tensor, and tiles

    def as_tensor(self) -> Tensor:
        """(B, N, 5 + C) float32: sigma_x, sigma_y, rho, x, y, then the texture (the checkpoints' order)."""
        return torch.cat([self.geometry, self.texture.float()], dim=-1)

    @classmethod
    def from_tensor(
        cls,
        tensor: Tensor,
        image_size: tuple[int, int],
        tile_grid: tuple[int, int] = (1, 1),
        canvas_size: tuple[int, int] | None = None,
    ) -> GPSTokens:
        """Undoes `as_tensor`. `tensor` is (B, N, 5 + C), C >= 1; the texture keeps its dtype.

        Raises:
            ValueError: another shape, or sizes that do not fit.
        """
        if tensor.ndim != 3 or tensor.shape[-1] <= GEOMETRY_CHANNELS:
            raise ValueError(f"tokens must have the shape (B, N, 5 + C), C >= 1, not {tuple(tensor.shape)}")
        geometry, texture = tensor[..., :GEOMETRY_CHANNELS].float(), tensor[..., GEOMETRY_CHANNELS:]
        return cls(geometry, texture, image_size, tile_grid, canvas_size)

    @classmethod
    def from_geometry(
        cls,
        geometry: Tensor,
        image_size: tuple[int, int],
        tile_grid: tuple[int, int] = (1, 1),
        canvas_size: tuple[int, int] | None = None,
    ) -> GPSTokens:
        """A layout: Gaussians (B, N, 5) without texture (C = 0), so that no decoder takes it.

        It is cut into tiles, drawn, edited and saved as all tokens are. Raises as the constructor does.
        """
        return cls(geometry, geometry.new_empty((*geometry.shape[:2], 0)), image_size, tile_grid, canvas_size)

    @classmethod
    def merge_tiles(
        cls,
        geometry: Tensor,
        texture: Tensor,
        tile_grid: tuple[int, int],
        image_size: tuple[int, int],
        canvas_size: tuple[int, int] | None = None,
    ) -> GPSTokens:
        """Join the tokens of tiles, each in its own [-1, 1] coordinates, into tokens of whole images.

        See `geometry.merge_tile_geometry` for the formula.

        Args:
            geometry: (B * rows * columns, n, 5) float32; the image is the outermost index, then row, column.
            texture: (B * rows * columns, n, C).
            tile_grid: (rows, columns).
            image_size: (height, width) in pixels of the picture.
            canvas_size: (height, width) in pixels of all tiles together; None when nothing was padded.

        Raises:
            ValueError: the number of tiles is not a multiple of rows * columns, or sizes do not fit.
        """
        merged = merge_tile_geometry(geometry, tile_grid)
        texture = texture.unflatten(0, (-1, tile_grid[0] * tile_grid[1])).flatten(1, 2)
        return cls(merged, texture, image_size, tile_grid, canvas_size)

    def with_tiles(self, geometry: Tensor, texture: Tensor) -> GPSTokens:
        """`merge_tiles` into pictures of the sizes and tiles of these."""
        return self.merge_tiles(geometry, texture, self.tile_grid, self.image_size, self.canvas_size)

    def split_tiles(self) -> tuple[Tensor, Tensor]:
        """Undo `merge_tiles`, up to rounding.

        Returns:
            geometry (B * T, n, 5) in each tile's own coordinates, texture (B * T, n, C); T = rows * columns.
        """
        num_tiles = self.tile_grid[0] * self.tile_grid[1]
        geometry = split_tile_geometry(self.geometry, self.tile_grid)
        return geometry, self.texture.unflatten(1, (num_tiles, -1)).flatten(0, 1)

    # Files

    def save(
        self, path: str | os.PathLike, metadata: Mapping[str, str] | None = None, dtype: str | None = None
    ) -> None:
        """Write a safetensors file: the numbers, and a header that says what they are.

        The file appears whole or not at all; one that was there before survives a failure.

        Args:
            path: where to write; its folder must exist.
            metadata: more strings for the header, such as the model's name; `read_metadata` gives them back.
            dtype: None keeps every bit; "float32" and "float16" cast the texture; "uint8" stores all numbers with
                about 8 bits, compressed, as `token_files` describes.

        Raises:
            ValueError: `validate()` fails, a metadata key is one of the header's own, there is no such `dtype`,
                float16 cannot hold the texture, or a token lies millions of its own sizes away.
            TypeError: metadata that is not strings.
            OSError: the file cannot be written.
        """
        token_files.save_tokens(self, path, metadata, dtype)

    @classmethod
    def load(cls, path: str | os.PathLike) -> GPSTokens:
        """Read a file of `save`, onto the CPU. Nothing in it is ever executed.

        The texture has the dtype that it was stored in, and float32 where it was stored with fewer bits.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is empty, truncated, of another kind, of a later version, or holds impossible
                values; the message says which, and what to do.
        """
        return token_files.load_tokens(path, cls)

    @staticmethod
    def read_metadata(path: str | os.PathLike) -> dict[str, str]:
        """The header of a file, with the `metadata` and the `encoding` of `save`. Raises as `load` does."""
        return token_files.read_metadata(path)


def _pair(name: str, value: Sequence[int]) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or [isinstance(size, Integral) for size in value] != [True, True]:
        raise TypeError(f"{name} must be two ints (height, width or rows, columns), not {value!r}")
    if min(value) < 1:
        raise ValueError(f"{name} must be at least 1 along both axes, not {tuple(value)}")
    return (int(value[0]), int(value[1]))  # Python's own, as JSON takes no others
