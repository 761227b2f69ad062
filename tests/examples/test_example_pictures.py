"""The examples that draw sheets of pictures, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from pipeline_zoo import tiny_pipeline

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "edit"


def run(script: str, *arguments: object) -> None:
    command = [sys.executable, EXAMPLES / script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [str(part) for part in command], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_stages(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    random = np.random.default_rng(0)
    for name in ("first.png", "second.png"):
        Image.fromarray(random.integers(0, 255, (48, 40, 3), dtype=np.uint8)).save(tmp_path / name)
    files = (tmp_path / "first.png", tmp_path / "second.png", tmp_path / "sheet.png")
    run("two_stages.py", *files, "--pipeline", tmp_path / "pipeline", "--label", "food")
    assert Image.open(tmp_path / "sheet.png").height > 5 * 256


def test_edit_tokens(tmp_path):
    run("edit_tokens.py", tmp_path / "edited.png")
    sheet = np.asarray(Image.open(tmp_path / "edited.png").convert("RGB"), dtype=int)
    # Two rows of four pictures of 384 x 256, each row under a band of titles.
    band, margin = sheet.shape[0] // 2 - 256, (sheet.shape[1] - 4 * 384) // 5
    photograph, decoded, deleted = (
        sheet[28 : 28 + 256, left : left + 384] for left in (margin + k * (384 + margin) for k in range(3))
    )
    assert band > 28
    assert np.abs(photograph - decoded).mean() < 12  # the mini's reconstruction
    bird, sky = (slice(60, 150), slice(80, 150)), (slice(0, 60), slice(300, 384))
    assert np.abs(decoded - deleted)[bird].mean() > 20
    assert np.abs(decoded - deleted)[sky].mean() < 0.5
