"""Pictures of Gaussians."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .images import image_to_pil, pil_to_image
from .nodes_codec import output_size
from .sockets import GPSLayoutSocket, GPSTokensSocket, searched_as

STYLES = ["ellipses", "glow"]


class GPSVisualize(io.ComfyNode):
    """Where Gaussians lie, as a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GPSVisualize",
            display_name="GPS Visualize",
            category="GPSToken",
            **searched_as("ellipses", "preview"),
            description="Draws Gaussians as ellipses or as lights, over a picture or alone.",
            inputs=[
                io.MultiType.Input("tokens", [GPSTokensSocket, GPSLayoutSocket], tooltip="Tokens, or a layout."),
                io.Combo.Input(
                    "style",
                    options=STYLES,
                    default="ellipses",
                    tooltip="ellipses: outlines. glow: lights on a dark ground, in the picture's colours.",
                ),
                io.Image.Input("image", optional=True, tooltip="What to draw over, or to take colours from."),
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
            ],
            outputs=[io.Image.Output("image_out", display_name="image", tooltip="For Preview Image or Save Image.")],
        )

    @classmethod
    def execute(cls, tokens, style, image=None, width=0, height=0) -> io.NodeOutput:
        from gpstoken_diffusers import visualize_gaussians

        pictures = None
        if image is not None:
            pictures = image_to_pil(image)
            if len(pictures) == 1:
                pictures = pictures * tokens.batch_size
        drawn = visualize_gaussians(tokens, pictures, style, output_size(tokens.image_size, width, height))
        return io.NodeOutput(pil_to_image(drawn))
