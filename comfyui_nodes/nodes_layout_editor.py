"""Gaussians moved, reshaped, added and deleted by hand, in the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.v0_0_2 import io, ui
from comfy_execution.graph import ExecutionBlocker

from .sockets import GPSLayoutSocket, GPSTokensSocket, searched_as, where_known

if TYPE_CHECKING:
    import torch

    from gpstoken_diffusers import GPSTokens

    from .layout_edits import LayoutEdits

DIGITS = 6  # of what the page shows; Gaussians that nobody touches keep all theirs
FOREIGN_EDITS = (
    "the edits in GPS Layout Editor were made on another layout, of another picture or seed, and are not applied: "
    "press Apply anyway or Reset in the editor, or bring that layout back."
)


class GPSLayoutEditor(io.ComfyNode):
    """An editor in the page, by web/layout_editor.js; what somebody did there comes as the input `edits`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GPSLayoutEditor",
            display_name="GPS Layout Editor",
            category="GPSToken",
            **searched_as("draw", "canvas"),
            description=(
                "Shows Gaussians as ellipses, to be moved, scaled, turned, added, deleted with the mouse. Run once "
                "to see them; from then on each run applies what was done."
            ),
            inputs=[
                io.MultiType.Input(
                    "tokens", [GPSTokensSocket, GPSLayoutSocket], tooltip="Tokens, or a layout without textures."
                ),
                io.Image.Input("image", optional=True, tooltip="What to show behind the ellipses."),
                io.String.Input(
                    "edits", default="", optional=True, socketless=True, tooltip="What the editor did, as JSON."
                ),
            ],
            outputs=[
                GPSTokensSocket.Output(
                    "tokens_out", display_name="tokens", tooltip="The edited tokens, for GPS Decode; none of a layout."
                ),
                GPSLayoutSocket.Output(
                    "layout_out", display_name="layout", tooltip="The edited Gaussians without textures."
                ),
            ],
            is_output_node=True,
            **where_known(has_intermediate_output=True),  # shown again where the page was opened anew
        )

    @classmethod
    def execute(cls, tokens, edits="", image=None) -> io.NodeOutput:
        from gpstoken_diffusers import GPSTokens

        from .layout_edits import LayoutEdits

        edits = LayoutEdits.parse(edits)
        view = {"layout_editor": [shown(tokens.validate(), image, edits)]}
        if edits.is_foreign_to(tokens):
            # Not an error of this node: the page would then keep showing the layout of before, and nobody could choose.
            blocker = ExecutionBlocker(FOREIGN_EDITS)
            return io.NodeOutput(blocker, blocker, ui=view)
        edited = edits.apply(tokens)
        layout = GPSTokens.from_geometry(edited.geometry, edited.image_size, edited.tile_grid, edited.canvas_size)
        if tokens.is_layout:
            edited = ExecutionBlocker(
                "the editor was given a layout, which has no textures: connect its output layout, or give it tokens."
            )
        return io.NodeOutput(edited, layout, ui=view)


def shown(tokens: GPSTokens, image: torch.Tensor | None, edits: LayoutEdits) -> dict:
    """What the page draws: the first picture's Gaussians before all edits, and what lies behind them.

    The page takes the edits to be of this layout if they have its fingerprint to the digit, so that only
    `is_foreign_to` knows of tolerances: a layout that the edits fit gets the fingerprint that they carry.
    """
    from gpstoken_diffusers.token_editing import deleted_tokens

    from .layout_edits import layout_fingerprint

    first = tokens[0]
    known = edits.fingerprint is not None and not edits.is_empty and edits.num_tokens == tokens.num_tokens
    fits = known and not edits.is_foreign_to(first)
    rows = [[round(number, DIGITS) for number in row] for row in first.geometry[0].tolist()]
    gone = deleted_tokens(first)[0].tolist()
    background = None if image is None else ui.PreviewImage(image[:1, ..., :3]).values[0]
    return {
        "geometry": [None if dead else row for row, dead in zip(rows, gone, strict=True)],
        "image_size": list(tokens.image_size),
        "canvas_size": list(tokens.canvas_size),
        "fingerprint": list(edits.fingerprint if fits else layout_fingerprint(first)),
        "background": background,
    }
