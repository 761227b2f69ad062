"""The host emulation of CUDA notices what it is there to notice."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch
from emulation.toolchain import compile_emulation, find_compiler
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: the emulation cannot be built"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulation is for Linux"),
]


def test_mistakes_are_noticed(tmp_path: Path) -> None:
    """Kernels with one mistake each are refused; without that, tests by emulation would mean little."""
    library = ctypes.CDLL(str(compile_emulation("broken_kernels.cpp", tmp_path / "libbroken.so", "-O1")))
    library.run_kernel.restype = ctypes.c_char_p

    def run(name: str, seed: int = 0) -> tuple[str, Tensor]:
        data = torch.zeros(64)
        message = library.run_kernel(name.encode(), ctypes.c_void_p(data.data_ptr()), seed)
        return message.decode(), data

    assert "threads do not meet" in run("misses_barrier")[0]
    assert "threads do not meet" in run("splits_barrier")[0]
    assert "threads do not meet" in run("misses_ballot")[0]
    assert not run("races")[1].isfinite().all()  # reads what nobody wrote yet
    message, data = run("works")
    assert message == "" and set(data.tolist()) == {sum(range(1, 33)), sum(range(33, 64))}
    assert torch.equal(run("works", seed=5)[1], data)
