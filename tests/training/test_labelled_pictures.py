"""Pictures with class labels: what views change, pictures of any mode, and datasets of the package `datasets`."""

from __future__ import annotations

import io

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


class ClassLabel:
    names = ["ant", "zebra"]


class ImageFeature:
    def __init__(self, decode: bool = True):
        self.decode = decode


ImageFeature.__name__ = "Image"


class StandIn:
    """As much of `datasets.Dataset` as is used."""

    _fingerprint = "f00d"

    def __init__(self, columns, features):
        self.columns, self.features = columns, features

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: column[key] for name, column in self.columns.items()}

    def select_columns(self, name):
        return StandIn({name: self.columns[name]}, {name: self.features[name]})

    def cast_column(self, name, feature):
        assert not feature.decode
        return StandIn(self.columns, {name: feature})


def test_datasets_are_read_undecoded(tmp_path):
    buffer = io.BytesIO()
    smooth_picture(6).save(buffer, "PNG")
    smooth_picture(7).save(tmp_path / "b.png")
    images = [
        {"bytes": buffer.getvalue(), "path": None},
        {"bytes": None, "path": str(tmp_path / "b.png")},
        {"bytes": b"damaged", "path": "c.png"},
    ]
    features = {"img": ImageFeature(), "kind": ClassLabel()}
    pictures = LabelledDataset(StandIn({"img": images, "kind": [1, 0, 1]}, features))
    assert pictures.id2label == {0: "ant", 1: "zebra"}
    assert pictures.labels == [1, 0, 1]
    assert pictures.names == ["zebra/00000000", "ant/00000001", "zebra/00000002"]
    assert load_picture(pictures.open(0)).tobytes() == smooth_picture(6).tobytes()
    assert load_picture(pictures.open(1)).tobytes() == smooth_picture(7).tobytes()
    with pytest.raises(ValueError, match="not an image"):
        load_picture(pictures.open(2))
    with pytest.raises(FileNotFoundError):  # no damage: the disk may be back later, so nothing is left out
        load_picture(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="Expected classes 0 to 1, got {-1}: take a labelled split"):
        LabelledDataset(StandIn({"img": images, "kind": [1, -1, 1]}, features))
    with pytest.raises(ValueError, match="one Image and one ClassLabel column"):
        LabelledDataset(StandIn({}, {"img": ImageFeature(), "text": str}))


def test_a_real_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [smooth_picture(8), smooth_picture(9)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "zebra"])})
    datasets.Dataset.from_dict({"image": images, "label": [1, 0]}, features=features).save_to_disk(str(tmp_path / "d"))
    pictures = open_labelled(str(tmp_path / "d"), "train")
    assert pictures.labels == [1, 0]
    assert load_picture(pictures.open(1)).tobytes() == images[1].tobytes()
    assert pictures.fingerprint() == open_labelled(str(tmp_path / "d"), "train").fingerprint()
