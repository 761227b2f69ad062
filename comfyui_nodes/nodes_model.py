"""Where a graph begins: the model."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from . import installation
from .models import DTYPES, GPSModel, find_model, list_models, model_fingerprint
from .sockets import GPSModelSocket, searched_as


class LoadGPSToken(io.ComfyNode):
    """A model of models/gpstoken, or the one that the package ships."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadGPSToken",
            display_name="Load GPSToken",
            category="GPSToken",
            **searched_as("vae", "load vae", "checkpoint"),
            description=(
                "Loads a GPSToken model: the small one that ships with the package, a folder that save_pretrained "
                "wrote, or an official .safetensors file. Put others into ComfyUI/models/gpstoken."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=list_models(),
                    tooltip=(
                        "gpstoken-mini encodes, generates and decodes. Single files only encode and decode; the three "
                        "released ones, gpstoken_s64, m128 and l256, are downloaded when they are first used."
                    ),
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    optional=True,
                    tooltip="What the networks compute in. auto: what ComfyUI chooses for this device, or the nearest.",
                ),
            ],
            outputs=[
                GPSModelSocket.Output(
                    "model_out", display_name="model", tooltip="For every node that encodes, generates or decodes."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        try:
            installation.check()
            if model_name is not None:  # else it comes from another node, and is not known yet
                find_model(model_name)
        except (ValueError, RuntimeError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None = None, dtype: str | None = "auto") -> object:
        # Of a name that another node gives, nothing is known but that it is one of these.
        return [model_fingerprint(name) for name in ([model_name] if model_name is not None else list_models())]

    @classmethod
    def execute(cls, model_name: str, dtype: str = "auto") -> io.NodeOutput:
        installation.check()
        return io.NodeOutput(GPSModel.load(model_name, dtype))
