"""Pictures changed by their tokens."""

from __future__ import annotations

import math

from comfy_api.v0_0_2 import io

from .images import fitting_mask, given_mask
from .sockets import GPSTokensSocket, searched_as

ACTIONS = ["move", "scale", "rotate", "flip horizontally", "flip vertically", "duplicate", "delete"]
MASK_SELECTS = ["center", "footprint"]


def tokens_output() -> io.Output:
    """Changed tokens."""
    return GPSTokensSocket.Output("tokens_out", display_name="tokens", tooltip="For GPS Decode.")


class GPSEditTokens(io.ComfyNode):
    """Selected tokens moved, scaled, turned, mirrored, duplicated or deleted."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GPSEditTokens",
            display_name="GPS Edit Tokens",
            category="GPSToken/edit",
            **searched_as("move", "scale", "rotate"),
            description=(
                "Moves, scales, turns, mirrors, duplicates or deletes tokens: all, those under a mask, or those of "
                "a certain size. With gpstoken-mini, pixels far from them stay exactly as they are."
            ),
            inputs=[
                GPSTokensSocket.Input("tokens", tooltip="The picture to change."),
                io.Combo.Input(
                    "action", options=ACTIONS, default="move", tooltip="What to do with the selected tokens."
                ),
                io.Mask.Input("mask", optional=True, tooltip="Selects the tokens under it. Without it: all."),
                io.Combo.Input(
                    "mask_selects",
                    options=MASK_SELECTS,
                    default="center",
                    optional=True,
                    tooltip="center: tokens whose centre is masked. footprint: all that paint on the mask.",
                ),
                io.Float.Input(
                    "smallest_px",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    optional=True,
                    tooltip="Leaves out tokens whose mean sigma is less than this many pixels.",
                ),
                io.Float.Input(
                    "largest_px",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    optional=True,
                    tooltip="Leaves out tokens whose mean sigma is more than this many pixels. 0: no limit.",
                ),
                io.Float.Input(
                    "dx",
                    default=32.0,
                    min=-16384.0,
                    max=16384.0,
                    step=4.0,
                    optional=True,
                    tooltip="For move and duplicate: pixels to the right.",
                ),
                io.Float.Input(
                    "dy",
                    default=0.0,
                    min=-16384.0,
                    max=16384.0,
                    step=4.0,
                    optional=True,
                    tooltip="For move and duplicate: pixels down.",
                ),
                io.Float.Input(
                    "factor",
                    default=1.5,
                    min=0.01,
                    max=100.0,
                    step=0.05,
                    optional=True,
                    tooltip="For scale: above 1 enlarges, below 1 shrinks, about the middle of what is selected.",
                ),
                io.Float.Input(
                    "degrees",
                    default=30.0,
                    min=-360.0,
                    max=360.0,
                    step=5.0,
                    optional=True,
                    tooltip="For rotate: counter-clockwise. The Gaussians turn, but what each shows stays upright.",
                ),
            ],
            outputs=[tokens_output()],
        )

    @classmethod
    def execute(
        cls,
        tokens,
        action,
        mask=None,
        mask_selects="center",
        smallest_px=0.0,
        largest_px=0.0,
        dx=32.0,
        dy=0.0,
        factor=1.5,
        degrees=30.0,
    ) -> io.NodeOutput:
        from gpstoken_diffusers import token_editing

        selection = token_editing.select_by_size(tokens, smallest_px, largest_px or math.inf)
        if (mask := given_mask(mask)) is not None:
            mask = fitting_mask(mask, tokens.batch_size, tokens.image_size)
            selection = selection & token_editing.select_by_mask(tokens, mask, mask_selects)
        if not selection.any():
            raise ValueError(
                "No token is selected: paint on the mask where the tokens are, or widen the range of sizes."
            )
        actions = {
            "move": lambda: token_editing.move_tokens(tokens, selection, dx, dy),
            "scale": lambda: token_editing.scale_tokens(tokens, selection, factor),
            "rotate": lambda: token_editing.rotate_tokens(tokens, selection, degrees),
            "flip horizontally": lambda: token_editing.flip_tokens(tokens, selection, "horizontal"),
            "flip vertically": lambda: token_editing.flip_tokens(tokens, selection, "vertical"),
            "duplicate": lambda: token_editing.duplicate_tokens(tokens, selection, dx, dy),
            "delete": lambda: token_editing.delete_tokens(tokens, selection),
        }
        if action not in actions:
            raise ValueError(f"action must be one of {', '.join(ACTIONS)}, not {action!r}.")
        return io.NodeOutput(actions[action]())


class GPSMergeTokens(io.ComfyNode):
    """Two pictures put together by a mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GPSMergeTokens",
            display_name="GPS Merge Tokens",
            category="GPSToken/edit",
            **searched_as("composite"),
            description="Puts two pictures together: tokens of one under a mask, of the other elsewhere.",
            inputs=[
                GPSTokensSocket.Input("outside", tooltip="The picture outside the mask."),
                GPSTokensSocket.Input("inside", tooltip="The picture under the mask, of the same size."),
                io.Mask.Input("mask", tooltip="A mask of the pictures' size."),
            ],
            outputs=[tokens_output()],
        )

    @classmethod
    def execute(cls, outside, inside, mask) -> io.NodeOutput:
        from gpstoken_diffusers.token_editing import merge_tokens

        mask = fitting_mask(mask, outside.batch_size, outside.image_size)
        return io.NodeOutput(merge_tokens(outside, inside, mask))


class GPSSwapTexture(io.ComfyNode):
    """The Gaussians of one picture with the textures of another."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GPSSwapTexture",
            display_name="GPS Swap Texture",
            category="GPSToken/edit",
            **searched_as(),
            description="Fills the Gaussians of one picture with what their counterparts show in another.",
            inputs=[
                GPSTokensSocket.Input("geometry", tooltip="The picture whose Gaussians stay."),
                GPSTokensSocket.Input("texture", tooltip="The picture whose textures they get, with as many tokens."),
            ],
            outputs=[tokens_output()],
        )

    @classmethod
    def execute(cls, geometry, texture) -> io.NodeOutput:
        from gpstoken_diffusers.token_matching import swap_texture

        return io.NodeOutput(swap_texture(geometry, texture))


class GPSInterpolate(io.ComfyNode):
    """The way between two pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GPSInterpolate",
            display_name="GPS Interpolate",
            category="GPSToken/edit",
            **searched_as("morph"),
            description="Makes a batch of pictures between two: every Gaussian travels to its counterpart.",
            inputs=[
                GPSTokensSocket.Input("first", tooltip="One picture."),
                GPSTokensSocket.Input("last", tooltip="Another, with as many tokens."),
                io.Int.Input(
                    "frames", default=8, min=1, max=256, tooltip="Number of pictures, first and last included."
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Where on the way the first frame is, from 0 to 1. A single frame is taken there.",
                ),
                io.Float.Input(
                    "end", default=1.0, min=0.0, max=1.0, step=0.01, optional=True, tooltip="Where the last frame is."
                ),
            ],
            outputs=[tokens_output()],
        )

    @classmethod
    def execute(cls, first, last, frames, start=0.0, end=1.0) -> io.NodeOutput:
        import torch

        from gpstoken_diffusers import GPSTokens
        from gpstoken_diffusers.token_matching import interpolate_tokens, match_tokens

        matching = match_tokens(first, last)
        weights = torch.linspace(start, end, frames).tolist()
        return io.NodeOutput(
            GPSTokens.concatenate([interpolate_tokens(first, last, weight, matching) for weight in weights])
        )
