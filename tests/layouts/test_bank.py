"""LayoutBank: drawing by class, files, the official pickle, bad input."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gpstoken_diffusers.layouts.bank import LayoutBank
from gpstoken_diffusers.ops.partition import partition_image


def real_layouts(count: int, num_tokens: int = 12, seed: int = 0) -> torch.Tensor:
    images = torch.rand((count, 64, 64), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    images *= torch.linspace(0, 1, 64)
    return partition_image(images, num_tokens).geometry


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def bank() -> LayoutBank:
    return LayoutBank(real_layouts(7), [3, 3, 3, 5, 0, 5, 0], {3: "cat", 5: "dog", 4: "bird"})


# ---- drawing ----


def rows_of(bank: LayoutBank, layouts: torch.Tensor) -> list[int]:
    return [next(i for i in range(len(bank)) if torch.equal(bank.layouts[i], layout)) for layout in layouts]


def test_each_class_gets_its_own_layouts_and_never_runs_out(bank):
    found = bank.sample([3] * 60 + [5] * 40, torch.Generator().manual_seed(0))
    assert found.shape == (100, 12, 5) and found.dtype == torch.float32
    rows = rows_of(bank, found)
    assert set(rows[:60]) == {0, 1, 2} and set(rows[60:]) == {3, 5}
    assert min(rows[:60].count(i) for i in range(3)) >= 10  # evenly


def test_a_sample_does_not_depend_on_its_batch(bank):
    together = bank.sample(torch.tensor([3, 0, 5]), generators(1, 2, 3))
    for i, label in enumerate((3, 0, 5)):
        assert torch.equal(bank.sample([label], generators(i + 1)), together[i : i + 1])
    assert torch.equal(bank.sample([5, 3], generators(3, 1)), together[[2, 0]])


def test_generators_decide(bank):
    labels = [3, 5, 0, 3, 3, 3, 5, 0]
    first = bank.sample(labels, torch.Generator().manual_seed(4))
    assert torch.equal(first, bank.sample(labels, torch.Generator().manual_seed(4)))
    assert not torch.equal(first, bank.sample(labels, torch.Generator().manual_seed(5)))
    torch.manual_seed(1)
    first = bank.sample(labels)
    torch.manual_seed(1)
    assert torch.equal(first, bank.sample(labels))


def test_memory_is_its_own():
    layouts, labels = real_layouts(2), torch.tensor([1, 1])
    bank = LayoutBank(layouts, labels)
    layouts.zero_()
    labels.zero_()
    bank.sample([1]).zero_()
    assert (bank.layouts[..., :2] > 0).all() and bank.classes == [1]
    assert bank.sample([]).shape == (0, 12, 5)


def test_add(bank):
    bank.add(real_layouts(2, seed=1).double(), torch.tensor([9, 3]))
    assert len(bank) == 9 and bank.classes == [0, 3, 5, 9] and bank.layouts.dtype == torch.float32
    assert torch.equal(bank.sample([9]), real_layouts(2, seed=1)[:1])
    with pytest.raises(ValueError, match="12 tokens each, these 8"):
        bank.add(real_layouts(1, 8), [0])
    assert repr(bank) == "LayoutBank(9 layouts of 12 tokens, 4 classes)"


# ---- files ----


def assert_same(found: LayoutBank, expected: LayoutBank) -> None:
    assert torch.equal(found.layouts, expected.layouts) and torch.equal(found.labels, expected.labels)
    assert found.id2label == expected.id2label


def test_save_and_load(bank, tmp_path):
    path = tmp_path / "layouts.safetensors"
    bank.save(path)
    assert_same(LayoutBank.load(path), bank)
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises(OSError):
        bank.save(tmp_path / "none" / "layouts.safetensors")


HEADER = {"format": "gpstoken.layouts", "format_version": "1", "id2label": "{}"}
TENSORS = {"layouts": torch.full((2, 3, 5), 0.1), "labels": torch.tensor([0, 1])}


@pytest.mark.parametrize(
    ("tensors", "header", "words"),
    (
        (TENSORS, {}, "not of layouts"),
        (TENSORS, {"format": "gpstoken.tokens"}, "not of layouts"),
        (TENSORS, HEADER | {"format_version": "2"}, "version 2.*[Uu]pgrade"),
        (TENSORS, HEADER | {"format_version": "one"}, "damaged.*'one'"),
        (TENSORS, {"format": "gpstoken.layouts", "format_version": "1"}, "lack 'id2label'"),
        (TENSORS, HEADER | {"id2label": "[1]"}, "damaged"),
        (TENSORS, HEADER | {"id2label": "{"}, "damaged"),
        (TENSORS, HEADER | {"id2label": '{"a": "b"}'}, "damaged"),
        ({"layouts": TENSORS["layouts"]}, HEADER, "lack 'labels'"),
        (TENSORS | {"labels": torch.tensor([0])}, HEADER, "damaged: labels.*2 layouts, got 1"),
        (TENSORS | {"layouts": torch.zeros(2, 3, 5)}, HEADER, "damaged: layouts.*sigma > 0"),
    ),
)
def test_other_files(tensors, header, words, tmp_path):
    path = tmp_path / "layouts.safetensors"
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=words) as caught:
        LayoutBank.load(path)
    assert str(path) in str(caught.value)


def test_damaged_files(bank, tmp_path):
    path = tmp_path / "layouts.safetensors"
    with pytest.raises(FileNotFoundError):
        LayoutBank.load(path)
    bank.save(path)
    whole = path.read_bytes()
    for data, words in ((b"", "0 bytes"), (whole[:-5], "truncated"), (pickle.dumps({}), "pickle")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=words):
            LayoutBank.load(path)


# ---- the official pickle ----


def official(path, data) -> LayoutBank:
    path.write_bytes(pickle.dumps(data))
    return LayoutBank.from_official_pickle(path)


def rows(count: int, columns: int = 21, dtype: str = "f4") -> list[np.ndarray]:
    return [np.full((4, columns), 0.1 + i / 100, dtype) for i in range(count)]


def test_official_pickle(tmp_path):
    path = tmp_path / "initg.pickle"
    bank = official(path, {7: rows(3), 0: rows(1, 5, "f8")})
    assert bank.labels.tolist() == [7, 7, 7, 0] and bank.layouts.shape == (4, 4, 5) and bank.id2label == {}
    assert torch.allclose(bank.layouts[1], torch.tensor(0.11))
    bank.sample([7, 0])
    bank.layouts.zero_()  # memory of its own
    assert official(path, {"7": rows(1), np.int64(0): rows(1)}).labels.tolist() == [7, 0]
    named = official(path, {"n01440764": rows(2), "n01443537": [], "n01484850": rows(1)})
    assert named.labels.tolist() == [0, 0, 2] and named.id2label[2] == "n01484850"
    with pytest.raises(ValueError, match=r"no layout of class 1 \(n01443537\).*0 \(n01440764\), 2 \(n01484850\)"):
        named.sample([0, 1])


@pytest.mark.parametrize(
    ("data", "words"),
    (
        ([1], "something else"),
        ({}, "something else"),
        ({0: np.zeros((3, 5))}, "something else"),
        ({None: rows(1)}, "NoneType, not an integer or text"),
        ({0: []}, "no layout"),
        ({0: rows(1, 4)}, r"layout 0 of class 0 is float32 \(4, 4\)"),
        ({0: rows(1), 1: [np.zeros(5)]}, r"\(4, >= 5\), but layout 0 of class 1 is float64 \(5,\)"),
        ({0: [*rows(1), np.ones((3, 5))]}, r"layout 1 of class 0 is float64 \(3, 5\)"),
        ({0: [[1]]}, "is a list, not an array"),
        ({0: rows(1, 5, "i4")}, "is int32"),
        ({0: [np.zeros((4, 5))]}, "sigma > 0.*token 0 of layout 0"),
        ({0: [np.full((4, 5), np.nan)]}, "token 0 of layout 0"),
        ({0: rows(1) * 1000}, "again and again"),
        ({0: [torch.zeros(4, 5)]}, "asks for 'torch"),
        ({0: [os.system]}, r"asks for '\w+.system'"),
    ),
)
def test_bad_official_pickle(data, words, tmp_path):
    path = tmp_path / "initg.pickle"
    with pytest.raises(ValueError, match=words) as caught:
        official(path, data)
    assert str(caught.value).startswith(f"{path}: ")


# ---- bad input ----

GOOD = torch.full((2, 3, 5), 0.1)


def with_value(channel: int, value: float) -> torch.Tensor:
    layouts = GOOD.clone()
    layouts[1, 2, channel] = value
    return layouts


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    (
        ((GOOD.numpy(), [0, 1]), TypeError, "ndarray"),
        ((GOOD.int(), [0, 1]), TypeError, "int32"),
        ((GOOD[0], [0]), ValueError, r"\(n, N, 5\).*got \(3, 5\)"),
        ((GOOD[:0], []), ValueError, r"got \(0, 3, 5\)"),
        ((GOOD[:, :, :4], [0, 1]), ValueError, r"got \(2, 3, 4\)"),
        ((GOOD, [0]), ValueError, "2 layouts, got 1"),
        ((GOOD, [0.0, 1.0]), TypeError, "integers, got torch.float32"),
        ((GOOD, [0, -1]), ValueError, "from 0, got -1"),
        ((GOOD, [[0, 1]]), ValueError, r"shape \(1, 2\)"),
        ((with_value(3, float("nan")), [0, 1]), ValueError, "token 2 of layout 1"),
        ((with_value(1, 0.0), [0, 1]), ValueError, "token 2 of layout 1"),
        ((with_value(2, -1.0), [0, 1]), ValueError, "token 2 of layout 1"),
        ((GOOD, [0, 1], {"0": "cat"}), TypeError, "'0': 'cat'"),
        ((GOOD, [0, 1], {0: 1}), TypeError, "0: 1"),
    ),
)
def test_bad_layouts(arguments, error, words):
    with pytest.raises(error, match=words):
        LayoutBank(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    (
        (([1],), ValueError, r"class 1\. .*: 0, 3 \(cat\), 5 \(dog\)\.$"),
        (([3, 4],), ValueError, r"class 4 \(bird\)"),
        (([-1],), ValueError, "from 0, got -1"),
        (([3.0],), TypeError, "float32"),
        (([3, 3], generators(1)), ValueError, r"one per sample \(2\), got 1"),
        (([3], 7), TypeError, "got int"),
        (([3], [None, 7]), ValueError, "got 2"),
    ),
)
def test_bad_sample(bank, arguments, error, words):
    with pytest.raises(error, match=words):
        bank.sample(*arguments)


def test_a_long_list_of_classes_is_cut():
    bank = LayoutBank(GOOD[:1].expand(40, 3, 5), list(range(40)))
    with pytest.raises(ValueError, match="10, 11 and 28 more"):
        bank.sample([40])
