"""`gpstoken comfyui install`, and what a clone's own files do outside of ComfyUI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from gpstoken_diffusers import __version__
from gpstoken_diffusers.cli import comfyui, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def base(tmp_path) -> Path:
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    return tmp_path / "ComfyUI"


def test_it_copies_nodes_help_and_workflows(base, capsys):
    assert main(["comfyui", "install", str(base)]) == 0
    target = base / "custom_nodes" / comfyui.FOLDER
    assert str(target) in capsys.readouterr().out
    assert (target / comfyui.VERSION_FILE).read_text().strip() == __version__
    for path in (ROOT / "comfyui_nodes").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (target / path.relative_to(ROOT / "comfyui_nodes")).read_bytes() == path.read_bytes()
    for path in (ROOT / "example_workflows").iterdir():
        assert (target / "example_workflows" / path.name).read_bytes() == path.read_bytes()
    assert [entry.name for entry in (base / "custom_nodes").iterdir()] == [comfyui.FOLDER]


def test_it_takes_the_folder_of_nodes_too_and_replaces_its_own(base):
    assert main(["comfyui", "install", str(base / "custom_nodes"), "--quiet"]) == 0
    target = base / "custom_nodes" / comfyui.FOLDER
    (target / "left_over.py").write_text("old")
    assert main(["comfyui", "install", str(base), "--quiet"]) == 0
    assert not (target / "left_over.py").exists() and (target / "extension.py").is_file()
    assert [entry.name for entry in (base / "custom_nodes").iterdir()] == [comfyui.FOLDER]


def test_it_leaves_folders_alone_that_are_not_its_own(base, capsys):
    target = base / "custom_nodes" / comfyui.FOLDER
    target.mkdir()
    (target / "mine.py").write_text("precious")
    assert main(["comfyui", "install", str(base)]) == 1
    assert "did not make it" in capsys.readouterr().err
    assert [entry.name for entry in target.iterdir()] == ["mine.py"]


def test_a_folder_without_custom_nodes(tmp_path, capsys):
    assert main(["comfyui", "install", str(tmp_path)]) == 1
    assert "has no folder custom_nodes" in capsys.readouterr().err


def test_a_failure_leaves_the_older_nodes(base, monkeypatch, capsys):
    main(["comfyui", "install", str(base), "--quiet"])
    target = base / "custom_nodes" / comfyui.FOLDER
    before = sorted(path.name for path in target.iterdir())

    def full(path, *text, **options):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(comfyui.Path, "write_text", full)
    assert main(["comfyui", "install", str(base)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert sorted(path.name for path in target.iterdir()) == before
    assert [entry.name for entry in (base / "custom_nodes").iterdir()] == [comfyui.FOLDER]


def test_the_door_is_inert_outside_of_comfyui():
    """pytest and type checkers import a root __init__.py, too."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('clone', {str(ROOT / '__init__.py')!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(hasattr(module, 'comfy_entrypoint'), 'gpstoken_diffusers' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.split() == ["False", "False", "False"]


PIP = """
import pathlib, sys
if sys.argv[1:] != ["install", "cmake>=3.23", "ninja>=1.11"]:
    sys.exit(f"asked for {sys.argv}")
cmake = pathlib.Path(sys.executable).parent / "cmake"
cmake.write_text(f'#!/bin/sh\\necho "$@" >> {cmake.parent / "called"}')
cmake.chmod(0o755)
"""


@pytest.mark.parametrize("pip, status", [("import sys; sys.exit('no index')", 1), (PIP, 0)])
def test_install_fetches_cmake_where_it_is_missing_or_says_that_it_failed(tmp_path, pip, status):
    shutil.copy(ROOT / "install.py", tmp_path)
    (tmp_path / "pip.py").write_text(pip)  # in the place of the real one
    environment = {**os.environ, "PATH": "/nowhere", "PYTHONPATH": str(tmp_path)}
    venv.create(tmp_path / "venv", with_pip=False)  # cmake is looked for beside the interpreter, too
    python = tmp_path / "venv" / "bin" / "python"
    done = subprocess.run([python, "install.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    if status == 0:
        assert len((python.parent / "called").read_text().splitlines()) == 3  # configure, build, install
    else:
        assert "no index" in done.stdout and "plain PyTorch" in done.stdout and "install.py" in done.stdout


def test_what_install_fetches_is_among_the_requirements():
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert {'"cmake>=3.23"', '"ninja>=1.11"'} <= set(re.findall('"[a-z]+>=[^"]+"', (ROOT / "install.py").read_text()))
    assert "cmake>=3.23\n" in text and "ninja>=1.11\n" in text
