"""What every pipeline of this package does between noise and latents: generators, labels, guidance, the loop."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Generator, Tensor

from gpstoken_diffusers.schedulers.flow_time import data_times, set_timesteps, to_model_output

if TYPE_CHECKING:
    from gpstoken_diffusers.tokens import GPSTokens

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
Labels = int | str | Sequence[int | str] | Tensor | None
StepCallback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


def sample_generators(generator: Generator | Sequence[Generator] | None, batch_size: int) -> list[Generator]:
    """One CPU generator per sample, so that a sample depends on its own seed alone.

    Args:
        generator: one for all, from which the samples' seeds are drawn in turn (the first sample is that of a batch of
            one); a list with one per sample; or None for seeds nobody chose. Generators of other devices only give
            their seeds: noise is always drawn on the CPU, where every machine draws the same.
        batch_size: number of samples.

    Raises:
        TypeError: something that is no generator.
        ValueError: a list of another length.
    """
    if generator is None or isinstance(generator, Generator):
        sources = [generator] * batch_size
    else:
        sources = list(generator)
        if len(sources) != batch_size:
            raise ValueError(f"Give one generator, or one for each of the {batch_size} samples; got {len(sources)}.")
    generators = []
    for source in sources:
        if not isinstance(source, Generator | None):
            raise TypeError(f"generator must be a torch.Generator or a list of them, got {type(source).__name__}.")
        device = "cpu" if source is None else source.device
        seed = torch.randint(2**62, (), generator=source, device=device).item()
        generators.append(Generator().manual_seed(seed))
    return generators


def draw_noise(generators: Sequence[Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal noise (B, *shape) float32: row i from generator i, drawn on the CPU."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


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


def guided_velocity(
    network: Velocity,
    class_labels: Tensor,
    null_class: int,
    guidance_scale: float,
    guidance_interval: tuple[float, float],
) -> Callable[[Tensor, float], Tensor]:
    """The velocity under classifier-free guidance, u + scale (c - u), evaluated no oftener than needed.

    Args:
        network: (latents (B, N, C), time (B,), labels (B,)) -> velocity (B, N, C).
        class_labels: (B,) int64.
        null_class: the label of the unconditional prediction u.
        guidance_scale: 1 is no guidance. Then, for samples without a class, and at times outside the interval, the
            network is evaluated once and without a second half.
        guidance_interval: (first, last) time of guidance, inclusive, in flow time: 0 is noise, 1 is data.

    Returns: (latents, time) -> velocity.

    Raises ValueError: a scale below 0, or an interval that is reversed or outside [0, 1].
    """
    first, last = guidance_interval
    if not 0 <= first <= last <= 1:
        raise ValueError(
            f"guidance_interval is (first, last) with 0 <= first <= last <= 1 in flow time (0 noise, 1 data), got "
            f"{tuple(guidance_interval)}."
        )
    if guidance_scale < 0:
        raise ValueError(f"guidance_scale must not be negative, got {guidance_scale}.")
    guidable = guidance_scale != 1 and bool((class_labels != null_class).any())
    both = torch.cat([class_labels, torch.full_like(class_labels, null_class)])

    def velocity(latents: Tensor, time: float) -> Tensor:
        if not guidable or not first <= time <= last:
            towards_data = network(latents, latents.new_full((len(latents),), time), class_labels)
            # A copy: some schedulers keep it, and a network recorded as a CUDA graph writes its next result over it.
            return towards_data.to(torch.float32, copy=True)
        doubled = torch.cat([latents, latents])
        conditional, unconditional = network(doubled, doubled.new_full((len(doubled),), time), both).float().chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return velocity


def integrate_flow(
    scheduler: SchedulerMixin,
    velocity: Callable[[Tensor, float], Tensor],
    latents: Tensor,
    num_inference_steps: int,
    generators: Sequence[Generator],
    on_step: Callable[[int, float, Tensor, Tensor, Tensor], Tensor | None],
    strength: float = 1.0,
) -> Tensor:
    """From noise to data by any flow scheduler.

    Args:
        scheduler: of diffusers or of this package.
        velocity: (latents, flow time) -> data - noise.
        latents: (B, N, C) float32 at the flow time at which the steps begin.
        num_inference_steps: steps of the whole way; a scheduler that chooses its own steps ignores it.
        generators: one per sample, for schedulers that add noise.
        on_step: called after every step with (its number from 0, the flow time it started at, the scheduler's timestep
            as a tensor, the latents, and what the network expected at the step's start that they will end as; the
            latents themselves, from schedulers that choose their own steps); the latents that it returns are taken
            from there on; None ends the way.
        strength: the part of the way to go, see [`set_timesteps`].

    Returns: (B, N, C) float32.
    """
    if hasattr(scheduler, "integrate"):
        steps = 0

        def callback(time: float, state: Tensor) -> bool:
            nonlocal steps
            kept = on_step(steps, time, torch.tensor(1000 * (1 - time)), state, state)
            steps += 1
            return kept is None

        return scheduler.integrate(velocity, latents, start_time=1 - strength, callback=callback)
    begin = set_timesteps(scheduler, num_inference_steps, latents.device, strength)
    draws_noise = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": list(generators)} if draws_noise else {}
    times = data_times(scheduler)
    for number, (timestep, time) in enumerate(zip(scheduler.timesteps[begin:], times[begin:], strict=True)):
        towards_data = velocity(latents, time)
        stepped = scheduler.step(to_model_output(towards_data), timestep, latents, **options).prev_sample
        kept = on_step(number, time, timestep, stepped, latents + (1 - time) * towards_data)
        if kept is None:
            return stepped
        latents = kept
    return latents


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
        network: Callable[[Tensor, Tensor, Tensor], Tensor],
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
            if hasattr(scheduler, "integrate"):
                progress.total = None  # nobody knows how many steps it will take

            def on_step(number: int, time: float, timestep: Tensor, latents: Tensor, denoised: Tensor) -> Tensor | None:
                if number == 0 and progress.total is not None:
                    # Some of the way may be left out, and some schedulers evaluate twice in a step.
                    progress.total = len(scheduler.timesteps) - scheduler.begin_index
                progress.update()
                if callback_on_step_end is not None:
                    makers = {"latents": lambda: latents, "tokens": lambda: tokens_of(denoised)}
                    given = {name: makers[name]() for name in callback_on_step_end_tensor_inputs}
                    latents = callback_on_step_end(self, number, timestep, given).get("latents", latents)
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
