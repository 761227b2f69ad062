"""One method on all pictures of a resolution: how good, how large, how fast, how much memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from gpstoken_diffusers import GPSTokenImageProcessor
from gpstoken_diffusers.evaluation.metrics import psnr, ssim

from .judges import Judges, SetDistances
from .methods import Method
from .squares import Squares

PSNR, SSIM, CODED_PSNR = "PSNR, dB", "SSIM", "PSNR of coded, dB"
CODED, FLOAT16, FLOAT32 = "bytes, coded", "bytes, float16", "bytes, float32"
ENCODED_PER_SECOND, DECODED_PER_SECOND, MEMORY = "encoded per s", "decoded per s", "memory, MB"


@dataclass(frozen=True)
class Case:
    """A picture and its reconstruction, with its PSNR in dB."""

    psnr: float
    place: int
    picture: Image.Image
    reconstruction: Image.Image


class Cases:
    """The `count` pictures that came out worst, and as many that came out best."""

    def __init__(self, count: int):
        self.count = count
        self.worst: list[Case] = []
        self.best: list[Case] = []

    def add(self, values: list[float], places: list[int], images: Tensor, outputs: Tensor) -> None:
        """Pictures (B, 3, R, R) and their reconstructions, both in [-1, 1]."""
        if self.count == 0:
            return
        for number, (value, place) in enumerate(zip(values, places, strict=True)):
            bad = len(self.worst) < self.count or value < self.worst[-1].psnr
            good = len(self.best) < self.count or value > self.best[-1].psnr
            if not (bad or good):
                continue
            pair = torch.stack([images[number], outputs[number]])
            case = Case(value, place, *GPSTokenImageProcessor().postprocess(pair))
            self.worst = sorted([*self.worst, case], key=lambda case: case.psnr)[: self.count]
            self.best = sorted([*self.best, case], key=lambda case: -case.psnr)[: self.count]


@dataclass
class Row:
    """What a table says of a method at a resolution.

    Attributes:
        method: its name.
        resolution: side of the pictures in pixels.
        pictures: how many there were.
        tokens, numbers: of a picture; None where there are none.
        parameters: of the method.
        figures: means over the pictures, and distances of the whole set; None where there are none.
        psnr: of each picture, by its place.
        coded_bytes: of each picture, by its place.
        cases: the worst and the best pictures.
    """

    method: str
    resolution: int
    pictures: int
    tokens: int | None
    numbers: int | None
    parameters: int
    figures: dict[str, float | None]
    psnr: dict[int, float] = field(repr=False)
    coded_bytes: dict[int, int] = field(repr=False)
    cases: Cases = field(repr=False)


@torch.no_grad()
def describe_pictures(squares: Squares, judges: Judges, batch_size: int, device: str) -> SetDistances | None:
    """What compares reconstructions with these pictures; None without a judge of features."""
    if not judges.features:
        return None
    sets = SetDistances(judges.features)
    with tqdm(total=len(squares), desc=f"features at {squares.resolution} px", unit="picture") as progress:
        for places, images in squares.batches(batch_size):
            sets.add(images.to(device), real=True)
            progress.update(len(places))
    return sets


@torch.no_grad()
def measure(
    method: Method,
    squares: Squares,
    judges: Judges = Judges(),  # noqa: B008 (frozen)
    sets: SetDistances | None = None,
    batch_size: int = 4,
    device: str = "cpu",
    num_cases: int = 0,
) -> Row:
    """Runs a method on all pictures.

    The first batch is run twice: to warm up and watch memory, and for everything else.

    Args:
        method: what to measure.
        squares: the pictures.
        judges: the networks.
        sets: what [`describe_pictures`] returned for these pictures.
        batch_size: pictures that pass through the networks together.
        device: where pictures are compared.
        num_cases: how many of the worst pictures to keep, and of the best.

    Raises:
        ValueError: the method does not make pictures of the same size, or what the method itself raises.
    """
    sums: dict[str, list[Tensor]] = {}
    sizes: dict[str, list[int]] = {}
    encoding = decoding = 0.0
    memory, cost, coded_bytes, order = None, None, {}, []
    cases = Cases(num_cases)
    if sets:
        sets.forget_made()
    with tqdm(total=len(squares), desc=f"{method.name} at {squares.resolution} px", unit="picture") as progress:
        for places, images in squares.batches(batch_size):
            if not order:
                memory = peak_memory(lambda: method.decode(method.encode(images, places)), device)  # noqa: B023
            start = _now(device)
            code = method.encode(images, places)
            middle = _now(device)
            output = method.decode(code)
            end = _now(device)
            encoding, decoding = encoding + middle - start, decoding + end - middle
            images = images.to(device)
            output = _picture(method, output, images)
            cost = method.cost(code)
            coded = output if cost.coded is None else _picture(method, method.decode(cost.coded), images)
            values = {PSNR: psnr(output, images), SSIM: ssim(output, images)}
            if judges.perceptual:
                values[judges.perceptual.label] = judges.perceptual_distances(output, images)
            values[CODED_PSNR] = psnr(coded, images)
            for key, value in values.items():
                sums.setdefault(key, []).append(value.double().cpu())
            for key, lengths in cost.bytes.items():
                sizes.setdefault(key, []).extend(lengths)
            if sets:
                sets.add(output, real=False)
            cases.add(values[PSNR].tolist(), places, images, output)
            coded_bytes |= dict(zip(places, cost.bytes["coded"], strict=True))
            order += places
            progress.update(len(places))

    each = {key: torch.cat(parts) for key, parts in sums.items()}
    figures: dict[str, float | None] = {key: each[key].mean().item() for key in each if key != CODED_PSNR}
    if sets:
        figures |= sets.figures()
    for key, name in ((CODED, "coded"), (FLOAT16, "float16"), (FLOAT32, "float32")):
        figures[key] = sum(sizes[name]) / len(order) if name in sizes else None
    figures[CODED_PSNR] = each[CODED_PSNR].mean().item()
    figures |= {ENCODED_PER_SECOND: len(order) / encoding, DECODED_PER_SECOND: len(order) / decoding, MEMORY: memory}
    return Row(
        method=method.name,
        resolution=squares.resolution,
        pictures=len(order),
        tokens=cost.tokens,
        numbers=cost.numbers,
        parameters=method.parameters,
        figures=figures,
        psnr=dict(zip(order, each[PSNR].tolist(), strict=True)),
        coded_bytes=coded_bytes,
        cases=cases,
    )


def peak_memory(run: Callable[[], object], device: str) -> float | None:
    """How much memory `run` takes at its peak, in MB: of the GPU, or of this process.

    None where the system does not say (the process's is read from Linux's /proc).
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before = None
    gc.collect(1)  # everything else is old: a full collection takes half a second per row
    with contextlib.suppress(OSError, AttributeError, TypeError):
        # Memory that earlier rows freed still belongs to the process, and would be used again uncounted.
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _resident("VmRSS")
    run()
    return None if before is None else max(0.0, _resident("VmHWM") - before)


def _resident(field_name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field_name)).split()[1]) / 1024


def _now(device: str) -> float:
    """Seconds, once the device has finished."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _picture(method: Method, output: Tensor, images: Tensor) -> Tensor:
    if output.shape != images.shape:
        sizes = [f"{tuple(pixels.shape[-2:])} px" for pixels in (images, output)]
        raise ValueError(
            f"{method.name} makes pictures of {sizes[1]} from those of {sizes[0]}: take a resolution that is a "
            "multiple of its downsampling factor"
        )
    return output.to(images).clamp(-1, 1)
