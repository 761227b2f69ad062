"""The examples that draw sheets of pictures, run as a user runs them."""

from __future__ import annotations

import numpy as np
from model_zoo import smooth_picture
from PIL import Image
from pipeline_zoo import tiny_pipeline
from script_runs import ROOT, run_script

EDIT = ROOT / "examples" / "edit"


def test_two_stages(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    for seed, name in enumerate(("first.png", "second.png")):
        smooth_picture(seed, (40, 48)).save(tmp_path / name)
    files = ("first.png", "second.png", "sheet.png")
    run_script([EDIT / "two_stages.py", *files, "--pipeline", "pipeline", "--label", "food"], tmp_path)
    assert Image.open(tmp_path / "sheet.png").height > 5 * 256


def test_edit_tokens(tmp_path):
    run_script([EDIT / "edit_tokens.py", "edited.png"], tmp_path)
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
