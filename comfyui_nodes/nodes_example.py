"""Pictures that ship with the package, so that example workflows run as they are."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from . import installation
from .images import pil_to_image
from .sockets import searched_as

PICTURES = ["kingfisher", "duck", "honey pot"]


class GPSExampleImage(io.ComfyNode):
    """A picture to try things on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GPSExampleImage",
            display_name="GPS Example Image",
            category="GPSToken/files",
            **searched_as(),
            description="A picture that ships with GPSToken. For your own, put Load Image in its place.",
            inputs=[
                io.Combo.Input(
                    "picture",
                    options=PICTURES,
                    default="kingfisher",
                    tooltip="A photograph of 768 x 512 px, and two emoji of 256 x 256 px, which is one tile.",
                )
            ],
            outputs=[
                io.Image.Output("image_out", display_name="image", tooltip="The picture, on white."),
                io.Mask.Output("mask_out", display_name="mask", tooltip="The emoji's shape; all of the photograph."),
            ],
        )

    @classmethod
    def execute(cls, picture) -> io.NodeOutput:
        installation.check()
        import numpy as np
        import torch
        from PIL import Image

        from gpstoken_diffusers.assets import EXAMPLE_PICTURES

        if picture not in EXAMPLE_PICTURES:
            raise ValueError(f"picture must be one of {', '.join(PICTURES)}, not {picture!r}.")
        loaded = Image.open(EXAMPLE_PICTURES[picture]).convert("RGBA")
        white = Image.new("RGBA", loaded.size, "white")
        shape = torch.from_numpy(np.asarray(loaded.getchannel("A")) / np.float32(255))
        return io.NodeOutput(pil_to_image([Image.alpha_composite(white, loaded)]), shape[None])
