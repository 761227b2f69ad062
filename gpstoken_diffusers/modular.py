"""The stages of `GPSTokenPipeline` as diffusers' modular blocks. Experimental, as modular pipelines are in diffusers.

They need diffusers 0.42. A folder that a pipeline saved opens as a modular pipeline as well:

    pipe = ModularPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.load_components()
    made = pipe(class_labels="food", output=["images", "layout", "tokens"])

What to know of modular pipelines:

- The folder is a string. diffusers takes a `Path` for no folder: it logs an error, and the parts stay None.
- The folder is named when the pipeline is made: `GPSTokenBlocks().init_pipeline(folder)`. After an empty
  `init_pipeline()`, `load_components(pretrained_model_name_or_path=folder)` loads nothing, without a word.
- Their `save_pretrained` writes no blocks. Save with `GPSTokenPipeline`, which writes all that is needed; for the Hub
  with `repo_id="owner/name"`, as the index of a repository names the repository.
- They know no interruption. `callback_on_step_end` gets the `GPSTokenPipeline` that the block calls: set its
  `_interrupt` to True to stop that stage.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from packaging.version import Version

if Version(diffusers.__version__) < Version("0.42"):
    raise ImportError(
        f"Modular blocks need diffusers 0.42 or later, this is {diffusers.__version__}: pip install -U diffusers. "
        "The pipelines need no blocks."
    )

from diffusers.modular_pipelines import (
    AutoPipelineBlocks,
    ModularPipelineBlocks,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam

from .image_processor import GPSTokenImageProcessor
from .layouts.bank import LayoutBank
from .models.autoencoder_gpstoken import AutoencoderGPSToken
from .models.transformer_gpstoken import GPSTokenTransformerModel
from .models.transformer_gpstoken_layout import GPSTokenLayoutModel
from .pipelines.pipeline_gpstoken import GPSTokenPipeline
from .pipelines.pipeline_gpstoken_img2img import GPSTokenImg2ImgPipeline
from .tokens import GPSTokens

__all__ = ["GPSTokenBlocks", "GPSTokenDecodeBlock", "GPSTokenEncodeBlock", "GPSTokenInputBlock", "GPSTokenLayoutBlock",
           "GPSTokenTextureBlock"]  # fmt: skip

COMPONENTS = {
    "autoencoder": AutoencoderGPSToken,
    "transformer": GPSTokenTransformerModel,
    "scheduler": SchedulerMixin,
    "image_processor": GPSTokenImageProcessor,
    "layout_model": GPSTokenLayoutModel,
    "layout_scheduler": SchedulerMixin,
    "layout_bank": LayoutBank,
}
CONFIGS = ("id2label", "sampling_defaults")


# As of `GPSTokenPipeline.__call__`; the others are None there too.
_DEFAULTS = {
    "layout_num_inference_steps": 20,
    "layout_guidance_scale": 2.0,
    "num_images_per_label": 1,
    "output_type": "pil",
    "callback_on_step_end_tensor_inputs": ("latents",),
}


def _inputs(*names: str) -> list[InputParam]:
    """Parameters that mean what they mean in `GPSTokenPipeline.__call__`."""
    return [InputParam(name, default=_DEFAULTS.get(name), description="As in GPSTokenPipeline.") for name in names]


class _Block(ModularPipelineBlocks):
    """Calls methods of a `GPSTokenPipeline` on the modular pipeline's components."""

    model_name = "gpstoken"
    progress: dict[str, Any] = {}

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec(name, kind) for name, kind in COMPONENTS.items()]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec(name, None) for name in CONFIGS]

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """As of a pipeline."""
        self.progress = kwargs

    def pipeline(self, components: Any, kind: type[GPSTokenPipeline] = GPSTokenPipeline) -> Any:
        """The pipeline on these components."""
        missing = [name for name in list(COMPONENTS)[:4] if getattr(components, name, None) is None]
        if missing:
            raise ValueError(
                f"The pipeline has no {missing[0]}: make it by from_pretrained(folder) or init_pipeline(folder), with "
                "the folder as a string, then call load_components()."
            )
        parts = {name: getattr(components, name, None) for name in COMPONENTS}
        pipe = kind(**parts, **{name: getattr(components.config, name, None) for name in CONFIGS})
        pipe.set_progress_bar_config(**self.progress)
        return pipe

    def run(self, components: Any, state: Any) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        self.run(components, block_state)
        self.set_block_state(state, block_state)
        return components, state


class GPSTokenEncodeBlock(_Block):
    """A picture's tokens, and the layout that they were refined from."""

    description = "Encodes a picture: its tokens, and its layout for the stages behind."
    inputs = [InputParam("image", description="A picture, or several of one size."), *_inputs("num_tokens")]
    intermediate_outputs = [
        OutputParam("tokens", GPSTokens, "Of the picture."),
        OutputParam("layout", GPSTokens, "Initial Gaussians of the picture."),
    ]

    def run(self, components: Any, state: Any) -> None:
        pipe = self.pipeline(components, GPSTokenImg2ImgPipeline)
        state.tokens, tiles = pipe.encode(state.image, state.num_tokens)
        tiles = tiles.flatten(0, 1)
        geometry = state.tokens.with_tiles(tiles, tiles).geometry
        where = (state.tokens.image_size, state.tokens.tile_grid, state.tokens.canvas_size)
        state.layout = GPSTokens.from_geometry(geometry, *where)


class GPSTokenInputBlock(_Block):
    """Labels as numbers, a given layout as Gaussians, and a generator for each stage of each picture."""

    description = "Prepares labels, a given layout and generators."
    inputs = _inputs("class_labels", "num_images_per_label", "layout", "num_tokens", "generator")
    intermediate_outputs = [
        OutputParam("labels", list, "A class number for each picture."),
        OutputParam("layout", torch.Tensor, "The given layout for each picture; None if there is none."),
        OutputParam("texture_generators", list),
        OutputParam("layout_generators", list),
    ]

    def run(self, components: Any, state: Any) -> None:
        state.labels, state.layout, state.texture_generators, state.layout_generators = self.pipeline(
            components
        ).prepare_inputs(
            state.class_labels, state.num_images_per_label, state.layout, state.num_tokens, state.generator
        )


class GPSTokenLayoutBlock(_Block):
    """The first stage."""

    description = "Draws layouts of the labels."
    inputs = [
        InputParam("labels", required=True),
        InputParam("layout_generators"),
        *_inputs("num_tokens", "layout_num_inference_steps", "layout_guidance_scale", "layout_guider"),
    ]
    intermediate_outputs = [OutputParam("layout", torch.Tensor, "(B, N, 5) initial Gaussians.")]

    def run(self, components: Any, state: Any) -> None:
        state.layout = self.pipeline(components).generate_layout(
            state.labels,
            state.num_tokens,
            state.layout_num_inference_steps,
            state.layout_guidance_scale,
            generator=state.layout_generators,
            guider=state.layout_guider,
        )


class GPSTokenGivenLayoutBlock(_Block):
    """A layout that is there already."""

    description = "Keeps the given layout."
    inputs = [InputParam("layout")]

    def run(self, components: Any, state: Any) -> None:
        pass


class GPSTokenAutoLayoutBlock(AutoPipelineBlocks):
    """The first stage, where no layout is given."""

    block_classes = [GPSTokenGivenLayoutBlock, GPSTokenLayoutBlock]
    block_names = ["given", "generated"]
    block_trigger_inputs = ["layout", None]
    description = "Draws layouts unless one is given."

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """As of a pipeline."""
        self.sub_blocks["generated"].set_progress_bar_config(**kwargs)


class GPSTokenAutoEncodeBlock(AutoPipelineBlocks):
    """Encodes a picture if there is one."""

    block_classes = [GPSTokenEncodeBlock]
    block_names = ["picture"]
    block_trigger_inputs = ["image"]
    description = "Takes the layout of a picture, if one is given."


class GPSTokenTextureBlock(_Block):
    """The second stage."""

    description = "Draws what the Gaussians of a layout show."
    inputs = [
        InputParam("layout", required=True),
        InputParam("labels", required=True),
        InputParam("texture_generators"),
        *_inputs(
            "num_inference_steps",
            "guidance_scale",
            "guidance_interval",
            "latents",
            "callback_on_step_end",
            "callback_on_step_end_tensor_inputs",
            "guider",
        ),
    ]
    intermediate_outputs = [OutputParam("tokens", GPSTokens, "Of the pictures.")]

    def run(self, components: Any, state: Any) -> None:
        state.tokens = self.pipeline(components).generate_texture(
            state.layout,
            state.labels,
            state.num_inference_steps,
            state.guidance_scale,
            state.guidance_interval,
            state.texture_generators,
            state.latents,
            state.callback_on_step_end,
            state.callback_on_step_end_tensor_inputs,
            guider=state.guider,
        )


class GPSTokenDecodeBlock(_Block):
    """Pictures of tokens."""

    description = "Decodes tokens to pictures."
    inputs = [InputParam("tokens", required=True), *_inputs("output_type")]
    intermediate_outputs = [OutputParam("images", list, 'PIL pictures, or what `output_type` says ("np", "pt").')]

    def run(self, components: Any, state: Any) -> None:
        state.images = self.pipeline(components).decode(state.tokens, state.output_type)


class GPSTokenBlocks(SequentialPipelineBlocks):
    """All stages: from a class, a layout or a picture's layout to pictures, as `GPSTokenPipeline` does it."""

    model_name = "gpstoken"
    block_classes = [
        GPSTokenAutoEncodeBlock,
        GPSTokenInputBlock,
        GPSTokenAutoLayoutBlock,
        GPSTokenTextureBlock,
        GPSTokenDecodeBlock,
    ]
    block_names = ["encode", "inputs", "layout", "texture", "decode"]
    description = "Pictures of classes by GPSTokens, the layout of the Gaussians first, then what they show."
