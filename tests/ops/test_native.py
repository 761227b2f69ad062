"""Finding, loading, refusing and explaining the native libraries."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from package_process import run_code

import gpstoken_diffusers
from gpstoken_diffusers.ops.backend import native
from gpstoken_diffusers.ops.splat import splat_gaussians

ROOT = Path(__file__).resolve().parents[2]
needs_native = pytest.mark.skipif(
    native.library("cpu") is None, reason=f"no native CPU library: {native.why_missing('cpu')}"
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build a library with")


@pytest.fixture(autouse=True)
def backend_not_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests choose the backend themselves, whatever the tests are run with."""
    monkeypatch.delenv("GPSTOKEN_BACKEND", raising=False)


@pytest.fixture
def package_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a folder of its own the only one in which libraries are looked for, and forgets what was loaded."""
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(gpstoken_diffusers, "__path__", [str(tmp_path)])
    monkeypatch.setattr(native, "_announced", set())
    native._load.cache_clear()
    yield tmp_path
    native._load.cache_clear()


def build_library(path: Path, source: str) -> None:
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", path], input=source, text=True, check=True)


def splat_something() -> torch.Tensor:
    return splat_gaussians(torch.tensor([[[0.5, 0.5, 0.0, 0.0, 0.0]]]), torch.ones(1, 1, 1), 3, 3)


@needs_native
def test_library_is_loaded_once_and_names_its_instruction_set() -> None:
    library = native.library("cpu")
    assert library is native.library("cpu") and native.why_missing("cpu") == ""
    assert library.gpstoken_cpu_isa() in (b"baseline", b"avx2", b"avx512")


def test_header_and_loader_agree() -> None:
    """The loader's tables have each function of the header, with as many arguments, and the same version number."""
    header = (ROOT / "csrc" / "gpstoken_native.h").read_text()
    assert f"#define GPSTOKEN_ABI_VERSION {native.ABI_VERSION}\n" in header
    declared = dict(re.findall(r"GPSTOKEN_API int (\w+)\(([^)]*)\);", header))
    del declared["gpstoken_abi_version"]
    table = {name: arguments for part in native._SIGNATURES.values() for name, arguments in part.items()}
    assert {name: text.count(",") + 1 for name, text in declared.items()} == {
        name: len(arguments) for name, arguments in table.items()
    }
    types = {"const char*": ctypes.c_char_p, "int64_t": ctypes.c_int64}
    answering = re.findall(r"GPSTOKEN_API (const char\*|int64_t) (\w+)\(", header)
    assert {name: types[text] for text, name in answering} == {
        name: answer for part in native._ANSWERS.values() for name, answer in part.items()
    }
    codes = dict(re.findall(r"#define (GPSTOKEN_(?:FLOAT|BFLOAT)\w+) (\d)", header))
    assert {name: int(code) for name, code in codes.items()} == {
        "GPSTOKEN_FLOAT32": native.dtype_code(torch.float32),
        "GPSTOKEN_FLOAT16": native.dtype_code(torch.float16),
        "GPSTOKEN_BFLOAT16": native.dtype_code(torch.bfloat16),
    }
    assert native.dtype_code(torch.float64) is None


def test_missing_library(package_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert native.library("cpu") is None
    assert "was not built" in native.why_missing("cpu") and str(package_folder) in native.why_missing("cpu")
    with caplog.at_level(logging.WARNING):
        first, second = splat_something(), splat_something()
    assert first[0, 0, 1, 1] == 1 and torch.equal(first, second)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1, "the fallback is announced once, not at each call"
    assert "splat_gaussians on cpu runs on the Python reference" in messages[0] and "install a C++17" in messages[0]
    with pytest.raises(RuntimeError, match=r"gpstoken_splat_forward_cpu: the cpu library is not available"):
        native.call("cpu", "gpstoken_splat_forward_cpu")


def test_fallback_to_the_other_library(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where the cpu library stands in for the cuda library, nobody is told of the reference."""
    monkeypatch.setattr(native, "_announced", set())
    monkeypatch.setattr(native, "library", lambda kind: object() if kind == "cpu" else None)
    native.announce_fallback("partition_image", "cuda")
    (message,) = (record.getMessage() for record in caplog.records)
    assert "partition_image on cuda runs on the cpu library, which is slower" in message
    assert "nvcc" in message or "gpstoken_cuda" in message


def test_file_that_is_no_library(package_folder: Path) -> None:
    (package_folder / "lib" / native._file_name("cpu")).write_text("not a library")
    assert native.library("cpu") is None and "cannot be loaded" in native.why_missing("cpu")
    assert "cannot be loaded" in native.doctor()


@needs_compiler
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('extern "C" int gpstoken_abi_version() { return 999; }', "interface 999, expected"),
        (f'extern "C" int gpstoken_abi_version() {{ return {native.ABI_VERSION}; }}', "cannot be loaded"),
        ("int nothing;", "cannot be loaded"),
    ],
    ids=["another version", "without functions", "of something else"],
)
def test_library_that_does_not_fit(package_folder: Path, source: str, reason: str) -> None:
    build_library(package_folder / "lib" / native._file_name("cpu"), source)
    assert native.library("cpu") is None and reason in native.why_missing("cpu")
    assert splat_something()[0, 0, 1, 1] == 1


def test_later_folder_of_the_package_is_searched(package_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editable install has its Python files in one folder and its libraries in another."""
    native._load.cache_clear()
    built = [Path(root) / "lib" / native._file_name("cpu") for root in REAL_PATH]
    built = [path for path in built if path.exists()]
    if not built:
        pytest.skip("no native CPU library is built")
    monkeypatch.setattr(gpstoken_diffusers, "__path__", [str(package_folder), str(built[0].parents[1])])
    assert native.library("cpu") is not None


REAL_PATH = list(gpstoken_diffusers.__path__)


def test_forced_reference(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native, "_announced", set())
    monkeypatch.setenv("GPSTOKEN_BACKEND", "reference")
    assert native.library("cpu") is None and "GPSTOKEN_BACKEND=reference" in native.why_missing("cpu")
    assert "Unset GPSTOKEN_BACKEND" in native.doctor()
    with caplog.at_level(logging.WARNING):
        splat_something()
    assert not caplog.records, "a reference that was asked for needs no announcement"
    monkeypatch.setenv("GPSTOKEN_BACKEND", "fast")
    with pytest.raises(ValueError, match="GPSTOKEN_BACKEND='fast': expected 'auto'"):
        native.library("cpu")


def test_unknown_library() -> None:
    with pytest.raises(ValueError, match="'tpu': expected one of cpu, cuda"):
        native.library("tpu")


@needs_native
def test_errors_name_function_and_cause() -> None:
    zeros = torch.zeros(64)
    pointers = [zeros.data_ptr()] * 3
    with pytest.raises(RuntimeError, match=r"gpstoken_splat_forward_cpu failed with code 1 \(invalid argument\)"):
        native.call("cpu", "gpstoken_splat_forward_cpu", *pointers, 1, 1, 1, 0, 1, 3.0, 0, 1)
    with pytest.raises(RuntimeError, match=r"code 2 \(unsupported dtype\)"):
        native.call("cpu", "gpstoken_splat_forward_cpu", *pointers, 1, 1, 1, 1, 1, 3.0, 7, 1)


@needs_native
def test_doctor_names_the_library_and_what_each_op_uses() -> None:
    text = native.doctor()
    assert native.library("cpu")._name in text and "instruction set: " in text
    assert re.search(r"splat_gaussians +on cpu +native \(cpu library\)", text)
    assert re.search(r"partition_image +on cpu +native \(cpu library\)", text)
    for package in ("torch", "torchvision", "diffusers"):
        assert re.search(rf"\b{package} \d", text)


def test_doctor_as_a_command() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "gpstoken_diffusers.ops.backend.native"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "native libraries" in result.stdout and "which implementation runs" in result.stdout


def test_importing_says_nothing_and_pulls_in_no_compiler() -> None:
    """torch._dynamo takes seconds to import; a first call must not need it."""
    code = (
        "import sys, torch\nfrom gpstoken_diffusers.ops.splat import splat_gaussians\n"
        "g = torch.full((1, 2, 5), 0.1, requires_grad=True)\n"
        "splat_gaussians(g, torch.ones(1, 2, 3), 4, 4).sum().backward()\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    result = run_code(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and (native.library("cpu") is None or result.stderr == "")


_FORKED = """
import os, signal, torch
from gpstoken_diffusers.ops.group_norm import group_statistics
torch.set_num_threads(2)
x = torch.rand(1, 64, 128, 128).contiguous(memory_format=torch.channels_last)
exact = torch.var_mean(x.double().reshape(1, 32, -1), dim=2, correction=0)  # on torch's threads
{before}
child = os.fork()
if child == 0:
    signal.alarm(60)
    found = group_statistics(x, 32)
    os._exit(not all(map(torch.allclose, found, (figure[..., None, None].float() for figure in exact))))
print("status", os.waitpid(child, 0)[1])
"""


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts a process by fork")
@pytest.mark.parametrize("before", ["group_statistics(x, 32)", ""], ids=["loaded before", "loaded after"])
def test_a_forked_process_does_not_wait_for_threads_that_it_lacks(before: str) -> None:
    """OpenMP's, of which a fork knows but which did not come along."""
    done = run_code(_FORKED.format(before=before))
    assert done.stdout.split() == ["status", "0"], done.stderr
