"""Tables in three formats, and the sheet of the worst and best pictures."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest
import torch
from reconstruction.measure import CODED, FLOAT16, PSNR, SSIM, Cases, Row
from reconstruction.report import case_sheet, csv_table, json_report, markdown_table


def made_up_row(method: str = "ours", **figures) -> Row:
    figures = {PSNR: 27.004, SSIM: 0.78849, CODED: 10242.4, FLOAT16: None} | figures
    return Row(method, 1024, 2, 256, 9472, 10_767_537, figures, {0: 26.0, 1: 28.008}, {0: 10000, 1: 10484}, Cases(0))


def test_figures_are_rounded_in_markdown():
    heading, rule, row = markdown_table([made_up_row()]).splitlines()
    assert heading == (
        "| resolution | method | pictures | tokens | numbers | parameters | PSNR, dB | SSIM | bytes, coded "
        "| bytes, float16 |"
    )
    assert rule.count("---|") == 10
    assert row == "| 1,024 | ours | 2 | 256 | 9,472 | 10,767,537 | 27.00 | 0.788 | 10,242 | - |"


def test_infinite_figures_read_inf_everywhere():
    row = made_up_row(**{PSNR: math.inf})
    row.psnr[1] = math.inf
    assert "| inf | 0.788 |" in markdown_table([row])
    assert ",inf," in csv_table([row])
    (read,) = csv.DictReader(io.StringIO(csv_table([row])))
    assert float(read[PSNR]) == math.inf and read[FLOAT16] == ""

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    report = json.loads(json_report([row], {1024: ["a.png", "b.png"]}, notes=[]), parse_constant=refuse)
    assert report["rows"][0][PSNR] == "inf"
    assert report["rows"][0]["PSNR of each picture, dB"] == {"a.png": 26.0, "b.png": "inf"}
    assert report["rows"][0][FLOAT16] is None


def test_rows_with_other_figures_share_a_table():
    rows = [made_up_row(), made_up_row("other", rFID=1.234)]
    lines = markdown_table(rows).splitlines()
    assert lines[2].endswith("| 10,242 | - | - |") and lines[3].endswith("| 10,242 | - | 1.23 |")
    assert [row["rFID"] for row in csv.DictReader(io.StringIO(csv_table(rows)))] == ["", "1.234"]


@pytest.mark.parametrize("pictures, columns, gaps", [(6, 4, 1), (3, 3, 1), (2, 2, 0)])
def test_a_sheet_shows_each_picture_once(pictures, columns, gaps):
    row = made_up_row()
    row.cases = Cases(2)
    images = torch.linspace(-1, 1, pictures)[:, None, None, None].expand(-1, 3, 64, 64)
    row.cases.add([20.0 + place for place in range(pictures)], list(range(pictures)), images, -images)
    sheet = case_sheet(row)
    text_width = sheet.width - (6 + columns * 70 + gaps * 18)
    assert text_width >= 0  # the title may be wider than a few small pictures
    assert sheet.height == 26 + 64 + 6 + 64 + 26
    # The worst picture, and below it its reconstruction; then the caption.
    assert sheet.getpixel((10, 30)) == (0, 0, 0)
    assert sheet.getpixel((10, 100)) == (255, 255, 255)
    assert sheet.crop((6, 26 + 134, 70, sheet.height)).getextrema()[0][0] < 128


def test_there_is_no_sheet_without_cases():
    assert case_sheet(made_up_row()) is None
