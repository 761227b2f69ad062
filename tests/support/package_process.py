"""Fresh Python processes that import the package under test, be it installed or this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def run_code(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code`, which finds the modules that this process finds, and those of the tests.

    Not in the root of the checkout: its package folder, which has no native library, would hide the installed one.
    """
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=TESTS)


def run_code_on(isa: str, code: str, **environment: str) -> str:
    """What `code` prints where the CPU library uses instruction set `isa`, or the best that the processor has."""
    done = run_code(code, GPSTOKEN_CPU_ISA=isa, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
