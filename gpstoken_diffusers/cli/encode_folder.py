"""`gpstoken encode` of a folder: reading, partition, networks and writing at the same time; a run cut off goes on.

Pictures are read and partitioned by threads: Pillow and the native partition do not hold Python's lock, nothing has to
pass from process to process, and Ctrl-C is one process's affair. They wait for the networks with 8 bits per number.

A tokens file carries its own record, in its header: its source and the settings. So tokens and record appear together
or not at all. Under `accelerate launch` (or torchrun) each process takes its share of the pictures; they need not talk
to each other.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..image_processor import GPSTokenImageProcessor
from ..picture_files import readable_formats
from ..safe_files import check_writable
from ..token_files import is_cut_off, read_metadata
from ..tokens import GPSTokens
from .codec import Codec, load_codec
from .errors import ends_run, printable, reason
from .files import check_tokens_output, prepare_folder
from .folders import find_pictures, model_settings, settings_difference
from .made_folders import make_folder
from .sources import Record, folder_mark, is_same_source, picture_of, read_source

RECORD = "record"  # name of the header's entry
WRITES_AHEAD = 16  # files that may wait to be written: what bounds the memory if the disk is slow
READS_AHEAD = 4  # pictures that may wait for the networks, beside one for each thread
PIXELS_READ_AT_ONCE = 50_000_000  # at some 50 bytes each
BYTES_OF_BATCH = 2**26  # of 8-bit pixels: more at once is no faster
BYTES_WAITING = 2**28  # of pictures that wait for others of their size

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
    if args.polish:  # folders of earlier versions say nothing of it
        settings |= {"polish": args.polish}
    names = sorted(sources)[process::processes]
    waiting, failures, done = [], {}, 0
    progress = tqdm(total=len(names), unit="picture", disable=args.quiet or process > 0)
    with progress as bar:

        def fail(name: str, problem: str) -> None:
            failures[name] = problem
            bar.write(f"gpstoken: error: {printable(name)}: {problem}", file=sys.stderr)

        for name in names:
            try:
                if args.overwrite:
                    check_tokens_output(_target(args.output, name))
                if args.overwrite or not _is_done(args, name, sources[name], settings):
                    waiting.append(name)
            except OSError as error:
                fail(name, reason(error))
        bar.reset(total=len(waiting))
        for name, outcome in _encode(codec, sources, waiting, settings, args):
            bar.update()
            if outcome is None:
                done += 1
            else:
                fail(name, outcome)
    if not args.quiet:
        skipped = len(names) - done - len(failures)
        before = f", {skipped} done before" if skipped else ""
        failed = f", {len(failures)} failed" if failures else ""
        share = f" (process {process + 1} of {processes})" if processes > 1 else ""
        print(f"{args.output}: {done} encoded{before}{failed}{share}")
    return 1 if failures else 0


@dataclass(frozen=True)
class Reading:
    """What the networks take of one picture, and the record of its source; or what is wrong with it.

    Attributes:
        name: of the picture.
        features: as the processor gives them, with `pixel_values` in 8 bits (0..255, uint8) where that is all of them.
        source: see [`read_source`].
        problem: empty if there is none.
    """

    name: str
    features: Features
    source: Record
    problem: str = ""


class PixelBudget:
    """Lets threads go on while the pictures in their hands have no more than so many pixels together."""

    def __init__(self, pixels: int):
        self.total = self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Waits until there is room; a picture that is larger than all of it waits until it is alone."""
        pixels = min(pixels, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


class FolderReader:
    """Reads and partitions pictures by their names, in any thread."""

    def __init__(self, processor: GPSTokenImageProcessor, sources: dict[str, Path], num_tokens: int | None):
        self.processor, self.sources, self.num_tokens = processor, sources, num_tokens
        self._budget = PixelBudget(PIXELS_READ_AT_ONCE)

    def __call__(self, name: str) -> Reading:
        path = self.sources[name]
        try:
            data, source = read_source(path)
            with self._budget.taken(_pixels(data)):
                picture = picture_of(data, path, self.processor.background)
                features = dict(self.processor(picture, num_tokens=self.num_tokens))
                if features["pixel_values"].shape[-2:] == (picture.height, picture.width):  # it was not resized
                    features["pixel_values"] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
                return Reading(name, features, source)
        except Exception as error:  # whatever a picture raises is its own error
            return Reading(name, {}, {}, reason(error))


def _pixels(data: bytes) -> int:
    """Of a picture that has not been read; 1 where its header does not tell."""
    try:
        with Image.open(io.BytesIO(data), formats=readable_formats()) as image:
            return image.width * image.height
    except Exception:  # said when it is read
        return 1


def read_ahead(reader: FolderReader, names: Sequence[str], threads: int) -> Iterator[Reading]:
    """Readings in the order of the names, made by so many threads before they are asked for."""
    if not threads:
        yield from map(reader, names)
        return
    # Each thread works alone: PyTorch's own threads are for the networks.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    ahead: deque[Future[Reading]] = deque()
    try:
        for name in names:
            ahead.append(pool.submit(reader, name))
            if len(ahead) >= threads + READS_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass
class Batch:
    """Pictures of one size that wait for the networks."""

    names: list[str]
    features: list[Features]

    @property
    def num_bytes(self) -> int:
        return sum(part["pixel_values"].nbytes for part in self.features)

    def take(self) -> tuple[list[str], Features]:
        """Hands them over, and is empty."""
        names, parts = self.names, self.features
        self.names, self.features = [], []
        return names, {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def batches(items: Iterator[tuple[str, Features]], batch_size: int) -> Iterator[tuple[list[str], Features]]:
    """Puts pictures of one size together.

    Args:
        items: names and features of one picture each.
        batch_size: pictures of a batch at most; of large pictures there are fewer. No more than four times as many wait
            for others of their size, and no more than memory is for.
    """
    kinds: dict[tuple, Batch] = {}
    for name, features in items:
        kind = tuple(features["pixel_values"].shape)
        batch = kinds.setdefault(kind, Batch([], []))
        batch.names.append(name)
        batch.features.append(features)
        waiting = kinds.values()
        if len(batch.names) == batch_size or batch.num_bytes >= BYTES_OF_BATCH:
            yield kinds.pop(kind).take()
        elif sum(len(other.names) for other in waiting) >= 4 * batch_size:
            yield kinds.pop(max(kinds, key=lambda kind: len(kinds[kind].names))).take()
        elif sum(other.num_bytes for other in waiting) >= BYTES_WAITING:
            yield kinds.pop(max(kinds, key=lambda kind: kinds[kind].num_bytes)).take()
    for batch in kinds.values():
        yield batch.take()


def _encode(
    codec: Codec, sources: dict[str, Path], names: list[str], settings: Record, args: argparse.Namespace
) -> Iterator[tuple[str, str | None]]:
    """Name by name: None for what was written, or what went wrong with the picture.

    What goes wrong with the whole disk ends the run: OSError.
    """
    threads = args.num_workers
    if threads is None:
        threads = min(8, (os.cpu_count() or 1) // 2, len(names))
    unreadable: list[tuple[str, str]] = []
    records: dict[str, Record] = {}

    def readable() -> Iterator[tuple[str, Features]]:
        for reading in read_ahead(FolderReader(codec.processor, sources, args.num_tokens), names, threads):
            if reading.problem:
                unreadable.append((reading.name, reading.problem))
            else:
                records[reading.name] = reading.source | {"folder": folder_mark(args.image)}
                yield reading.name, reading.features

    writes: dict[Future, str] = {}
    with ThreadPoolExecutor(max_workers=1) as writer:
        try:
            for batch_names, features in batches(readable(), args.batch_size):
                while unreadable:
                    yield unreadable.pop()
                for name, outcome in _tokens(codec, batch_names, features, args.polish):
                    record = {"source": records.pop(name), "settings": settings}
                    if isinstance(outcome, str):
                        yield name, outcome
                        continue
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


def _tokens(
    codec: Codec, names: list[str], features: Features, polish_steps: int
) -> Iterator[tuple[str, GPSTokens | str]]:
    """Name by name the tokens, or what went wrong; a batch in which something does is taken in halves.

    So one that is too large for the memory is done in parts, and one odd picture fails alone.
    """
    try:
        with torch.inference_mode():
            own = {key: value.to(codec.model.device) for key, value in features.items()}
            if own["pixel_values"].dtype == torch.uint8:
                own["pixel_values"] = _values(own["pixel_values"])
            tokens = codec.model.encode(**own, polish_steps=polish_steps).tokens.cpu()
        found: list[tuple[str, GPSTokens | str]] = [(name, tokens[place]) for place, name in enumerate(names)]
    except Exception as error:
        if len(names) == 1:
            yield names[0], reason(error)
            return
        found = []
    if found:
        yield from found
        return
    half = len(names) // 2
    tiles = len(features["regions"]) // len(names)
    for part in (slice(0, half), slice(half, len(names))):
        rows = slice(part.start * tiles, part.stop * tiles)
        own = {key: value[part if key == "pixel_values" else rows] for key, value in features.items()}
        yield from _tokens(codec, names[part], own, polish_steps)


def _values(pixels: Tensor) -> Tensor:
    """8-bit pixels (B, 3, H, W) as the processor's values in [-1, 1]: v / 127.5 - 1, rounded once."""
    value_of_byte = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).float().to(pixels.device)
    values = torch.empty(pixels.shape, device=pixels.device)
    for place, picture in enumerate(pixels):
        values[place] = value_of_byte[picture.int()]
    return values


def _write(tokens: GPSTokens, target: Path, metadata: dict[str, str], encoding: str | None) -> str | None:
    """None, or why these tokens cannot be stored so, or there. Raises OSError if none can be."""
    try:
        make_folder(target.parent)
        tokens.save(target, metadata, dtype=encoding)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and ends_run(error):
            raise
        return reason(error)
    return None


def _finish(writes: dict[Future, str], finished: set[Future]) -> Iterator[tuple[str, str | None]]:
    for future in finished:
        yield writes.pop(future), future.result()


def _target(output: Path, name: str) -> Path:
    return output / f"{name}.safetensors"


def _is_done(args: argparse.Namespace, name: str, source: Path, settings: Record) -> bool:
    """Whether a picture's tokens are there, of the same picture and settings. Tokens that were cut off are not.

    Raises:
        ValueError: tokens of other settings, or of another folder's picture, or a file that this command did not write.
        OSError: the tokens or the picture cannot be read, or the tokens not be replaced.
    """
    target = _target(args.output, name)
    if not os.path.lexists(target):
        return False
    check_writable(target)
    if is_cut_off(target):
        return False
    advice = "Choose another folder, or add --overwrite to do them again."
    try:
        record = json.loads(read_metadata(target)[RECORD])
        found, state = dict(record["settings"]), dict(record["source"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{target} is not of `gpstoken encode` of a folder. {advice}") from error
    if found != settings:
        raise ValueError(
            f"{args.output} holds tokens of other settings ({settings_difference(found, settings)}). {advice}"
        )
    try:
        return is_same_source(state, source, args.image)
    except ValueError as error:
        raise ValueError(f"{error}, and its tokens are {target}. {advice}") from error
