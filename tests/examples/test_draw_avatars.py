"""The avatar drawer: what its own code chooses, and, where npm and the packages are at hand, real drawings."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import draw_avatars
import pytest
from draw_avatars import BACKGROUNDS, PAIRS, choose_options, heldout_combinations, install, label, main, read_styles
from PIL import Image

SCHEMA = {
    "hair": {"type": "array", "items": {"enum": [f"hair{i}" for i in range(8)]}},
    "mouth": {"type": "array", "items": {"enum": [f"mouth{i}" for i in range(8)]}},
    "glasses": {"type": "array", "items": {"enum": ["round", "square"]}},
    "glassesProbability": {"type": "integer", "default": 5},
    "baseColor": {"type": "array", "items": {"pattern": "^...$"}, "default": ["ac6651", "77311d"]},
    "hairColor": {"type": "array", "items": {"pattern": "^...$"}, "default": ["ac6651", "77311d", "ffffff"]},
    "faceRotation": {"type": "array", "default": [-2, 2]},
}


def micah(split: str, number: int) -> dict:
    return choose_options("micah", SCHEMA, split, number)


def test_choice_depends_on_style_split_and_number_alone():
    assert micah("train", 3) == micah("train", 3)
    assert len({json.dumps(micah("train", number)["hair"]) for number in range(50)}) > 4


def test_combinations_of_the_two_splits_never_meet():
    pairs = {
        split: {(o["hair"][0], o["mouth"][0]) for o in (micah(split, number) for number in range(300))}
        for split in ("train", "heldout")
    }
    variants = [tuple(SCHEMA[name]["items"]["enum"]) for name in PAIRS["micah"]]
    held = heldout_combinations("micah", *variants)
    assert len(held) == 6 and pairs["heldout"] == held  # a tenth of 8 x 8
    assert not pairs["train"] & held and len(pairs["train"]) > 40
    assert {hair for hair, _ in pairs["train"]} == set(SCHEMA["hair"]["items"]["enum"]), "each part is trained on"


def test_rare_parts_are_drawn_more_often_and_colours_differ_from_skin_and_background():
    options = [micah("train", number) for number in range(400)]
    glasses = Counter(option["glassesProbability"] for option in options)
    assert 0.13 < glasses[100] / 400 < 0.27  # 20% of 400, +- 3.5 deviations
    for option in options:
        assert option["hairColor"] != option["baseColor"]
        assert option["backgroundColor"][0] in BACKGROUNDS
        assert option["backgroundColor"] not in (option["hairColor"], option["baseColor"])
        assert -2 <= option["faceRotation"][0] <= 2


def test_label_says_what_was_drawn_not_what_was_asked_for():
    options = micah("train", 0)
    drawn = {"hair": "hair1", "mouth": "mouth2", "hairColor": "#ffffff", "baseColor": "#ac6651"}
    drawn |= {"primaryBackgroundColor": "#b6e3f4", "secondaryBackgroundColor": "#b6e3f4", "backgroundType": "solid"}
    row = label("micah", "train/micah/00000.png", options, drawn)
    assert row["parts"] == {"hair": "hair1", "mouth": "mouth2", "glasses": None}
    assert row["colours"] == {"hairColor": "#ffffff", "baseColor": "#ac6651", "backgroundColor": "#b6e3f4"}


def test_missing_node_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 1
    assert "Install Node.js 18 or newer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def cache() -> Path:
    """A cache that holds the packages: that of the user, for no test asks a registry."""
    folder = Path(os.environ.get("GPSTOKEN_CACHE", "~/.cache/gpstoken")).expanduser()
    lock = draw_avatars.sha256_of(draw_avatars.TOOLS / "package-lock.json")[:12]
    if shutil.which("npm") is None or not (folder / f"avatars-{lock}" / "installed").exists():
        pytest.skip("needs npm, and the packages that one run of examples/mini_corpus/draw_avatars.py leaves in the "
                    "cache (GPSTOKEN_CACHE)")  # fmt: skip
    return folder


def run(output: Path, cache: Path, *more: str) -> int:
    styles = ["thumbs", "toon-head"]
    return main(["--output", str(output), "--cache", str(cache), "--count", "2", "--styles", *styles, *more])


def test_drawn_pictures_labels_and_licences(tmp_path, cache):
    assert run(tmp_path, cache) == 0
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [
        f"{split}/{style}/{number:05}.png"
        for split, count in (("heldout", 1), ("train", 2)) for style in ("thumbs", "toon-head")
        for number in range(count)
    ]  # fmt: skip
    styles = read_styles(install(cache, "http://localhost:9"))
    for row in rows:
        image = Image.open(tmp_path / row["file"]).convert("RGB")
        assert image.size == (256, 256)
        drawn = {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in image.getcolors(1 << 16)}
        assert {row["colours"]["backgroundColor"]} <= drawn and len(drawn) > 2
        names = PAIRS[row["style"]]
        variants = (tuple(styles[row["style"]]["options"][name]["items"]["enum"]) for name in names)
        held = heldout_combinations(row["style"], *variants)
        assert (tuple(row["parts"][name] for name in names) in held) == row["file"].startswith("heldout/")
    assert "CC0 1.0" in (tmp_path / "LICENSES/thumbs.LICENSE.txt").read_text()
    assert "CC BY 4.0" in (tmp_path / "LICENSES/toon-head.LICENSE.txt").read_text()
    assert "| toon-head | Johan Melin | CC BY 4.0 |" in (tmp_path / "README.md").read_text()


def test_second_run_draws_what_is_missing_and_the_same(tmp_path, cache):
    assert run(tmp_path, cache) == 0
    lost, kept = tmp_path / "train/thumbs/00001.png", tmp_path / "train/thumbs/00000.png"
    before, labels, time = lost.read_bytes(), (tmp_path / "labels.jsonl").read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    assert run(tmp_path, cache) == 0
    assert lost.read_bytes() == before
    assert (tmp_path / "labels.jsonl").read_bytes() == labels
    assert kept.stat().st_mtime_ns == time


def test_each_style_has_its_pair_and_a_free_licence(cache):
    styles = read_styles(install(cache, "http://localhost:9"))
    assert set(styles) == set(PAIRS)
    for name, pair in PAIRS.items():
        variants = [tuple(styles[name]["options"][part]["items"]["enum"]) for part in pair]
        held = heldout_combinations(name, *variants)
        for values, place in zip(variants, (0, 1), strict=True):
            most = Counter(combination[place] for combination in held).most_common(1)[0][1]
            assert most < len(variants[1 - place]), f"{name}: one of {values} is never trained on"
