"""Tables and picture sheets of measured reconstructions."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .measure import (
    CODED,
    CODED_PSNR,
    DECODED_PER_SECOND,
    ENCODED_PER_SECOND,
    FLOAT16,
    FLOAT32,
    MEMORY,
    PSNR,
    SSIM,
    Case,
    Row,
)

HEADINGS = ("resolution", "method", "pictures", "tokens", "numbers", "parameters")
DIGITS = {PSNR: 2, SSIM: 3, CODED_PSNR: 2, CODED: 0, FLOAT16: 0, FLOAT32: 0, MEMORY: 0}
DIGITS |= {ENCODED_PER_SECOND: 2, DECODED_PER_SECOND: 2}
SET_DISTANCES = ("rFID", "sFID", "KID", "Frechet", "kernel")
"""How the names of distances between sets of pictures begin."""
SET_DIGITS, OTHER_DIGITS = 2, 4

GAP = 6
GROUP_GAP = 24
"""px between the worst and the best pictures of a sheet."""
TEXT = 14


def columns(rows: Sequence[Row]) -> list[str]:
    """Headings of a table: those of every row, and then every figure that some row has, in order."""
    figures = {name: None for row in rows for name in row.figures}
    return [*HEADINGS, *figures]


def cells(row: Row, names: Sequence[str]) -> dict[str, Any]:
    """Values of a row; None where it has none."""
    return {name: getattr(row, name) if name in HEADINGS else row.figures.get(name) for name in names}


def markdown_table(rows: Sequence[Row]) -> str:
    """A table with rounded figures; "inf" for pictures without error, "-" for a figure that is missing."""
    names = columns(rows)
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        lines.append(f"| {' | '.join(_rounded(name, value) for name, value in cells(row, names).items())} |")
    return "\n".join(lines) + "\n"


def csv_table(rows: Sequence[Row]) -> str:
    """The same with all digits; empty where a figure is missing."""
    names = columns(rows)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None else value for name, value in cells(row, names).items()})
    return buffer.getvalue()


def json_report(rows: Sequence[Row], names: dict[int, list[str]], **other: Any) -> str:
    """The same with the PSNR of each picture.

    Args:
        rows: of all resolutions.
        names: of the pictures by resolution, in the order of their places.
        other: what else the report says, such as the settings.
    """
    table = []
    for row in rows:
        by_picture = {names[row.resolution][place]: value for place, value in row.psnr.items()}
        table.append(cells(row, columns(rows)) | {"PSNR of each picture, dB": by_picture})
    return json.dumps(_finite({**other, "rows": table}), indent=2, allow_nan=False) + "\n"


def case_sheet(row: Row) -> Image.Image | None:
    """The worst pictures of a row, worst first, and then the best ones: inputs above reconstructions, PSNR under each.

    None where no case was kept.
    """
    worst = row.cases.worst
    best = [case for case in row.cases.best[::-1] if case.place not in {case.place for case in worst}]  # few pictures
    groups = [group for group in (worst, best) if group]
    if not groups:
        return None
    side = groups[0][0].picture.width
    font = ImageFont.load_default(TEXT)
    title = f"{row.method}, {row.resolution} px: worst {len(worst)}, best {len(best)}"
    count = sum(map(len, groups))
    width = max(
        GAP + count * (side + GAP) + (len(groups) - 1) * (GROUP_GAP - GAP), math.ceil(font.getlength(title)) + 2 * GAP
    )
    band = TEXT + 2 * GAP
    sheet = Image.new("RGB", (width, band + 2 * side + GAP + band), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, band / 2), title, fill="black", font=font, anchor="lm")
    left = GAP
    for group in groups:
        for case in group:
            _draw_case(sheet, draw, case, left, band, font)
            left += side + GAP
        left += GROUP_GAP - GAP
    return sheet


def _draw_case(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, case: Case, left: int, top: int, font: ImageFont.FreeTypeFont
) -> None:
    side = case.picture.width
    sheet.paste(case.picture, (left, top))
    sheet.paste(case.reconstruction, (left, top + side + GAP))
    caption = f"{case.psnr:.2f} dB"  # "inf dB" where nothing is lost
    draw.text((left + side / 2, sheet.height - TEXT / 2 - GAP), caption, fill="black", font=font, anchor="mm")


def _rounded(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    otherwise = SET_DIGITS if name.startswith(SET_DISTANCES) else OTHER_DIGITS
    digits = 0 if isinstance(value, int) else DIGITS.get(name, otherwise)
    return f"{value:,.{digits}f}"


def _finite(value: Any) -> Any:
    """JSON has no infinite numbers: they become "inf", "-inf" and "nan"."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
