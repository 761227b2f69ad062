"""ComfyUI nodes over GPSToken; installed as `gpstoken_diffusers.comfyui_nodes`.

Nodes hold no mathematics: they turn ComfyUI's pictures and masks into what the package takes, and back. Importing this
imports neither PyTorch nor the package's models; the nodes do, when they run.
"""

from __future__ import annotations

from pathlib import Path

WEB_DIRECTORY = str(Path(__file__).resolve().parent / "web")
"""What the page loads: help pages, pictures and the Layout Editor's script."""


async def comfy_entrypoint():
    """Called by ComfyUI once; returns the extension that lists the nodes."""
    from .extension import GPSTokenExtension

    return GPSTokenExtension()
