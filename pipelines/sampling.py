"""How a stage is sampled: its settings, and its run with a progress bar, callbacks and a way to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import BaseGuidance
from torch import Generator, Tensor

from gpstoken_diffusers.schedulers.guidance import Network, check_guider, guided_velocity, guider_velocity
from gpstoken_diffusers.schedulers.integration import FlowStep, integrate_flow, is_adaptive
from gpstoken_diffusers.schedulers.noise import draw_noise, sample_generators

if TYPE_CHECKING:
    from gpstoken_diffusers.tokens import GPSTokens

StepCallback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]
CALLBACK_INPUTS = ("latents", "tokens")


@dataclass(frozen=True)
class SamplingSettings:
    """What a caller chooses about the sampling of one stage; the meaning is told in `GPSTokenPipeline.__call__`.

    Raises:
        ValueError: an unknown callback input, a strength outside (0, 1], or a guider that is not for tokens.
        TypeError: a guider that is none.
    """

    num_inference_steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    callback_on_step_end: StepCallback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    strength: float = 1.0
    guider: BaseGuidance | None = None

    def __post_init__(self):
        check_guider(self.guider)
        unknown = sorted(set(self.callback_on_step_end_tensor_inputs) - set(CALLBACK_INPUTS))
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs can name {', '.join(CALLBACK_INPUTS)}, got {', '.join(unknown)}."
            )
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be greater than 0 and at most 1, got {self.strength!r}.")


class FlowSamplingMixin:
    """The run of either stage, for pipelines."""

    _callback_tensor_inputs = list(CALLBACK_INPUTS)
    _interrupt = False
    _num_timesteps = 0

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` (in a callback, say) to stop after the current step."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Steps of the last run, known from its first step on; those of adaptive schedulers are counted as they go."""
        return self._num_timesteps

    def _sample(
        self,
        stage: str,
        network: Network,
        labels: Sequence[int],
        shape: tuple[int, int],
        generator: Generator | Sequence[Generator] | None,
        latents: Tensor | None,
        settings: SamplingSettings,
        tokens_of: Callable[[Tensor], GPSTokens] | None = None,
    ) -> Tensor:
        """Noise to latents (B, *shape) float32.

        Args:
            stage: "layout" or "texture".
            network: of that stage.
            labels: B class numbers.
            latents: (B, *shape) where the way begins, noise at strength 1; None draws it.
            tokens_of: makes tokens of pictures of such latents, for the callback.
        """
        scheduler, model = {
            "layout": (self.layout_scheduler, self.layout_model),
            "texture": (self.scheduler, self.transformer),
        }[stage]
        device = self._execution_device
        generators = sample_generators(generator, len(labels))
        if latents is None:
            latents = draw_noise(generators, shape, device)
        elif latents.shape != (len(labels), *shape):
            raise ValueError(
                f"latents of the {stage} stage must have the shape {(len(labels), *shape)}, got {tuple(latents.shape)}."
            )
        class_labels = torch.tensor(labels, device=device)
        if settings.guider is None:
            velocity = guided_velocity(
                network, class_labels, model.null_class, settings.guidance_scale, settings.guidance_interval
            )
        elif is_adaptive(scheduler):
            raise ValueError(
                f"A guider counts steps, and {type(scheduler).__name__} has none that are known beforehand: take a "
                "sampler with steps, or leave out the guider of this stage."
            )
        else:
            velocity = guider_velocity(settings.guider, model, network, class_labels, model.null_class, scheduler)
        self._interrupt, self._num_timesteps = False, 0
        with self.progress_bar(total=settings.num_inference_steps) as progress:
            progress.set_description(stage)
            if is_adaptive(scheduler):
                progress.total = None  # nobody knows how many steps it will take

            def on_step(step: FlowStep) -> Tensor | None:
                if is_adaptive(scheduler):
                    self._num_timesteps = step.number + 1
                elif step.number == 0:
                    # Some of the way may be left out, and some schedulers evaluate twice in a step.
                    self._num_timesteps = progress.total = len(scheduler.timesteps) - scheduler.begin_index
                progress.update()
                kept = step.latents
                if settings.callback_on_step_end is not None:
                    makers = {"latents": lambda: step.latents, "tokens": lambda: tokens_of(step.denoised)}
                    given = {name: makers[name]() for name in settings.callback_on_step_end_tensor_inputs}
                    kept = settings.callback_on_step_end(self, step.number, step.timestep, given).get("latents", kept)
                return None if self.interrupt else kept

            return integrate_flow(
                scheduler,
                velocity,
                latents.to(device, torch.float32),
                settings.num_inference_steps,
                generators,
                on_step,
                settings.strength,
            )
