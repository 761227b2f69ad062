"""The first stage: where Gaussians lie."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .images import from_image
from .nodes_codec import importance_inputs, num_tokens_input, partition_arguments
from .nodes_texture import label_of, seeds
from .progress import Progress
from .sockets import GPSLayoutSocket, label_input, model_input, searched_as, seed_input, steps_input


def layout_output() -> io.Output:
    """Initial Gaussians."""
    return GPSLayoutSocket.Output("layout_out", display_name="layout", tooltip="For GPS Texture Generate.")


class GPSLayoutFromImage(io.ComfyNode):
    """The layout of a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GPSLayoutFromImage",
            display_name="GPS Layout from Image",
            category="GPSToken/layout",
            **searched_as(),
            description="Takes from a picture only where Gaussians lie: many where it is busy. No network runs for it.",
            inputs=[
                model_input(),
                io.Image.Input("image", tooltip="256 x 256 px are one tile, which models generate at once."),
                num_tokens_input(128),
                *importance_inputs(),
            ],
            outputs=[layout_output()],
        )

    @classmethod
    def execute(cls, model, image, num_tokens, importance=None, importance_strength=4.0) -> io.NodeOutput:
        arguments = partition_arguments(image, num_tokens, importance, importance_strength)
        return io.NodeOutput(model.processor.layout(from_image(image), **arguments))


class GPSLayoutGenerate(io.ComfyNode):
    """A layout that a network draws."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GPSLayoutGenerate",
            display_name="GPS Layout Generate",
            category="GPSToken/layout",
            **searched_as("sampler", "generate"),
            description="Draws at random where the Gaussians of new pictures lie, and snaps them to valid layouts.",
            inputs=[
                model_input(),
                label_input(),
                seed_input(),
                steps_input(),
                io.Float.Input(
                    "guidance",
                    default=2.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How closely to keep to the class. 1 is no guidance, and about twice as fast.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many layouts to draw."),
            ],
            outputs=[layout_output()],
        )

    @classmethod
    def execute(cls, model, label, seed, steps, guidance, batch_size) -> io.NodeOutput:
        from gpstoken_diffusers import GPSTokens

        pipe = model.pipeline("layout_model")
        progress = Progress(steps)

        def after_step(pipe, step, timestep, given):
            progress.step()
            return {}

        labels = pipe.label_ids(label_of(label)) * batch_size
        geometry = pipe.generate_layout(
            labels,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=seeds(seed, batch_size),
            callback_on_step_end=after_step,
        )
        side = model.sample_size
        return io.NodeOutput(GPSTokens.from_geometry(geometry.cpu(), (side, side)))


class GPSLayoutFromMask(io.ComfyNode):
    """A layout that follows a mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GPSLayoutFromMask",
            display_name="GPS Layout from Mask",
            category="GPSToken/layout",
            **searched_as(),
            description="Makes a layout with many small Gaussians where a mask is bright, few large ones elsewhere.",
            inputs=[
                model_input(),
                io.Mask.Input(
                    "mask",
                    tooltip="The picture will have its size. 256 x 256 px are one tile, which models generate at once.",
                ),
                num_tokens_input(128),
                io.Float.Input(
                    "strength",
                    default=8.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    tooltip="On the mask, tokens lie 1 + strength times as densely as elsewhere. 0: evenly.",
                ),
            ],
            outputs=[layout_output()],
        )

    @classmethod
    def execute(cls, model, mask, num_tokens, strength) -> io.NodeOutput:
        mask = mask[None] if mask.ndim == 2 else mask
        return io.NodeOutput(model.processor.layout_from_mask(list(mask.float()), num_tokens, strength))


class GPSLayoutFromBoxes(io.ComfyNode):
    """A layout after boxes that a user writes down."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GPSLayoutFromBoxes",
            display_name="GPS Layout from Boxes",
            category="GPSToken/layout",
            **searched_as("regions"),
            description="Makes a layout from boxes: each is one Gaussian, or is halved until there are enough.",
            inputs=[
                model_input(),
                io.String.Input(
                    "boxes",
                    multiline=True,
                    default="64, 64, 128, 128\n96, 96, 32, 32",
                    tooltip="One box a line: left, top, width, height in pixels of a 256 x 256 picture.",
                ),
                num_tokens_input(128),
            ],
            outputs=[layout_output()],
        )

    @classmethod
    def execute(cls, model, boxes, num_tokens) -> io.NodeOutput:
        from gpstoken_diffusers import GPSTokens, layout_from_boxes

        side = model.sample_size
        partition = layout_from_boxes(
            parse_boxes(boxes), num_tokens, image_size=(side, side), min_region_size=model.processor.min_region_size
        )
        return io.NodeOutput(GPSTokens.from_geometry(partition.geometry, (side, side)))


def parse_boxes(text: str) -> list[tuple[float, float, float, float]]:
    """Lines of x, y, width, height as (x0, y0, x1, y1) with the last pixels inclusive.

    Raises ValueError: no box, or a line that is none.
    """
    boxes = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            x, y, width, height = (float(part) for part in line.replace(",", " ").split())
        except ValueError as error:
            raise ValueError(
                f"Line {number} of boxes reads {line.strip()!r}, but a box is four numbers: x, y, width, height."
            ) from error
        boxes.append((x, y, x + width - 1, y + height - 1))
    if not boxes:
        raise ValueError("There is no box: write one a line, x, y, width, height in pixels.")
    return boxes
