"""The list of nodes."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from .nodes_codec import GPSDecode, GPSEncode
from .nodes_edit import GPSEditTokens, GPSInterpolate, GPSMergeTokens, GPSSwapTexture
from .nodes_example import GPSExampleImage
from .nodes_files import LoadGPSTokens, SaveGPSTokens
from .nodes_layout import GPSLayoutFromBoxes, GPSLayoutFromImage, GPSLayoutFromMask, GPSLayoutGenerate
from .nodes_layout_editor import GPSLayoutEditor
from .nodes_model import LoadGPSToken
from .nodes_texture import GPSTextureGenerate
from .nodes_view import GPSVisualize

NODES = [
    LoadGPSToken,
    GPSExampleImage,
    GPSEncode,
    GPSDecode,
    GPSLayoutFromImage,
    GPSLayoutGenerate,
    GPSLayoutFromMask,
    GPSLayoutFromBoxes,
    GPSLayoutEditor,
    GPSTextureGenerate,
    GPSVisualize,
    GPSEditTokens,
    GPSMergeTokens,
    GPSSwapTexture,
    GPSInterpolate,
    SaveGPSTokens,
    LoadGPSTokens,
]


class GPSTokenExtension(ComfyExtension):
    """GPSToken's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
