#!/usr/bin/env python
"""Encodes a folder of pictures into shards of tokens, once, so that a generator can be trained on them.

    accelerate launch examples/train/encode_dataset.py --data pictures/train --output tokens --num_tokens 128 --views 4

--data holds one folder per class with pictures in it (Class/any/picture.png); classes are numbered in the order of
their names. A folder with pictures and no folders in it is one class. Besides, --data may be

  - tar shards as WebDataset writes them: a folder of them, or a pattern such as "shards/train-{0000..0012}.tar" or
    "shards/*.tar"; classes are what the `.cls` files say, and all pictures are one class where there are none,
  - with the package `datasets`, a dataset that it saved on disk (`save_to_disk`), a folder or a pattern of parquet
    files, or a name that it loads; classes are in the column of class labels, and without one there is one class.

Each picture is laid on white where it is transparent, scaled so that its shorter side is the model's tile, and cut to
its centre square. With --views K it has K - 1 more items, each changed a little: scaled by 0.8 to 1.1, moved by up to
6% of its side and, with --flip, mirrored half of the time. Pixels that a change uncovers are white for pictures with
transparency, and repeat the border for others.

Run again after an interruption, the script goes on: finished shards are kept. What a shard holds depends only on the
pictures and settings, so on one kind of device any number of processes writes the same bytes (with one --batch_size and
one number of threads: the last bits of the arithmetic depend on them).

Exit code: 0 done, 1 an error (it says what), 130 interrupted. Pictures that cannot be read are left out and named.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import gpstoken_diffusers.training  # noqa: F401  before torch, which reads a setting that it makes

# isort: split
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor
from gpstoken_diffusers.assets import MINI
from gpstoken_diffusers.cli.errors import printable
from gpstoken_diffusers.ops.partition import max_tokens
from gpstoken_diffusers.training.labelled_pictures import (
    ClassFolders,
    LabelledDataset,
    LabelledShards,
    change_view,
    open_labelled,
    read_labelled,
)
from gpstoken_diffusers.training.launch import COUNT, NATURAL
from gpstoken_diffusers.training.token_dataset import (
    TokenDataset,
    model_fingerprint,
    read_shard_header,
    settings_difference,
    shard_path,
    write_index,
    write_shard,
)

logger = logging.getLogger("encode_dataset")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--autoencoder", default="mini", help='Folder of an AutoencoderGPSToken, or "mini", the one shipped.')
    add("--data", required=True, help="Folder of class folders or pictures, tar shards, or a dataset: see above.")
    add("--split", default="train", help="Which split of a dataset.")
    add("--image_column", help="Where a dataset has several columns of pictures.")
    add("--label_column", help="Where a dataset has several columns of classes.")
    add("--output", type=Path, required=True, help="Folder for the shards and dataset.json.")
    add("--num_tokens", type=COUNT, help="Tokens per picture; default: the autoencoder's own number.")
    add("--views", type=COUNT, default=1, help="Items per picture: itself, and this many less 1 changed a little.")
    add("--flip", action="store_true", help="Mirror half of the changed views.")
    add("--shard_size", type=COUNT, default=1024, help="Items per file.")
    add("--batch_size", type=COUNT, default=16, help="Pictures that the autoencoder encodes at once.")
    add(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="What the autoencoder computes in. Texture is stored as float32, or as float16 after bfloat16.",
    )
    add("--num_workers", type=NATURAL, default=1, help="Processes that read and partition pictures, per encoder.")
    return parser.parse_args(argv)


class EncoderInputs(Dataset):
    """What the autoencoder takes, by batches: index (shard, first item, number of items) -> a batch.

    A batch: `shard` and `count` as in the index; `features` for `AutoencoderGPSToken.encode`, or None where no picture
    could be read; `names` and `labels` of the items in it; `skipped`, picture -> reason. In place of a batch comes the
    OSError that ends the work, for the main process to raise.

    Features are NumPy's, as tensors would come through shared memory, of which containers often have 64 MB.
    """

    def __init__(
        self, pictures: ClassFolders | LabelledShards | LabelledDataset, processor: GPSTokenImageProcessor, args
    ):
        self.pictures, self.processor = pictures, processor
        self.views, self.flip = args.views, args.flip

    def __getitem__(self, batch: tuple[int, int, int]) -> dict[str, Any] | OSError:
        try:
            return self._read(batch)
        except OSError as error:
            return error

    def _read(self, batch: tuple[int, int, int]) -> dict[str, Any]:
        shard, first, count = batch
        images, names, labels, skipped = [], [], [], {}
        for picture, items in itertools.groupby(range(first, first + count), lambda item: item // self.views):
            name = self.pictures.names[picture]
            image, reason = read_labelled(self.pictures, picture)
            if image is None:
                skipped[name] = reason
                continue
            for item in items:
                view = item % self.views
                changed = change_view(image, self.processor.tile_size, name, view, self.flip) if view else image
                images.append(changed)
                names.append((name, view))
                labels.append(self.pictures.labels[picture])
        features = {name: tensor.numpy() for name, tensor in self.processor(images).items()} if images else None
        content = {"features": features, "names": names, "labels": labels, "skipped": skipped}
        return {"shard": shard, "count": count, **content}


@dataclass(frozen=True)
class Plan:
    """Which items (picture * views + view) lie in which shard."""

    num_items: int
    shard_size: int
    batch_size: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_items // self.shard_size)

    def items(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_items))

    def batches(self, shard: int) -> Iterator[tuple[int, int, int]]:
        """No batch reaches into the next shard, so its numbers do not depend on which shards are missing."""
        items = self.items(shard)
        for start in range(items.start, items.stop, self.batch_size):
            yield shard, start, min(self.batch_size, items.stop - start)


def missing_shards(output: Path, plan: Plan, settings: dict[str, Any]) -> list[int]:
    """The shards that are missing.

    Raises ValueError: a shard was made with other settings.
    """
    missing = []
    for shard in range(plan.num_shards):
        path = shard_path(output, shard)
        try:
            header = read_shard_header(path)
        except FileNotFoundError:
            missing.append(shard)
            continue
        except ValueError as error:
            logger.warning("%s It is made anew.", error)
            missing.append(shard)
            continue
        difference = settings_difference(header.settings, settings)
        if difference:
            raise ValueError(
                f"{output} holds shards of other settings ({difference}). Give the settings they were made with, or "
                "another --output."
            )
    expected = {shard_path(output, shard) for shard in range(plan.num_shards)}
    if strays := sorted(set(output.glob("shard-*.safetensors")) - expected):
        raise ValueError(f"{output} holds {strays[0].name}, which is not of this dataset. Give another --output.")
    return missing


def arriving(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The batches of a loader of [`EncoderInputs`]. Raises OSError: pictures are out of reach, or a process died."""
    try:
        for batch in loader:
            if isinstance(batch, OSError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(
            f"a process that reads pictures has ended ({str(error).splitlines()[0]}). Is there memory enough for "
            f"{loader.num_workers} of them? Fewer --num_workers or a smaller --batch_size take less; finished shards "
            "are kept."
        ) from error


@torch.no_grad()
def encode_shards(
    model: AutoencoderGPSToken, loader: DataLoader, settings: dict[str, Any], output: Path, quiet: bool
) -> int:
    """Writes the shards whose batches `loader` gives, one after the other; returns the number of items written."""
    device, texture_dtype = model.device, {"float32": torch.float32, "bfloat16": torch.float16}[settings["dtype"]]
    num_tokens, channels = settings["num_tokens"], model.config.texture_channels
    written = 0
    progress = tqdm(total=sum(count for _, _, count in loader.sampler), disable=quiet, unit="picture", smoothing=0.05)
    for shard, batches in itertools.groupby(arriving(loader), key=lambda batch: batch["shard"]):
        # An empty part first: a shard without a readable picture has its tensors too.
        parts = [(torch.empty(0, num_tokens, 5), torch.empty(0, num_tokens, 5), torch.empty(0, num_tokens, channels))]
        names, labels, skipped = [], [], {}
        for batch in batches:
            names += batch["names"]
            labels += batch["labels"]
            skipped |= batch["skipped"]
            if batch["features"] is not None:
                features = {name: torch.from_numpy(array).to(device) for name, array in batch["features"].items()}
                tokens = model.encode(**features).tokens
                parts.append((features["geometry"].cpu(), tokens.geometry.cpu(), tokens.texture.cpu()))
            progress.update(batch["count"])
        initial, geometry, texture = (torch.cat(part) for part in zip(*parts, strict=True))
        tensors = {"initial_geometry": initial, "geometry": geometry, "texture": texture.to(texture_dtype)}
        tensors["label"] = torch.tensor(labels, dtype=torch.int64)
        write_shard(shard_path(output, shard), tensors, names, settings, skipped)
        written += len(names)
    progress.close()
    return written


def as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    """The loader's collation: a batch is whole already."""
    return batch


def run(args: argparse.Namespace) -> None:
    """Encodes what is missing in args.output.

    Raises:
        ValueError: unusable pictures, too many tokens, or an output folder of other settings.
        OSError: the autoencoder cannot be loaded, or a file not be written.
    """
    # At the end all processes wait for the slowest, however long it takes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])
    main = accelerator.is_main_process
    pictures = open_labelled(args.data, args.split, args.image_column, args.label_column)
    source = MINI if args.autoencoder == "mini" else args.autoencoder
    model = AutoencoderGPSToken.from_pretrained(source, torch_dtype=getattr(torch, args.dtype)).eval()
    config = model.config
    num_tokens = config.num_tokens if args.num_tokens is None else args.num_tokens
    most = max_tokens(config.sample_size, config.sample_size, config.min_region_size)
    if not 1 <= num_tokens <= most:
        raise ValueError(f"--num_tokens {num_tokens}: this model's tile of {config.sample_size} px has 1 to {most}.")
    settings = {
        "autoencoder": model_fingerprint(model),
        "pictures": pictures.fingerprint(),
        "num_tokens": num_tokens,
        "views": args.views,
        "flip": args.flip and args.views > 1,
        "dtype": args.dtype,
        "shard_size": args.shard_size,
    }
    plan = Plan(len(pictures) * args.views, args.shard_size, args.batch_size)
    args.output.mkdir(parents=True, exist_ok=True)
    missing = missing_shards(args.output, plan, settings)
    if main:
        logger.info("%d pictures in %d classes", len(pictures), len(pictures.id2label))
        logger.info("%d of %d shards are there", plan.num_shards - len(missing), plan.num_shards)
        for leftover in args.output.glob(".shard-*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()
    accelerator.wait_for_everyone()  # all have looked before anyone writes, so all share out the same shards

    mine = missing[accelerator.process_index :: accelerator.num_processes]
    processor = GPSTokenImageProcessor(
        shortest_edge=config.sample_size,
        center_crop=True,
        tile_size=config.sample_size,
        num_tokens=num_tokens,
        min_region_size=config.min_region_size,
        entropy_exponent=config.entropy_exponent,
        partition_criterion=config.partition_criterion,
    )
    loader = DataLoader(
        EncoderInputs(pictures, processor, args),
        batch_size=None,
        sampler=[batch for shard in mine for batch in plan.batches(shard)],
        num_workers=args.num_workers,
        collate_fn=as_it_is,
    )
    model.to(accelerator.device)
    started = time.monotonic()
    written = encode_shards(model, loader, settings, args.output, quiet=not main)
    total = accelerator.gather(torch.tensor([written], device=accelerator.device)).sum().item()
    if main:
        seconds = time.monotonic() - started
        logger.info("%d items encoded in %.1f s: %.2f pictures/s", total, seconds, total / max(seconds, 1e-6))
        # The folder's name only: where it lies on this computer is private.
        folder = Path(args.autoencoder)
        name = "gpstoken-mini" if source == MINI else folder.resolve().name if folder.is_dir() else args.autoencoder
        description = {
            "id2label": pictures.id2label,
            "image_size": [config.sample_size, config.sample_size],
            "autoencoder": {"name": name, "config": json.loads(model.to_json_string())},
        }
        skipped = write_index(args.output, plan.num_shards, description)["skipped"]
        logger.info("%s holds %d items", args.output, len(TokenDataset(args.output)))
        if skipped:
            listed = "".join(f"\n  {printable(picture)}: {reason}" for picture, reason in skipped.items())
            logger.warning("%d pictures could not be read and were left out:%s", len(skipped), listed)
    accelerator.end_training()


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
