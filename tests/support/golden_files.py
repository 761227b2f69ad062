"""Where the golden tensors lie: recorded from the research code, beside the checkout and not in it."""

from __future__ import annotations

from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


def golden(name: str) -> Path:
    """Path of a golden file; skips the test, saying so, where the reference data are not at hand."""
    path = GOLDEN / name
    if not path.is_file():
        pytest.skip(f"reference tensors are not at hand: {name} is not in shared/golden beside the checkout")
    return path
