"""Pictures that were encoded once, for generators to train on: shards of tokens in a folder, written and read.

A folder holds `shard-00000.safetensors`, `shard-00001.safetensors` and so on and, once all of them are there,
`dataset.json`. A shard stacks n items: `initial_geometry` (n, N, 5) float32, `geometry` (n, N, 5) float32, `texture`
(n, N, C) float16 or float32, `label` (n,) int64. Its header says what made it and names each item's picture, so that a
shard can be trusted, or refused, without the rest of the folder.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor
from torch.utils.data import Dataset

from ..models.autoencoder_gpstoken import AutoencoderGPSToken
from ..models.token_latents import geometry_residual
from ..safe_files import open_safetensors, write_atomically
from ..tokens import GEOMETRY_CHANNELS

DATASET_FORMAT = "gpstoken.dataset"
DATASET_FORMAT_VERSION = 1
INDEX_FILE = "dataset.json"
ORIGIN_FILE = "trained_on.json"
"""Beside a generator's weights: [`TokenDataset.origin`] of what it was trained on."""

_ADVICE = "Delete it and encode the pictures again: only what is missing is made anew."
_TENSORS = ("geometry", "initial_geometry", "label", "texture")
# safetensors' names of the types that a shard may hold.
_DTYPES = {"F16": "float16", "F32": "float32", "I64": "int64"}
# Items that statistics look at together: some ten megabytes in float64.
_ITEMS_AT_ONCE = 256


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of itself.

    Attributes:
        num_items, num_tokens, texture_channels: n, N and C of its tensors.
        texture_dtype: "float16" or "float32".
        settings: whatever decides the content, as the writer noted it; all shards of a folder agree in it.
        names: per item the picture's name and the number of the view (0 is the picture as it is).
        skipped: pictures that could not be read, and why; no item stands for them.
    """

    num_items: int
    num_tokens: int
    texture_channels: int
    texture_dtype: str
    settings: dict[str, Any]
    names: list[tuple[str, int]]
    skipped: dict[str, str]


def shard_path(folder: str | os.PathLike, index: int) -> Path:
    """Where the shard of this number lies in a dataset's folder."""
    return Path(folder) / f"shard-{index:05d}.safetensors"


def write_shard(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    names: Sequence[tuple[str, int]],
    settings: Mapping[str, Any],
    skipped: Mapping[str, str] | None = None,
) -> None:
    """Write one shard, whole or not at all.

    Args:
        path: see [`shard_path`]; its folder must exist.
        tensors: `initial_geometry` and `geometry` (n, N, 5) float32, `texture` (n, N, C) float16 or float32 and
            `label` (n,) int64, on the CPU; n may be 0.
        names: per item the picture's name and the number of its view.
        settings: what decides the content, in JSON's types; [`write_index`] wants it equal in all shards.
        skipped: name and reason of each picture that could not be read.

    Raises:
        ValueError: shapes or dtypes are others, or a number is NaN or infinite (the message names the item).
        OSError: the file cannot be written.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    _check_layout(path, shapes, dtypes)
    if len(names) != shapes["label"][0]:
        raise ValueError(f"{path}: {len(names)} names were given for {shapes['label'][0]} items")
    for name in ("initial_geometry", "geometry", "texture"):
        bad = ~tensors[name].isfinite().flatten(1).all(1)
        if bad.any():
            picture, view = names[int(bad.nonzero()[0])]
            raise ValueError(
                f"the {name} of {picture} (view {view}) holds NaN or infinity. Where the autoencoder ran in bfloat16, "
                "try float32."
            )
    header = {"version": DATASET_FORMAT_VERSION, "settings": settings, "names": list(names), "skipped": skipped or {}}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))  # in ASCII: a name may be no UTF-8
    contiguous = {name: tensors[name].contiguous() for name in _TENSORS}
    # One key for all: safetensors writes several in a random order, and equal shards shall be equal bytes.
    write_atomically(path, safetensors_bytes(contiguous, metadata={DATASET_FORMAT: text}))


def read_shard_header(path: str | os.PathLike) -> ShardHeader:
    """Read what a shard says of itself, and check that it is whole; its numbers are not read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, truncated, of another kind or another format version.
    """
    with open_safetensors(path, advice=_ADVICE) as file:
        text = (file.metadata() or {}).get(DATASET_FORMAT)
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: part.get_dtype() for name, part in slices.items()}
    if text is None:
        raise ValueError(f"{path}: a safetensors file, but no shard of a token dataset. Move it away.")
    header = json.loads(text)
    if header["version"] != DATASET_FORMAT_VERSION:
        raise ValueError(f"{path}: a shard of {_other_version(header['version'])}")
    _check_layout(path, shapes, {name: _DTYPES.get(dtype, dtype) for name, dtype in dtypes.items()})
    num_items, num_tokens, texture_channels = shapes["texture"]
    return ShardHeader(
        num_items,
        num_tokens,
        texture_channels,
        _DTYPES[dtypes["texture"]],
        header["settings"],
        [(picture, view) for picture, view in header["names"]],
        header["skipped"],
    )


def settings_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In words, where the settings of a shard differ from those wanted; empty where they are equal."""
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return ", ".join(f"{name} is {found.get(name)}, not {wanted.get(name)}" for name in names)


def write_index(folder: str | os.PathLike, num_shards: int, description: Mapping[str, Any]) -> dict[str, Any]:
    """Write `dataset.json`, which makes the shards 0 .. num_shards - 1 of a folder a dataset.

    Args:
        folder: where the shards are.
        num_shards: how many there are.
        description: `id2label` (class number -> name), `image_size` ((height, width) in pixels that the tokens stand
            for), `autoencoder` (what is known of the model), and whatever else is worth keeping, in JSON's types.

    Returns: the content of the file: the description and `format`, `version`, `num_items`, `num_tokens`,
    `texture_channels`, `texture_dtype`, `settings`, `skipped` (picture -> reason) and `shards` (file name and number
    of items of each).

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a shard is damaged, the shards do not fit together, or hold no item at all.
    """
    folder = Path(folder)
    shards, skipped, first = [], {}, None
    for index in range(num_shards):
        path = shard_path(folder, index)
        header = read_shard_header(path)
        first = first or header
        _check_fits(path, header, vars(first))
        shards.append({"file": path.name, "items": header.num_items})
        skipped.update(header.skipped)
    num_items = sum(shard["items"] for shard in shards)
    if first is None or num_items == 0:
        raise ValueError(f"{folder}: there is nothing to write a dataset of: no picture could be read.")
    content = {
        "format": DATASET_FORMAT,
        "version": DATASET_FORMAT_VERSION,
        **description,
        "num_items": num_items,
        "num_tokens": first.num_tokens,
        "texture_channels": first.texture_channels,
        "texture_dtype": first.texture_dtype,
        "settings": first.settings,
        "skipped": dict(sorted(skipped.items())),
        "shards": shards,
    }
    text = json.dumps(content, indent=1) + "\n"  # in ASCII, as above
    write_atomically(folder / INDEX_FILE, text.encode("utf-8"))
    return json.loads(text)


def model_fingerprint(model: AutoencoderGPSToken) -> str:
    """sha256 of a tokenizer's configuration and weights, as a shard's `settings` name it under `autoencoder`."""
    # Without what diffusers adds, such as its version, and without defaults, which a later version has more of: an
    # upgrade changes no token.
    arguments = inspect.signature(type(model).__init__).parameters
    defaults = json.loads(json.dumps({name: argument.default for name, argument in arguments.items()}, default=str))
    config = json.loads(model.to_json_string())
    config = {name: value for name, value in config.items() if name[0] != "_" and value != defaults.get(name)}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


class TokenDataset(Dataset):
    """The items of a folder of shards, for a generator to train on. Read from memory-mapped files: what is not looked
    at is not loaded, and worker processes share what is.

    Args:
        folder: holds `dataset.json` and the shards.

    An item: `initial_geometry` (N, 5) float32, the Gaussians of the partition; `geometry` (N, 5) float32, refined;
    `texture` (N, C) float16 or float32; `label` int, the class.

    Attributes:
        num_tokens, texture_channels: N and C.
        image_size: (height, width) in pixels that the tokens stand for.
        id2label: class number -> name.
        labels: (n,) int64, the class of each item.
        description: all of `dataset.json`, such as `autoencoder` (which model made the tokens) and `settings`.

    Raises:
        FileNotFoundError: there is no `dataset.json`, or a shard is missing.
        ValueError: `dataset.json` or a shard is damaged, of another format version, or does not belong to the rest.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.description = _read_index(self.folder / INDEX_FILE)
        self.num_tokens: int = self.description["num_tokens"]
        self.texture_channels: int = self.description["texture_channels"]
        self.image_size: tuple[int, int] = tuple(self.description["image_size"])
        self.id2label: dict[int, str] = {int(key): name for key, name in self.description["id2label"].items()}
        self._paths = [self.folder / shard["file"] for shard in self.description["shards"]]
        sizes = [shard["items"] for shard in self.description["shards"]]
        self._ends = list(accumulate(sizes))
        self._open: dict[int, safe_open] = {}
        for path, size in zip(self._paths, sizes, strict=True):
            try:
                header = read_shard_header(path)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{path}: this shard of the dataset is missing. {_ADVICE}") from error
            _check_fits(path, header, {**self.description, "num_items": size})
        self.labels = torch.cat([self._file(shard).get_tensor("label") for shard in range(len(self._paths))])
        strangers = set(self.labels.unique().tolist()) - self.id2label.keys()
        if strangers:
            raise ValueError(f"{self.folder / INDEX_FILE}: id2label lacks the items' classes {sorted(strangers)[:5]}.")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        shard, row = self._locate(index)
        file = self._file(shard)
        # Copies: a batch that is changed in place must not change what the file's memory shows.
        item = {name: file.get_slice(name)[row].clone() for name in ("initial_geometry", "geometry", "texture")}
        return {**item, "label": int(self.labels[index])}

    def name(self, index: int) -> tuple[str, int]:
        """The picture that an item stands for, a path below the folder of pictures, and the number of the view."""
        shard, row = self._locate(index)
        return read_shard_header(self._paths[shard]).names[row]

    def use_classes(self, id2label: Mapping[int, str]) -> None:
        """Number the classes as another dataset does, by their names.

        Raises ValueError: an item's class is not among them.
        """
        # Pictures without class folders are one class, named after their folder: "train" here and "heldout" there.
        if self.id2label == id2label or len(self.id2label) == len(id2label) == 1:
            return
        numbers = {name: number for number, name in id2label.items()}
        found = self.labels.unique().tolist()
        strangers = [self.id2label[label] for label in found if self.id2label[label] not in numbers]
        if strangers:
            raise ValueError(
                f"Expected items of the classes {', '.join(map(str, numbers))}, got {', '.join(strangers[:5])} in "
                f"{self.folder}. Encode it with the same class folders as the data to train on."
            )
        renumbered = torch.zeros(max(found) + 1, dtype=torch.int64)
        for label in found:
            renumbered[label] = numbers[self.id2label[label]]
        self.labels, self.id2label = renumbered[self.labels], dict(id2label)

    def validates(self, trained_on: TokenDataset) -> None:
        """Become what a model is validated on that is trained on another dataset: classes are numbered as there.

        Raises ValueError: tokens of another width, pictures of another size, or an item's class is not among those.
        """
        for what, found, wanted in (
            ("texture channels", self.texture_channels, trained_on.texture_channels),
            ("(height, width) in pixels", self.image_size, trained_on.image_size),
        ):
            if found != wanted:
                raise ValueError(
                    f"Expected a --validation_dir with {wanted} {what}, as {trained_on.folder} has, got {self.folder} "
                    f"with {found}. Encode both with one tokenizer."
                )
        self.use_classes(trained_on.id2label)

    def check_autoencoder(self, folder: str | os.PathLike) -> str:
        """See that a tokenizer can decode these tokens.

        Args:
            folder: of the tokenizer, or its repository.

        Returns: what is doubtful about it, a sentence; empty if it is the one that made the tokens.

        Raises ValueError: it has another number of texture channels, or another tile.
        """
        settings = self.description["settings"]
        dtype = getattr(torch, settings.get("dtype", "float32"))  # rounded weights have another fingerprint
        model = AutoencoderGPSToken.from_pretrained(folder, torch_dtype=dtype)
        for what, found, wanted in (
            ("texture channels", model.config.texture_channels, self.texture_channels),
            ("pixels as the side of its tile", model.config.sample_size, self.image_size[0]),
        ):
            if found != wanted:
                raise ValueError(
                    f"Expected the tokenizer that made the tokens in {self.folder}, with {wanted} {what}, got {folder} "
                    f"with {found}. Give that tokenizer by --autoencoder, or encode the pictures with this one."
                )
        maker = settings.get("autoencoder")
        if maker is None or maker == model_fingerprint(model):
            return ""
        return (
            f"{folder} is not the tokenizer that made the tokens in {self.folder}: its weights or settings are others."
        )

    def origin(self) -> dict[str, Any]:
        """What a model trained on these items must remember of them, in JSON's types; see `check_origin`."""
        return {
            "classes": [self.id2label[label] for label in sorted(self.id2label)],
            "autoencoder": self.description["settings"].get("autoencoder"),
        }

    def check_origin(self, folder: str | os.PathLike, num_classes: int) -> None:
        """Raises ValueError unless a model was trained on items of these classes, by the same tokenizer.

        Args:
            folder: of the model; what it remembers is in its `ORIGIN_FILE`, which older folders lack.
            num_classes: that it knows.
        """
        ours, file = self.origin(), Path(folder, ORIGIN_FILE)
        theirs = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        classes = theirs.get("classes", ours["classes"])
        # A single class is named after its folder, "train" here and "heldout" there.
        if num_classes != len(ours["classes"]) or (num_classes > 1 and classes != ours["classes"]):
            names = f" ({', '.join(classes[:10])})" if theirs else ""
            raise ValueError(
                f"Expected a model of the {len(ours['classes'])} classes {', '.join(ours['classes'][:10])} of "
                f"{self.folder}, got {folder} with {num_classes}{names}. Give the token dataset that it was trained on."
            )
        maker, known = ours["autoencoder"], theirs.get("autoencoder")
        if maker is not None and known is not None and maker != known:
            raise ValueError(
                f"Expected a model that was trained on tokens of the tokenizer that made {self.folder}, got {folder}, "
                "which was trained on those of another. Give the token dataset that it was trained on."
            )

    def layouts(self) -> Tensor:
        """The initial Gaussians of all items: (n, N, 5) float32."""
        return torch.cat([self._file(shard).get_tensor("initial_geometry") for shard in range(len(self._paths))])

    def statistics(self, residual: str = "additive") -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of what a generator predicts, over all items and tokens.

        Args:
            residual: "additive" or "relative", see [`geometry_residual`].

        Returns: two tensors (5 + C,) float64: of the geometry's residual, then of texture, channel by channel. Reads
        everything once. The deviation is that of the items themselves (divided by n, not by n - 1).
        """
        count = 0
        mean = torch.zeros(GEOMETRY_CHANNELS + self.texture_channels, dtype=torch.float64)
        squares = torch.zeros_like(mean)  # sum of squared distances from the mean so far
        for rows in self._latents(residual):
            # Parts are joined by their means: a sum of plain squares would lose a deviation small beside its mean.
            total = count + len(rows)
            part_mean = rows.mean(0)
            shift = part_mean - mean
            squares += (rows - part_mean).square().sum(0) + shift.square() * (count * len(rows) / total)
            mean += shift * (len(rows) / total)
            count = total
        return mean, (squares / count).sqrt()

    def _latents(self, kind: str) -> Iterator[Tensor]:
        """All tokens, some at a time: (tokens, 5 + C) float64."""
        for shard in range(len(self._paths)):
            file = self._file(shard)
            parts = {name: file.get_tensor(name) for name in ("initial_geometry", "geometry", "texture")}
            for start in range(0, len(parts["texture"]), _ITEMS_AT_ONCE):
                chosen = {name: part[start : start + _ITEMS_AT_ONCE].double() for name, part in parts.items()}
                residual = geometry_residual(chosen["initial_geometry"], chosen["geometry"], kind)
                yield torch.cat([residual, chosen["texture"]], dim=-1).flatten(0, 1)

    def _locate(self, index: int) -> tuple[int, int]:
        """Shard and row of an item."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of a dataset of {len(self)}")
        index %= len(self)
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _file(self, shard: int) -> safe_open:
        # Mapped for good: a mapping costs no memory of its own and keeps no file descriptor.
        if shard not in self._open:
            self._open[shard] = safe_open(self._paths[shard], framework="pt")
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # mappings are not sent to worker processes, each makes its own


def _other_version(version: Any) -> str:
    return (
        f"format version {version}, but this program reads version {DATASET_FORMAT_VERSION}. Use the release that "
        "wrote it, or encode the pictures again."
    )


def _check_layout(path: str | os.PathLike, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> None:
    """Raises ValueError, naming the file, unless these are the tensors of a shard."""
    texture = shapes.get("texture", ())
    num_items, num_tokens = texture[:2] if len(texture) == 3 else (0, 0)
    geometry = (num_items, num_tokens, GEOMETRY_CHANNELS)
    expected = {"geometry": geometry, "initial_geometry": geometry, "label": (num_items,), "texture": texture}
    if len(texture) != 3 or dict(shapes) != expected:
        found = ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
        raise ValueError(
            f"{path}: a shard has initial_geometry and geometry (n, N, 5), texture (n, N, C) and label (n,), this one "
            f"has {found or 'nothing'}."
        )
    allowed = {"texture": ("float16", "float32"), "label": ("int64",)}
    for name, dtype in dtypes.items():
        if dtype not in allowed.get(name, ("float32",)):
            raise ValueError(f"{path}: {name} is {dtype}, which a shard cannot hold.")


def _check_fits(path: Path, header: ShardHeader, expected: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the file, unless a shard is what the rest of the dataset expects."""
    names = ["num_tokens", "texture_channels", "texture_dtype", "settings"]
    if "version" in expected:
        names.append("num_items")
    for name in names:
        found, wanted = getattr(header, name), expected[name]
        if found != wanted:
            difference = f"{name} is {found}, not {wanted}"
            if name == "settings":
                difference = settings_difference(found, wanted)
            raise ValueError(
                f"{path}: {difference} as in the rest of the dataset. The file belongs to another one: move it away "
                "and encode the pictures again, which makes only what is missing."
            )


def _read_index(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: no such file, so {path.parent} is no finished dataset. encode_dataset.py writes it last."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: damaged, this is not JSON ({error}). {_ADVICE}") from error
    if not isinstance(content, dict) or content.get("format") != DATASET_FORMAT:
        raise ValueError(f"{path}: JSON, but not of a token dataset.")
    if content.get("version") != DATASET_FORMAT_VERSION:
        raise ValueError(f"{path}: a dataset of {_other_version(content.get('version'))}")
    return content
