"""The encoding script for real: two processes, kill -9 and going on, damaged pictures, other settings."""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import encode_dataset
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from model_zoo import smooth_picture, tiny_model

from gpstoken_diffusers import GPSTokenImageProcessor
from gpstoken_diffusers.training.token_dataset import TokenDataset, shard_path

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
COMMON = ("--num_tokens", "5", "--views", "3", "--flip", "--shard_size", "4", "--batch_size", "3", "--num_workers", "0")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes, five pictures: one with transparency, one damaged, one in a subfolder."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("zebra", "ant/deep"):
        (folder / name).mkdir(parents=True)
    smooth_picture(0).save(folder / "zebra" / "a b.png")
    smooth_picture(1, (32, 32), 4).save(folder / "zebra" / "clear.png")
    smooth_picture(2, (30, 70)).save(folder / "ant" / "x.jpg")
    smooth_picture(3).save(folder / "ant" / "deep" / "y.png")
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
        smooth_picture(9).save(tmp_path / "other" / "ant" / "x.jpg")
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


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("change, reason", [
    (Path.unlink, "cannot be read (No such file or directory)"),
    (to_folder, "cannot be read (Is a directory)"),
    (to_loop, "cannot be read (Too many levels of symbolic links)"),
    (lambda path: shutil.rmtree(path.parent), "cannot be read (No such file or directory)"),
    (lambda path: path.write_bytes(b""), "not an image in a format that Pillow reads"),
])  # fmt: skip
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_picture_that_is_gone_since_the_list_was_made_is_left_out(
    encode, whole, pictures, tmp_path, monkeypatch, caplog, change, reason, workers
):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    real = encode_dataset.missing_shards  # the last that is done before pictures are read
    monkeypatch.setattr(
        encode_dataset, "missing_shards", lambda *args: (change(data / "ant" / "deep" / "y.png"), real(*args))[1]
    )
    assert encode(tmp_path / "out", "--data", str(data), "--num_workers", workers) == 0
    dataset, complete = TokenDataset(tmp_path / "out"), TokenDataset(whole)
    assert dataset.description["skipped"]["ant/deep/y.png"] == reason
    assert f"2 pictures could not be read and were left out:\n  ant/deep/y.png: {reason}" in caplog.text
    assert [dataset.name(index) for index in range(9)] == [complete.name(index) for index in range(3, 12)]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_disk_that_is_gone_leaves_no_picture_out(encode, pictures, tmp_path, monkeypatch, capsys, workers):
    data, output = tmp_path / "data", tmp_path / "out"
    shutil.copytree(pictures, data)
    real = encode_dataset.missing_shards
    monkeypatch.setattr(
        encode_dataset, "missing_shards", lambda *args: (data.rename(tmp_path / "away"), real(*args))[1]
    )
    assert encode(output, "--data", str(data), "--num_workers", workers) == 1
    said = capsys.readouterr().err
    assert "is their disk there?" in said and "Traceback" not in said
    (tmp_path / "away").rename(data)
    monkeypatch.setattr(encode_dataset, "missing_shards", real)
    assert encode(output, "--data", str(data)) == 0
    assert TokenDataset(output).description["skipped"].keys() == {"ant/z.png"}


def end_by_force(path: Path) -> None:
    if torch.utils.data.get_worker_info():
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_ends_the_run_in_one_line(encode, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encode_dataset, "read_labelled", lambda pictures, index: end_by_force(pictures.open(index)))
    assert encode(tmp_path / "out", "--num_workers", "2") == 1
    said = capsys.readouterr().err
    assert "a process that reads pictures has ended" in said and "Traceback" not in said


def test_pixels_come_without_shared_memory(pictures, model_folder):
    """torch sends tensors of worker processes through /dev/shm, NumPy's arrays go through a pipe."""
    processor = GPSTokenImageProcessor(shortest_edge=32, center_crop=True, tile_size=32, num_tokens=5)
    args = encode_dataset.parse_args(["--data", str(pictures), "--output", "unused"])
    inputs = encode_dataset.EncoderInputs(encode_dataset.open_labelled(str(pictures), "train"), processor, args)
    batch = inputs[0, 0, 3]
    assert {type(value) for value in batch["features"].values()} == {np.ndarray}


def test_odd_names_and_shapes_are_pictures_too(encode, tmp_path, caplog):
    folder = tmp_path / "odd"
    folder.mkdir()
    smooth_picture(1).save(folder / "plain.png")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes((folder / "plain.png").read_bytes())
    Path(os.fsdecode(os.fsencode(folder) + b"/bad\xe9.png")).write_bytes(b"no picture")
    smooth_picture(2, (5000, 1)).save(folder / "thin.png")
    smooth_picture(3, (1, 1)).save(folder / "dot.png")
    assert encode(tmp_path / "out", "--data", str(folder)) == 0
    dataset = TokenDataset(tmp_path / "out")
    assert len(dataset) == 4 * 3 and len(dataset.description["skipped"]) == 1
    assert "bad\\udce9.png: not an image" in caplog.text  # in letters that every log can hold


def test_a_folder_of_pictures_is_one_class(encode, tmp_path):
    folder = tmp_path / "holiday"
    folder.mkdir()
    for number in range(2):
        smooth_picture(number).save(folder / f"{number}.png")
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
