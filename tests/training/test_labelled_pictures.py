"""Pictures with class labels: what views change, pictures of any mode, and datasets of the package `datasets`."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from command_runs import odd_picture
from model_zoo import smooth_picture
from PIL import Image

from gpstoken_diffusers import GPSTokenImageProcessor
from gpstoken_diffusers.training.labelled_pictures import (
    VIEW_SCALE,
    LabelledDataset,
    change_view,
    load_picture,
    open_labelled,
)


def test_views_depend_on_name_and_number_alone():
    image = smooth_picture(4, (64, 64))
    pixels = [np.asarray(change_view(image, 32, *which)) for which in [("a", 1, True)] * 2 + [("a", 2, True)]]
    pixels.append(np.asarray(change_view(image, 32, "b", 1, True)))
    assert (pixels[0] == pixels[1]).all()
    assert (pixels[0] != pixels[2]).any() and (pixels[0] != pixels[3]).any()


def test_views_change_size_and_place_a_little():
    dot = Image.new("RGB", (200, 300), "white")
    dot.paste((0, 0, 0), (80, 130, 120, 170))  # 40 px in the middle of a picture 200 px wide
    sizes, places = [], []
    for view in range(1, 200):
        dark = 1 - np.asarray(change_view(dot, 100, "dot", view, False)).mean(2) / 255
        sizes.append(np.sqrt(dark.sum()) / 20)
        places.append((dark.sum(0) @ np.arange(100) / dark.sum() - 49.5) / 100)
    assert min(sizes) > VIEW_SCALE[0] - 0.02 and max(sizes) < VIEW_SCALE[1] + 0.02
    assert max(sizes) - min(sizes) > 0.25
    assert 0.05 < max(np.abs(places)) < 0.06 * VIEW_SCALE[1] + 0.005


@pytest.mark.parametrize("mode, border", [("RGB", (200, 30, 90)), ("RGBA", (0, 0, 0, 0))])
def test_what_a_view_uncovers(mode, border):
    image = Image.new(mode, (50, 50), (200, 30, 90) if mode == "RGB" else (200, 30, 90, 255))
    corners = set()
    for view in range(1, 60):
        changed = change_view(image, 32, "plain", view, True)
        assert changed.mode == mode and changed.size == (32, 32)
        corners |= {changed.getpixel(xy) for xy in ((0, 0), (31, 0), (0, 31), (31, 31))}
        assert changed.getpixel((16, 16)) == image.getpixel((0, 0))
    assert border in corners
    assert mode == "RGBA" or corners == {border}


def test_whatever_a_picture_raises_is_named(tmp_path):
    with pytest.raises(ValueError, match="damaged .Unimplemented pixel format"):
        load_picture(odd_picture(tmp_path / "odd.dds"))


def test_classes_are_folders_links_to_folders_and_no_others(tmp_path, caplog):
    for name in ("data/ant/1.png", "data/__MACOSX/1.png", "data/loose.png", "bee/below/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        smooth_picture(1).save(tmp_path / name)
    (tmp_path / "data" / "bee").symlink_to(tmp_path / "bee")
    (tmp_path / "data" / "same-bee").symlink_to(tmp_path / "bee")
    (tmp_path / "data" / "ant" / "back").symlink_to(tmp_path / "data")
    pictures = open_labelled(str(tmp_path / "data"), "train")
    assert pictures.id2label == {0: "ant", 1: "bee"}
    assert pictures.names == ["ant/1.png", "bee/below/2.png"] and pictures.labels == [0, 1]
    assert "1 left out (outside of the class folders): loose.png" in caplog.text
    assert "2 left out (leads to a folder that was searched already): ant/back, same-bee" in caplog.text
    (tmp_path / "data" / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image"):
        open_labelled(str(tmp_path / "data"), "train")


def test_flips_are_asked_for():
    half = Image.new("RGB", (64, 64), "white")
    half.paste((0, 0, 0), (0, 0, 32, 64))
    left = [[np.asarray(change_view(half, 32, "half", view, flip))[16, 3, 0] < 128 for view in range(1, 60)]
            for flip in (False, True)]  # fmt: skip
    assert all(left[0])
    assert 15 < sum(left[1]) < 45


@pytest.mark.parametrize("mode", ["L", "P", "LA", "I;16", "CMYK", "1"])
def test_pictures_of_any_mode(mode):
    image = smooth_picture(5).convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image, dtype=np.uint16) * 257)
    else:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    loaded = load_picture(buffer)
    processor = GPSTokenImageProcessor(shortest_edge=32, center_crop=True, tile_size=32, num_tokens=4)
    views = [loaded, change_view(loaded, 32, "any", 1, False)]
    means = processor(views)["pixel_values"].mean((1, 2, 3))
    assert (means[0] - means[1]).abs() < 0.25
    assert means.abs().max() < 0.9


IMAGES = [smooth_picture(seed) for seed in (6, 7, 8)]
KINDS = [1, 0, 1]


def png(image: Image.Image) -> bytes:
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write_shards(folder: Path, classes: Sequence[str]) -> None:
    """A shard a picture, as WebDataset writes it; with a file of its class where there are classes."""
    for index, image in enumerate(IMAGES):
        files = {f"a/{index}.png": png(image), f"a/{index}.json": b"{}"}
        files |= {f"a/{index}.cls": classes[index].encode()} if classes else {}
        write_tar(folder / f"x-{index:04}.tar", files)


def rows_of(labels: dict[str, list] | None = None, feature=None):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [{"bytes": png(image), "path": None} for image in IMAGES], **(labels or {})}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    for name in labels or {}:
        rows = rows.cast_column(name, feature or datasets.ClassLabel(names=["ant", "zebra"]))
    return rows


def saved(folder: Path) -> None:
    rows_of({"kind": KINDS}).save_to_disk(folder)


def of_splits(folder: Path) -> None:
    splits = {"test": rows_of({"kind": [0, 0, 0]}), "train": rows_of({"kind": KINDS})}
    pytest.importorskip("datasets").DatasetDict(splits).save_to_disk(folder)


def parquet(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    for index in range(3):
        path = folder / "data" / f"train-{index:05}-of-00003.parquet"
        rows_of({"kind": KINDS}).select([index]).to_parquet(path)


def parquet_of_others(folder: Path) -> None:
    """Pictures as bytes, classes as words, and no word of `datasets` in it."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    folder.mkdir()
    columns = {"jpg": [png(image) for image in IMAGES], "label": ["zebra", "ant", "zebra"]}
    write_table(pyarrow.table(columns), folder / "0000.parquet")


NAMED = {0: "ant", 1: "zebra"}


@pytest.mark.parametrize("write, data, id2label, labels", [
    (saved, "d", NAMED, KINDS),
    (of_splits, "d", NAMED, KINDS),
    (parquet, "d", NAMED, KINDS),
    (parquet, "d/data/train-{00000..00002}-of-00003.parquet", NAMED, KINDS),
    (parquet, "d/data/train-*.parquet", NAMED, KINDS),
    (parquet_of_others, "d", NAMED, KINDS),
    (lambda folder: rows_of().save_to_disk(folder), "d", {0: "d"}, [0, 0, 0]),
    (lambda folder: rows_of({"kind": [-1, -1, -1]}).save_to_disk(folder), "d", {0: "d"}, [0, 0, 0]),
    (lambda folder: write_shards(folder, ["10", "9", "10"]), "d", {0: "9", 1: "10"}, KINDS),
    (lambda folder: write_shards(folder, ["zebra", "ant", "zebra"]), "d/x-{0000..0002}.tar", NAMED, KINDS),
    (lambda folder: write_shards(folder, []), "d/x-{0000,0001,0002}.tar", {0: "d"}, [0, 0, 0]),
])  # fmt: skip
def test_data_of_every_kind(tmp_path, write, data, id2label, labels):
    write(tmp_path / "d")
    pictures, again = (open_labelled(str(tmp_path / data), "train") for _ in range(2))
    assert (pictures.id2label, pictures.labels) == (id2label, labels)
    assert [load_picture(pictures.open(index)).tobytes() for index in range(3)] == [i.tobytes() for i in IMAGES]
    assert len(set(pictures.names)) == len(pictures) == 3
    assert pictures.fingerprint() == again.fingerprint()


def test_data_that_cannot_be_used_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    of_splits(tmp_path / "splits")
    with pytest.raises(ValueError, match="test, train, got heldout"):
        open_labelled(str(tmp_path / "splits"), "heldout")
    write_shards(tmp_path / "shards", [])
    write_tar(tmp_path / "shards" / "y.tar", {"a.png": png(IMAGES[0]), "a.cls": b"3"})
    with pytest.raises(ValueError, match=r"x-0000.tar:a/0.png has none"):
        open_labelled(str(tmp_path / "shards"), "train")
    with pytest.raises(ValueError, match=r"No tar shard matches .*x-0003.tar"):
        open_labelled(str(tmp_path / "shards" / "x-{0001..0004}.tar"), "train")
    with pytest.raises(ValueError, match="No file matches"):
        open_labelled(str(tmp_path / "absent-*.parquet"), "train")
    for rows, message in (
        (rows_of({"kind": [1, -1, 1]}), "Expected classes 0 to 1, got {-1}: take a labelled split"),
        (rows_of({"fine": KINDS, "coarse": KINDS}), "fine, coarse: say by --label_column"),
        (datasets.Dataset.from_dict({"text": ["a"]}), "one Image column, got text"),
    ):
        with pytest.raises(ValueError, match=message):
            LabelledDataset(rows)
    both = rows_of({"fine": KINDS, "coarse": [0, 0, 0]})
    assert LabelledDataset(both, label_column="fine").labels == KINDS
    with pytest.raises(ValueError, match="image, fine, coarse, got 'kind'"):
        LabelledDataset(both, label_column="kind")


def test_a_dataset_is_read_undecoded(tmp_path):
    """So that a damaged picture is left out, but one that the disk may give back later is not."""
    datasets = pytest.importorskip("datasets")
    IMAGES[0].save(tmp_path / "b.png")
    places = [(None, str(tmp_path / "b.png")), (b"damaged", "c.png"), (None, str(tmp_path / "absent.png"))]
    images = [{"bytes": data, "path": path} for data, path in places]
    pictures = LabelledDataset(datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image()))
    assert load_picture(pictures.open(0)).tobytes() == IMAGES[0].tobytes()
    with pytest.raises(ValueError, match="not an image"):
        load_picture(pictures.open(1))
    with pytest.raises(FileNotFoundError):
        load_picture(pictures.open(2))
