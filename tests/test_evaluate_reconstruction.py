"""The evaluation script: its baselines are what they claim to be, and it runs on a folder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from model_zoo import tiny_model
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "evaluate_reconstruction.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evaluate_reconstruction", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(3):
        coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        coarse.resize((70, 50), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def test_regions_are_painted_with_their_means(script):
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    regions = torch.tensor([[[0, 0, 1, 3], [2, 0, 3, 3]], [[0, 0, 3, 1], [0, 2, 3, 3]]])
    painted = script.region_means(images, regions)
    assert torch.equal(painted[0, :, :, :2], images[0, :, :, :2].mean((1, 2))[:, None, None].expand(3, 4, 2))
    assert torch.equal(painted[1, :, 2:], images[1, :, 2:].mean((1, 2))[:, None, None].expand(3, 2, 4))


def test_all_principal_components_lose_nothing_and_fewer_lose_more(script, photographs):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    errors = []
    for components in (3 * 4 * 4, 20, 5):
        pca = script.PatchPCA(photographs, 32, patch=4, components=components, crops=40)
        errors.append((pca(images) - images).square().mean().item())
    assert errors[0] < 1e-9  # rounding
    assert errors[0] < errors[1] < errors[2]


def test_a_folder_is_evaluated(script, photographs, tmp_path, capsys):
    tiny_model("lattice").save_pretrained(tmp_path / "model")
    arguments = [photographs, "--model", tmp_path / "model", "--train_dir", photographs, "--resolution", "32"]
    script.main([*map(str, arguments), "--num_tokens", "16", "--device", "cpu", "--output", str(tmp_path / "out")])
    table = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(table)[:4] == ["gpstoken", "textures shuffled", "initial Gaussians", "region means"]
    assert "PCA of 8x8 patches, 9 numbers" in table
    assert all(np.isfinite(list(row.values())).all() for row in table.values())
    assert "| region means |" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "sheet.png").size == (3 * 32, 6 * 32)
