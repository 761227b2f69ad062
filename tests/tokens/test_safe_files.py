"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpstoken_diffusers.safe_files import replace_folder, write_atomically

FAILURES = [OSError(28, "No space left on device"), KeyboardInterrupt()]


def raising(failure: BaseException):
    def fail(*_):
        raise failure

    return fail


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step, failure):
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, step, raising(failure))
    with pytest.raises(type(failure)) as caught:
        write_atomically(path, b"new")
    monkeypatch.undo()
    if isinstance(failure, OSError):
        assert caught.value.errno == 28 and caught.value.filename == str(path)
    assert os.listdir(tmp_path) == ["a.bin"] and path.read_bytes() == b"old"


def test_a_new_file_is_as_readable_as_any(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "atomic", b"data")
    assert (tmp_path / "atomic").read_bytes() == b"data"
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def write(folder: Path, text: str) -> None:
    with replace_folder(folder) as place:
        assert place.parent == folder.parent and list(place.iterdir()) == []
        (place / "file").write_text(text)
        assert place.name.endswith(".disabled")  # ComfyUI would load any other


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "runs" / "model", "first")
    write(tmp_path / "runs" / "model", "old")
    return tmp_path / "runs" / "model"


def assert_only(folder: Path, text: str) -> None:
    assert os.listdir(folder.parent) == [folder.name] and (folder / "file").read_text() == text


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_folder_leaves_the_old_one(folder, failure):
    assert_only(folder, "old")
    with pytest.raises(type(failure)), replace_folder(folder) as place:
        (place / "file").write_text("half")
        raise failure
    assert_only(folder, "old")


def test_a_folder_that_cannot_take_its_place_puts_the_old_one_back(folder, monkeypatch):
    rename = Path.rename

    def fail_for_new_folders(self, target):
        if ".tmp." in self.name:
            raise OSError(13, "Permission denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new_folders)
    with pytest.raises(OSError):
        write(folder, "new")
    assert_only(folder, "old")


def test_what_a_killed_process_left(folder):
    """Killed while it wrote, or between the two renames; a failure after that finds the old folder."""
    half = folder.with_name(".model.tmp.disabled")
    half.mkdir()
    (half / "half").write_text("")
    folder.rename(folder.with_name(".model.old.disabled"))
    with pytest.raises(KeyError), replace_folder(folder):
        raise KeyError
    assert_only(folder, "old")
