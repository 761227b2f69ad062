"""The second stage: what Gaussians show."""

from __future__ import annotations

import time

from comfy.cli_args import LatentPreviewMethod, args
from comfy_api.v0_0_2 import io

from .images import fitting_mask, given_mask, image_to_pil, to_image
from .progress import Progress
from .sockets import (
    SAMPLERS,
    GPSLayoutSocket,
    GPSTokensSocket,
    label_input,
    model_input,
    searched_as,
    seed_input,
    steps_input,
)

PREVIEW_SHARE = 0.2  # of the time; with quick networks, not every step is shown


def label_of(text: str) -> str | int | None:
    """What a user wrote as a class: a name, a number, or nothing."""
    text = text.strip()
    return int(text) if text.isdecimal() else text or None


def seeds(seed: int, count: int) -> list:
    """A generator for each picture of a batch."""
    import torch

    return [torch.Generator().manual_seed(seed + number) for number in range(count)]


class GPSTextureGenerate(io.ComfyNode):
    """New textures for a layout, or for a part of a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GPSTextureGenerate",
            display_name="GPS Texture Generate",
            category="GPSToken",
            description=(
                "Generates what the Gaussians of a layout show. With tokens connected, it starts from those: denoise "
                "says how far to go, and a mask which part of the picture to make anew."
            ),
            **searched_as("sampler", "inpaint", "generate"),
            inputs=[
                model_input(),
                GPSLayoutSocket.Input("layout", tooltip="Where the Gaussians lie."),
                label_input(),
                seed_input(),
                steps_input(),
                io.Combo.Input(
                    "sampler",
                    options=SAMPLERS,
                    default="unipc",
                    tooltip=(
                        "unipc, dpm++ and heun do well in 20 steps, though those of heun take twice as long. euler and "
                        "sde want 50, official-sde, official-sde-heun and official-ode-euler 250. official-ode chooses "
                        "its steps itself."
                    ),
                ),
                io.Float.Input(
                    "guidance",
                    default=3.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How closely to keep to the class. 1 is no guidance, and about twice as fast.",
                ),
                io.Float.Input(
                    "guidance_start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Where guidance begins: 0 is noise, 1 is the picture.",
                ),
                io.Float.Input(
                    "guidance_end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Where guidance ends: 0 is noise, 1 is the picture.",
                ),
                GPSTokensSocket.Input(
                    "tokens", optional=True, tooltip="Tokens to start from: of GPS Encode, together with its layout."
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="With tokens: how far to go from them. At 1 nothing of the old picture is left.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="With tokens: which to make anew. Others stay exactly as they are."
                ),
            ],
            outputs=[GPSTokensSocket.Output("tokens_out", display_name="tokens", tooltip="For GPS Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        layout,
        label,
        seed,
        steps,
        sampler,
        guidance,
        guidance_start=0.0,
        guidance_end=1.0,
        tokens=None,
        denoise=1.0,
        mask=None,
    ) -> io.NodeOutput:
        from gpstoken_diffusers import make_sampler
        from gpstoken_diffusers.token_editing import select_by_mask

        mask = given_mask(mask)
        if tokens is None and (denoise < 1 or mask is not None):
            given = "a mask is connected" if mask is not None else f"denoise is {denoise:g}"
            raise ValueError(f"{given}, but no tokens to start from: connect those of GPS Encode.")
        pipe = model.pipeline("transformer", "autoencoder")
        pipe.scheduler, scheduler_steps = make_sampler(sampler, steps)
        options = {
            "num_inference_steps": scheduler_steps or steps,
            "guidance_scale": guidance,
            "guidance_interval": (guidance_start, guidance_end),
            "generator": seeds(seed, layout.batch_size),
            "callback_on_step_end": _Preview(model, steps),
            "callback_on_step_end_tensor_inputs": ["tokens"],
        }
        if tokens is None:
            made = pipe.generate_texture(layout, label_of(label), **options)
        else:
            selection = None
            if mask is not None:
                mask = fitting_mask(mask, tokens.batch_size, tokens.image_size)
                selection = select_by_mask(tokens, mask, reach_sigmas=1.5)
                if not selection.any():
                    raise ValueError("The mask is empty, or reaches no token: paint where something new is to come.")
            made = pipe.regenerate_tokens(tokens, layout, label_of(label), denoise, selection, **options)
        return io.NodeOutput(made.cpu())


class _Preview(Progress):
    """Shows what the picture will be, and stops when the user cancels."""

    def __init__(self, model, steps: int):
        super().__init__(steps)
        self._model = model
        self._not_before = 0.0

    def __call__(self, pipe, step, timestep, given) -> dict:
        from gpstoken_diffusers.schedulers.integration import is_adaptive

        started = time.monotonic()
        preview = None
        # Read each time: ComfyUI changes it with every prompt that has a setting of its own.
        if args.preview_method != LatentPreviewMethod.NoPreviews and started >= self._not_before:
            pictures = pipe.decode(given["tokens"][:1], "pt")
            preview = ("JPEG", image_to_pil(to_image(pictures))[0], args.preview_size)
            finished = time.monotonic()
            self._not_before = finished + (finished - started) * (1 / PREVIEW_SHARE - 1)
        # Part of the way may be left out, and some samplers step twice; one chooses its steps as it goes.
        scheduler = pipe.scheduler
        self.step(preview, None if is_adaptive(scheduler) else len(scheduler.timesteps) - (scheduler.begin_index or 0))
        return {}
