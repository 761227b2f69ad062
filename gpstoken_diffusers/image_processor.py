"""Pictures of any kind -> what the autoencoder takes, and the way back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.image_processing_base import BatchFeature, ImageProcessingMixin

from .geometry import merge_tile_geometry
from .layouts.of_pictures import partition_tiles
from .layouts.requested import layout_from_mask
from .picture_files import check_background, mask_levels, read_picture, upright_rgb
from .tiling import cut_tiles, pad_to_tiles, seen_sizes, tile_grid_for
from .tokens import GPSTokens

if TYPE_CHECKING:
    from typing_extensions import Self

ImageLike = Image.Image | np.ndarray | Tensor

__all__ = ["GPSTokenImageProcessor", "upright_rgb"]


class GPSTokenImageProcessorSettings(TypedDict, total=False):
    """What `from_pretrained(folder, name=value)` may override."""

    shortest_edge: int | None
    center_crop: bool
    tile_size: int
    num_tokens: int
    min_region_size: int
    partition_criterion: str
    entropy_exponent: float
    background: tuple[int, int, int]


class GPSTokenImageProcessor(ImageProcessingMixin):
    """Makes pixel values in [-1, 1], regions and initial Gaussians from pictures, and pictures from pixel values.

    Args:
        shortest_edge: scale pictures so that their shorter side has this many pixels; None keeps their size.
        center_crop: cut pictures to their centre square (after scaling).
        tile_size: side in pixels of the tiles that larger pictures are cut into; the autoencoder's `sample_size`.
        num_tokens: tokens per tile.
        min_region_size, partition_criterion, entropy_exponent: the partition's settings, see [`partition_image`].
        background: RGB in 0..255 that transparent pixels are laid on.
    """

    model_input_names = ["pixel_values", "regions", "geometry"]
    valid_kwargs = GPSTokenImageProcessorSettings

    def __init__(
        self,
        shortest_edge: int | None = None,
        center_crop: bool = False,
        tile_size: int = 256,
        num_tokens: int = 256,
        min_region_size: int = 8,
        entropy_exponent: float = 2.5,
        background: Sequence[int] = (255, 255, 255),
        partition_criterion: str = "entropy",
        **kwargs: Any,
    ):
        # transformers adds entries of its own to the saved file; the base class knows which to keep.
        kwargs.pop("image_processor_type", None)
        super().__init__(**kwargs)
        for name, value in (("tile_size", tile_size), ("num_tokens", num_tokens), ("shortest_edge", shortest_edge)):
            if value is not None and (not _is_integer(value) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        check_background(background)
        # Python's own numbers, as JSON takes no others.
        self.shortest_edge, self.center_crop = None if shortest_edge is None else int(shortest_edge), center_crop
        self.tile_size, self.num_tokens, self.background = int(tile_size), int(num_tokens), [int(v) for v in background]
        self.min_region_size, self.entropy_exponent = min_region_size, entropy_exponent
        self.partition_criterion = partition_criterion

    @classmethod
    def for_autoencoder(cls, config: Any, **overrides: Any) -> Self:
        """The processor that goes with an autoencoder's configuration; `overrides` are arguments of the constructor."""
        settings = {
            "tile_size": config.sample_size,
            "num_tokens": config.num_tokens,
            "min_region_size": config.min_region_size,
            "entropy_exponent": config.entropy_exponent,
            "partition_criterion": config.partition_criterion,
        }
        return cls(**settings | overrides)

    # ------------------------------------------------------------------ pictures to tensors

    def __call__(self, images: ImageLike | Sequence[ImageLike], **kwargs: Any) -> BatchFeature:
        """Same as [`preprocess`]."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        num_tokens: int | None = None,
        importance: ImageLike | Sequence[ImageLike] | None = None,
        importance_strength: float = 1.0,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prepares a batch for `AutoencoderGPSToken.encode(**features)`.

        Args:
            images: one picture or several, all of one size in the end: PIL images of any mode; numpy arrays (H, W),
                (H, W, 1|3|4) or (B, H, W, C), uint8 or floats in [0, 1]; tensors (H, W), (1|3|4, H, W) or
                (B, C, H, W), uint8 or floats in [0, 1].
            num_tokens: tokens per tile; None takes the processor's number.
            importance: for each picture (or one for all) a map of the picture's size that draws tokens to where it is
                bright: a PIL image of any mode, as [`mask_levels`] takes it, or gray or booleans in an array.
            importance_strength: how strongly, see [`partition_image`].
            return_tensors: as in transformers; "pt" alone is there.

        Returns: `pixel_values` (B, 3, H, W) float32 in [-1, 1]; `regions` (B tiles, n, 4) int32 inclusive pixel indices
        within each tile; `geometry` (B tiles, n, 5) float32 initial Gaussians. Tiles of an image follow each other row
        by row.

        Raises:
            TypeError: a picture of another type or dtype.
            ValueError: empty pictures, pictures of several sizes, values outside [0, 1], NaN, a map of another size
                than its picture, or more tokens than a tile has regions.
        """
        if return_tensors != "pt":
            raise ValueError(f'return_tensors must be "pt", got {return_tensors!r}: there are PyTorch tensors only.')
        images = _as_list(images)
        if not images:
            raise ValueError("There is no image to process: the list is empty.")
        pixels = [_to_pixel_values(image, self.background) for image in images]
        pixel_values = self._fit_and_stack(pixels, "images").clamp_(-1, 1)  # in place: the memory is ours
        weights = None
        if importance is not None:
            maps = [_to_importance(image) for image in _as_list(importance)]
            maps = maps * len(pixels) if len(maps) == 1 else maps
            if len(maps) != len(pixels):
                raise ValueError(f"There are {len(pixels)} images but {len(maps)} importance maps.")
            for picture, weight in zip(pixels, maps, strict=True):
                if picture.shape[-2:] != weight.shape[-2:]:
                    raise ValueError(
                        "An importance map must have its image's size: the image has (height, width) "
                        f"{tuple(picture.shape[-2:])}, the map {tuple(weight.shape[-2:])}."
                    )
            weights = self._fit_and_stack(maps, "importance maps").clamp(0, 1)
        regions, geometry = partition_tiles(
            pixel_values,
            self.tile_size,
            self.num_tokens if num_tokens is None else num_tokens,
            min_region_size=self.min_region_size,
            criterion=self.partition_criterion,
            entropy_exponent=self.entropy_exponent,
            importance=weights,
            importance_strength=importance_strength,
        )
        return BatchFeature({"pixel_values": pixel_values, "regions": regions, "geometry": geometry})

    def layout(self, images: ImageLike | Sequence[ImageLike], **kwargs: Any) -> GPSTokens:
        """The initial Gaussians of pictures, without texture, in coordinates of the whole picture.

        Arguments and errors as in [`preprocess`].
        """
        features = self(images, **kwargs)
        return self._merged(features["geometry"], tuple(features["pixel_values"].shape[-2:]))

    def layout_from_mask(
        self, masks: ImageLike | Sequence[ImageLike], num_tokens: int | None = None, strength: float = 8.0
    ) -> GPSTokens:
        """Layouts without a picture: tokens where masks are bright, see [`layout_from_mask`].

        Args:
            masks: as `importance` of [`preprocess`].
            num_tokens: tokens per tile; None takes the processor's number.
            strength: density on the mask over density elsewhere, less one.
        """
        planes = self._fit_and_stack([_to_importance(mask) for mask in _as_list(masks)], "masks").clamp(0, 1)
        size = tuple(planes.shape[-2:])
        tiles = cut_tiles(pad_to_tiles(planes, self.tile_size), tile_grid_for(*size, self.tile_size))[:, 0]
        count = self.num_tokens if num_tokens is None else num_tokens
        partition = layout_from_mask(
            tiles,
            count,
            strength=strength,
            min_region_size=self.min_region_size,
            seen=seen_sizes(len(planes), *size, self.tile_size),
        )
        return self._merged(partition.geometry, size)

    def _merged(self, geometry: Tensor, size: tuple[int, int]) -> GPSTokens:
        grid = tile_grid_for(*size, self.tile_size)
        canvas = (grid[0] * self.tile_size, grid[1] * self.tile_size)
        return GPSTokens.from_geometry(merge_tile_geometry(geometry, grid), size, grid, canvas)

    @staticmethod
    def load_image(path: str | os.PathLike, background: Sequence[int] = (255, 255, 255)) -> Image.Image:
        """Reads an image file as [`upright_rgb`] makes it: upright, in sRGB, transparency laid on `background`.

        Of several frames or pages it reads the first.

        Raises:
            FileNotFoundError: no such file.
            ValueError: an empty file, one that is no image in a raster format, or a damaged one.
            OSError: the system cannot read the file.
        """
        check_background(background)  # before the file, whose fault it is not
        return read_picture(path, str(path), lambda image: upright_rgb(image, background))

    @staticmethod
    def load_mask(path: str | os.PathLike) -> np.ndarray:
        """Reads an image file as a mask, (H, W) float32 in [0, 1], by [`mask_levels`]. Raises as [`load_image`]."""
        return read_picture(path, str(path), mask_levels)

    def _fit_and_stack(self, pictures: list[Tensor], what: str) -> Tensor:
        """Applies the resize and crop policy: (C, H, W) each -> (B, C, H', W')."""
        fitted = []
        for picture in pictures:
            if self.shortest_edge is not None and self.center_crop:
                # Nobody sees the far ends of a thin strip, and at the height of a tile they would fill the memory.
                height, width = picture.shape[-2:]
                top, left = (max(0, (side - _STRIP * min(height, width)) // 2) for side in (height, width))
                picture = picture[:, top : height - top, left : width - left]
            height, width = picture.shape[-2:]
            if self.shortest_edge is not None and min(height, width) != self.shortest_edge:
                scale = self.shortest_edge / min(height, width)
                height, width = max(1, round(height * scale)), max(1, round(width * scale))
                picture = F.interpolate(picture[None], size=(height, width), mode="bicubic", antialias=True)[0]
            if self.center_crop:
                side = min(height, width)
                top, left = (height - side) // 2, (width - side) // 2
                picture = picture[:, top : top + side, left : left + side]
            fitted.append(picture)
        sizes = {tuple(picture.shape[-2:]) for picture in fitted}
        if len(sizes) > 1:
            raise ValueError(
                f"The {what} of a batch must come out at one size, got (height, width) {sorted(sizes)}. Process them "
                "one by one, or set shortest_edge and center_crop."
            )
        return torch.stack(fitted) if len(fitted) > 1 else fitted[0][None].contiguous()

    # ------------------------------------------------------------------ tensors to pictures

    def postprocess(self, sample: Tensor, output_type: str = "pil") -> list[Image.Image] | np.ndarray | Tensor:
        """Decoded pixel values to pictures.

        Args:
            sample: (B, 3, H, W) around [-1, 1]; what lies outside is clamped.
            output_type: "pil" (a list of RGB pictures, rounded to 8 bits), "np" ((B, H, W, 3) float32 in [0, 1]) or
                "pt" ((B, 3, H, W) float32 in [0, 1]).

        Raises ValueError: another shape or output type, or NaN.
        """
        if sample.ndim != 4 or sample.shape[1] != 3:
            raise ValueError(f"sample must have the shape (B, 3, H, W), got {tuple(sample.shape)}.")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f'output_type must be "pil", "np" or "pt", got {output_type!r}.')
        if output_type == "pil":
            return [self._eight_bit(picture) for picture in sample.detach()]
        unit = _unit_values(sample.detach())
        return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).numpy()

    @staticmethod
    def _eight_bit(picture: Tensor) -> Image.Image:
        """(3, H, W) around [-1, 1] to an RGB picture, some rows at a time."""
        array = np.empty((*picture.shape[1:], 3), dtype=np.uint8)
        for top in range(0, len(array), _ROWS_AT_ONCE):
            rows = slice(top, top + _ROWS_AT_ONCE)
            array[rows] = (_unit_values(picture[:, rows]).permute(1, 2, 0).numpy() * 255).round()
        return Image.fromarray(array)


def _unit_values(sample: Tensor) -> Tensor:
    """Values around [-1, 1] in [0, 1], float32 on the CPU. Raises ValueError for NaN."""
    unit = (sample.float().cpu() / 2 + 0.5).clamp(0, 1)
    if unit.isnan().any():
        raise ValueError("The decoded image holds NaN. In float16, try bfloat16 or float32 instead.")
    return unit


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    if isinstance(images, (np.ndarray, Tensor)):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
        return list(images)
    raise TypeError(f"images must be PIL images, numpy arrays or tensors, got {type(images).__name__}.")


def _check_kind(image: ImageLike) -> None:
    if not isinstance(image, (Image.Image, np.ndarray, Tensor)):
        raise TypeError(f"An image must be a PIL image, a numpy array or a tensor, got {type(image).__name__}.")
    shape = image.size[::-1] if isinstance(image, Image.Image) else tuple(image.shape)
    if 0 in shape:
        raise ValueError(f"An image must have at least one pixel, got the shape {shape}.")


def _planes(image: np.ndarray | Tensor) -> Tensor:
    """An array (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W), as (C, H, W) on the CPU."""
    values = image.detach().cpu() if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    if values.ndim == 2:
        return values[None]
    if values.ndim == 3 and not isinstance(image, Tensor):
        values = values.permute(2, 0, 1)
    if values.ndim != 3 or values.shape[0] not in (1, 3, 4):
        raise ValueError(
            "An array must have the shape (H, W) or (H, W, 1|3|4), a tensor (H, W) or (1|3|4, H, W), got "
            f"{tuple(image.shape)}."
        )
    return values


def _check_unit_floats(values: Tensor, what: str) -> None:
    if not values.is_floating_point():
        raise TypeError(f"{what} must be uint8 in 0..255 or floats in [0, 1], got {values.dtype}.")
    if values.isnan().any():
        raise ValueError(f"Float {what} must lie in [0, 1] without NaN, got NaN.")
    if not bool(((values >= 0) & (values <= 1)).all()):
        # Every digit: 1.0000001 is not 1.
        low, high = values.min().item(), values.max().item()
        raise ValueError(f"Float {what} must lie in [0, 1] without NaN, got {low!r} to {high!r}.")


# Rows of a large picture to convert at once, so that intermediate values do not exist for all of it.
_ROWS_AT_ONCE = 256

# Sides of its centre square that are scaled of a long picture: enough that the square comes out the same.
_STRIP = 8

# v / 127.5 - 1 of all 8-bit values v, rounded once.
_VALUE_OF_BYTE = (np.arange(256) / 127.5 - 1).astype(np.float32)


def _to_pixel_values(image: ImageLike, background: Sequence[int]) -> Tensor:
    """Any picture as (3, H, W) float32 in [-1, 1]; 8-bit values v become v / 127.5 - 1, rounded once."""
    _check_kind(image)
    if not isinstance(image, Image.Image):
        values = _planes(image)
        if values.dtype != torch.uint8:
            _check_unit_floats(values, "pixels")
            values = values.float()
            if values.shape[0] == 4:
                color = torch.tensor(background, dtype=torch.float32)[:, None, None] / 255
                values = values[:3] * values[3:] + color * (1 - values[3:])
            return values.expand(3, -1, -1) * 2 - 1
        array = values.permute(1, 2, 0).numpy()
        image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    array = np.asarray(upright_rgb(image, background))
    planes = np.empty((3, *array.shape[:2]), dtype=np.float32)
    for top in range(0, len(array), _ROWS_AT_ONCE):
        rows = slice(top, top + _ROWS_AT_ONCE)
        planes[:, rows] = _VALUE_OF_BYTE[array[rows]].transpose(2, 0, 1)
    return torch.from_numpy(planes)


def _to_importance(image: ImageLike) -> Tensor:
    """A gray picture, an array or a tensor as a map (1, H, W) float32 in [0, 1]."""
    _check_kind(image)
    if isinstance(image, Image.Image):
        image = mask_levels(image)
    values = _planes(image)
    if values.shape[0] != 1:
        raise ValueError(f"An importance map has one channel, got {values.shape[0]}.")
    if values.dtype == torch.uint8:
        return values.float() / 255
    if values.dtype == torch.bool:
        return values.float()
    _check_unit_floats(values, "importance")
    return values.float()
