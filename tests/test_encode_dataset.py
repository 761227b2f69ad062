"""The encoding script for real: two processes, kill -9 and going on, damaged pictures, other settings."""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from model_zoo import tiny_model
from PIL import Image

from gpstoken_diffusers import GPSTokenImageProcessor
from gpstoken_diffusers.training.labelled_pictures import (
    VIEW_SCALE,
    LabelledDataset,
    change_view,
    load_picture,
    open_labelled,
)
from gpstoken_diffusers.training.token_dataset import TokenDataset, shard_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import encode_dataset  # noqa: E402

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
COMMON = ("--num_tokens", "5", "--views", "3", "--flip", "--shard_size", "4", "--batch_size", "3", "--num_workers", "0")


def smooth(seed: int, size: tuple[int, int] = (44, 36), channels: int = 3) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes, five pictures: one with transparency, one damaged, one in a subfolder."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("zebra", "ant/deep"):
        (folder / name).mkdir(parents=True)
    smooth(0).save(folder / "zebra" / "a b.png")
    smooth(1, (32, 32), 4).save(folder / "zebra" / "clear.png")
    smooth(2, (30, 70)).save(folder / "ant" / "x.jpg")
    smooth(3).save(folder / "ant" / "deep" / "y.png")
    (folder / "ant" / "z.png").write_bytes((folder / "zebra" / "a b.png").read_bytes()[:900])
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("lattice").save_pretrained(folder)
    return folder


def run_script(pictures: Path, model_folder: Path, output: Path, *extra: str) -> int:
    """Runs the script in this process, on the CPU; later options replace earlier ones. Returns the exit code."""
    arguments = ["--autoencoder", str(model_folder), "--data", str(pictures), "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1")
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            return encode_dataset.main([*arguments, *COMMON, *extra])
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def encode(pictures, model_folder):
    return functools.partial(run_script, pictures, model_folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(pictures, model_folder, tmp_path_factory):
    """What one process writes."""
    output = tmp_path_factory.mktemp("whole")
    assert run_script(pictures, model_folder, output) == 0
    return output


def test_items_are_what_the_autoencoder_gives(whole, pictures, model_folder):
    dataset = TokenDataset(whole)
    assert dataset.id2label == {0: "ant", 1: "zebra"}
    assert dataset.labels.tolist() == [0] * 6 + [1] * 6
    named = ["ant/deep/y.png", "ant/x.jpg", "zebra/a b.png", "zebra/clear.png"]
    assert [dataset.name(index) for index in range(12)] == [(name, view) for name in named for view in range(3)]
    assert [shard["items"] for shard in dataset.description["shards"]] == [4, 2, 3, 3]  # 4 but for the damaged one's
    description = dataset.description
    assert description["skipped"].keys() == {"ant/z.png"}
    assert description["autoencoder"]["name"] == model_folder.name
    assert description["autoencoder"]["config"]["hidden_size"] == 32
    assert str(pictures) not in (whole / "dataset.json").read_text()

    processor = GPSTokenImageProcessor(shortest_edge=32, center_crop=True, tile_size=32, num_tokens=5)
    model = tiny_model("lattice")
    for index, name in zip((0, 3, 6, 9), named, strict=True):
        features = processor(GPSTokenImageProcessor.load_image(pictures / name))
        with torch.no_grad():
            tokens = model.encode(**features).tokens
        item = dataset[index]
        assert torch.equal(item["initial_geometry"], features["geometry"][0])
        # Not to the bit: there it was one of a batch.
        torch.testing.assert_close(item["geometry"], tokens.geometry[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(item["texture"], tokens.texture[0], rtol=1e-4, atol=1e-4)
        assert not torch.equal(item["texture"], dataset[index + 1]["texture"])


def be_one_of_two(encode, output: Path, rank: int, port: int) -> None:
    """What `accelerate launch` and torchrun set up for a process; starting them takes the better part of a minute."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    made = []
    real = encode_dataset.write_shard
    encode_dataset.write_shard = lambda path, *rest: (made.append(path.name), real(path, *rest))
    code = encode(output)
    (output.parent / f"made-{rank}").write_text(" ".join(made))
    os._exit(code)


@needs_fork
def test_two_processes_write_the_same_bytes(encode, whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [(encode, tmp_path / "two", rank, port) for rank in range(2)]
    processes = [FORK.Process(target=be_one_of_two, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert files(tmp_path / "two") == files(whole)
    made = [(tmp_path / f"made-{rank}").read_text() for rank in range(2)]
    parts = [" ".join(f"shard-{shard:05d}.safetensors" for shard in shards) for shards in ((0, 2), (1, 3))]
    assert made == parts


def die_while_writing(encode, output: Path, shard: int) -> None:
    """A process that is killed when `shard` is written but does not have its name yet."""
    real = os.replace

    def replace(source, target):
        if Path(target) == shard_path(output, shard):
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = replace
    encode(output)


@needs_fork
def test_goes_on_after_kill_9(encode, whole, tmp_path):
    output = tmp_path / "cut"
    process = FORK.Process(target=die_while_writing, args=(encode, output, 2))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    left = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert [name for name in sorted(left) if name[0] != "."] == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert len(left) == 3  # and the half-done one under a temporary name
    with pytest.raises(FileNotFoundError, match="no finished dataset"):
        TokenDataset(output)
    assert encode(output) == 0
    assert files(output) == files(whole)
    for name in ("shard-00000.safetensors", "shard-00001.safetensors"):
        assert (output / name).stat().st_mtime_ns == left[name], f"{name} was made again"


def test_a_finished_dataset_is_left_as_it_is(encode, whole, tmp_path, caplog):
    output = tmp_path / "again"
    assert encode(output) == 0
    assert "1 pictures could not be read and were left out:\n  ant/z.png: damaged" in caplog.text
    assert files(output) == files(whole)
    before = {path: path.stat().st_mtime_ns for path in output.glob("shard-*")}
    assert encode(output) == 0
    assert {path: path.stat().st_mtime_ns for path in output.glob("shard-*")} == before
    # A shard that the disk lost part of is made anew.
    path = shard_path(output, 1)
    path.write_bytes(path.read_bytes()[:-20])
    assert encode(output) == 0
    assert "truncated or damaged" in caplog.text
    assert files(output) == files(whole)


@pytest.mark.parametrize(
    "change, message",
    [
        (("--num_tokens", "6"), "num_tokens is 5, not 6"),
        (("--views", "2"), "views is 3, not 2"),
        (("--shard_size", "5"), "shard_size is 4, not 5"),
        (("--dtype", "bfloat16"), "dtype is float32, not bfloat16"),
        (("--autoencoder", "OTHER"), "autoencoder is "),
        (("--data", "OTHER"), "pictures is "),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(encode, whole, tmp_path, capsys, change, message):
    option, value = change
    value = value.replace("OTHER", str(tmp_path / "other"))
    if option == "--autoencoder":
        tiny_model("lattice", seed=1).save_pretrained(value)
    elif option == "--data":
        (tmp_path / "other" / "ant").mkdir(parents=True)
        smooth(9).save(tmp_path / "other" / "ant" / "x.jpg")
    before = files(whole)
    assert encode(whole, option, value) == 1
    error = capsys.readouterr().err
    assert "holds shards of other settings" in error and message in error
    assert files(whole) == before


def test_bfloat16_is_stored_in_16_bits(encode, whole, tmp_path):
    assert encode(tmp_path / "half", "--dtype", "bfloat16", "--views", "1", "--shard_size", "3") == 0
    half, full = TokenDataset(tmp_path / "half"), TokenDataset(whole)
    assert half.description["texture_dtype"] == "float16"
    assert half[0]["geometry"].dtype == torch.float32
    assert torch.equal(half[0]["initial_geometry"], full[0]["initial_geometry"])
    torch.testing.assert_close(half[0]["texture"].float(), full[0]["texture"], rtol=0.05, atol=0.2)


def test_workers_change_nothing(encode, whole, tmp_path):
    assert encode(tmp_path / "workers", "--num_workers", "2") == 0
    assert files(tmp_path / "workers") == files(whole)


def test_a_folder_of_pictures_is_one_class(encode, tmp_path):
    folder = tmp_path / "holiday"
    folder.mkdir()
    for number in range(2):
        smooth(number).save(folder / f"{number}.png")
    assert encode(tmp_path / "out", "--data", str(folder)) == 0
    dataset = TokenDataset(tmp_path / "out")
    assert dataset.id2label == {0: "holiday"} and set(dataset.labels.tolist()) == {0}


def test_unusable_input_is_one_message(encode, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed

    def error(*extra: str, data: Path) -> str:
        assert encode(tmp_path / "out", "--data", str(data), *extra) == 1
        return capsys.readouterr().err

    empty, hollow, broken = (tmp_path / name for name in ("empty", "hollow", "broken"))
    for folder in (empty, hollow / "ant", broken / "ant"):
        folder.mkdir(parents=True)
    (broken / "ant" / "a.png").write_bytes(b"no picture")
    assert "is no folder of class folders" in (message := error(data=tmp_path / "absent"))
    assert "pip install datasets" in message
    assert f"{empty} holds no image" in error(data=empty)
    assert f"{hollow / 'ant'} holds no image" in error(data=hollow)
    assert "no picture could be read" in error(data=broken)
    assert "tile of 32 px has 1 to" in error("--num_tokens", "5000", data=broken)
    assert "absent" in error("--autoencoder", str(tmp_path / "absent"), data=broken)
    with pytest.raises(SystemExit):
        encode(tmp_path / "out", "--views", "0")


def test_a_shard_too_many_is_refused(encode, whole, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    shard_path(output, 1).rename(shard_path(output, 7))
    assert encode(output) == 1
    assert "shard-00007.safetensors, which is not of this dataset" in capsys.readouterr().err


def test_views_depend_on_name_and_number_alone():
    image = smooth(4, (64, 64))
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


def test_flips_are_asked_for():
    half = Image.new("RGB", (64, 64), "white")
    half.paste((0, 0, 0), (0, 0, 32, 64))
    left = [[np.asarray(change_view(half, 32, "half", view, flip))[16, 3, 0] < 128 for view in range(1, 60)]
            for flip in (False, True)]  # fmt: skip
    assert all(left[0])
    assert 15 < sum(left[1]) < 45


@pytest.mark.parametrize("mode", ["L", "P", "LA", "I;16", "CMYK", "1"])
def test_pictures_of_any_mode(mode):
    image = smooth(5).convert("L")
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
    """As much of `datasets.Dataset` as the script uses."""

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
    smooth(6).save(buffer, "PNG")
    smooth(7).save(tmp_path / "b.png")
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
    assert load_picture(pictures.open(0)).tobytes() == smooth(6).tobytes()
    assert load_picture(pictures.open(1)).tobytes() == smooth(7).tobytes()
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
    images = [smooth(8), smooth(9)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "zebra"])})
    datasets.Dataset.from_dict({"image": images, "label": [1, 0]}, features=features).save_to_disk(str(tmp_path / "d"))
    pictures = open_labelled(str(tmp_path / "d"), "train")
    assert pictures.labels == [1, 0]
    assert load_picture(pictures.open(1)).tobytes() == images[1].tobytes()
    assert pictures.fingerprint() == open_labelled(str(tmp_path / "d"), "train").fingerprint()
