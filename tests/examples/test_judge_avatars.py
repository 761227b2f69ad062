"""The judge of avatars' parts, on drawn marks: what it must tell apart is known."""

from __future__ import annotations

import json
import random
from pathlib import Path

import judge_avatars
import pytest
import torch
from draw_avatars import PAIRS
from judge_avatars import PartClassifier
from perceptual_zoo import build
from PIL import Image, ImageDraw

STYLE = "thumbs"
HELDOUT = {(0, 1), (1, 2), (2, 0)}  # combinations of the two parts that no training picture has


def draw(path: Path, eyes: list[int], mouth: list[int]) -> None:
    """A face on a plain ground; each variant of a part that is named is drawn, one over the other."""
    image = Image.new("RGB", (256, 256), random.choice(["#ffd5dc", "#c7ecd0", "#b6e3f4"]))
    pen, dx, dy = ImageDraw.Draw(image), random.randint(-6, 6), random.randint(-6, 6)
    for x in (80, 150):
        box = (x + dx, 70 + dy, x + dx + 30, 100 + dy)
        for variant in eyes:
            (pen.ellipse, pen.rectangle, pen.line)[variant](box, fill="black", **({"width": 8} if variant == 2 else {}))
    for variant in mouth:
        box = (80 + dx, 140 + dy, 180 + dx, 200 + dy)
        if variant == 2:
            pen.line((80 + dx, 170 + dy, 180 + dx, 170 + dy), fill="black", width=8)
        else:
            pen.arc(box, 180 * variant, 180 * variant + 180, fill="black", width=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_certainty_falls_between_two_variants():
    torch.manual_seed(0)
    centres = torch.randn(3, 20)
    names = [["a", "b", None][index % 3] for index in range(90)]
    features = centres.repeat(30, 1) + 0.1 * torch.randn(90, 20)
    judge = PartClassifier(features, names)
    found, sure = judge(centres)
    assert found == ["a", "b", None] and sure.min() > 0.7
    _, unsure = judge((centres + centres.roll(1, 0)) / 2)
    assert unsure.max() < 0.2


def test_double_parts_are_invalid_and_new_combinations_are_counted(tmp_path, capsys):
    build("efficientnet-lite0")
    random.seed(0)
    data, rows = tmp_path / "data", []
    every = [(eyes, mouth) for eyes in range(3) for mouth in range(3)]
    for split, some, count in (("train", [pair for pair in every if pair not in HELDOUT], 48),
                               ("heldout", sorted(HELDOUT), 24)):  # fmt: skip
        for number in range(count):
            eyes, mouth = some[number % len(some)]
            file = f"{split}/{STYLE}/{number:05}.png"
            draw(data / file, [eyes], [mouth])
            parts = dict(zip(PAIRS[STYLE], (f"eyes{eyes}", f"mouth{mouth}"), strict=True))
            rows.append({"file": file, "style": STYLE, "parts": parts, "colours": {}})
    (data / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = {"known": ([0], [0]), "new": ([1], [2]), "double": ([0, 1, 2], [0, 1])}
    for name, parts in sets.items():
        for number in range(10):
            draw(tmp_path / name / STYLE / f"{number}.png", *parts)
    judge_avatars.main(["--data", str(data), "--pictures", *(f"{name}={tmp_path / name}" for name in sets)])
    row = capsys.readouterr().out.splitlines()[2]
    style, parts, right, heldout, new_heldout, *figures = [cell.strip() for cell in row.strip("|").split("|")]
    assert style == STYLE and parts == ", ".join(PAIRS[STYLE])
    assert min(map(float, right.split(","))) > 0.9
    # The limit leaves out a twentieth for each of two parts, more or less: 24 pictures and 10 are few.
    assert 0.8 <= float(heldout) < 1 and float(new_heldout) > 0.9
    known, new_known, new, new_new, double, _ = map(float, figures)
    assert known >= 0.5 and new_known == 0 and new >= 0.5 and new_new == 1 and double < 0.3


def test_wrong_folders_are_named(tmp_path, capsys):
    for line, message in (
        (["--data", tmp_path], f"{tmp_path} has no labels.jsonl"),
        (["--data", tmp_path, "--pictures", "somewhere"], "--pictures takes NAME=FOLDER"),
    ):
        with pytest.raises(SystemExit):
            judge_avatars.main([str(part) for part in line])
        assert message in capsys.readouterr().err
