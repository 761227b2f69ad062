"""GPSTokenImg2ImgPipeline: a picture drawn anew, in its own layout or with its own textures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from diffusers.guiders import BaseGuidance
from torch import Generator, Tensor

from gpstoken_diffusers.image_processor import ImageLike
from gpstoken_diffusers.layouts.bank import LayoutBank
from gpstoken_diffusers.schedulers.flow_time import data_times, mix_noise, set_timesteps
from gpstoken_diffusers.schedulers.guidance import Network
from gpstoken_diffusers.schedulers.integration import is_adaptive
from gpstoken_diffusers.schedulers.noise import draw_noise
from gpstoken_diffusers.token_matching import swap_texture
from gpstoken_diffusers.tokens import GPSTokens

from .class_labels import Labels
from .pipeline_gpstoken import GPSTokenPipeline, GPSTokenPipelineOutput
from .sampling import SamplingSettings, StepCallback


class GPSTokenImg2ImgPipeline(GPSTokenPipeline):
    r"""Draws a picture anew: its tokens are noised a part of the way, and generated again from there.

    Components are those of [`GPSTokenPipeline`], and `GPSTokenImg2ImgPipeline.from_pipe(pipe)`
    shares them (without the dtype, diffusers would cast them to float32). To give the layout of one picture to a class,
    whatever its textures were, `pipe(label, layout=picture)` of the main pipeline will do.

    Pictures larger than one tile are generated tile by tile, as the networks know single tiles: a tile is told its own
    layout and tokens, and nothing of its neighbours. Its tokens merge without seams in the decoder, but what
    neighbouring tiles show agrees only as far as the kept part of the picture makes it agree.
    """

    @torch.no_grad()
    def __call__(
        self,
        image: ImageLike | Sequence[ImageLike],
        class_labels: Labels = None,
        strength: float = 0.6,
        keep: str = "layout",
        layout: Tensor | GPSTokens | LayoutBank | ImageLike | Sequence[ImageLike] | None = None,
        num_tokens: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        layout_num_inference_steps: int = 20,
        layout_guidance_scale: float = 2.0,
        generator: Generator | Sequence[Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        guider: BaseGuidance | None = None,
        layout_guider: BaseGuidance | None = None,
    ) -> GPSTokenPipelineOutput | tuple:
        """Draws pictures anew. Arguments that are not listed are as in `GPSTokenPipeline.__call__`.

        Args:
            image: a picture, or several of one size, of any kind that the image processor takes.
            class_labels: one for all pictures, or one for each; several labels for one picture give several results.
            strength: in (0, 1], the part of the way to noise and back. At 1 nothing of the old tokens is left.
            keep: "layout" generates what the Gaussians show, in the layout of the picture; "texture" carries the
                picture's tokens over to another layout by [`match_tokens`] first. At strength 1 that layout alone
                counts.
            layout: the other layout for `keep="texture"`, as in `GPSTokenPipeline.__call__`; None generates one. It
                stands for one tile, and so must the picture.
            num_tokens: tokens per tile; None takes the number that the models were trained on, or the given layout's.

        Returns: as `GPSTokenPipeline.__call__`; the output's `layout` is in coordinates of the whole picture.

        Raises:
            ValueError: a strength outside (0, 1], a layout for `keep="layout"`, numbers of pictures, labels and layouts
                that do not fit together, a picture of several tiles for `keep="texture"`, pixels that are NaN or
                outside [0, 1], and as `GPSTokenPipeline.__call__`.
            TypeError: arguments of another type.
        """
        self._check_request(output_type)
        settings = self._texture_settings(
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            strength,
            guider or self.guider,
        )
        if keep not in ("layout", "texture"):
            raise ValueError(f'keep must be "layout" or "texture", got {keep!r}.')
        if keep == "layout" and layout is not None:
            raise ValueError('keep="layout" takes the layout of the picture, but one was given: set keep="texture".')
        if layout is not None and not isinstance(layout, LayoutBank):
            layout = self.prepare_layout(layout, num_tokens)
            num_tokens = layout.shape[1]
        tokens, own_layout, labels = self._encode_with_labels(image, class_labels, num_tokens)
        if keep == "texture" and tokens.tile_grid != (1, 1):
            raise ValueError(
                f'keep="texture" takes pictures of one tile, up to {self.autoencoder.config.sample_size} pixels a '
                f"side, got {tokens.image_size[0]} x {tokens.image_size[1]}. Crop or scale the picture."
            )
        generators, layout_generators = self._seeded(generator, len(labels))
        latents = self._tile_latents(tokens, own_layout)
        if keep == "texture":
            layout_settings = SamplingSettings(
                layout_num_inference_steps, layout_guidance_scale, guider=layout_guider or self.layout_guider
            )
            layout = self._other_layout(layout, labels, own_layout.shape[1], layout_generators, layout_settings)
            old, new = (GPSTokens(geometry, latents, tokens.image_size) for geometry in (own_layout, layout))
            latents = swap_texture(new, old).texture
            own_layout = layout

        def tokens_of(latents: Tensor) -> GPSTokens:
            return tokens.with_tiles(*self.transformer.from_latents(own_layout, latents))

        tile_labels, tile_generators = self._of_tiles(tokens, labels, generators)
        latents = self._regenerate(latents, own_layout, tile_labels, tile_generators, settings, tokens_of)
        layout = tokens.with_tiles(own_layout, own_layout).geometry
        return self._output(tokens_of(latents), layout, output_type, return_dict)

    @torch.no_grad()
    def regenerate_tokens(
        self,
        tokens: GPSTokens,
        layout: GPSTokens | Tensor,
        class_labels: Labels = None,
        strength: float = 0.6,
        selection: Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guider: BaseGuidance | None = None,
    ) -> GPSTokens:
        """The stage between `encode` and `decode`: noises tokens to the strength, and generates them from there.

        Args:
            tokens: of B pictures.
            layout: the initial Gaussians that they were refined from: tokens, whose Gaussians are taken, or
                (B, N, 5) in coordinates of the whole picture.
            selection: (N,) or (B, N) bool: tokens to generate; all others stay bit for bit, and the network sees them
                on their way from noise at every evaluation. None is all. Tiles without a selected token cost nothing.

            The rest is as in `__call__`.

        Raises:
            ValueError: a layout of another size or number of tokens, a selection of another shape or of no token at
                all, and as `__call__`.
        """
        self._check_parts()
        settings = self._texture_settings(
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            strength,
            guider or self.guider,
        )
        labels = self.label_ids(class_labels, tokens.batch_size)
        if isinstance(layout, Tensor):
            layout = GPSTokens.from_geometry(layout, tokens.image_size, tokens.tile_grid, tokens.canvas_size)
        for name in ("batch_size", "num_tokens", "image_size", "tile_grid", "canvas_size"):
            ours, theirs = getattr(tokens, name), getattr(layout, name)
            if ours != theirs:
                raise ValueError(f"The tokens and their layout differ in {name}: {ours} and {theirs}.")
        shape = (tokens.batch_size, tokens.num_tokens)
        if selection is None:
            selection = torch.ones(shape, dtype=torch.bool)
        if selection.dtype != torch.bool or tuple(selection.shape) not in (shape, shape[1:]):
            raise ValueError(
                f"selection must be boolean with the shape {shape} or {shape[1:]}, got {selection.dtype} of "
                f"{tuple(selection.shape)}."
            )
        if not selection.any():
            raise ValueError("selection is empty: no token is to be generated. Select at least one.")
        device = self._execution_device
        tokens, layout = tokens.validate().to(device, torch.float32), layout.validate().to(device)
        selection, generators = selection.to(device).expand(shape), self._seeded(generator, len(labels))[0]
        return self._regenerate_selected(tokens, layout.split_tiles()[0], selection, labels, generators, settings)

    def _other_layout(
        self,
        layout: Tensor | LayoutBank | None,
        labels: Sequence[int],
        num_tokens: int,
        generators: Sequence[Generator],
        settings: SamplingSettings,
    ) -> Tensor:
        """A layout (B, n, 5) for each label: the given ones, of a bank, or generated."""
        if layout is None:
            return self._draw_layouts(labels, num_tokens, generators, None, settings)
        if isinstance(layout, LayoutBank):
            layout = self._banked_layouts(layout, labels, num_tokens, generators)
        if len(layout) not in (1, len(labels)):
            raise ValueError(f"There are {len(layout)} layouts for {len(labels)} pictures.")
        return layout.expand(len(labels), -1, -1)

    # ------------------------------------------------------------------ pictures to latents

    @torch.no_grad()
    def encode(self, image: ImageLike | Sequence[ImageLike], num_tokens: int | None = None) -> tuple[GPSTokens, Tensor]:
        """The tokens of pictures, and the layouts that they were refined from.

        Args:
            image: a picture, or several of one size.
            num_tokens: tokens per tile; None takes the number that the transformer was trained on.

        Returns: tokens of B pictures with texture in float32; layout (B, tiles, n, 5) float32, each tile in its own
        coordinates.
        """
        count = self.transformer.config.num_tokens if num_tokens is None else num_tokens
        features = self.image_processor(image, num_tokens=count).to(self._execution_device)
        pixels = features["pixel_values"].to(self.autoencoder.dtype)
        tokens = self.autoencoder.encode(pixels, features["geometry"], features["regions"]).tokens
        return tokens.to(torch.float32), features["geometry"].unflatten(0, (tokens.batch_size, -1))

    def _encode_with_labels(
        self, image: ImageLike | Sequence[ImageLike], class_labels: Labels, num_tokens: int | None
    ) -> tuple[GPSTokens, Tensor, list[int]]:
        """Tokens (B pictures), layouts (B tiles, n, 5) and one label for each picture: what is single serves all."""
        labels = self.label_ids(class_labels)
        tokens, layout = self.encode(image, num_tokens)
        if tokens.batch_size == 1:
            tokens, layout = tokens[[0] * len(labels)], layout.expand(len(labels), -1, -1, -1)
        return tokens, layout.flatten(0, 1), self.label_ids(labels, tokens.batch_size)

    def _tile_latents(self, tokens: GPSTokens, layout: Tensor) -> Tensor:
        """(B tiles, n, 5 + C): the tokens of each tile as the transformer's latents."""
        return self.transformer.to_latents(layout, *tokens.split_tiles())

    # ------------------------------------------------------------------ noise and back

    def _regenerate(
        self,
        data: Tensor,
        layout: Tensor,
        labels: Sequence[int],
        generators: Sequence[Generator],
        settings: SamplingSettings,
        tokens_of: Callable[[Tensor], GPSTokens],
        kept: Tensor | None = None,
    ) -> Tensor:
        """Noises latents to the strength and generates from there.

        Args:
            data: (M, n, 5 + C) latents of tiles.
            layout: (M, n, 5).
            labels, generators: one for each tile, see `_of_tiles`.
            tokens_of: as in `_sample`.
            kept: (M, n) bool, tokens that stay as they are. They go along the straight way between their noise and
                their own latents, exactly, whatever the solver: the network sees them there at every evaluation, and
                their velocity is that of this way.

        Returns: (M, n, 5 + C) float32.
        """
        noise = draw_noise(generators, tuple(data.shape[1:]), data.device)
        network = self.texture_network(layout)
        if kept is not None:
            network = _held(network, kept[..., None], data, noise)
        start = mix_noise(data, noise, self._start_time(settings))
        shape = tuple(data.shape[1:])
        return self._sample("texture", network, labels, shape, generators, start, settings, tokens_of)

    def _regenerate_selected(
        self,
        tokens: GPSTokens,
        layout: Tensor,
        selection: Tensor,
        labels: Sequence[int],
        generators: Sequence[Generator],
        settings: SamplingSettings,
    ) -> GPSTokens:
        """Generates the tokens of B pictures that `selection` (B, N) names, for layouts (B tiles, n, 5).

        Tiles without selected tokens stay out of it.
        """
        by_tile = selection.reshape(layout.shape[:2])
        active = by_tile.any(dim=1)
        labels, generators = (
            [one for one, is_active in zip(of_tiles, active.tolist(), strict=True) if is_active]
            for of_tiles in self._of_tiles(tokens, labels, generators)
        )
        latents = self._tile_latents(tokens, layout)

        def tokens_of(drawn: Tensor) -> GPSTokens:
            whole = latents.clone()
            whole[active] = drawn
            made = tokens.with_tiles(*self.transformer.from_latents(layout, whole))
            # Latents and back rounds; what is kept is kept bit for bit.
            return replace(
                tokens,
                geometry=torch.where(selection[..., None], made.geometry, tokens.geometry),
                texture=torch.where(selection[..., None], made.texture, tokens.texture),
            )

        kept = ~by_tile[active]
        return tokens_of(
            self._regenerate(latents[active], layout[active], labels, generators, settings, tokens_of, kept)
        )

    def _start_time(self, settings: SamplingSettings) -> float:
        """Flow time (0 is noise) of the first step that the scheduler takes."""
        if is_adaptive(self.scheduler):
            return 1 - settings.strength
        steps = settings.num_inference_steps
        begin = set_timesteps(self.scheduler, steps, self._execution_device, settings.strength)
        return data_times(self.scheduler)[begin]


def _held(network: Network, kept: Tensor, data: Tensor, noise: Tensor) -> Network:
    """The network with some tokens held on their way: kept (M, n, 1), data and noise (M, n, C)."""

    def velocity(noisy: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        # Under guidance, the batch comes twice.
        held, end, start = (part.repeat(len(noisy) // len(part), 1, 1) for part in (kept, data, noise))
        noisy = torch.where(held, mix_noise(end, start, time), noisy)
        return torch.where(held, end - start, network(noisy, time, labels).float())

    return velocity
