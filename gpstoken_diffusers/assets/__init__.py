"""Files that the package ships: the small model and a photograph to try it on (licence in DEMO_LICENSE.txt)."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

MINI = _HERE / "gpstoken-mini"
"""Folder of the model that this project trained; its README.md is the model card."""

DEMO_PHOTOGRAPH = _HERE / "demo.jpg"
"""A kingfisher, 768 x 512 px; no model was trained on it."""
