"""GPSTokenPipeline: pictures from class labels, the layout of the Gaussians first, then what they show."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.guiders import BaseGuidance
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Generator, Tensor

from gpstoken_diffusers.image_processor import GPSTokenImageProcessor, ImageLike
from gpstoken_diffusers.layouts.bank import LayoutBank
from gpstoken_diffusers.layouts.calibration import calibrate_layout, check_num_tokens
from gpstoken_diffusers.models.attention import autocast_disabled
from gpstoken_diffusers.models.autoencoder_gpstoken import AutoencoderGPSToken
from gpstoken_diffusers.models.loading import with_dtype
from gpstoken_diffusers.models.transformer_gpstoken import GPSTokenTransformerModel
from gpstoken_diffusers.models.transformer_gpstoken_layout import LAYOUT_CHANNELS, GPSTokenLayoutModel
from gpstoken_diffusers.schedulers.guidance import Network, check_guider
from gpstoken_diffusers.schedulers.noise import sample_generators
from gpstoken_diffusers.schedulers.presets import make_sampler
from gpstoken_diffusers.tokens import GEOMETRY_CHANNELS, GPSTokens

from .class_labels import Labels, imagenet_labels, label_ids
from .portable_folder import PortableFolderMixin
from .sampling import FlowSamplingMixin, SamplingSettings, StepCallback

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from gpstoken_diffusers.models.hub_files import HubOptions

_TEXTURE_DEFAULTS = {"num_inference_steps": 20, "guidance_scale": 3.0, "guidance_interval": (0.0, 1.0)}
_OFFICIAL_DEFAULTS = {"num_inference_steps": 250, "guidance_scale": 1.5, "guidance_interval": (0.2, 1.0)}
OUTPUT_TYPES = ("pil", "np", "pt", "tokens", "latent")


@dataclass
class GPSTokenPipelineOutput(BaseOutput):
    """What generation gives.

    Attributes:
        images: a list of PIL pictures, or an array (B, H, W, 3) or tensor (B, 3, H, W) in [0, 1]; None for
            `output_type="tokens"`, and the tokens for "latent".
        tokens: the tokens that the pictures were decoded from.
        layout: (B, N, 5) float32, the initial Gaussians that the tokens were made for.
    """

    images: list[Image.Image] | np.ndarray | Tensor | GPSTokens | None
    tokens: GPSTokens
    layout: Tensor


class GPSTokenPipeline(FlowSamplingMixin, PortableFolderMixin, DiffusionPipeline):
    r"""Generates pictures in two stages (arXiv 2509.01109): a layout of Gaussians, then a texture for each of them.

    Args:
        autoencoder: its decoder makes the pictures; its encoder's partition makes layouts of pictures.
        transformer: the second stage.
        scheduler: samples the second stage; any flow scheduler of diffusers or of this package.
        image_processor: tensors to pictures and back.
        layout_model: the first stage. Without it (the official release has none), each call needs a layout.
        layout_scheduler: samples the first stage.
        layout_bank: layouts to draw from where there is no layout model, as the official release does it.
        sampling_defaults: other defaults of the second stage than 20 steps with guidance of 3 all the way:
            `num_inference_steps`, `guidance_scale`, `guidance_interval`. They are saved with the pipeline. None: those
            of the pipeline whose `components` the transformer comes from; {}: none.
        id2label: names of the classes by number; None takes those that the transformer has had in another pipeline.
        guider, layout_guider: of `diffusers.guiders`, what calls take that name none; also as attributes. They are not
            saved.

    Raises ValueError: parts that do not belong together.

    The three stages can be called apart: `generate_layout`, `generate_texture`, `decode`.
    """

    model_cpu_offload_seq = "layout_model->transformer->autoencoder"
    _optional_components = ["layout_model", "layout_scheduler", "layout_bank"]

    def __init__(
        self,
        autoencoder: AutoencoderGPSToken,
        transformer: GPSTokenTransformerModel,
        scheduler: SchedulerMixin,
        image_processor: GPSTokenImageProcessor,
        layout_model: GPSTokenLayoutModel | None = None,
        layout_scheduler: SchedulerMixin | None = None,
        id2label: dict[str, str] | dict[int, str] | None = None,
        layout_bank: LayoutBank | None = None,
        sampling_defaults: dict | None = None,
        guider: BaseGuidance | None = None,
        layout_guider: BaseGuidance | None = None,
    ):
        super().__init__()
        check_guider(guider)
        check_guider(layout_guider)
        self.guider, self.layout_guider = guider, layout_guider
        self.register_modules(
            autoencoder=autoencoder,
            transformer=transformer,
            scheduler=scheduler,
            image_processor=image_processor,
            layout_model=layout_model,
            layout_scheduler=layout_scheduler,
            layout_bank=layout_bank,
        )
        # What went with the transformer in another pipeline, see `components`.
        names = getattr(transformer, "_class_names", {}) if id2label is None else id2label
        # JSON has only strings for keys.
        self.register_to_config(id2label={str(int(number)): name for number, name in names.items()})
        defaults = getattr(transformer, "_sampling_defaults", {}) if sampling_defaults is None else sampling_defaults
        if unknown := set(defaults) - _TEXTURE_DEFAULTS.keys():
            raise ValueError(
                f"sampling_defaults can say {', '.join(_TEXTURE_DEFAULTS)}, but not {sorted(unknown)[0]!r}."
            )
        if defaults:
            self.register_to_config(sampling_defaults=dict(defaults))
        self._check_parts()

    def _check_parts(self) -> None:
        """Raises ValueError for parts that do not belong together; users may have replaced some since the last run."""
        channels, classes = self.transformer.config.texture_channels, self.transformer.config.num_classes
        if self.autoencoder.config.texture_channels != channels:
            raise ValueError(
                f"The transformer draws {channels} texture channels, the autoencoder decodes "
                f"{self.autoencoder.config.texture_channels}: they do not belong together. Take both from one model."
            )
        if self.layout_model is not None and self.layout_model.config.num_classes != classes:
            raise ValueError(
                f"The transformer knows {classes} classes, the layout model {self.layout_model.config.num_classes}: "
                "they do not belong together. Take both from one model."
            )
        bank = self.layout_bank
        if bank is not None and max(bank.classes) >= classes:
            raise ValueError(
                f"The transformer knows {classes} classes, but there are layouts of class {max(bank.classes)}: they do "
                "not belong together."
            )
        unknown = [number for number in self.id2label if not 0 <= number < classes]
        if unknown:
            raise ValueError(
                f"id2label must name classes from 0 to {classes - 1}, those of the transformer, got {unknown[0]}."
            )

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name; `OtherPipeline(**pipe.components)` has the class names and `sampling_defaults` too."""
        # diffusers leaves settings out, so they go with the transformer, whichever it is by now.
        self.transformer._class_names = self.id2label
        self.transformer._sampling_defaults = dict(self.config.get("sampling_defaults", {}))
        return super().components

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes by number."""
        return {int(number): name for number, name in self.config.id2label.items()}

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> Self:
        """This pipeline on another one's components, which both share from then on; arguments as in diffusers.

        The components keep their precision unless `dtype` says otherwise; diffusers would cast them to float32.
        """
        guiders = {name: getattr(pipeline, name, None) for name in ("guider", "layout_guider")}
        return super().from_pipe(pipeline, **with_dtype({"dtype": pipeline.dtype, **guiders, **kwargs}))

    @classmethod
    def from_official(
        cls,
        generator: str | os.PathLike | GPSTokenTransformerModel,
        autoencoder: str | os.PathLike | AutoencoderGPSToken = "m128",
        layouts: str | os.PathLike | LayoutBank | None = None,
        *,
        dtype: torch.dtype | None = None,
        **hub: Unpack[HubOptions],
    ) -> Self:
        """The released pipeline: SiT-XL/2-gs on M128's tokens, 250 steps of the SDE, guidance of 1.5 from t = 0.2.

        Args:
            generator: the official `generator.safetensors`, as `GPSTokenTransformerModel.from_single_file` takes it, or
                a loaded model.
            autoencoder: an official tokenizer, as `AutoencoderGPSToken.from_single_file` takes it, or a loaded model.
            layouts: the official `initg.pickle`, which is read without unpickling, a file of `LayoutBank.save`, or a
                bank; None asks for a layout in each call.
            dtype: of the weights; None keeps float32.
            hub: `cache_dir`, `token` and the like, for both models.

        Class names are ImageNet's where the generator has its 1,000 classes, else those of the layouts.

        Raises as the two `from_single_file`, and ValueError or OSError for a file of layouts that cannot be read.
        """
        if not isinstance(layouts, LayoutBank | None):
            read = LayoutBank.load if os.fspath(layouts).endswith(".safetensors") else LayoutBank.from_official_pickle
            layouts = read(layouts)
        if not isinstance(generator, GPSTokenTransformerModel):
            generator = GPSTokenTransformerModel.from_single_file(generator, dtype=dtype, **hub)
        if not isinstance(autoencoder, AutoencoderGPSToken):
            autoencoder = AutoencoderGPSToken.from_single_file(autoencoder, dtype=dtype, **hub)
        return cls(
            autoencoder=autoencoder,
            transformer=generator,
            scheduler=make_sampler("official-sde")[0],
            image_processor=GPSTokenImageProcessor.for_autoencoder(autoencoder.config),
            id2label=imagenet_labels() if generator.config.num_classes == 1000 else layouts and layouts.id2label,
            layout_bank=layouts,
            sampling_defaults=_OFFICIAL_DEFAULTS,
        )

    # ------------------------------------------------------------------ all stages

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels = None,
        num_tokens: int | None = None,
        layout: Tensor | GPSTokens | LayoutBank | ImageLike | Sequence[ImageLike] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        layout_num_inference_steps: int = 20,
        layout_guidance_scale: float = 2.0,
        num_images_per_label: int = 1,
        generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        guider: BaseGuidance | None = None,
        layout_guider: BaseGuidance | None = None,
    ) -> GPSTokenPipelineOutput | tuple:
        """Generates pictures.

        Args:
            class_labels: a class by number or by name, or a list of them; None is no class in particular.
            num_tokens: tokens per picture; None takes the number that the models were trained on.
            layout: where the tokens lie: None generates layouts, or draws them from the pipeline's bank; initial
                Gaussians (B, N, 5) or (N, 5); tokens, whose Gaussians are taken; a picture or a list of them, which are
                partitioned; or a [`LayoutBank`], from which layouts of the labels are drawn. One layout serves all
                labels, one label serves all layouts.
            num_inference_steps: steps of the second stage. These three are the pipeline's own where None: 20, 3 and
                (0, 1) unless it has `sampling_defaults`.
            guidance_scale: classifier-free guidance of the second stage; 1 is none, and costs half as much.
            guidance_interval: (first, last) flow time of guidance, 0 is noise and 1 is data.
            layout_num_inference_steps, layout_guidance_scale: the same of the first stage.
            num_images_per_label: pictures for each label.
            generator: one, or one for each picture. A picture depends on its own seed, not on batch or device; but
                with the adaptive "official-ode", as in the release, one step size serves the batch, so that a picture
                changes a little with its companions.
            latents: (B, N, 5 + C) noise of the second stage instead of the generator's.
            output_type: "pil", "np", "pt", "tokens", or "latent", as diffusers calls what is not decoded.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after each step of the second
                stage; what it returns under "latents" is taken from there on.
            callback_on_step_end_tensor_inputs: what it gets; beside "latents" there is "tokens", [`GPSTokens`] of the
                pictures as the network expects them to end, for previews.
            return_dict: whether to return a [`GPSTokenPipelineOutput`] or a tuple of its first entry (the pictures, or
                the tokens where nothing is decoded).
            guider: one of `diffusers.guiders` in place of `guidance_scale` and `guidance_interval`, for the second
                stage; None takes the pipeline's. Its `start` and `stop` count steps, an interval is in flow time. Skip
                layers by `LayerSkipConfig`: `AutoGuidance(auto_guidance_layers=...)` fails in diffusers 0.42.
            layout_guider: the same of the first stage.

        Raises:
            ValueError: unknown labels, settings out of range, shapes that do not fit together; the message says which.
            TypeError: arguments of another type.
        """
        self._check_request(output_type)
        settings = self._texture_settings(
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            guider=guider or self.guider,
        )
        layout_settings = SamplingSettings(
            layout_num_inference_steps, layout_guidance_scale, guider=layout_guider or self.layout_guider
        )
        labels, layout, generators, layout_generators = self.prepare_inputs(
            class_labels, num_images_per_label, layout, num_tokens, generator
        )
        if layout is None:
            layout = self._draw_layouts(labels, num_tokens, layout_generators, None, layout_settings)
        side = self.autoencoder.config.sample_size
        tokens = self._draw_textures(
            GPSTokens.from_geometry(self.prepare_layout(layout), (side, side)), labels, generators, latents, settings
        )
        return self._output(tokens, layout, output_type, return_dict)

    def prepare_inputs(
        self,
        class_labels: Labels,
        num_images_per_label: int = 1,
        layout: Tensor | GPSTokens | LayoutBank | ImageLike | Sequence[ImageLike] | None = None,
        num_tokens: int | None = None,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> tuple[list[int], Tensor | None, list[Generator], list[Generator]]:
        """What the stages need of each of B pictures, from arguments as `__call__` takes them.

        Returns: B class numbers; the given layouts (B, N, 5), or None; B generators of the texture, B of the layout.
        """
        _check_count("num_images_per_label", num_images_per_label)
        labels = [label for label in self.label_ids(class_labels) for _ in range(num_images_per_label)]
        if layout is not None and not isinstance(layout, LayoutBank):
            layout = self.prepare_layout(layout, num_tokens)
            if len(labels) == 1:
                labels = labels * len(layout)
            if len(layout) == 1:
                layout = layout.expand(len(labels), -1, -1)
        generators, layout_generators = self._seeded(generator, len(labels))
        if isinstance(layout, LayoutBank):
            layout = self._banked_layouts(layout, labels, num_tokens, layout_generators)
        return labels, layout, generators, layout_generators

    def label_ids(self, class_labels: Labels, count: int | None = None) -> list[int]:
        """Labels by number or name as numbers, see [`class_labels.label_ids`].

        With `count`, a single label is repeated so often, and ValueError raised for another number of labels.
        """
        labels = label_ids(class_labels, self.id2label, self.transformer.null_class)
        if count is None:
            return labels
        if len(labels) not in (1, count):
            raise ValueError(f"There are {len(labels)} class labels for {count} pictures.")
        return labels if len(labels) == count else labels * count

    def _check_request(self, output_type: str) -> None:
        self._check_parts()
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")

    def _texture_settings(
        self,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        guidance_interval: tuple[float, float] | None,
        *others: Any,
        **named: Any,
    ) -> SamplingSettings:
        """Settings of the second stage; None is the pipeline's own."""
        asked = (num_inference_steps, guidance_scale, guidance_interval)
        own = {**_TEXTURE_DEFAULTS, **self.config.get("sampling_defaults", {})}
        return SamplingSettings(
            *(own[name] if one is None else one for name, one in zip(own, asked, strict=True)), *others, **named
        )

    @staticmethod
    def _seeded(
        generator: Generator | Sequence[Generator] | None, count: int
    ) -> tuple[list[Generator], list[Generator]]:
        """Generators of the texture, and of the layout.

        Both are drawn whether needed or not: the same seed gives the same texture for a layout that is handed in again.
        """
        generators = sample_generators(generator, count)
        return generators, sample_generators(generators, count)

    def _output(
        self, tokens: GPSTokens, layout: Tensor, output_type: str, return_dict: bool
    ) -> GPSTokenPipelineOutput | tuple:
        is_decoded = output_type not in ("tokens", "latent")
        images = self.decode(tokens, output_type) if is_decoded else tokens
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return GPSTokenPipelineOutput(None if output_type == "tokens" else images, tokens, layout)

    # ------------------------------------------------------------------ first stage

    @torch.no_grad()
    def generate_layout(
        self,
        class_labels: Labels = None,
        num_tokens: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        guider: BaseGuidance | None = None,
    ) -> Tensor:
        """Draws layouts and calibrates them: each is the initial Gaussians of a partition of the whole picture.

        Args as in `__call__`; `latents` are (B, N, 4), and the callback and the guider are those of this stage.

        Returns: (B, N, 5) float32, on the layout model's device.

        Raises ValueError: as `__call__`, and for a pipeline without a layout model.
        """
        labels = self.label_ids(class_labels)
        settings = SamplingSettings(
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            callback_on_step_end,
            guider=guider or self.layout_guider,
        )
        return self._draw_layouts(labels, num_tokens, generator, latents, settings)

    def _draw_layouts(
        self,
        labels: Sequence[int],
        num_tokens: int | None,
        generator: Generator | Sequence[Generator] | None,
        latents: Tensor | None,
        settings: SamplingSettings,
    ) -> Tensor:
        """See `generate_layout`."""
        if self.layout_model is None and self.layout_bank is not None:
            return self._banked_layouts(self.layout_bank, labels, num_tokens, sample_generators(generator, len(labels)))
        if self.layout_model is None or self.layout_scheduler is None:
            raise ValueError(
                "This pipeline has no layout model. Give a layout: initial Gaussians (B, N, 5), a picture to "
                "partition, or a LayoutBank."
            )
        num_tokens = self.layout_model.config.num_tokens if num_tokens is None else num_tokens
        _check_count("num_tokens", num_tokens)
        config = self.autoencoder.config
        check_num_tokens(num_tokens, config.sample_size, config.sample_size, config.min_region_size)

        def network(noisy: Tensor, time: Tensor, label: Tensor) -> Tensor:
            with autocast_disabled(noisy):  # see the model's note on precision
                return self.layout_model(noisy, time, label).sample

        shape = (num_tokens, LAYOUT_CHANNELS)
        latents = self._sample("layout", network, labels, shape, generator, latents, settings)
        predicted = self.layout_model.from_latents(latents)
        return calibrate_layout(
            predicted, image_size=(config.sample_size, config.sample_size), min_region_size=config.min_region_size
        ).geometry

    def _banked_layouts(
        self, bank: LayoutBank, labels: Sequence[int], num_tokens: int | None, generators: Sequence[Generator]
    ) -> Tensor:
        """A layout (B, N, 5) of each label from a bank."""
        # No class in particular: that of any layout in the bank.
        of_class = [
            bank.labels[torch.randint(len(bank), (), generator=own)].item()
            if label == self.transformer.null_class
            else label
            for label, own in zip(labels, generators, strict=True)
        ]
        return self.prepare_layout(bank.sample(of_class, generators), num_tokens)

    def prepare_layout(
        self, layout: Tensor | GPSTokens | ImageLike | Sequence[ImageLike], num_tokens: int | None = None
    ) -> Tensor:
        """Any form of layout that `__call__` takes, but banks, as initial Gaussians (B, N, 5) float32.

        Raises ValueError: no Gaussians in it, numbers that make none, another number than `num_tokens`, or a picture
        that is not one tile.
        """
        if isinstance(layout, GPSTokens):
            if layout.tile_grid != (1, 1):
                raise ValueError(
                    f"A layout must be of one tile, got {layout.tile_grid[0]} x {layout.tile_grid[1]}: "
                    "generate_texture takes larger ones, as tokens."
                )
            layout = layout.geometry
        is_geometry = isinstance(layout, Tensor) and layout.shape[-1] == GEOMETRY_CHANNELS
        if is_geometry and layout.ndim in (2, 3) and layout.shape[-2] > 0:
            layout = layout.detach().float().reshape(-1, *layout.shape[-2:])
            GPSTokens.from_geometry(layout, (1, 1)).validate()
        elif is_geometry:
            raise ValueError(f"A layout must have the shape (B, N, 5) or (N, 5), got {tuple(layout.shape)}.")
        else:
            count = self.transformer.config.num_tokens if num_tokens is None else num_tokens
            features = self.image_processor(layout, num_tokens=count)
            size, tile = tuple(features["pixel_values"].shape[-2:]), self.autoencoder.config.sample_size
            if size != (tile, tile):
                raise ValueError(
                    f"A picture that gives a layout must be {tile} x {tile} pixels, got {size[0]} x {size[1]}: the "
                    "models generate one tile. Crop or scale it."
                )
            layout = features["geometry"]
        if num_tokens is not None and layout.shape[1] != num_tokens:
            raise ValueError(f"The layout has {layout.shape[1]} tokens, but num_tokens is {num_tokens}.")
        return layout.to(self._execution_device)

    # ------------------------------------------------------------------ second stage

    @torch.no_grad()
    def generate_texture(
        self,
        layout: Tensor | GPSTokens,
        class_labels: Labels = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guider: BaseGuidance | None = None,
    ) -> GPSTokens:
        """Draws what the Gaussians of a layout show, and by how much they differ from it.

        Args:
            layout: (B, N, 5), initial Gaussians of one tile; or tokens, whose Gaussians are taken, of pictures of any
                size. Tiles are then drawn each by itself: the networks know single tiles.
            latents: (B tiles, n, 5 + C) noise instead of the generator's.

            The rest is as in `__call__`; one label serves all layouts.

        Returns: tokens of B pictures, texture in float32.
        """
        settings = self._texture_settings(
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            guider=guider or self.guider,
        )
        if not isinstance(layout, GPSTokens):
            side = self.autoencoder.config.sample_size
            layout = GPSTokens.from_geometry(self.prepare_layout(layout), (side, side))
        return self._draw_textures(layout, class_labels, generator, latents, settings)

    def _draw_textures(
        self,
        layout: GPSTokens,
        class_labels: Labels,
        generator: Generator | Sequence[Generator] | None,
        latents: Tensor | None,
        settings: SamplingSettings,
    ) -> GPSTokens:
        """See `generate_texture`."""
        layout = layout.validate().to(self._execution_device)
        labels = self.label_ids(class_labels, layout.batch_size)
        if layout.tile_grid != (1, 1):
            labels, generator = self._of_tiles(layout, labels, sample_generators(generator, len(labels)))
        tiles, _ = layout.split_tiles()

        def tokens_of(latents: Tensor) -> GPSTokens:
            return layout.with_tiles(*self.transformer.from_latents(tiles, latents))

        shape = (tiles.shape[1], GEOMETRY_CHANNELS + self.transformer.config.texture_channels)
        network = self.texture_network(tiles)
        return tokens_of(self._sample("texture", network, labels, shape, generator, latents, settings, tokens_of))

    @staticmethod
    def _of_tiles(
        tokens: GPSTokens, labels: Sequence[int], generators: Sequence[Generator]
    ) -> tuple[list[int], list[Generator]]:
        """Labels and generators of B pictures for each of their tiles; a picture's generator gives its tiles seeds."""
        tiles = range(tokens.tile_grid[0] * tokens.tile_grid[1])
        sources = [generator for generator in generators for _ in tiles]
        return [label for label in labels for _ in tiles], sample_generators(sources, len(sources))

    def texture_network(self, layout: Tensor) -> Network:
        """The transformer for layouts (B, N, 5), a function of latents, time and labels of B or 2 B samples."""

        def network(noisy: Tensor, time: Tensor, labels: Tensor) -> Tensor:
            where = layout if len(noisy) == len(layout) else torch.cat([layout, layout])
            return self.transformer(noisy, time, labels, where).sample

        return network

    # ------------------------------------------------------------------ decoding

    @torch.no_grad()
    def decode(self, tokens: GPSTokens, output_type: str = "pil") -> list[Image.Image] | np.ndarray | Tensor:
        """Makes the pictures of tokens: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W), in [0, 1]."""
        tokens = tokens.to(self._execution_device, self.autoencoder.dtype)
        return self.image_processor.postprocess(self.autoencoder.decode(tokens).sample, output_type)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be at least 1 and an integer, got {value!r}.")
