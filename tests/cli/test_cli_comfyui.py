"""`gpstoken comfyui install`, and what a clone's own files do outside of ComfyUI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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


def test_install_without_cmake_or_compiler_is_no_error(tmp_path):
    shutil.copy(ROOT / "install.py", tmp_path)
    environment = {**os.environ, "PATH": "/nowhere"}
    python = tmp_path / "bin" / "python"  # cmake is looked for beside the interpreter, too
    python.parent.mkdir()
    python.symlink_to(Path(sys.executable).resolve())
    done = subprocess.run([python, "install.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "plain PyTorch" in done.stdout
