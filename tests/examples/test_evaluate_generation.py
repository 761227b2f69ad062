"""The evaluation of generated pictures: what it writes for a tiny pipeline, what it keeps, which mistakes it names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import evaluate_generation
import numpy as np
import pytest
import torch
from generation.classifier import classification, fit_classifier
from generation.pictures import generate
from PIL import Image
from pipeline_zoo import LABELS, tiny_pipeline, tiny_transformer

COLOURS = ((220, 40, 40), (40, 180, 60), (50, 70, 220))


class MeanColours(torch.nn.Module):
    """In place of the real network: the mean colour of each quarter of a picture."""

    name = "mean colours"

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, pixel_values):
        self.seen += len(pixel_values)
        return torch.nn.functional.adaptive_avg_pool2d(pixel_values, 2).flatten(1) + 1


def write_classes(folder: Path, count: int, seed: int) -> Path:
    """Pictures whose class is their colour."""
    random = np.random.default_rng(seed)
    for name, colour in zip(LABELS.values(), COLOURS, strict=True):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = random.integers(-40, 40, (6, 6, 3))
            coarse = Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))
            coarse.resize((40, 32), Image.Resampling.BICUBIC).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(pipeline, tmp_path):
    folders = {
        "--pipeline": pipeline,
        "--train_dir": write_classes(tmp_path / "train", 6, seed=0),
        "--heldout_dir": write_classes(tmp_path / "heldout", 3, seed=1),
        "--output": tmp_path / "out",
        "--cache": tmp_path / "cache",
    }
    settings = ["--num_images_per_class", "3", "--steps", "2", "--batch_size", "4", "--device", "cpu"]
    return [str(part) for pair in folders.items() for part in pair] + settings


def test_a_pipeline_is_evaluated(arguments, tmp_path, capsys):
    network = MeanColours()
    assert evaluate_generation.main(arguments, network) == 0
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["steps"] == 2
    assert results["classes"] == list(LABELS.values())
    assert results["pictures"]["samples"] == results["pictures"]["held-out"] == 9
    judged = results["classifier"]
    assert judged["held-out"]["accuracy"] == 1  # colours are the classes
    assert judged["held-out"]["largest_class"] == pytest.approx(1 / 3)
    for row in judged.values():
        assert np.array(row["confusion"]).sum(axis=1).tolist() == [3, 3, 3]
        assert row["accuracy"] == pytest.approx(np.trace(row["confusion"]) / 9)
    # The random tokenizer's pictures all look alike, so that having seen such helps little: it judges otherwise.
    blurred = results["classifier_with_reconstructions"]
    assert blurred["held-out"]["accuracy"] > 0.8
    assert blurred["held-out reconstructed"]["confusion"] != judged["held-out reconstructed"]["confusion"]
    kernel = results["kernel_distance_x1000"]
    assert np.isfinite(list(kernel.values())).all()
    # The tiny tokenizer has random weights: its pictures are far from real ones.
    assert kernel["held-out reconstructed to train"][0] > 10 * abs(kernel["held-out to train"][0])
    near = results["nearest_training_picture"]
    assert near["held-out"]["suspicious"] <= 0.12
    assert near["samples"]["features"] > near["held-out"]["features"]
    assert (out / "results.md").read_text() in capsys.readouterr().out
    assert "| Food & Drink | 1.00 |" in (out / "results.md").read_text()
    assert Image.open(out / "samples.png").size == (3 * 36 + 4, 3 * 36 + 4)
    assert Image.open(out / "neighbours.png").width > 7 * 128
    assert not list(out.rglob("*.partial"))

    # Again: nothing is generated, features of real pictures are at hand.
    seen, network.seen = network.seen, 0
    times = {path: path.stat().st_mtime_ns for path in out.rglob("0*.png")}
    assert len(times) == 9
    assert evaluate_generation.main(arguments, network) == 0
    assert network.seen == seen - (18 + 18 + 9)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    again = json.loads((out / "results.json").read_text())
    assert again == results


def test_reconstructions_can_be_fewer(arguments):
    args = evaluate_generation.parse_args([*arguments, "--max_reconstructions", "4"])
    results = evaluate_generation.evaluate(args, MeanColours())
    made = {name: count for name, count in results["pictures"].items() if "reconstructed" in name or "shuffled" in name}
    assert set(made.values()) == {4}
    # Of nine pictures, three per class, these are 0, 2, 4 and 6.
    judged = results["classifier"]["held-out reconstructed"]
    assert np.array(judged["confusion"]).sum(axis=1).tolist() == [2, 1, 1]
    assert results["pictures"]["held-out"] == 9


def make_samples(arguments: list[str], *more: str) -> dict[str, bytes]:
    args = evaluate_generation.parse_args([*arguments, *more])
    pipe = evaluate_generation.GPSTokenPipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    paths, labels = generate(pipe, args)
    assert labels.tolist() == sorted(labels.tolist())
    assert [path.parent.name for path in paths] == [LABELS[label] for label in labels.tolist()]
    return {str(path.relative_to(args.samples_dir)): path.read_bytes() for path in paths}


def test_samples_are_kept_and_not_mixed_up(arguments, tmp_path, capsys):
    first = make_samples(arguments)
    assert len(set(first.values())) == 9
    # More of them, or other batches, leave these as they are; a missing one is made again.
    more = ["--samples_dir", str(tmp_path / "more"), "--num_images_per_class", "4", "--batch_size", "12"]
    elsewhere = make_samples(arguments, *more)
    assert len(elsewhere) == 12
    assert {name: elsewhere[name] for name in first} == first
    (tmp_path / "out" / "samples" / LABELS[1] / "00001.png").unlink()
    assert make_samples(arguments) == first
    # Another seed or sampler makes others, and not in this folder.
    for name, changed in (("seed", ["--seed", "7"]), ("sampler", ["--sampler", "heun"])):
        assert evaluate_generation.main([*arguments, *changed], MeanColours()) == 1
        assert f"made with another {name}; give another folder" in capsys.readouterr().err
        other = make_samples(arguments, *changed, "--samples_dir", str(tmp_path / name))
        assert all(other[path] != picture for path, picture in first.items())
    tiny_pipeline(transformer=tiny_transformer(seed=5)).save_pretrained(tmp_path / "other")
    arguments[1] = str(tmp_path / "other")
    assert evaluate_generation.main(arguments, MeanColours()) == 1
    assert "made with another pipeline" in capsys.readouterr().err


def test_a_sample_is_nearest_to_the_picture_it_copies(arguments, tmp_path):
    """Samples that are training pictures, mirrored: every one is suspicious, and found under its name."""
    make_samples(arguments)
    for name in LABELS.values():
        for place in range(3):
            with Image.open(tmp_path / "train" / name / f"{place}.png") as picture:
                square = picture.crop((4, 0, 36, 32)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            square.save(tmp_path / "out" / "samples" / name / f"{place:05}.png")
    args = evaluate_generation.parse_args(arguments)
    results = evaluate_generation.evaluate(args, MeanColours())
    near = results["nearest_training_picture"]["samples"]
    assert near["features"] == pytest.approx(0, abs=1e-6)
    assert near["pixels"] == pytest.approx(0, abs=1e-4)
    assert near["suspicious"] == 1
    assert results["classifier"]["samples"]["accuracy"] == 1


def without_layout_model(folder: Path) -> None:
    tiny_pipeline(layout_model=None, layout_scheduler=None).save_pretrained(folder / "pipeline")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "train" / LABELS[1]).rename(folder / "train" / "Soup"), "lacks 'Food & Drin.*'Soup'"),
        (lambda folder: (folder / "heldout").rename(folder / "elsewhere"), "there is no folder .*heldout"),
        (lambda folder: (folder / "heldout" / LABELS[0] / "0.png").write_bytes(b"no picture"), "0.png is not an image"),
        (lambda folder: (folder / "out" / "samples" / "holiday").mkdir(parents=True), "something else than samples"),
        (lambda folder: shutil.rmtree(folder / "pipeline"), "there is no pipeline at"),
        (without_layout_model, "no layout model"),
    ],
)
def test_mistakes_are_named(arguments, pipeline, tmp_path, capsys, damage, message):
    arguments[1] = str(shutil.copytree(pipeline, tmp_path / "pipeline"))
    damage(tmp_path)
    assert evaluate_generation.main(arguments, MeanColours()) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error), error


# ------------------------------------------------------------------------------------------------ the classifier


def test_the_classifier_finds_the_line_between_classes():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(300, 5, generator=random)
    labels = (features[:, 0] + 2 * features[:, 1] > 0).long() + (features[:, 0] > 1.5)
    classify = fit_classifier(100 * features[:200] + 7, labels[:200], 3, decay=1e-3)
    found = classification(classify(100 * features[200:] + 7), labels[200:], ["a", "b", "c"])
    assert found["accuracy"] > 0.9


def test_decay_keeps_weights_small():
    features, labels = torch.randn(50, 20, generator=torch.Generator().manual_seed(1)), torch.arange(50) % 2
    assert (fit_classifier(features, labels, 2, decay=1e-4)(features) == labels).float().mean() > 0.7
    assert fit_classifier(features, torch.tensor([0] * 30 + [1] * 20), 2, decay=10)(features).sum() == 0


def test_figures_of_a_classification():
    found = classification(torch.tensor([0, 1, 1, 0, 2]), torch.tensor([0, 1, 1, 1, 2]), ["a", "b", "c", "none"])
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["largest_class"] == pytest.approx(0.6)
    assert found["accuracy_by_class"] == pytest.approx({"a": 1, "b": 2 / 3, "c": 1})
    assert found["confusion"] == [[1, 0, 0, 0], [1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
