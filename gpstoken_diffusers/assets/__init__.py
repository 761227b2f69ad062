"""Files that the package ships: the small model and a photograph to try it on (licence in DEMO_LICENSE.txt)."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

MINI_PIPELINE = _HERE / "gpstoken-mini"
"""Folder of the pipeline that this project trained, both stages and the tokenizer; its README.md is the model card."""

MINI = MINI_PIPELINE / "autoencoder"
"""Folder of the tokenizer in it, with its image processor."""

DEMO_PHOTOGRAPH = _HERE / "demo.jpg"
"""A kingfisher, 768 x 512 px; no model was trained on it."""

EXAMPLE_PICTURES = {"kingfisher": DEMO_PHOTOGRAPH, "duck": _HERE / "duck.png", "honey pot": _HERE / "honey_pot.png"}
"""Pictures to try things on: that photograph, and two emoji of 256 x 256 px, transparent, no model saw them either."""
