"""Pictures to tokens, and tokens to pictures."""

from __future__ import annotations

import comfy.utils
import torch
from comfy_api.v0_0_2 import io, ui

from .images import fitting_mask, from_image, given_mask, to_image
from .progress import Progress
from .sockets import GPSLayoutSocket, GPSTokensSocket, memory_input, model_input, searched_as, where_known

MAX_TOKENS = 1024  # a tile has 32 x 32 regions of 8 x 8 px, the smallest
TILINGS = ["auto", "merge", "tile"]
SCALINGS = ["resample", "render"]


def num_tokens_input(default: int) -> io.Input:
    """Tokens per tile."""
    return io.Int.Input(
        "num_tokens",
        default=default,
        min=1,
        max=MAX_TOKENS,
        tooltip="Tokens for each 256 x 256 px of the picture, at most 1024. More of them keep more detail.",
    )


def importance_inputs() -> list[io.Input]:
    """A mask that draws tokens, and how strongly."""
    return [
        io.Mask.Input(
            "importance", optional=True, tooltip="A mask of the picture's size. Tokens go where it is bright."
        ),
        io.Float.Input(
            "importance_strength",
            default=4.0,
            min=0.0,
            max=1000.0,
            step=0.5,
            optional=True,
            tooltip="How strongly the mask draws tokens. At 1 it counts as much as the detail of an average pixel.",
        ),
    ]


def partition_arguments(image, num_tokens, importance, importance_strength) -> dict:
    """What the image processor takes, from the inputs of a node."""
    arguments = {"num_tokens": num_tokens}
    if (importance := given_mask(importance)) is not None:
        mask = fitting_mask(importance, len(image), tuple(image.shape[1:3]))
        arguments |= {"importance": list(mask), "importance_strength": importance_strength}
    return arguments


class GPSEncode(io.ComfyNode):
    """Pictures to tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GPSEncode",
            display_name="GPS Encode",
            category="GPSToken",
            description="Turns a picture into Gaussian tokens: where each lies, its size and shape, and what it shows.",
            **searched_as("vae", "vae encode"),
            **where_known(has_intermediate_output=True),  # what came out is shown again where the node need not run
            inputs=[
                model_input(),
                io.Image.Input("image", tooltip="Pictures of any size; large ones are cut into tiles."),
                num_tokens_input(256),
                *importance_inputs(),
                memory_input(),
            ],
            outputs=[
                GPSTokensSocket.Output("tokens_out", display_name="tokens", tooltip="Refined Gaussians with texture."),
                GPSLayoutSocket.Output(
                    "layout_out", display_name="layout", tooltip="The initial Gaussians that they were refined from."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, image, num_tokens, importance=None, importance_strength=4.0, memory_gb=0.0
    ) -> io.NodeOutput:
        arguments = partition_arguments(image, num_tokens, importance, importance_strength)
        features = model.processor(from_image(image), **arguments)
        tiles, progress = len(features["regions"]), Progress(len(features["regions"]))
        at_once = tiles if tiles == len(image) else 4
        with model.at_work(memory_gb, at_once, num_tokens) as autoencoder:
            pixels = features["pixel_values"].to(model.load_device, autoencoder.dtype)
            found = autoencoder.encode(pixels, features["geometry"], features["regions"], progress=progress.share)
        tokens = found.tokens.to("cpu", torch.float32)  # whatever the networks compute in: tokens of two models mix
        layout = tokens.with_tiles(features["geometry"], features["geometry"][..., :0])
        return io.NodeOutput(tokens, layout, ui=ui.PreviewText(size_of(tokens)))  # web/encoded_size.js shows it


def size_of(tokens) -> str:
    """How many tokens there are, and how many bytes their numbers take in a file of Save GPS Tokens."""
    size = sum(numbers.numel() * numbers.element_size() for numbers in (tokens.geometry, tokens.texture))
    count = f"{tokens.num_tokens} tokens"
    if tokens.batch_size > 1:
        count = f"{tokens.batch_size} pictures of {count}"
    return f"{count}, {size / 1000:,.0f} kB"


class GPSDecode(io.ComfyNode):
    """Tokens to pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GPSDecode",
            display_name="GPS Decode",
            category="GPSToken",
            description="Paints a picture from its tokens, at its own size or at another.",
            **searched_as("vae", "vae decode"),
            inputs=[
                model_input(),
                GPSTokensSocket.Input("tokens", tooltip="What to paint, made by the same model."),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=16384,
                    optional=True,
                    tooltip="Pixels. 0: the picture's own width, or what fits the height.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=16384,
                    optional=True,
                    tooltip="Pixels. 0: the picture's own height, or what fits the width.",
                ),
                io.Combo.Input(
                    "scaling",
                    options=SCALINGS,
                    default="resample",
                    optional=True,
                    tooltip=(
                        "For another size. resample: paint at the picture's own size, then scale. render: paint the "
                        "Gaussians at the new size; edges are crisper, but the networks were trained at one scale."
                    ),
                ),
                io.Combo.Input(
                    "tiling",
                    options=TILINGS,
                    default="auto",
                    optional=True,
                    tooltip=(
                        "For large pictures. merge: one canvas, no seams. tile: each tile by itself, as it was "
                        "encoded. auto: as the model is configured. gpstoken-mini always merges."
                    ),
                ),
                memory_input(),
            ],
            outputs=[io.Image.Output("image_out", display_name="image", tooltip="The picture, or the batch.")],
        )

    @classmethod
    def execute(
        cls, model, tokens, width=0, height=0, scaling="resample", tiling="auto", memory_gb=0.0
    ) -> io.NodeOutput:
        for name, value, known in (("tiling", tiling, TILINGS), ("scaling", scaling, SCALINGS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}.")
        size = output_size(tokens.image_size, width, height)
        rendered, mode = size if scaling == "render" else None, None if tiling == "auto" else tiling
        progress, at_once = Progress(1000), tokens.batch_size if tokens.tile_grid == (1, 1) else 4
        with model.at_work(memory_gb, at_once, tokens.tokens_per_tile) as autoencoder:
            tokens = tokens.validate().to(model.load_device, autoencoder.dtype)
            sample = autoencoder.decode(tokens, mode=mode, size=rendered, progress=progress.share).sample
        pictures = model.processor.postprocess(sample, "pt")
        if size is not None and tuple(pictures.shape[-2:]) != size:
            pictures = comfy.utils.common_upscale(pictures, size[1], size[0], "lanczos", "disabled")
        return io.NodeOutput(to_image(pictures))


def output_size(own: tuple[int, int], width: int, height: int) -> tuple[int, int] | None:
    """(height, width) of a result from a node's inputs, in which 0 keeps the shape; None is the picture's own."""
    if width == 0 and height == 0:
        return None
    return (
        height or max(1, round(own[0] * width / own[1])),
        width or max(1, round(own[1] * height / own[0])),
    )
