"""GPSToken (arXiv 2509.01109) for diffusers: images as 2D Gaussians with texture.

Importing this package imports nothing heavy: each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_MODULE_OF = {
    "AutoencoderGPSToken": "models.autoencoder_gpstoken",
    "FlowMatchDopri5Scheduler": "schedulers.scheduling_dopri5",
    "GPSTokenAutoModel": "models.auto_model",
    "GPSTokenImageProcessor": "image_processor",
    "GPSTokenImg2ImgPipeline": "pipelines.pipeline_gpstoken_img2img",
    "GPSTokenInpaintPipeline": "pipelines.pipeline_gpstoken_inpaint",
    "GPSTokenLayoutModel": "models.transformer_gpstoken_layout",
    "GPSTokenPipeline": "pipelines.pipeline_gpstoken",
    "GPSTokenSDEScheduler": "schedulers.scheduling_gpstoken_sde",
    "GPSTokenTransformerModel": "models.transformer_gpstoken",
    "GPSTokens": "tokens",
    "LayoutBank": "layouts.bank",
    "calibrate_layout": "layouts.calibration",
    "layout_from_boxes": "layouts.requested",
    "layout_from_mask": "layouts.requested",
    "make_sampler": "schedulers.presets",
    "partition_image": "ops.partition",
    "splat_gaussians": "ops.splat",
    "visualize_gaussians": "visualization",
}
__all__ = ["__version__", *_MODULE_OF]

# In a plain checkout (a clone in ComfyUI's custom_nodes, say) `pipelines` and `comfyui_nodes` lie beside this folder;
# an installed package holds them inside. Looking there too makes `gpstoken_diffusers.pipelines` mean the same in both.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "csrc").is_dir() and (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
