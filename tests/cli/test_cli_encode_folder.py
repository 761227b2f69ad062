"""`gpstoken encode` of a folder: the same tokens as one by one, in processes, and going on where a run stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from command_runs import names_in, odd_picture, photo, run, save_tiny_model

from gpstoken_diffusers import GPSTokenImageProcessor, GPSTokens
from gpstoken_diffusers.cli import encode_folder, sources
from gpstoken_diffusers.cli.encode_folder import PixelBudget, batches

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = [(40, 56), (32, 32), (40, 56), (9, 70), (32, 32), (40, 56), (40, 56)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "lattice")


@pytest.fixture
def photos(tmp_path) -> Path:
    for number, size in enumerate(SIZES):
        photo(tmp_path / "photos" / f"{number}.png", *size, seed=number)
    return tmp_path / "photos"


@pytest.fixture
def encode(model_folder, tmp_path, photos):
    def encode_folder(*more: object, output: str = "tokens") -> int:
        argv = ("encode", photos, "-o", tmp_path / output, "--model", model_folder, "--num-workers", 0, *more)
        return run(*argv)

    return encode_folder


def assert_same(first: Path, second: Path, names: list[str]) -> None:
    """The same tokens to the last bits that a batch of another size may change."""
    for name in names:
        one, other = (GPSTokens.load(folder / f"{name}.safetensors") for folder in (first, second))
        assert one.image_size == other.image_size and one.tile_grid == other.tile_grid
        torch.testing.assert_close(one.geometry, other.geometry, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.texture, other.texture, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_gives_what_its_pictures_give(encode, model_folder, photos, tmp_path, capsys, workers):
    photo(photos / "deep" / "8.png")
    assert encode("--recursive", "--batch-size", 3, "--num-workers", workers) == 0
    assert "8 encoded" in capsys.readouterr().out
    names = [path.relative_to(photos).as_posix() for path in sorted(photos.rglob("*.png"))]
    assert names_in(tmp_path / "tokens") == {f"{name}.safetensors" for name in names}
    for name in names:
        target = tmp_path / "single" / f"{name}.safetensors"
        assert run("encode", photos / name, "-o", target, "--model", model_folder) == 0
    assert_same(tmp_path / "single", tmp_path / "tokens", names)


def test_settings_reach_the_files(encode, photos, tmp_path):
    assert encode("--num-tokens", 3, "--encoding", "uint8") == 0
    file = tmp_path / "tokens" / "1.png.safetensors"
    assert GPSTokens.load(file).tokens_per_tile == 3
    metadata = GPSTokens.read_metadata(file)
    assert metadata["encoding"] == "uint8" and metadata["model"] == "tiny"
    record = json.loads(metadata["record"])
    assert record["settings"]["num_tokens"] == 3 and record["source"]["bytes"] == (photos / "1.png").stat().st_size


def test_what_is_done_is_left_and_what_changed_is_done_again(encode, photos, tmp_path, capsys):
    assert encode() == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}
    photo(photos / "1.png", 32, 32, seed=99)
    (tmp_path / "tokens" / "2.png.safetensors").unlink()
    capsys.readouterr()
    assert encode() == 0
    assert "2 encoded, 5 done before" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"1.png.safetensors", "2.png.safetensors"}
    assert encode("--overwrite") == 0
    assert "7 encoded" in capsys.readouterr().out


def test_other_settings_or_files_of_others_are_refused(encode, tmp_path, capsys):
    assert encode() == 0
    assert encode("--num-tokens", 4) == 1
    assert "tokens of other settings (num_tokens 6 there, 4 now)" in capsys.readouterr().err
    assert encode("--num-tokens", 4, "--overwrite") == 0
    tokens = GPSTokens.load(tmp_path / "tokens" / "0.png.safetensors")
    tokens.save(tmp_path / "tokens" / "0.png.safetensors")
    assert encode("--num-tokens", 4) == 1
    assert "0.png.safetensors is not of `gpstoken encode` of a folder" in capsys.readouterr().err


def test_broken_pictures_are_named_and_left_out(encode, photos, tmp_path, capsys):
    (photos / "3.png").write_bytes((photos / "3.png").read_bytes()[:60])
    (photos / "empty.jpg").touch()
    odd_picture(photos / "odd.dds")
    photo(photos / "tiny.png", 2, 2)
    assert encode() == 1
    captured = capsys.readouterr()
    assert "error: 3.png: " in captured.err and "error: empty.jpg: " in captured.err
    assert "odd.dds is damaged or truncated: Unimplemented" in captured.err and "Traceback" not in captured.err
    assert ", 3 failed" in captured.out or ", 4 failed" in captured.out
    assert "0.png.safetensors" in names_in(tmp_path / "tokens")
    assert not {"3.png.safetensors", "empty.jpg.safetensors"} & names_in(tmp_path / "tokens")


def test_a_batch_that_is_too_large_is_taken_in_halves(encode, photos, tmp_path, monkeypatch, capsys):
    """Memory is for two pictures at once."""
    import gpstoken_diffusers.models.autoencoder_gpstoken as module

    whole, sizes = module.AutoencoderGPSToken.encode, []

    def small_memory(self, pixel_values, **features):
        sizes.append(len(pixel_values))
        if len(pixel_values) > 2:
            raise MemoryError
        return whole(self, pixel_values, **features)

    assert encode(output="whole") == 0
    monkeypatch.setattr(module.AutoencoderGPSToken, "encode", small_memory)
    assert encode("--batch-size", 4) == 0
    assert max(sizes) == 4
    assert_same(tmp_path / "whole", tmp_path / "tokens", [f"{number}.png" for number in range(7)])
    monkeypatch.setattr(module.AutoencoderGPSToken, "encode", lambda *args, **kwargs: small_memory(None, [0] * 3))
    assert encode(output="none") == 1
    assert "7 failed" in capsys.readouterr().out


def test_pictures_of_one_size_come_together():
    def features(side: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.full((1, 3, side, side), float(side))}

    items = [(str(number), features(side)) for number, side in enumerate([8, 9, 8, 10, 8, 9, 11, 12, 13, 14, 15, 16])]
    found = list(batches(iter(items), 2))
    assert sorted(name for names, _ in found for name in names) == sorted(name for name, _ in items)
    assert found[0][0] == ["0", "2"] and found[1][0] == ["1", "5"]
    for names, together in found:
        assert len(together["pixel_values"]) == len(names) <= 2
    # No more than eight wait: the first of the odd ones goes before the last comes.
    assert [names for names, _ in found].index(["3"]) < [names for names, _ in found].index(["11"])


def test_pictures_wait_in_8_bits_and_lose_nothing(model_folder, photos):
    """Also through a processor that resizes, whose values are not of 8 bits."""
    for settings in ({}, {"shortest_edge": 32, "center_crop": True}):
        processor = GPSTokenImageProcessor(tile_size=32, num_tokens=6, **settings)
        reading = encode_folder.FolderReader(processor, {"a": photos / "0.png"}, None)("a")
        pixels = reading.features["pixel_values"]
        assert (pixels.dtype == torch.uint8) == (not settings)
        values = encode_folder._values(pixels) if not settings else pixels
        expected = processor(processor.load_image(photos / "0.png"))
        assert torch.equal(values, expected["pixel_values"])
        assert torch.equal(reading.features["regions"], expected["regions"])


def test_large_pictures_wait_for_each_other():
    budget, inside, most = PixelBudget(100), [], []

    def hold(pixels: int) -> None:
        with budget.taken(pixels):
            inside.append(pixels)
            most.append(sum(inside))
            time.sleep(0.002)
            inside.remove(pixels)

    threads = [threading.Thread(target=hold, args=(pixels,)) for pixels in [40, 40, 40, 500, 10, 90] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(most) == 18 and not inside
    assert all(total <= 100 for total in most if total < 500) and 500 in most


def test_large_pictures_come_in_small_batches(monkeypatch):
    monkeypatch.setattr(encode_folder, "BYTES_OF_BATCH", 20)
    monkeypatch.setattr(encode_folder, "BYTES_WAITING", 30)
    items = ((str(number), {"pixel_values": torch.zeros(1, side, dtype=torch.uint8)})
             for number, side in enumerate([10, 10, 10, 30, 5, 6, 7, 8, 1]))  # fmt: skip
    found = [names for names, _ in batches(items, 100)]
    assert found[:2] == [["0", "1"], ["3"]] and sorted(sum(found, [])) == [str(number) for number in range(9)]
    assert found.index(["2"]) < found.index(["8"])  # 10 + 5 + 6 + 7 + 8 do not wait together


def test_one_odd_picture_of_a_batch_fails_alone(encode, monkeypatch, tmp_path, capsys):
    """Out of memory on a CPU is a RuntimeError of PyTorch's."""
    import gpstoken_diffusers.models.autoencoder_gpstoken as module

    whole = module.AutoencoderGPSToken.encode

    def odd(self, pixel_values, **features):
        if pixel_values.shape[-1] == 70:
            torch.empty(2**60, dtype=torch.uint8)
        return whole(self, pixel_values, **features)

    monkeypatch.setattr(module.AutoencoderGPSToken, "encode", odd)
    assert encode() == 1
    said = capsys.readouterr()
    assert "6 encoded, 1 failed" in said.out
    assert said.err.count("error: 3.png: out of memory. Use") == 1 and "Traceback" not in said.err


NAMES = {
    "long": "x" * 236 + ".png",
    "too long": "y" * 250 + ".png",
    "bytes": os.fsdecode(b"caf\xe9.png"),
    "codes": "a\x1b[31m.png",
}


def test_names_of_every_kind(encode, photos, tmp_path, capsys):
    for name in NAMES.values():
        photo(photos / name, 32, 32)
    (photos / "broken\x1b[31m.png").touch()
    assert encode() == 1
    said = capsys.readouterr()
    assert "10 encoded, 2 failed" in said.out and "\x1b" not in said.err
    assert "File name too long" in said.err and said.err.count("gpstoken: error") == 2
    for name in (NAMES["long"], NAMES["bytes"], NAMES["codes"]):
        GPSTokens.load(tmp_path / "tokens" / f"{name}.safetensors")
    assert encode() == 1
    assert "0 encoded, 10 done before, 2 failed" in capsys.readouterr().out
    # An output folder of such a name, on a terminal that cannot print it.
    output = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    argv = [
        "-m",
        "gpstoken_diffusers",
        "encode",
        str(photos / "0.png"),
        "-o",
        f"{output}/0.safetensors",
        "--num-tokens",
        "4",
    ]
    result = subprocess.run([sys.executable, *argv], capture_output=True, cwd=REPOSITORY,
                            env={**os.environ, "PYTHONIOENCODING": "cp1252:strict"})  # fmt: skip
    assert result.returncode == 0 and b"Traceback" not in result.stderr
    assert len(GPSTokens.load(f"{output}/0.safetensors")) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_trouble_with_one_file_is_its_own(encode, photos, tmp_path, monkeypatch, capsys, workers):
    """A source that disappears, an output that cannot be written; a later run does them."""
    read = sources.open if hasattr(sources, "open") else open

    def vanishing(path, *args):
        if str(path).endswith("2.png"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return read(path, *args)

    monkeypatch.setattr(sources, "open", vanishing, raising=False)
    (tmp_path / "tokens" / "4.png.safetensors").mkdir(parents=True)
    (tmp_path / "tokens" / "5.png.safetensors").write_bytes(b"")
    (tmp_path / "tokens" / "5.png.safetensors").chmod(0o444)
    assert encode("--num-workers", workers) == 1
    said = capsys.readouterr()
    assert "4 encoded, 3 failed" in said.out and said.err.count("gpstoken: error") == 3
    assert "error: 2.png: " in said.err and "read-only" in said.err and "something else has its name" in said.err
    monkeypatch.undo()
    (tmp_path / "tokens" / "4.png.safetensors").rmdir()
    (tmp_path / "tokens" / "5.png.safetensors").chmod(0o644)
    assert encode() == 0
    assert "3 encoded, 4 done before" in capsys.readouterr().out


def test_pictures_of_two_folders_are_kept_apart(encode, photos, model_folder, tmp_path, capsys):
    """Cameras number their folders, and the pictures in each from the start."""
    other = tmp_path / "101"
    photo(other / "0.png", *SIZES[0], seed=50)
    argv = ("encode", other, "-o", tmp_path / "tokens", "--model", model_folder)
    assert encode() == 0
    before = (tmp_path / "tokens" / "0.png.safetensors").read_bytes()
    size, times = (photos / "0.png").stat().st_size, (photos / "0.png").stat().st_mtime_ns
    (other / "0.png").write_bytes((other / "0.png").read_bytes()[:size].ljust(size, b"\0"))
    os.utime(other / "0.png", ns=(times, times))
    assert run(*argv) == 1
    assert "the same name as another picture, in another folder" in capsys.readouterr().err
    assert (tmp_path / "tokens" / "0.png.safetensors").read_bytes() == before
    # The same picture at another place is done.
    (other / "0.png").write_bytes((photos / "0.png").read_bytes())
    capsys.readouterr()
    assert run(*argv) == 0
    assert "1 done before" in capsys.readouterr().out
    # Of one size and time, in the same folder.
    data = bytearray((photos / "1.png").read_bytes())
    data[-1] ^= 1
    times = (photos / "1.png").stat().st_mtime_ns
    (photos / "1.png").write_bytes(data)
    os.utime(photos / "1.png", ns=(times, times))
    encode()
    assert "1 encoded, 6 done before" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [0, 5, 12, 200, -1])
def test_tokens_that_were_cut_off_are_made_anew(encode, tmp_path, capsys, kept):
    assert encode() == 0
    file = tmp_path / "tokens" / "0.png.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    assert encode() == 0
    assert "1 encoded, 6 done before" in capsys.readouterr().out
    # Bit for bit: the order of the header too. The first batch has the others of its size in it.
    assert GPSTokens.read_metadata(file)["record"] == json.dumps(json.loads(GPSTokens.read_metadata(file)["record"]))
    file.write_bytes(b"a note of mine, and no tokens")
    assert encode() == 1
    assert file.read_bytes() == b"a note of mine, and no tokens"


@pytest.mark.parametrize("options, message", [
    (("--batch-size", 0), "--batch-size 0: it must be at least 1"),
    (("--num-workers", -1), "--num-workers -1: it must be at least 0"),
    (("--importance", "mask.png"), "mask of one picture"),
    (("--num-tokens", 10_000), "--num-tokens 10000"),
])  # fmt: skip
def test_mistakes(encode, capsys, options, message):
    assert encode(*options) == 1
    assert message in capsys.readouterr().err


def test_a_file_cannot_take_a_folder(photos, model_folder, tmp_path, capsys):
    assert run("encode", photos, "-o", tmp_path / "x.safetensors", "--model", model_folder) == 1
    assert "must be a folder" in capsys.readouterr().err
    assert run("encode", photos, "-o", photos, "--model", model_folder) == 1
    assert "is the input folder itself" in capsys.readouterr().err


def test_a_full_disk_ends_the_run(encode, tmp_path, monkeypatch, capsys):
    def full(self, path, *args, **kwargs):
        raise OSError(28, "cannot write the file (No space left on device)", str(path))

    monkeypatch.setattr(GPSTokens, "save", full)
    assert encode("--quiet") == 1
    err = capsys.readouterr().err
    assert err.count("gpstoken: error") == 1 and "No space left" in err


# ---- real processes ----


def start(photos: Path, output: Path, model_folder: Path, launcher: list[str], *more: str) -> subprocess.Popen:
    argv = ["gpstoken_diffusers", "encode", str(photos), "-o", str(output), "--model", str(model_folder), *more]
    return subprocess.Popen(
        [*launcher, "-m", *argv],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background may have been told to ignore SIGINT; children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_processes_share_the_work(encode, photos, model_folder, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = start(photos, tmp_path / "shared", model_folder, torchrun, "--num-workers", "1")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "4 encoded (process 1 of 2)" in out and "3 encoded (process 2 of 2)" in out
    assert encode() == 0
    assert names_in(tmp_path / "shared") == names_in(tmp_path / "tokens")
    assert_same(tmp_path / "shared", tmp_path / "tokens", [f"{number}.png" for number in range(7)])


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process on Windows")
@pytest.mark.parametrize("send", ["kill", "killpg"])  # a terminal sends to the group
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_cut_off_goes_on(encode, photos, model_folder, tmp_path, capsys, number, send):
    for index in range(40):
        photo(photos / f"more-{index:02}.png", 96, 96, seed=index)
    output = tmp_path / "tokens"
    process = start(photos, output, model_folder, [sys.executable], "--num-workers", "1", "--batch-size", "1")
    deadline = time.monotonic() + 120
    while len(list(output.glob("*.safetensors"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    getattr(os, send)(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    if number == signal.SIGINT:
        assert err.strip().endswith("gpstoken: interrupted") and "Traceback" not in err
        assert all(name.endswith(".safetensors") and not name.startswith(".") for name in names_in(output))
    there = list(output.glob("[!.]*.safetensors"))
    assert 3 <= len(there) < 47
    for file in there:
        GPSTokens.load(file)
    assert encode() == 0
    assert f"{47 - len(there)} encoded, {len(there)} done before" in capsys.readouterr().out
