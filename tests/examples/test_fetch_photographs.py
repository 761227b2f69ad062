"""The photograph fetcher, on packages built here: what it writes, going on, packages that lie, files of others.

No network: there are stand-ins for apt-get and dpkg-deb.
"""

import hashlib
import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import fetch_photographs
import numpy as np
import pytest
from photographs.sources import SOURCES, Source
from PIL import Image
from qt_resource_files import PLAIN, build_rcc, packed


def picture(seed: int, kind: str, size: tuple[int, int] = (96, 64)) -> bytes:
    """An image file of smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def build_deb(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> str:
    """A stand-in for a .deb, a tar file; returns its sha256."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return hashlib.sha256(path.read_bytes()).hexdigest()


STAND_INS = {
    # apt-get download NAME=VERSION
    "apt-get": 'echo "$2" >> {mirror}/calls; n="${{2%%=*}}_${{2#*=}}_all.deb"\n'
    'cp "{mirror}/$n" . 2>/dev/null || {{ echo "E: no $2" >&2; exit 100; }}',
    "dpkg-deb": 'tar -xf "$2" -C "$3"',
}

META = {"KPlugin": {"License": "LGPLv3", "Authors": [{"Name": "Ada"}]}}
COPYRIGHT = b"Files: pics/*\nCopyright: Bo\nLicense: CC0-1.0\nComment: found\n"


class World:
    """A mirror with three packages, and empty output and cache folders."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.mirror, self.output, self.cache = (tmp_path / name for name in ("mirror", "out", "cache"))
        self.mirror.mkdir()
        programs = tmp_path / "bin"
        programs.mkdir()
        for name, script in STAND_INS.items():
            (programs / name).write_text("#!/bin/sh\n" + script.format(mirror=self.mirror) + "\n")
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        self.jpeg, self.webp = picture(1, "JPEG"), picture(2, "WEBP", (80, 48))
        self.sources = (
            self.package(
                Source("land", "1.0-1", "", "train", "usr/share/land", ("pics/*.jpg",), ("*/drawing.jpg",)),
                {
                    "usr/share/doc/land/copyright": COPYRIGHT,
                    "usr/share/land/pics/a b@2x.jpg": self.jpeg,
                    "usr/share/land/pics/drawing.jpg": picture(3, "JPEG"),
                    "usr/share/land/pics/c.jpg": picture(4, "JPEG"),
                },
                {"usr/share/land/pics/small.jpg": "c.jpg"},
            ),
            self.package(
                Source("walls", "2:3", "", "train", "walls", ("*/contents/images/big.png",), licences="kde"),
                {
                    "usr/share/doc/walls/copyright": b"Files: *\nCopyright: Bo\nLicense: GPL-2+\n",
                    "walls/Kite/metadata.json": json.dumps(META).encode(),
                    "walls/Kite/contents/images/big.png": picture(5, "PNG"),
                },
            ),
            self.package(
                Source("toys", "1", "", "heldout", "rcc", ("toy.rcc!x/*.webp",), licences="readme"),
                {
                    "usr/share/doc/toys/copyright": b"",
                    "rcc/other.rcc": b"never opened",
                    "rcc/toy.rcc": build_rcc(
                        {
                            "x/README": packed(b"Copyright: Cy\nLicense: Public Domain\nFiles:\nin/bee.webp\n"),
                            "x/in/bee.webp": (self.webp, PLAIN),
                        }
                    ),
                },
            ),
        )

    def package(self, source: Source, files: dict[str, bytes], links: dict[str, str] | None = None) -> Source:
        """Put a package on the mirror; returns `source` with its sha256."""
        return replace(source, sha256=build_deb(self.mirror / source.deb_name.replace("%3a", ":"), files, links))

    def run(self, *sources: Source) -> int:
        arguments = ["--output", str(self.output), "--cache", str(self.cache)]
        return fetch_photographs.main(arguments, sources or self.sources)

    def calls(self) -> int:
        """How often apt-get was called."""
        calls = self.mirror / "calls"
        return len(calls.read_text().splitlines()) if calls.exists() else 0

    def files(self) -> dict[str, tuple[bytes, int]]:
        """Content and modification time of every file of the output, hidden ones included."""
        paths = [path for path in self.output.rglob("*") if path.is_file()]
        return {p.relative_to(self.output).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}

    def manifest(self) -> dict[str, dict]:
        content = json.loads((self.output / "photographs.json").read_text("utf-8"))
        assert (content["format"], content["version"]) == ("gpstoken-photographs", 1)
        return {record["file"]: record for record in content["photographs"]}


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch)


NAMES = ["heldout/toys-toy-in-bee.png", "train/land-pics-a_b_2x.jpg", "train/land-pics-c.jpg"]
NAMES += ["train/walls-Kite-contents-images-big.png"]


def test_writes_photographs_and_manifest(world, capsys):
    assert world.run() == 0
    files = world.files()
    assert sorted(files) == [NAMES[0], "photographs.json", *NAMES[1:]]
    assert files["train/land-pics-a_b_2x.jpg"][0] == world.jpeg  # copied, not encoded again
    converted = Image.open(io.BytesIO(files[NAMES[0]][0]))
    assert converted.format == "PNG"
    expected = Image.open(io.BytesIO(world.webp)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(converted), np.asarray(expected))

    records = world.manifest()
    assert list(records) == NAMES
    for file, record in records.items():
        assert record["sha256"] == hashlib.sha256(files[file][0]).hexdigest()
    assert {k: v for k, v in records["train/land-pics-a_b_2x.jpg"].items() if k != "sha256"} == {
        "file": "train/land-pics-a_b_2x.jpg",
        "package": "land",
        "package_version": "1.0-1",
        "member": "usr/share/land/pics/a b@2x.jpg",
        "width": 96,
        "height": 64,
        "licence": "CC0-1.0",
        "author": "Bo",
        "note": "found",
    }
    bee = records["heldout/toys-toy-in-bee.png"]
    assert bee["member"] == "rcc/toy.rcc!x/in/bee.webp"
    assert (bee["licence"], bee["author"], bee["width"], bee["height"]) == ("Public Domain", "Cy", 80, 48)
    assert records["train/walls-Kite-contents-images-big.png"]["licence"] == "LGPLv3"
    printed = capsys.readouterr().out
    assert "train: 3 photographs" in printed and "heldout: 1 photographs" in printed
    assert "both in train and heldout (similarity >= 0.85): 0" in printed


def test_second_run_brings_back_what_is_missing(world):
    world.run()
    before, manifest = world.files(), world.manifest()
    assert world.run() == 0
    assert {name: world.files()[name] for name in NAMES} == {name: before[name] for name in NAMES}
    (world.output / NAMES[2]).unlink()
    assert world.run() == 0
    after = world.files()
    assert after[NAMES[2]][0] == before[NAMES[2]][0]
    for file in (NAMES[0], NAMES[1], NAMES[3]):
        assert after[file] == before[file]
    assert world.manifest() == manifest
    assert world.calls() == 3  # the packages came from the cache


def test_interrupted_run_goes_on(world, monkeypatch, capsys):
    real = fetch_photographs.write_atomically

    def interrupt(path, data):
        if path.name == "land-pics-c.jpg":
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(fetch_photographs, "write_atomically", interrupt)
    assert world.run() == 130
    assert "run the same command again" in capsys.readouterr().err
    assert sorted(world.files()) == ["photographs.json", NAMES[1]]
    assert list(world.manifest()) == [NAMES[1]]
    before = world.files()[NAMES[1]]
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{world.mirror.parent / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert world.run() == 0
    assert sorted(world.manifest()) == NAMES
    assert world.files()[NAMES[1]] == before


def test_wrong_sha256_is_refused(world, capsys):
    world.cache.mkdir()
    stale = world.cache / "land_1.0-1_all.deb"
    stale.write_bytes(b"something else")
    assert world.run(world.sources[0]) == 1
    assert stale.read_bytes() == b"something else"
    assert "has sha256" in (error := capsys.readouterr().err) and str(stale) in error
    assert world.calls() == 0
    stale.unlink()
    assert world.run(replace(world.sources[0], sha256="0" * 64), world.sources[1]) == 1
    assert f"expected {'0' * 64}; it was not kept" in capsys.readouterr().err
    assert [path.name for path in world.cache.iterdir()] == ["walls_2%3a3_all.deb"]
    assert sorted(world.manifest()) == NAMES[3:]  # the other package was not held up


def test_a_package_that_cannot_be_fetched_is_skipped(world, monkeypatch, capsys):
    assert world.run(replace(world.sources[0], version="1.0-7"), *world.sources[1:]) == 1
    error = capsys.readouterr().err
    assert "apt-get failed: E: no land=1.0-7. land 1.0-7 is a package of Debian 12: run `apt-get update`" in error
    assert "1 of 3 packages were skipped" in error
    assert sorted(world.manifest()) == [NAMES[0], NAMES[3]]
    monkeypatch.setenv("PATH", str(world.mirror))
    assert world.run(world.sources[0]) == 1
    assert "there is no apt-get here. land 1.0-1 is a package" in capsys.readouterr().err
    (world.mirror / "land_1.0-1_all.deb").rename(world.cache / "land_1.0-1_all.deb")
    assert world.run(world.sources[0]) == 1
    assert "there is no dpkg-deb here" in capsys.readouterr().err


def test_files_of_others_are_left_alone(world, capsys):
    mine = world.output / NAMES[1]
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"my holiday")
    (mine.parent / "other.jpg").write_bytes(b"another")
    assert world.run() == 1
    captured = capsys.readouterr()
    assert f"{mine} exists with other content" in captured.err
    assert "2 files that are not on record, left alone" in captured.out
    assert mine.read_bytes() == b"my holiday"
    assert sorted(world.manifest()) == [NAMES[0], NAMES[3]]


@pytest.mark.parametrize("content", ["my notes", "[]", '{"format": "gpstoken-photographs", "version": 2}'])
def test_foreign_manifest_is_left_alone(world, content, capsys):
    world.output.mkdir()
    (world.output / "photographs.json").write_text(content)
    assert world.run() == 1
    assert "move it away first" in capsys.readouterr().err
    assert {name: data for name, (data, _) in world.files().items()} == {"photographs.json": content.encode()}


def test_other_selection_is_made_anew(world):
    world.run()
    assert world.run(replace(world.sources[0], exclude=("*/c.jpg",)), *world.sources[1:]) == 0
    assert sorted(world.manifest()) == sorted([*NAMES[:2], NAMES[3], "train/land-pics-drawing.jpg"])


def test_png_packed_by_another_pillow_is_ours(world):
    world.run()
    path = world.output / NAMES[0]
    Image.open(path).save(path, compress_level=0)
    content = json.loads((world.output / "photographs.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    content["photographs"][0]["sha256"] = digest
    (world.output / "photographs.json").write_text(json.dumps(content))
    assert world.run() == 0
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest == world.manifest()[NAMES[0]]["sha256"]


def test_corrupt_resources_skip_their_package(world, capsys):
    source = world.package(
        world.sources[2],
        {
            "usr/share/doc/toys/copyright": b"",
            "rcc/toy.rcc": build_rcc({"x/in/bee.webp": packed(b"12")})[:-9],
        },
    )
    assert world.run(source, world.sources[1]) == 1
    assert "damaged Qt resource file" in capsys.readouterr().err
    assert list(world.manifest()) == NAMES[3:]


def test_unwritable_output_is_one_message(world, capsys):
    world.output.write_text("a file, not a folder")
    assert world.run() == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert world.calls() == 0


def test_reports_pictures_in_both_halves(world, capsys):
    source = world.package(
        replace(world.sources[0], split="heldout", package="copy"),
        {
            "usr/share/doc/copy/copyright": COPYRIGHT,
            # the training picture, smaller and packed otherwise
            "usr/share/land/pics/z.jpg": picture(1, "JPEG", (80, 52)),
        },
    )
    assert world.run(*world.sources, source) == 0
    printed = capsys.readouterr().out
    assert "both in train and heldout (similarity >= 0.85): 1" in printed
    assert "train/land-pics-a_b_2x.jpg heldout/copy-pics-z.jpg" in printed


def test_no_package_is_in_both_halves():
    assert len({source.package for source in SOURCES}) == len(SOURCES)
    assert [source.package for source in SOURCES if source.split == "heldout"] == ["gcompris-qt-data"]
    assert {source.split for source in SOURCES} == {"train", "heldout"}
