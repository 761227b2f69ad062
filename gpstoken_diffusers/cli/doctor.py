"""`gpstoken doctor`. It imports little, so that it speaks where the rest of an installation is broken."""

from __future__ import annotations

import argparse

from ..ops.backend import native


def doctor(args: argparse.Namespace) -> int:
    """Which native libraries exist, which one each operation uses, and how to get faster ones."""
    print(native.doctor())
    return 0
