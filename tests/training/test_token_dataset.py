"""Shards of tokens: what is written is read, what does not belong is refused by name."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from gpstoken_diffusers.training.token_dataset import (
    DATASET_FORMAT,
    TokenDataset,
    read_shard_header,
    shard_path,
    write_index,
    write_shard,
)

DESCRIPTION = {"id2label": {0: "cat", 1: "dog & co"}, "image_size": [32, 32], "autoencoder": {"name": "tiny"}}
SETTINGS = {"num_tokens": 6, "views": 2}


def tensors(num_items: int, num_tokens: int = 6, channels: int = 4, dtype=torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    initial = torch.rand(num_items, num_tokens, 5, generator=generator)
    return {
        "initial_geometry": initial,
        "geometry": initial + 0.01 * torch.randn(num_items, num_tokens, 5, generator=generator),
        "texture": (3 * torch.randn(num_items, num_tokens, channels, generator=generator) + 1).to(dtype),
        "label": torch.arange(num_items) % 2,
    }


def names(num_items: int, shard: int = 0) -> list[tuple[str, int]]:
    return [(f"cat/{shard}-{item // 2}.png", item % 2) for item in range(num_items)]


def write(folder, sizes, dtype=torch.float32, settings=SETTINGS):
    parts = [tensors(size, dtype=dtype, seed=shard) for shard, size in enumerate(sizes)]
    for shard, part in enumerate(parts):
        write_shard(shard_path(folder, shard), part, names(sizes[shard], shard), settings)
    write_index(folder, len(sizes), DESCRIPTION)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_items_come_back(tmp_path, dtype):
    expected = write(tmp_path, [3, 0, 4], dtype)  # a shard none of whose pictures could be read is empty
    dataset = TokenDataset(tmp_path)
    assert (len(dataset), dataset.num_tokens, dataset.texture_channels) == (7, 6, 4)
    assert dataset.id2label == {0: "cat", 1: "dog & co"}
    assert dataset.image_size == (32, 32)
    assert dataset.description["autoencoder"] == {"name": "tiny"}
    assert dataset.description["settings"] == SETTINGS
    for index in range(7):
        item = dataset[index]
        assert item["texture"].dtype == dtype
        assert type(item["label"]) is int
        assert item["label"] == expected["label"][index]
        for name in ("initial_geometry", "geometry", "texture"):
            assert torch.equal(item[name], expected[name][index]), name
    assert torch.equal(dataset.labels, expected["label"])
    assert torch.equal(dataset.layouts(), expected["initial_geometry"])
    assert torch.equal(dataset[-1]["texture"], expected["texture"][6])
    assert [dataset.name(index) for index in (2, 3, -1)] == [("cat/0-1.png", 0), ("cat/2-0.png", 0), ("cat/2-1.png", 1)]
    for index in (7, -8):
        with pytest.raises(IndexError, match=f"item {index} of a dataset of 7"):
            dataset[index]


def test_an_item_can_be_changed(tmp_path):
    expected = write(tmp_path, [2])
    dataset = TokenDataset(tmp_path)
    dataset[0]["geometry"].zero_()
    assert torch.equal(dataset[0]["geometry"], expected["geometry"][0])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same(tmp_path, context):
    expected = write(tmp_path, [3, 4])
    dataset = TokenDataset(tmp_path)
    dataset[0]
    if context == "spawn":  # what a spawned worker gets; starting one takes seconds
        dataset = pickle.loads(pickle.dumps(dataset))
        batches = list(DataLoader(dataset, 4))
    else:
        batches = list(DataLoader(dataset, 4, num_workers=2, multiprocessing_context="fork"))
    assert [len(batch["label"]) for batch in batches] == [4, 3]
    assert torch.equal(torch.cat([batch["texture"] for batch in batches]), expected["texture"])
    assert batches[0]["label"].dtype == torch.int64


@pytest.mark.parametrize("at_once", [1, 2, 256])
def test_statistics_are_those_of_all_tokens(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr("gpstoken_diffusers.training.token_dataset._ITEMS_AT_ONCE", at_once)
    expected = write(tmp_path, [3, 0, 4])
    mean, std = TokenDataset(tmp_path).statistics()
    residual = expected["geometry"].double() - expected["initial_geometry"].double()
    rows = torch.cat([residual, expected["texture"].double()], dim=-1).flatten(0, 1)
    assert mean.dtype == std.dtype == torch.float64
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(std, rows.std(0, correction=0), rtol=1e-12, atol=1e-14)


def test_statistics_keep_small_deviations_from_large_means(tmp_path):
    part = tensors(8)
    part["texture"] = 4e6 + torch.randint(0, 2, part["texture"].shape).float()  # steps of 0.5 there
    write_shard(shard_path(tmp_path, 0), part, names(8), SETTINGS)
    write_index(tmp_path, 1, DESCRIPTION)
    _, std = TokenDataset(tmp_path).statistics()
    expected = part["texture"].double().flatten(0, 1).std(0, correction=0)
    torch.testing.assert_close(std[5:], expected, rtol=1e-9, atol=0)


def test_equal_shards_are_equal_bytes(tmp_path):
    for copy in range(8):
        write_shard(tmp_path / str(copy), tensors(3), names(3), {"b": 1, "a": 2}, {"x": "damaged", "w": "damaged"})
    assert len({(tmp_path / str(copy)).read_bytes() for copy in range(8)}) == 1
    header = read_shard_header(tmp_path / "0")
    assert header.settings == {"a": 2, "b": 1}
    assert header.skipped == {"w": "damaged", "x": "damaged"}
    assert header.names == names(3)
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert json.loads(file.metadata()[DATASET_FORMAT])["version"] == 1


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_may_have_any_length(tmp_path, length):
    """A file begins with its header's length, and these begin like a Python pickle."""
    path = shard_path(tmp_path, 0)
    write_shard(path, tensors(1), names(1), SETTINGS, {"": ""})
    missing = length - int.from_bytes(path.read_bytes()[:8], "little")
    write_shard(path, tensors(1), names(1), SETTINGS, {"": "x" * missing})
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    assert read_shard_header(path).num_items == 1


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_shard(shard_path(tmp_path, 0), tensors(2), names(2), SETTINGS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("texture", lambda t: t.index_fill(0, torch.tensor([1]), torch.nan), r"texture of cat/0-0.png \(view 1\).*NaN"),
        ("geometry", lambda t: t / 0, r"geometry of cat/0-0.png \(view 0\)"),
        ("geometry", lambda t: t[:, :4], "geometry .3, 4, 5."),
        ("label", lambda t: t[:2], "a shard has initial_geometry"),
        ("label", lambda t: t.int(), "label is int32"),
        ("texture", lambda t: t.bfloat16(), "texture is bfloat16"),
        ("geometry", lambda t: t.half(), "geometry is float16"),
    ],
)
def test_the_writer_refuses(tmp_path, name, change, message):
    part = tensors(3)
    part[name] = change(part[name])
    with pytest.raises(ValueError, match=message):
        write_shard(shard_path(tmp_path, 0), part, names(3), SETTINGS)
    with pytest.raises(ValueError, match="2 names were given for 3 items"):
        write_shard(shard_path(tmp_path, 0), tensors(3), names(2), SETTINGS)
    assert list(tmp_path.iterdir()) == []


def rewrite(path, **change):
    """A shard with something else in its header."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[DATASET_FORMAT])
        content = {name: file.get_tensor(name).clone() for name in file.keys()}
    save_file(content, path, metadata={DATASET_FORMAT: json.dumps({**header, **change})})


def replace(**change):
    return lambda path: write_shard(path, tensors(4, **change), names(4), SETTINGS)


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


OF_CLASS_2 = tensors(4) | {"label": torch.full((4,), 2)}
# What happens to a shard of four items, and what is said of it.
DAMAGES = {
    "missing": (lambda path: path.unlink(), FileNotFoundError, "this shard of the dataset is missing"),
    "empty": (lambda path: path.write_bytes(b""), ValueError, "the file is empty"),
    "truncated": (cut, ValueError, "a truncated or damaged safetensors file"),
    "noise": (lambda path: path.write_bytes(b"\xff" * 100), ValueError, "not a safetensors file"),
    "foreign": (lambda path: save_file({"a": torch.zeros(2)}, path), ValueError, "but no shard of a token dataset"),
    "version": (
        lambda path: rewrite(path, version=2),
        ValueError,
        "format version 2, but this program reads version 1",
    ),
    "settings": (lambda path: rewrite(path, settings=SETTINGS | {"views": 3}), ValueError, "views is 3, not 2"),
    "tokens": (replace(num_tokens=8), ValueError, "num_tokens is 8, not 6"),
    "channels": (replace(channels=3), ValueError, "texture_channels is 3, not 4"),
    "dtype": (replace(dtype=torch.float16), ValueError, "texture_dtype is float16, not float32"),
    "items": (lambda path: write_shard(path, tensors(2), names(2), SETTINGS), ValueError, "num_items is 2, not 4"),
    "label": (lambda path: write_shard(path, OF_CLASS_2, names(4), SETTINGS), ValueError, r"the items' classes \[2\]"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_shard_that_does_not_belong_is_named(tmp_path, kind):
    write(tmp_path, [3, 4])
    damage, error, message = DAMAGES[kind]
    damage(shard_path(tmp_path, 1))
    file = "dataset.json" if kind == "label" else "shard-00001.safetensors"
    with pytest.raises(error, match=f"{file}: .*{message}"):
        TokenDataset(tmp_path)


@pytest.mark.parametrize("kind", ["missing", "truncated", "settings", "tokens", "dtype"])
def test_no_index_is_written_over_shards_that_do_not_fit(tmp_path, kind):
    write(tmp_path, [3, 4])
    (tmp_path / "dataset.json").unlink()
    damage, error, _ = DAMAGES[kind]
    damage(shard_path(tmp_path, 1))
    with pytest.raises(error, match="shard-00001.safetensors"):
        write_index(tmp_path, 2, DESCRIPTION)
    assert not (tmp_path / "dataset.json").exists()


def test_nothing_is_no_dataset(tmp_path):
    write_shard(shard_path(tmp_path, 0), tensors(0), [], SETTINGS, {"cat/a.png": "damaged"})
    with pytest.raises(ValueError, match="no picture could be read"):
        write_index(tmp_path, 1, DESCRIPTION)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no such file, so .* is no finished dataset"),
        ('{"format": "gps', "this is not JSON"),
        ("[]", "JSON, but not of a token dataset"),
        ('{"format": "other"}', "JSON, but not of a token dataset"),
        ('{"format": "gpstoken.dataset", "version": 9}', "a dataset of format version 9"),
    ],
)
def test_an_index_that_cannot_be_used(tmp_path, text, message):
    write(tmp_path, [3])
    (tmp_path / "dataset.json").unlink()
    if text is not None:
        (tmp_path / "dataset.json").write_text(text)
    with pytest.raises((FileNotFoundError, ValueError), match=f"dataset.json: .*{message}"):
        TokenDataset(tmp_path)
