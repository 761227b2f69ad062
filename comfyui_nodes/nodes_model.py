"""Where a graph begins: the model."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from . import installation
from .models import DTYPES, GPSModel, find_model, list_models, model_fingerprint
from .sockets import GPSModelSocket


class LoadGPSToken(io.ComfyNode):
    """A model of models/gpstoken, or the one that the package ships."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadGPSToken",
            display_name="Load GPSToken",
            category="GPSToken",
            description=(
                "Loads a GPSToken model: the small one that ships with the package, a folder that save_pretrained "
                "wrote, or an official .safetensors file. Put others into ComfyUI/models/gpstoken."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=list_models(),
                    tooltip="gpstoken-mini encodes, generates and decodes. Single files only encode and decode.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    optional=True,
                    tooltip="What the networks compute in. auto: what ComfyUI chooses for this device.",
                ),
            ],
            outputs=[
                GPSModelSocket.Output(
                    "model_out", display_name="model", tooltip="For every node that encodes, generates or decodes."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name: str) -> bool | str:
        try:
            installation.check()
            find_model(model_name)
        except (ValueError, RuntimeError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model_name: str, dtype: str = "auto") -> object:
        return model_fingerprint(model_name)

    @classmethod
    def execute(cls, model_name: str, dtype: str = "auto") -> io.NodeOutput:
        installation.check()
        return io.NodeOutput(GPSModel.load(model_name, dtype))
