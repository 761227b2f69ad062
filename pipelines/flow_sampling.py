"""What every pipeline of this package does between noise and latents: class labels, and the loop of a stage."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Generator, Tensor

from gpstoken_diffusers.schedulers.guidance import Network, guided_velocity
from gpstoken_diffusers.schedulers.integration import FlowStep, integrate_flow, is_adaptive
from gpstoken_diffusers.schedulers.noise import draw_noise, sample_generators

if TYPE_CHECKING:
    from gpstoken_diffusers.tokens import GPSTokens

Labels = int | str | Sequence[int | str] | Tensor | None
StepCallback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


def label_ids(labels: Labels, id2label: Mapping[int, str], null_class: int) -> list[int]:
    """Class labels as numbers.

    Args:
        labels: a number, a name (upper and lower case are alike), or a list of either; None is no class in particular.
        id2label: the model's classes. Of a name such as "Food & Drink", any comma- or "&"-separated part will do if no
            other class has it: "Food".
        null_class: the number that stands for no class.

    Raises:
        ValueError: a number out of range, or an unknown or ambiguous name; close matches are named.
        TypeError: a label of another type.
    """
    if labels is None:
        return [null_class]
    if isinstance(labels, Tensor):
        labels = labels.tolist()
    if isinstance(labels, int | str):
        labels = [labels]
    if len(labels) == 0:
        raise ValueError("class_labels is empty: give at least one label, or None for no class in particular.")
    return [_label_id(label, id2label, null_class) for label in labels]


def _label_id(label: int | str, id2label: Mapping[int, str], null_class: int) -> int:
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise TypeError(f"A class label is a number or a name, got {type(label).__name__}.")
    if isinstance(label, int):
        if not 0 <= label <= null_class:
            raise ValueError(
                f"Class labels run from 0 to {null_class - 1} ({null_class} is no class in particular), got {label}."
            )
        return label
    wanted = label.strip().casefold()
    names: dict[str, set[int]] = {}
    parts: dict[str, set[int]] = {}
    for number, name in id2label.items():
        names.setdefault(name.casefold(), set()).add(int(number))
        for part in name.replace("&", ",").split(","):
            parts.setdefault(part.strip().casefold(), set()).add(int(number))
    found = names.get(wanted) or parts.get(wanted, set())
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise ValueError(f"{label!r} names several classes: {', '.join(id2label[number] for number in sorted(found))}.")
    if not id2label:
        raise ValueError(f"This pipeline has no names for its {null_class} classes: give a number, not {label!r}.")
    close = difflib.get_close_matches(wanted, [*names, *parts], n=3)
    shown = [id2label[min(names.get(match) or parts[match])] for match in close]
    hint = f" Did you mean {' or '.join(repr(name) for name in dict.fromkeys(shown))}?" if shown else ""
    some = ", ".join(list(id2label.values())[:10])
    raise ValueError(f"There is no class {label!r}.{hint} Classes: {some}{', ...' if len(id2label) > 10 else ''}.")


class FlowSamplingMixin:
    """The loop of both stages, for pipelines: a progress bar, callbacks, and stopping between two steps."""

    _callback_tensor_inputs = ["latents", "tokens"]
    _interrupt = False

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` (in a callback, say) to stop after the current step."""
        return self._interrupt

    def _sample(
        self,
        stage: str,
        scheduler: SchedulerMixin,
        network: Network,
        shape: tuple[int, int],
        labels: Sequence[int],
        null_class: int,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        generator: Generator | Sequence[Generator] | None,
        latents: Tensor | None,
        strength: float = 1.0,
        tokens_of: Callable[[Tensor], GPSTokens] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Tensor:
        """Noise to latents (B, *shape) float32 with a progress bar named after the stage.

        `tokens_of` makes tokens of pictures of such latents, for the callback.
        """
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs can name {', '.join(self._callback_tensor_inputs)}, got "
                f"{', '.join(sorted(unknown))}."
            )
        device = self._execution_device
        generators = sample_generators(generator, len(labels))
        if latents is None:
            latents = draw_noise(generators, shape, device)
        elif latents.shape != (len(labels), *shape):
            raise ValueError(
                f"latents of the {stage} stage must have the shape {(len(labels), *shape)}, got {tuple(latents.shape)}."
            )
        class_labels = torch.tensor(labels, device=device)
        velocity = guided_velocity(network, class_labels, null_class, guidance_scale, guidance_interval)
        self._interrupt = False
        with self.progress_bar(total=num_inference_steps) as progress:
            progress.set_description(stage)
            if is_adaptive(scheduler):
                progress.total = None  # nobody knows how many steps it will take

            def on_step(step: FlowStep) -> Tensor | None:
                latents = step.latents
                if step.number == 0 and progress.total is not None:
                    # Some of the way may be left out, and some schedulers evaluate twice in a step.
                    progress.total = len(scheduler.timesteps) - scheduler.begin_index
                progress.update()
                if callback_on_step_end is not None:
                    makers = {"latents": lambda: latents, "tokens": lambda: tokens_of(step.denoised)}
                    given = {name: makers[name]() for name in callback_on_step_end_tensor_inputs}
                    latents = callback_on_step_end(self, step.number, step.timestep, given).get("latents", latents)
                return None if self.interrupt else latents

            return integrate_flow(
                scheduler,
                velocity,
                latents.to(device, torch.float32),
                num_inference_steps,
                generators,
                on_step,
                strength,
            )
