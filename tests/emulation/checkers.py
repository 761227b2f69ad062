"""Runs of the kernels under programs that watch every access: the compiler's sanitisers, and NVIDIA's on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .toolchain import HERE, compile_emulation

SANITISERS = "-fsanitize=address,undefined,float-cast-overflow"


def sanitised_program(source: str, target: Path, *options: str) -> Callable[..., subprocess.CompletedProcess]:
    """Compiles a program of this folder with the sanitisers; calling the result runs it with arguments.

    Skips the test where the compiler comes without them. Raises RuntimeError: it does not compile.
    """
    try:
        sanitise = ("-O1", "-g1", SANITISERS, "-fno-sanitize-recover=all")
        program = compile_emulation(source, target, *sanitise, *options)
    except RuntimeError as error:
        if "cannot find" in str(error):
            pytest.skip(f"the compiler comes without sanitisers: {error}")
        raise

    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment)

    return run


def expect_clean_on_gpu(tool: str, code: str) -> None:
    """Python code, which may import the tests' modules, under a tool of compute-sanitizer."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    folders = [str(HERE.parents[1]), str(HERE.parent)]
    # Without torch's pool of memory, so that every tensor is an allocation whose ends are known.
    environment = {"PYTHONPATH": os.pathsep.join(folders), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
