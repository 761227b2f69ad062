"""Weights of the perceptual distances: which files are taken, which refused, and what the fetching command says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from perceptual_zoo import build, files, trunk_weights

from gpstoken_diffusers.evaluation import perceptual_files, wheels
from gpstoken_diffusers.evaluation.perceptual import LPIPS, NAMES, STLPIPS, perceptual_distance

import fetch_perceptual  # isort: skip  # perceptual_zoo says where it is


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def change(path: Path, **changes) -> None:
    torch.save(torch.load(path, weights_only=True) | changes, path)


def without(path: Path, name: str) -> None:
    torch.save({k: v for k, v in torch.load(path, weights_only=True).items() if k != name}, path)


@pytest.mark.parametrize("name", ["lpips-alex", "inception"])
@pytest.mark.parametrize(
    "damage, message",
    [
        (truncated, "is damaged, or holds more than tensors"),
        (lambda path: path.write_bytes(b""), "is damaged, or holds more than tensors"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), "is damaged, or holds more than tensors"),
        (lambda path: torch.save({"w": Bomb(path.with_name("bang"))}, path), "holds more than tensors"),
        (lambda path: torch.save([torch.zeros(2)], path), "holds a list, expected a state dict"),
        (lambda path: torch.save({"epoch": 3}, path), "holds a dict, expected a state dict"),
        (lambda path: path.unlink(), "there is no file of weights"),
    ],
)
def test_files_that_are_no_weights_are_refused(tmp_path, name, damage, message):
    path = tmp_path / "weights.pth"
    path.write_bytes((files() / name).read_bytes())
    damage(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        perceptual_distance(name, path)
    assert not (tmp_path / "bang").exists()


@pytest.mark.parametrize(
    "name, damage, message",
    [
        (
            "lpips-alex",
            lambda p: change(p, **{"features.0.weight": torch.zeros(64, 3, 3, 3)}),
            r"has .*\(64, 3, 3, 3\)",
        ),
        ("lpips-alex", lambda p: without(p, "features.3.bias"), "does not fit Trunk: it lacks features.3.bias"),
        ("lpips-alex", lambda p: change(p, **{"features.7.bias": torch.zeros(3)}), "the unknown features.7.bias"),
        ("lpips-alex", lambda p: change(p, **{"lin1.model.1.weight": -torch.ones(1, 192, 1, 1)}), "least -1"),
        ("lpips-alex", lambda p: without(p, "lin4.model.1.weight"), "lin4.* but came nothing"),
        ("lpips-alex", lambda p: change(p, **{"features.0.bias": torch.full((64,), torch.nan)}), "NaN or infinity"),
        ("inception", lambda p: without(p, "Mixed_5b.branch1x1.bn.weight"), "lacks Mixed_5b.branch1x1.conv.bias"),
        ("inception", lambda p: change(p, **{"AuxLogits.weight": torch.zeros(2)}), "the unknown AuxLogits.weight"),
    ],
)
def test_weights_of_other_networks_are_refused(tmp_path, name, damage, message):
    path = tmp_path / "weights.pth"
    path.write_bytes((files() / name).read_bytes())
    damage(path)
    with pytest.raises(ValueError, match=message):
        perceptual_distance(name, path)


def test_vgg_does_not_take_alexnets_weights():
    with pytest.raises(ValueError, match="does not fit Trunk"):
        perceptual_distance("lpips-vgg", files() / "lpips-alex")


def test_a_name_with_a_sha256_is_checked(tmp_path):
    path = tmp_path / "vgg16-397923af.pth"
    path.write_bytes((files() / "lpips-vgg").read_bytes())
    with pytest.raises(ValueError, match=r"expected 397923af\.\.\.: it is damaged"):
        LPIPS("vgg", path)


def test_st_lpips_takes_its_published_weights_only(tmp_path):
    torch.save(trunk_weights("alex"), tmp_path / "alex_shift_tolerant.pth")
    with pytest.raises(ValueError, match=f"expected {perceptual_files.STLPIPS_SHA256['alex']}: it is damaged"):
        STLPIPS("alex", tmp_path / "alex_shift_tolerant.pth")
    (tmp_path / perceptual_files.STLPIPS_WHEEL.file).write_bytes(b"another")
    with pytest.raises(ValueError, match=f"expected {perceptual_files.STLPIPS_WHEEL.sha256}: it is damaged"):
        STLPIPS("alex", cache=tmp_path)


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(perceptual_files, "installed_file", lambda package, inside: None)
    cases = {
        "stlpips-vgg": "fetch it by `python examples/evaluate/fetch_perceptual.py stlpips-vgg`",
        "lpips-vgg": r"no .*vgg16-397923af.pth. .*torchvision.models.vgg16\(weights='IMAGENET1K_V1'\)",
        "lpips-alex": r"no .*alexnet-owt-7be5be79.pth.*torchvision.models.alexnet\(weights=",
        "inception": "The package index does not carry them",
    }
    for name, message in cases.items():
        with pytest.raises(FileNotFoundError, match=message):
            perceptual_distance(name, cache=tmp_path)
    torch.save(trunk_weights("alex"), tmp_path / "trunk.pth")
    with pytest.raises(FileNotFoundError, match="fetch_perceptual.py lpips-vgg"):
        LPIPS("alex", tmp_path / "trunk.pth", cache=tmp_path)
    for network in (LPIPS, STLPIPS):
        with pytest.raises(ValueError, match="the trunk must be one of vgg, alex, not 'squeeze'"):
            network("squeeze")


# ------------------------------------------------------------------------------------------------ the command


def test_a_failing_download_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(wheels, "pip_command", lambda: [sys.executable, "-c", "raise SystemExit(1)"])
    assert fetch_perceptual.main(["stlpips-vgg", "--cache", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert re.search(r"stlpips-vgg: pip could not fetch stlpips-pytorch==0.0.2: .* copy the file to ", error), error
    assert not list(tmp_path.iterdir())


def test_an_unknown_name_is_named(capsys):
    with pytest.raises(SystemExit):
        fetch_perceptual.main(["vgg"])
    assert "there is no vgg; choose from lpips-vgg" in capsys.readouterr().err


def test_every_distance_can_be_fetched_or_says_why_not():
    assert list(fetch_perceptual.WHEELS) == list(NAMES)


def test_a_fetched_distance_is_tried(capsys):
    build("stlpips-alex")
    assert fetch_perceptual.main(["stlpips-alex"]) == 0
    assert "stlpips-alex: ST-LPIPS (AlexNet), 2.5 M parameters" in capsys.readouterr().out
