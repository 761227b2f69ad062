"""`gpstoken encode` of a folder: reading, partition, networks and writing at the same time; a run cut off goes on.

A tokens file carries its own record, in its header: the state of its source and the settings. So tokens and record
appear together or not at all. Under `accelerate launch` (or torchrun) each process takes its share of the pictures;
they need not talk to each other.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..image_processor import GPSTokenImageProcessor
from ..token_files import read_metadata
from ..tokens import GPSTokens
from .codec import Codec, load_codec
from .files import prepare_folder
from .folders import Record, find_pictures, model_settings, picture_state, settings_difference

RECORD = "record"  # name of the header's entry
WRITES_AHEAD = 16  # files that may wait to be written: what bounds the memory if the disk is slow

Features = dict[str, Tensor]


def encode_folder(args: argparse.Namespace) -> int:
    """Encode all pictures of a folder, or this process's share of them. Returns 1 if any of them failed."""
    if args.importance is not None:
        raise ValueError("--importance is a mask of one picture: encode the pictures of a folder without it.")
    if args.output.suffix.lower() == ".safetensors" and not args.output.is_dir():
        raise ValueError(f"the output {args.output} must be a folder: each picture gets a tokens file in it.")
    for option, value, least in (("batch-size", args.batch_size, 1), ("num-workers", args.num_workers, 0)):
        if value is not None and value < least:
            raise ValueError(f"--{option} {value}: it must be at least {least}.")
    sources = find_pictures(args.image, args.output, args.recursive)
    prepare_folder(args.output)
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and args.device in ("auto", "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    codec = load_codec(args)
    codec.check_num_tokens(args.num_tokens)
    settings = model_settings(codec, args.num_tokens) | {"encoding": args.encoding}
    names = sorted(sources)[process::processes]
    waiting = [name for name in names if args.overwrite or not _is_done(args.output, name, sources[name], settings)]
    failures: dict[str, str] = {}
    done = 0
    progress = tqdm(total=len(waiting), unit="picture", disable=args.quiet or process > 0)
    with progress as bar, _interrupt_requests() as is_interrupted:
        for name, outcome in _encode(codec, sources, waiting, settings, args, is_interrupted):
            bar.update()
            if outcome is None:
                done += 1
            else:
                failures[name] = outcome
                bar.write(f"gpstoken: error: {name}: {outcome}", file=sys.stderr)
    if not args.quiet:
        before = f", {len(names) - len(waiting)} done before" if len(names) > len(waiting) else ""
        failed = f", {len(failures)} failed" if failures else ""
        share = f" (process {process + 1} of {processes})" if processes > 1 else ""
        print(f"{args.output}: {done} encoded{before}{failed}{share}")
    return 1 if failures else 0


class FolderInputs(Dataset):
    """What the model takes, picture by picture: (name, features, ""), or (name, None, what is wrong with it)."""

    def __init__(self, processor: GPSTokenImageProcessor, sources: dict[str, Path], names: list[str], num_tokens):
        self.processor, self.sources, self.names, self.num_tokens = processor, sources, names, num_tokens

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, Features | None, str]:
        name = self.names[index]
        try:
            picture = self.processor.load_image(self.sources[name], self.processor.background)
            return name, dict(self.processor(picture, num_tokens=self.num_tokens)), ""
        except Exception as error:  # whatever a picture raises is its own error
            return name, None, str(error) or type(error).__name__


@dataclass
class Batch:
    """Pictures of one size that wait for the networks."""

    names: list[str]
    features: list[Features]

    def take(self) -> tuple[list[str], Features]:
        """Hands them over, and is empty."""
        names, parts = self.names, self.features
        self.names, self.features = [], []
        return names, {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def batches(items: Iterator[tuple[str, Features]], batch_size: int) -> Iterator[tuple[list[str], Features]]:
    """Puts pictures of one size together.

    Args:
        items: names and features of one picture each.
        batch_size: pictures of a batch; no more than four times as many wait for others of their size.
    """
    kinds: dict[tuple, Batch] = {}
    for name, features in items:
        kind = tuple(features["pixel_values"].shape)
        batch = kinds.setdefault(kind, Batch([], []))
        batch.names.append(name)
        batch.features.append(features)
        if len(batch.names) == batch_size:
            yield kinds.pop(kind).take()
        elif sum(len(other.names) for other in kinds.values()) >= 4 * batch_size:
            yield kinds.pop(max(kinds, key=lambda kind: len(kinds[kind].names))).take()
    for batch in kinds.values():
        yield batch.take()


@contextmanager
def _interrupt_requests() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; pressed again, it ends the run at once.

    An exception in the middle of taking over a worker's tensors would leave that worker to complain of a broken pipe.
    """
    before = signal.getsignal(signal.SIGINT)
    requested = False

    def note(number: int, frame) -> None:
        nonlocal requested
        requested = True
        signal.signal(signal.SIGINT, before)

    if before is signal.SIG_IGN:  # as in the background of a shell script
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, before)


def _ignore_interrupts(worker: int) -> None:
    """A terminal sends Ctrl-C to the workers too, but it is the main process that ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _encode(
    codec: Codec,
    sources: dict[str, Path],
    names: list[str],
    settings: Record,
    args: argparse.Namespace,
    is_interrupted: Callable[[], bool],
) -> Iterator[tuple[str, str | None]]:
    """Name by name: None for what was written, or what went wrong with the picture.

    What goes wrong with the output folder ends the run: OSError.
    """
    workers = args.num_workers
    if workers is None:
        workers = min(8, (os.cpu_count() or 1) // 2, len(names))
    inputs = FolderInputs(codec.processor, sources, names, args.num_tokens)
    # Batches are made below, where it is known which pictures have one size.
    loader = DataLoader(
        inputs,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_interrupts,
    )
    unreadable: list[tuple[str, str]] = []

    def readable() -> Iterator[tuple[str, Features]]:
        for name, features, problem in loader:
            if is_interrupted():
                raise KeyboardInterrupt
            if features is None:
                unreadable.append((name, problem))
            else:
                yield name, features

    writes: dict[Future, str] = {}
    with ThreadPoolExecutor(max_workers=1) as writer:
        try:
            for batch_names, features in batches(readable(), args.batch_size):
                while unreadable:
                    yield unreadable.pop()
                for name, outcome in _tokens(codec, batch_names, features):
                    if isinstance(outcome, str):
                        yield name, outcome
                        continue
                    record = {"source": picture_state(sources[name]), "settings": settings}
                    metadata = codec.metadata() | {RECORD: json.dumps(record)}
                    target = _target(args.output, name)
                    writes[writer.submit(_write, outcome, target, metadata, args.encoding)] = name
                finished, _ = wait(writes, timeout=0)
                while len(writes) - len(finished) > WRITES_AHEAD:
                    finished, _ = wait(writes, return_when=FIRST_COMPLETED)
                    yield from _finish(writes, finished)
                    finished = set()
                yield from _finish(writes, finished)
            yield from unreadable
            yield from _finish(writes, wait(writes).done)
        except BaseException:
            writer.shutdown(cancel_futures=True)  # Ctrl-C: what has begun is finished, nothing else
            raise


def _tokens(codec: Codec, names: list[str], features: Features) -> Iterator[tuple[str, GPSTokens | str]]:
    """Name by name the tokens, or what went wrong; a batch that is too large for the memory is taken in halves."""
    try:
        with torch.inference_mode():
            output = codec.model.encode(**{key: value.to(codec.model.device) for key, value in features.items()})
        tokens = output.tokens.cpu()
        for place, name in enumerate(names):
            yield name, tokens[place]
    except (MemoryError, torch.OutOfMemoryError) as error:
        if len(names) == 1:
            yield names[0], str(error) or "out of memory"
            return
        half = len(names) // 2
        tiles = len(features["regions"]) // len(names)
        for part, count in ((slice(0, half), 0), (slice(half, None), half)):
            rows = slice(part.start * tiles, None if part.stop is None else part.stop * tiles)
            own = {key: value[part if key == "pixel_values" else rows] for key, value in features.items()}
            yield from _tokens(codec, names[count : count + len(own["pixel_values"])], own)
    except ValueError as error:
        for name in names:
            yield name, str(error)


def _write(tokens: GPSTokens, target: Path, metadata: dict[str, str], encoding: str | None) -> str | None:
    """None, or why these tokens cannot be stored so."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        tokens.save(target, metadata, dtype=encoding)
    except ValueError as error:
        return str(error)
    return None


def _finish(writes: dict[Future, str], finished: set[Future]) -> Iterator[tuple[str, str | None]]:
    for future in finished:
        yield writes.pop(future), future.result()


def _target(output: Path, name: str) -> Path:
    return output / f"{name}.safetensors"


def _is_done(output: Path, name: str, source: Path, settings: Record) -> bool:
    """Whether a picture's tokens are there, of the same picture and settings.

    Raises ValueError for tokens of other settings, and for files that this command did not write.
    """
    target = _target(output, name)
    if not target.exists():
        return False
    advice = "Choose another folder, or add --overwrite to do them again."
    try:
        record = json.loads(read_metadata(target)[RECORD])
        found, state = record["settings"], record["source"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{target} is not of `gpstoken encode` of a folder. {advice}") from error
    if found != settings:
        raise ValueError(f"{output} holds tokens of other settings ({settings_difference(found, settings)}). {advice}")
    return state == picture_state(source)
