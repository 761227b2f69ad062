"""The emoji fetcher, with a registry on this computer: downloads that break off, the split, what is written."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
from pathlib import Path

import fetch_emoji
import numpy as np
import pytest
from fetch_emoji import Package, group_names, group_of, plain, split_emoji
from PIL import Image


def entry(name: str, codes: str, category: str = "Objects", subcategory: str = "tool") -> dict:
    return {"short_name": name, "unified": codes, "category": category, "subcategory": subcategory}


ENTRIES = [entry(f"thing{index}", f"1F{index:03X}") for index in range(30)]
ENTRIES += [
    entry("copyright", "00A9-FE0F", "Symbols", "other-symbol"),
    entry("skin-tone-2", "1F3FB", "Component", "skin-tone"),
    entry("absent", "1FFFF"),
]


def emoji(size: tuple[int, int], seed: int) -> bytes:
    """A disc with soft edges in one colour on nothing."""
    y, x = np.mgrid[: size[1], : size[0]]
    away = np.hypot(x - size[0] / 2, y - size[1] / 2)
    pixels = np.zeros((size[1], size[0], 4), np.uint8)
    pixels[..., :3] = np.random.default_rng(seed).integers(0, 200, 3)
    pixels[..., 3] = np.clip((100 - away) * 20, 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, exact=True)
    return buffer.getvalue()


def tarball(path: Path, files: dict[str, bytes], name: str) -> Package:
    with tarfile.open(path, "w:gz") as tar:
        for member, content in files.items():
            info = tarfile.TarInfo(f"package/{member}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return Package(name, "1.0.0", hashlib.sha256(path.read_bytes()).hexdigest(), path.name)


class Registry(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`: url -> bytes. `server.broken` replies end early."""

    def do_GET(self) -> None:
        server = self.server
        server.calls.append(self.path)
        if self.path not in server.files:
            self.send_error(403, "Forbidden")
            return
        data = server.files[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if server.broken else data)
        server.broken = False

    def log_message(self, *args) -> None:
        pass


class World:
    """A registry with two packages, and empty output and cache folders."""

    def __init__(self, folder: Path):
        self.output, self.cache = folder / "out", folder / "cache"
        pictures = {f"assets/1f{index:03x}.webp": emoji((256, 256), index) for index in range(30)}
        pictures |= {"assets/00a9-fe0f.webp": emoji((256, 264), 77), "assets/1f3fb.webp": emoji((256, 256), 78)}
        pictures |= {"package.json": b'{"license": "MIT"}', "README.md": b"MIT licensed"}
        names = {"emoji.json": json.dumps(ENTRIES).encode(), "LICENSE": b"The MIT License"}
        self.pictures = tarball(folder / "pictures.tgz", pictures, "@one/pictures")
        self.names = tarball(folder / "names.tgz", names, "names")
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry)
        self.server.files = {
            "/npm/@one/pictures/-/pictures-1.0.0.tgz": (folder / "pictures.tgz").read_bytes(),
            "/npm/names/-/names-1.0.0.tgz": (folder / "names.tgz").read_bytes(),
        }
        self.server.calls, self.server.broken = [], False
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def run(self, *extra: str) -> int:
        registry = f"http://127.0.0.1:{self.server.server_port}/npm/"
        arguments = ["--output", str(self.output), "--cache", str(self.cache), "--registry", registry, *extra]
        return fetch_emoji.main(arguments, self.pictures, self.names)

    def files(self) -> dict[str, tuple[bytes, int]]:
        paths = sorted(path for path in self.output.rglob("*") if path.is_file())
        return {p.relative_to(self.output).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}


@pytest.fixture
def world(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    world = World(tmp_path)
    yield world
    world.server.shutdown()
    world.server.server_close()


def test_writes_pictures_licences_and_counts(world, capsys):
    assert world.run() == 0
    files = world.files()
    pictures = [name for name in files if name.endswith(".png")]
    assert len([name for name in pictures if name.startswith("train/Objects/thing")]) == 27
    assert len([name for name in pictures if name.startswith("heldout/Objects/thing")]) == 3
    assert "train/Symbols/copyright.png" in pictures  # a tenth of one picture is none
    assert len(pictures) == 31  # no component, and none of which there is no picture
    for name in pictures:
        image = Image.open(io.BytesIO(files[name][0]))
        assert (image.mode, image.size, image.format) == ("RGB", (256, 256), "PNG")
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert max(image.getpixel((128, 128))) < 200
    assert files["LICENSES/emoji-datasource.LICENSE.txt"][0] == b"The MIT License"
    assert files["LICENSES/fluent-emoji-3d.package.json"][0] == b'{"license": "MIT"}'
    assert files["LICENSES/fluent-emoji-3d.README.md"][0] == b"MIT licensed"
    row = "| Objects | 27 | 3 |"
    assert row in capsys.readouterr().out and row in files["README.md"][0].decode()
    assert "| all | 28 | 3 |" in files["README.md"][0].decode()


def test_pictures_stay_as_they_are_on_white():
    data = emoji((256, 256), 5)
    before = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).astype(float)
    after = np.asarray(Image.open(io.BytesIO(fetch_emoji.on_white(data)))).astype(float)
    alpha = before[..., 3:] / 255
    assert np.abs(after - (before[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1


def test_second_run_writes_what_is_missing(world):
    world.run()
    before = world.files()
    pictures = [name for name in before if name.endswith(".png")]
    (world.output / pictures[3]).unlink()
    assert world.run() == 0
    assert len(world.server.calls) == 2  # both packages came from the cache
    after = world.files()
    assert {name: content for name, (content, _) in after.items()} == {n: c for n, (c, _) in before.items()}
    assert [name for name in pictures if after[name][1] != before[name][1]] == [pictures[3]]


def test_no_picture_is_half_written(world, monkeypatch, capsys):
    real = os.replace

    def refuse(source, target):
        if str(target).endswith("thing7.png"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    assert world.run() == 1
    assert "No space left" in capsys.readouterr().err
    assert not list(world.output.rglob("thing7.png"))
    monkeypatch.undo()
    assert world.run() == 0
    assert len(list(world.output.rglob("[!.]*.png"))) == 31


def test_a_broken_download_is_not_kept(world, capsys):
    world.server.broken = True
    assert world.run() == 1
    assert "could not be fetched: IncompleteRead" in (error := capsys.readouterr().err) and "Run again" in error
    assert not world.cache.exists()
    assert world.run() == 0


def test_a_registry_that_refuses(world, capsys):
    world.server.files.clear()
    assert world.run() == 1
    error = capsys.readouterr().err
    assert "/npm/@one/pictures/-/pictures-1.0.0.tgz could not be fetched: HTTP Error 403: Forbidden" in error
    assert "--registry" in error and str(world.cache / "pictures.tgz") in error
    assert world.run("--registry", "http://127.0.0.1:9") == 1
    assert "http://127.0.0.1:9/@one/pictures/-/pictures-1.0.0.tgz could not be fetched" in capsys.readouterr().err


def test_wrong_sha256(world, capsys):
    url = "/npm/names/-/names-1.0.0.tgz"
    right, world.server.files[url] = world.server.files[url], b"other"
    assert world.run() == 1
    assert "it was not kept" in capsys.readouterr().err
    assert [path.name for path in world.cache.iterdir()] == ["pictures.tgz"]
    world.server.files[url] = right
    (world.cache / "pictures.tgz").write_bytes(b"mine")
    assert world.run() == 1
    assert "expected" in (error := capsys.readouterr().err) and "move it away" in error
    assert (world.cache / "pictures.tgz").read_bytes() == b"mine"
    assert not world.output.exists()


def test_other_pictures_in_the_folder_are_refused(world, capsys):
    mine = world.output / "train" / "Objects" / "mine.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    assert world.run() == 1
    assert "holds 1 pictures of something else, such as train/Objects/mine.png" in capsys.readouterr().err
    assert list(world.files()) == ["train/Objects/mine.png"]


# ---------------------------------------------------------------------- motifs and the split


@pytest.mark.parametrize(
    "alike",
    [
        [("runner", "1F3C3"), ("woman-running", "1F3C3-200D-2640-FE0F"),
         ("man_running_facing_right", "1F3C3-200D-2642-FE0F-200D-27A1-FE0F")],
        [("cook", "1F9D1-200D-1F373"), ("male-cook", "1F468-200D-1F373"), ("female-cook", "1F469-200D-1F373")],
        [("clock1", "1F550"), ("clock1230", "1F567")],
        [("prince", "1F934"), ("princess", "1F478"), ("person_with_crown", "1FAC5")],
        [("point_left", "1F448"), ("point_right", "1F449")],
        [("new_moon", "1F311"), ("waning_crescent_moon", "1F318")],
        [("heart", "2764-FE0F"), ("grey_heart", "1FA76"), ("black_heart", "1F5A4")],
    ],
)  # fmt: skip
def test_variants_are_one_motif(alike):
    groups = group_names()
    assert len({group_of(entry(*which), groups) for which in alike}) == 1


def test_other_emoji_are_motifs_of_their_own():
    groups = group_names()
    others = [("hammer", "1F528"), ("cook", "1F9D1-200D-1F373"), ("farmer", "1F9D1-200D-1F33E"), ("runner", "1F3C3")]
    others += [("male_sign", "2642-FE0F"), ("female_sign", "2640-FE0F"), ("clock1", "1F550")]
    assert len({group_of(entry(*which), groups) for which in others}) == len(others)


def test_no_name_is_in_two_motifs():
    listed = fetch_emoji.MOTIFS.read_text("utf-8").split()
    assert len(listed) == len(set(listed)) == len(group_names())


def test_no_motif_is_parted():
    people = [entry(f"{who}{job}", f"{code}-200D-1F{job:03X}", "People", "person-role")
              for job in range(40) for who, code in (("a", "1F468"), ("b", "1F469"), ("c", "1F9D1"))]  # fmt: skip
    people += [entry(f"family{index}", f"1F46A-{index:X}", "People", "family") for index in range(20)]
    files = split_emoji(people, {plain(person["unified"]) for person in people})
    assert len(files) == 140
    heldout = {name.split("/")[2] for name in files if name.startswith("heldout/")}
    assert 12 <= len(heldout) <= 14  # a tenth is 14, and motifs of three are not parted
    jobs = {name[1:] for name in heldout}
    assert heldout == {f"{who}{job}" for job in jobs for who in "abc"}  # no family: it alone is more than a tenth
    assert files == split_emoji(people[::-1], {plain(person["unified"]) for person in people})


def test_code_points_are_written_alike():
    assert plain("00A9-FE0F") == plain("a9") == "a9"
    assert plain("0023-FE0F-20E3") == "23-20e3"
