"""AutoencoderGPSToken: pictures to Gaussians with texture, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from ..geometry import GEOMETRY_CHANNELS
from ..layouts.of_pictures import partition_tiles
from ..ops.partition import initial_gaussians
from ..tiling import take_tiles, tile_grid_for
from ..tokens import GPSTokens
from . import official_checkpoints
from .canvas import Progress, checked_size, cut_picture, drawn_scale
from .lattice_decoder import LatticeDecoder
from .loading import SingleFileLoadingMixin
from .map_decoder import MapDecoder
from .patch_decoder import PatchDecoder
from .polish import polish_tiles
from .refinement import GaussianRefiner
from .stem import ImageStem
from .windows import Size
from .work_plan import WorkPlan, parse_memory


@dataclass
class AutoencoderGPSTokenOutput(BaseOutput):
    """What encoding gives.

    Attributes:
        tokens: the refined Gaussians with their texture, in whole-image coordinates.
        initial_tokens: the Gaussians of the partition before refinement, with the same texture.
        regions: (B tiles, n, 4) int32, each token's region as inclusive pixel indices x0, y0, x1, y1 of its tile.
    """

    tokens: GPSTokens
    initial_tokens: GPSTokens
    regions: Tensor


class AutoencoderGPSToken(
    SingleFileLoadingMixin, ModelMixin, AttentionMixin, AutoencoderMixin, ConfigMixin, PeftAdapterMixin
):
    r"""The GPSToken autoencoder (arXiv 2509.01109): an image becomes N Gaussians with a texture vector each.

    A greedy entropy-driven partition places the Gaussians, a transformer refines them and reads their texture, a
    splatting renderer paints them onto a feature map, a convolutional decoder makes the picture. Images larger than
    `sample_size` are cut into tiles whose tokens merge into one set; other sizes are padded and cropped back.
    Large images are processed piece by piece; `set_memory_budget("1GB")` limits the memory that this takes.

    Args:
        in_channels, out_channels: image channels.
        sample_size: side of a tile, in pixels.
        num_tokens: tokens per tile unless a call says otherwise.
        texture_channels: numbers of texture per token.
        support: reach of a Gaussian when splatted, in sigmas (the checkpoints use 3, the paper writes 5).
        min_region_size, partition_criterion, entropy_exponent: the partition's settings, see [`partition_image`].
        stem_channels, stem_patch_size, stem_num_layers: see [`ImageStem`].
        roi_size: RoIAlign cells per region along each axis.
        region_pixels: side of the small picture of each region that goes straight into its texture; 0 for none.
        region_reading: how the transformer reads the cells, "pool" or "flatten", see [`GaussianRefiner`].
        hidden_size, num_layers, num_attention_heads: the refinement transformer.
        map_size: side of a tile's feature map, in map pixels.
        decoder_type: "map" splats texture and decodes the map as the released checkpoints do ([`MapDecoder`]);
            "lattice" is strictly local and small ([`LatticeDecoder`]); "patch" is so too, and paints a small picture
            for each token at full resolution ([`PatchDecoder`]).
        decoder_block_out_channels: decoder widths, finest resolution first.
        decoder_num_layers: decoder residual blocks per resolution.
        lattice_size, lattice_channels: see [`LatticeDecoder`]; not for `decoder_type="map"`.
        decode_mode: how images of several tiles are decoded by default, "merge" (as one picture, no seams) or "tile"
            (each tile by itself, exactly as it was encoded). The release decodes L256 by tile, S64 and M128 merged.
            The local ones always merge.

    Precision: in bfloat16 or float16, the Gaussians, the geometry head and its residuals, RoIAlign, the splat's
    accumulation and the normalisation statistics stay float32. A centre in bfloat16 is off by up to a pixel, and sums
    over many Gaussians lose detail that the decoder needs. Texture and all convolutions follow the model's dtype.
    """

    _official = official_checkpoints.AUTOENCODER
    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["geometry_head"]
    _group_offload_block_modules = ["stem", "refiner", "decoder"]
    _no_split_modules = ["RefinementBlock", "DecoderBlock", "StemBlock", "LocalBlock"]
    _repeated_blocks = ["RefinementBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        sample_size: int = 256,
        num_tokens: int = 256,
        texture_channels: int = 32,
        support: float = 3.0,
        min_region_size: int = 8,
        entropy_exponent: float = 2.5,
        stem_channels: int = 128,
        stem_patch_size: int = 1,
        stem_num_layers: int = 2,
        roi_size: int = 8,
        region_reading: str = "pool",
        hidden_size: int = 512,
        num_layers: int = 30,
        num_attention_heads: int = 8,
        map_size: int = 64,
        decoder_type: str = "map",
        decoder_block_out_channels: tuple[int, ...] = (128, 256, 512),
        decoder_num_layers: int = 3,
        lattice_size: int = 4,
        lattice_channels: int = 32,
        decode_mode: str = "tile",
        region_pixels: int = 0,
        partition_criterion: str = "entropy",
    ):
        super().__init__()
        if decode_mode not in ("merge", "tile"):
            raise ValueError(f'decode_mode must be "merge" or "tile", got {decode_mode!r}.')
        if sample_size % map_size:
            raise ValueError(f"sample_size must be a multiple of map_size, got {sample_size} and {map_size}.")
        self.stem = ImageStem(in_channels, stem_channels, stem_patch_size, stem_num_layers)
        transformer = (hidden_size, num_layers, num_attention_heads)
        self.refiner = GaussianRefiner(
            stem_channels,
            *transformer,
            texture_channels,
            roi_size,
            region_reading,
            stem_patch_size,
            region_pixels,
            in_channels,
        )
        widths, upscale = tuple(decoder_block_out_channels), sample_size // map_size
        sizes = (texture_channels, out_channels, widths, decoder_num_layers, map_size, upscale, support)
        if decoder_type == "map":
            self.decoder = MapDecoder(*sizes)
        elif decoder_type == "lattice":
            self.decoder = LatticeDecoder(*sizes, lattice_size, lattice_channels)
        elif decoder_type == "patch":
            self.decoder = PatchDecoder(*sizes, lattice_size, lattice_channels)
        else:
            raise ValueError(f'decoder_type must be "map", "lattice" or "patch", got {decoder_type!r}.')
        self.use_slicing = self.use_tiling = self.is_compiled = False
        self._memory_budget: int | None = None

    def compile(self, *args, **kwargs) -> None:
        """Compiles the three networks in place, for `encode`, `decode` and `forward`; their weights keep their names.

        The first call with pictures of another size or another number of tokens takes some seconds to a minute. The
        windows in which a lattice decoder draws large pictures are not compiled.

        Args: as of `torch.compile`. `mode="reduce-overhead"` records CUDA graphs.
        """
        for network in (self.stem, self.refiner, self.decoder):
            network.compile(*args, **kwargs)
        self.is_compiled = True

    @property
    def partition_settings(self) -> dict[str, float | str]:
        """What [`partition_image`] is to be told beside the number of tokens."""
        config = self.config
        return {
            "min_region_size": config.min_region_size,
            "criterion": config.partition_criterion,
            "entropy_exponent": config.entropy_exponent,
        }

    @property
    def memory_budget(self) -> int | None:
        """Bytes that encoding and decoding may work in; None is no budget. See [`set_memory_budget`]."""
        return self._memory_budget

    def set_memory_budget(self, budget: int | str | None) -> None:
        """Sets how much memory `encode` and `decode` may work in, whatever the size of a picture.

        What counts is what they need beside the weights, their input, and their result (tokens, or the sample and the
        canvas that it is cut from). The budget decides how many tiles pass through the networks at once and how large
        the windows of a large picture are ([`WorkPlan`]). It holds for this object, and is not saved.

        Small windows are slower, because more around them is computed twice. Results stay the same up to rounding, with
        one exception: a "map" decoder in mode "merge" normalises over a window at its end, and windows are smaller
        where the budget has no room for the usual ones.

        It is an estimate for inference with the native libraries, on the high side. Gradients keep all activations,
        the PyTorch reference of the splat takes some 200 MB more, and so may the workspaces of cuDNN. A picture decoded
        at another size whose canvas has to be resampled (see `decode`) is held once more, and in float32.

        Args:
            budget: bytes, or text such as "800MB", "1.5GB" or "1GiB"; None, as at the start, takes no more than four
                tiles of a large picture at once, and all pictures of a batch of one tile each.

        Raises:
            TypeError: neither an int nor text nor None.
            ValueError: text that is no size, or less than this model needs; the message says the least that works.
                `encode` and `decode` raise it as well, for a call that needs more (more tokens, a larger picture).
        """
        if budget is not None:
            budget = parse_memory(budget)
            plan = replace(self.work_plan, budget=budget)
            least = max(plan.encoding_bytes(1, self.config.num_tokens), self.decoder.least_bytes(plan))
            plan.check_room(least, "this model")
        self._memory_budget = budget

    @property
    def work_plan(self) -> WorkPlan:
        """How `encode` and `decode` divide their work, by the present budget, dtype and `enable_slicing`."""
        return WorkPlan(self.config, self.dtype, self._memory_budget, self.use_slicing)

    def _lasting(self, result: Tensor) -> Tensor:
        """A network's result in memory of its own: a CUDA graph overwrites its last result."""
        return result.clone() if self.is_compiled else result

    @apply_forward_hook
    def encode(
        self,
        pixel_values: Tensor,
        geometry: Tensor | None = None,
        regions: Tensor | None = None,
        *,
        num_tokens: int | None = None,
        importance: Tensor | None = None,
        importance_strength: float = 1.0,
        polish_steps: int = 0,
        progress: Progress | None = None,
        return_dict: bool = True,
    ) -> AutoencoderGPSTokenOutput | tuple[GPSTokens]:
        """Turns images into tokens.

        Args:
            pixel_values: (B, in_channels, H, W) in [-1, 1], any H and W that the partition can split.
            geometry: (B tiles, n, 5) initial Gaussians of each tile, image outermost, then row, then column; None
                derives them from the regions.
            regions: (B tiles, n, 4) inclusive pixel indices x0, y0, x1, y1 within each tile, as the partition gives
                them; None computes the partition.
            num_tokens: tokens per tile; None takes the configured number. Only where regions are None.
            importance: (H, W) or (B, H, W) map in [0, 1] that draws tokens to where it is high; only where regions are
                None.
            importance_strength: how strongly, see [`partition_image`].
            polish_steps: how often the tokens of each tile, geometry and texture, are moved along the gradient of the
                decoded tile's squared error, after encoding. A step takes as long as two to three decodings, and
                memory for gradients, one tile at a time, that a budget does not know of. 0 leaves the tokens alone.
            progress: called with the share of the tiles that is done, above 0 and at most 1, after each few of them,
                or with that of the polishing, after each step; what it raises ends the call.
            return_dict: whether to return an [`AutoencoderGPSTokenOutput`] or a tuple.

        Raises:
            ValueError: another shape, no image, NaN pixels, regions that do not fit the image, more tokens than an
                image of this size has regions, steps below 0, or a memory budget that is too small.
        """
        config = self.config
        if polish_steps < 0:
            raise ValueError(f"polish_steps must be at least 0, got {polish_steps}.")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != config.in_channels:
            raise ValueError(
                f"pixel_values must have the shape (B, {config.in_channels}, H, W), got {tuple(pixel_values.shape)}."
            )
        if len(pixel_values) == 0:
            raise ValueError(f"pixel_values hold no image: their shape is {tuple(pixel_values.shape)}.")
        if not pixel_values.is_floating_point():
            raise TypeError(
                f"pixel_values must be floating point in [-1, 1], got {pixel_values.dtype}. "
                "GPSTokenImageProcessor makes them from pictures."
            )
        image_size = tuple(pixel_values.shape[-2:])
        tile_grid = tile_grid_for(*image_size, config.sample_size)
        if importance is not None and importance.shape[-2:] != image_size:
            raise ValueError(
                f"importance must have the images' height and width {image_size}, got {tuple(importance.shape)}."
            )
        if regions is None:
            if geometry is not None:
                raise ValueError("Initial Gaussians need the regions they came from: give both or neither.")
            regions, geometry = self._partition(pixel_values, num_tokens, importance, importance_strength)
        else:
            if num_tokens is not None or importance is not None:
                raise ValueError("num_tokens and importance choose a partition, but regions were given.")
            count = len(pixel_values) * tile_grid[0] * tile_grid[1]
            regions, geometry = self._check_partition(regions, geometry, count, pixel_values.device)

        shown = None if polish_steps else progress
        refined, texture = self._refine(pixel_values, geometry, regions, tile_grid, shown)
        if polish_steps:
            refined, texture = self._polish(pixel_values, refined, texture, polish_steps, progress)
        canvas_size = (tile_grid[0] * config.sample_size, tile_grid[1] * config.sample_size)
        tokens = GPSTokens.merge_tiles(refined, texture, tile_grid, image_size, canvas_size)
        if not return_dict:
            return (tokens,)
        initial_tokens = GPSTokens.merge_tiles(geometry, texture, tile_grid, image_size, canvas_size)
        return AutoencoderGPSTokenOutput(tokens=tokens, initial_tokens=initial_tokens, regions=regions)

    def _refine(
        self,
        pixel_values: Tensor,
        geometry: Tensor,
        regions: Tensor,
        tile_grid: tuple[int, int],
        progress: Progress | None,
    ) -> tuple[Tensor, Tensor]:
        """Geometry (B tiles, n, 5) and texture (B tiles, n, C): some tiles at a time through stem and transformer."""
        count, plan = len(regions), self.work_plan
        step = plan.encoding_tiles(count, tile_grid, regions.shape[1])
        refined = texture = None
        for start in range(0, max(1, count), step):
            chunk = slice(start, start + step)
            tiles = take_tiles(pixel_values, self.config.sample_size, chunk)
            features = self._lasting(self.stem(tiles.to(plan.dtype, memory_format=torch.channels_last)))
            seen = (tiles.to(plan.dtype),) if self.config.region_pixels else ()
            outputs = tuple(map(self._lasting, self.refiner(features, geometry[chunk], regions[chunk], *seen)))
            if progress is not None:
                progress(min(1.0, (start + step) / max(1, count)))
            if step >= count:
                return outputs
            if refined is None:
                refined, texture = (part.new_empty(count, *part.shape[1:]) for part in outputs)
            refined[chunk], texture[chunk] = outputs
        return refined, texture

    def _polish(
        self, pixel_values: Tensor, geometry: Tensor, texture: Tensor, steps: int, progress: Progress | None
    ) -> tuple[Tensor, Tensor]:
        """Geometry and texture of tiles, moved as `encode` says."""
        side, count = self.config.sample_size, len(geometry)
        polished = []

        def decode(geometry: Tensor, texture: Tensor) -> Tensor:
            return self.decode(GPSTokens(geometry, texture, (side, side)), mode="tile").sample

        def after_step(step: int) -> None:
            if progress is not None:
                progress((len(polished) * steps + step) / (count * steps))

        for tile in range(count):
            own = slice(tile, tile + 1)
            target = take_tiles(pixel_values, side, own)
            polished.append(polish_tiles(decode, target, geometry[own], texture[own], steps, after_step))
        return tuple(torch.cat(parts) for parts in zip(*polished, strict=True))

    def _partition(
        self, pixel_values: Tensor, num_tokens: int | None, importance: Tensor | None, importance_strength: float
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        if importance is not None:
            maps = importance.to(pixel_values.device).reshape(-1, 1, *importance.shape[-2:])
            importance = maps.expand(len(pixel_values), -1, -1, -1)
        return partition_tiles(
            pixel_values,
            config.sample_size,
            config.num_tokens if num_tokens is None else num_tokens,
            **self.partition_settings,
            importance=importance,
            importance_strength=importance_strength,
            tiles_at_once=self.work_plan.partition_tiles(),
        )

    def _check_partition(
        self, regions: Tensor, geometry: Tensor | None, count: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        if regions.ndim != 3 or regions.shape[-1] != 4 or len(regions) != count or regions.shape[1] == 0:
            raise ValueError(
                f"regions must have the shape ({count}, n, 4): one row of inclusive pixel indices x0, y0, x1, y1 "
                f"per token of each of the {count} tiles; got {tuple(regions.shape)}."
            )
        if geometry is None:
            geometry = initial_gaussians(regions, self.config.sample_size, self.config.sample_size)
        if geometry.shape != (*regions.shape[:2], GEOMETRY_CHANNELS):
            raise ValueError(
                f"geometry must have the shape {(*regions.shape[:2], GEOMETRY_CHANNELS)} to go with the regions, got "
                f"{tuple(geometry.shape)}."
            )
        return regions.to(device), geometry.to(device, torch.float32)

    @apply_forward_hook
    def decode(
        self,
        tokens: GPSTokens | Tensor,
        *,
        mode: str | None = None,
        size: Size | None = None,
        progress: Progress | None = None,
        return_dict: bool = True,
    ) -> DecoderOutput | tuple[Tensor]:
        """Turns tokens into images.

        Args:
            tokens: the tokens, or a tensor (B, N, 5 + texture_channels) that stands for images of one tile.
            mode: "merge" or "tile" for images of several tiles, see the class; None takes the configured one, or
                "tile" after `enable_tiling()`.
            size: (height, width) in pixels of the result, each at least 1, in any ratio; None is the pictures' own
                size. See below.
            progress: called with the share of the picture that is drawn, above 0 and at most 1, after each piece; what
                it raises ends the call.
            return_dict: whether to return a `DecoderOutput` or a tuple.

        Returns: `sample` (B, out_channels, height, width) around [-1, 1], not clamped.

        Raises:
            ValueError: an empty batch, another number of texture channels, a canvas that is not whole tiles, an unknown
                mode, a size below 1, or a memory budget that is too small.
            TypeError: a size that is not two ints.

        Another size: Gaussians have no pixels, so they are splatted onto a feature map that is larger or smaller by
        the same ratio, rounded to whole map pixels, and the same convolutions draw the picture. If that is not exactly
        the size asked for, it is resampled (bicubic with antialiasing).

        The convolutions were trained at one size, and draw fine texture differently at another. A picture decoded at
        its own size and then resampled is closer to the resampled original: with gpstoken-mini by 2.5 dB at twice the
        size and by 10 dB at half of it. A picture that fills a small part of its canvas is drawn at a smaller scale and
        resampled. Time and memory go with the pixels of the result (the attention of a "map"
        decoder takes time with the square of a tile's), so a small picture is cheaper here.
        """
        config = self.config
        if isinstance(tokens, Tensor):
            tokens = GPSTokens.from_tensor(tokens, (config.sample_size, config.sample_size))
        if tokens.batch_size == 0:
            raise ValueError("There are no tokens of any image to decode: the batch is empty.")
        if tokens.texture_channels != config.texture_channels:
            raise ValueError(
                f"This model's tokens have {config.texture_channels} texture channels, these have "
                f"{tokens.texture_channels}. They come from another model."
            )
        mode = mode or ("tile" if self.use_tiling else config.decode_mode)
        if mode not in ("merge", "tile"):
            raise ValueError(f'mode must be "merge" or "tile", got {mode!r}.')
        rows, cols = tokens.tile_grid
        if tokens.canvas_size != (rows * config.sample_size, cols * config.sample_size):
            raise ValueError(
                f"A canvas of {rows} x {cols} tiles of this model has {rows * config.sample_size} x "
                f"{cols * config.sample_size} pixels, the tokens have {tokens.canvas_size}."
            )
        size = tokens.image_size if size is None else checked_size(size)
        scale = tuple(Fraction(wanted, own) for wanted, own in zip(size, tokens.image_size, strict=True))
        drawn = drawn_scale(scale, tokens.canvas_size, size)
        canvas = self._lasting(self.decoder.draw(tokens, drawn, mode, self.work_plan, progress))
        if progress is not None:
            progress(1.0)
        sample = cut_picture(canvas, tokens.canvas_size, scale, size)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        geometry: Tensor | None = None,
        regions: Tensor | None = None,
        *,
        num_tokens: int | None = None,
        texture_noise: float = 0.0,
        nested_share: float = 0.0,
        return_dict: bool = True,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encodes and decodes: (B, in_channels, H, W) in [-1, 1] -> `sample` of that size. Arguments as `encode`, and

        texture_noise: for training. Each image's textures get noise of up to this share of their deviation in the
            batch, so that the decoder tolerates the small errors of a generator of tokens.
        nested_share: for training. Of this share of the images only the first channels of the textures are kept, a
            random number of them, so that any beginning of a texture decodes.
        """
        (tokens,) = self.encode(sample, geometry, regions, num_tokens=num_tokens, return_dict=False)
        if nested_share:
            texture = tokens.texture
            count, channels = len(texture), texture.shape[-1]
            kept = torch.randint(1, channels, (count, 1, 1), device=texture.device)
            kept = torch.where(torch.rand_like(kept, dtype=torch.float32) < nested_share, kept, channels)
            tokens = replace(tokens, texture=texture * (torch.arange(channels, device=texture.device) < kept))
        if texture_noise:
            texture = tokens.texture
            share = texture_noise * torch.rand(len(texture), 1, 1, device=texture.device, dtype=texture.dtype)
            noise = torch.randn_like(texture) * texture.detach().std(dim=(0, 1))
            tokens = replace(tokens, texture=texture + share * noise)
        return self.decode(tokens, return_dict=return_dict)
