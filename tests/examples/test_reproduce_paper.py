"""The paper's tables beside what was measured, by the evaluation script itself."""

from __future__ import annotations

import json
import re

import pytest
import reproduce_paper
from reconstruction.judges import Judges
from reconstruction_zoo import MeanColours, MeanDifference, autoencoder_folders, write_pictures


def test_tables_stand_beside_the_published_figures(tmp_path, monkeypatch):
    model = tmp_path / "gpstoken_m128"
    model.symlink_to(autoencoder_folders() / "AutoencoderGPSToken")
    monkeypatch.setitem(reproduce_paper.TABLES, 3, [32, 48])
    monkeypatch.setitem(reproduce_paper.PUBLISHED, (32, "m128"), {"PSNR, dB": 24.06, "LPIPS": 0.08})
    folder = write_pictures(tmp_path / "pictures", [(70, 50)] * 2)
    command = [str(folder), "--models", str(model), "--tables", "3", "--output", str(tmp_path / "paper")]
    command += ["--device", "cpu", "--perceptual", "none", "--features", "none"]
    assert reproduce_paper.main(command, Judges(MeanDifference(), MeanColours())) == 0
    text = (tmp_path / "paper" / "table3.md").read_text()
    measured = json.loads((tmp_path / "paper" / "table3" / "results.json").read_text())["rows"][0]["PSNR, dB"]
    row = re.search(r"^\| 32 .*\| PSNR, dB \| (\S+) \| 24.06 \|$", text, re.M)
    assert float(row[1]) == pytest.approx(measured, rel=1e-3)  # four digits
    assert re.search(r"^\| 32 .*\| LPIPS \| - \| 0.08 \|$", text, re.M)  # judged by another network, so not measured
    assert re.search(r"^\| 32 .*\| SSIM \| \S+ \| - \|$", text, re.M)
    assert re.search(r"^\| 48 .*\| PSNR, dB \| \S+ \| - \|$", text, re.M)


def test_a_table_counts_what_its_judge_is_called():
    row = {"method": "l256@256", "resolution": 256, "tokens": 256, "LPIPS (VGG)": 0.05, "rFID": 0.3}
    text = reproduce_paper.table([row])
    assert "| LPIPS (VGG) | 0.05 | 0.043 |" in text and "| rFID | 0.3 | 0.22 |" in text
    assert "| PSNR, dB | - | 28.81 |" in text
