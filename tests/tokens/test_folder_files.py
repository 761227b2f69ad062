"""The one walk of a folder: what it finds, what it leaves out, and that it says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from gpstoken_diffusers.folder_files import SEARCHED_ALREADY, find_files, is_ignored
from gpstoken_diffusers.picture_files import image_suffixes, readable_formats


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_names_in_the_order_of_their_parts(tmp_path):
    folder = make(tmp_path, "b.png", "a/2.PNG", "a/1.png", "a-z/0.png")
    found = find_files(folder, [".png"])
    assert list(found.files) == ["a/1.png", "a/2.PNG", "a-z/0.png", "b.png"]
    assert all(folder / name == path for name, path in found.files.items())
    top = find_files(folder, [".png"], recursive=False)
    assert list(top.files) == ["b.png"] and top.skipped == {"a": "a folder", "a-z": "a folder"}


@pytest.mark.parametrize("parent", ["", "deep/er/"])
def test_what_systems_leave_behind_is_ignored(tmp_path, parent):
    names = ("._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/x/a.png", "__MACOSX/._a.png", ".hidden/a.png")
    found = find_files(make(tmp_path, f"{parent}a.png", *(parent + name for name in names)), [".png"])
    assert list(found.files) == [f"{parent}a.png"] and found.skipped == {}
    assert all(is_ignored(parent + name) for name in names) and not is_ignored(f"{parent}a.png")


def test_links_are_followed_once_and_never_in_a_ring(tmp_path):
    folder, outside = make(tmp_path / "data", "own/1.png"), make(tmp_path / "outside", "2.png", "below/3.png")
    for link, place in {
        "a-link": folder / "own", "back": folder, "up": tmp_path, "x": outside, "y": outside,
        "own/2.png": outside / "2.png",
    }.items():  # fmt: skip
        (folder / link).symlink_to(place)
    found = find_files(folder, [".png"])
    # "up" leads to the folder above, so that what lies beside `data` is found by that link, as the first.
    assert list(found.files) == ["own/1.png", "own/2.png", "up/outside/2.png", "up/outside/below/3.png"]
    assert found.skipped == dict.fromkeys(["a-link", "back", "up/data", "x", "y"], SEARCHED_ALREADY)


def test_what_is_left_out_is_counted_and_named(tmp_path, monkeypatch):
    folder = make(tmp_path, "a.png", "locked/b.png", *(f"{number}.txt" for number in range(7)))
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "ring.png").symlink_to(folder / "ring.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    scan = os.scandir

    def denied(place):  # the tests may run as root, whom no permission stops
        if str(place).endswith("locked"):
            raise PermissionError(13, "Permission denied", place)
        return scan(place)

    monkeypatch.setattr(os, "scandir", denied)
    found = find_files(folder, [".png"])
    assert list(found.files) == ["a.png"]
    lines = list(found.skipped_lines())
    assert "7 left out (another kind of file, by its name): 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more" in lines
    assert "1 left out (Permission denied): locked" in lines
    assert "1 left out (a link that leads nowhere): gone.png" in lines
    assert "1 left out (no regular file): pipe.png" in lines
    assert "ring.png" in found.skipped and len(found.skipped) == 11


def test_results_are_not_searched(tmp_path):
    folder = make(tmp_path / "data", "a.png", "out/b.png")
    (folder / "link").symlink_to(folder / "out")
    assert list(find_files(folder, [".png"], leave_out=folder / "out").files) == ["a.png"]
    assert find_files(folder, [".png"], recursive=False, leave_out=folder / "out").skipped == {}


def test_suffixes_are_those_that_pillow_reads():
    suffixes = image_suffixes()
    assert {".jpg", ".jfif", ".jpe", ".png", ".tga", ".webp", ".tif", ".pgm"} <= set(suffixes)
    assert not {".eps", ".pdf", ".mpg", ".h5", ".fits", ".psd"} & set(suffixes)
    assert (".avif" in suffixes) == ("AVIF" in Image.OPEN) and (".jp2" in suffixes) == ("JPEG2000" in Image.OPEN)
    assert {Image.EXTENSION[suffix] for suffix in suffixes} <= set(readable_formats())
