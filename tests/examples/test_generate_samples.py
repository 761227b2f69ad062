"""The script that makes samples for a published FID: shared by processes, gone on with, the same pictures each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_zoo import LABELS, tiny_pipeline
from script_runs import ROOT, run_script

from gpstoken_diffusers import LayoutBank

SCRIPT = ROOT / "examples" / "evaluate" / "generate_samples.py"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder / "p")
    return folder / "p"


def sample(pipeline: Path, output: Path, *more: object, **how) -> str:
    few = ("--num_images", 7, "--batch_size", 2, "--steps", 2)
    output.parent.mkdir(exist_ok=True)
    return run_script([SCRIPT, "--pipeline", pipeline, "--output", output, *few, *more], output.parent, **how)


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory) -> Path:
    """What one process makes in one go."""
    output = tmp_path_factory.mktemp("whole") / "samples"
    sample(pipeline, output, "--npz", output.parent / "samples.npz")
    return output


def test_the_folder_and_the_file_hold_the_same_pictures_class_by_class(whole, pipeline):
    assert list(pictures(whole)) == [f"{index:06}.png" for index in range(7)]
    with np.load(whole.parent / "samples.npz") as packed:
        assert packed["arr_0"].dtype == np.uint8 and packed["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
        for array, path in zip(packed["arr_0"], sorted(whole.glob("*.png")), strict=True):
            assert np.array_equal(array, np.asarray(Image.open(path)))
    # Each is the pipeline's own, of its class and seed.
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(4)}
    (alone,) = tiny_pipeline()(LABELS[1], **options).images
    # One level of 255: there it was one of a batch.
    assert np.abs(np.asarray(alone, dtype=int) - np.asarray(Image.open(whole / "000004.png"))).max() <= 1


def test_processes_share_the_work_and_change_nothing(whole, pipeline, tmp_path):
    sample(pipeline, tmp_path / "two", "--npz", tmp_path / "two.npz", processes=2)
    assert pictures(tmp_path / "two") == pictures(whole)
    assert (tmp_path / "two.npz").read_bytes()[-1000:] == (whole.parent / "samples.npz").read_bytes()[-1000:]


def test_it_goes_on_with_what_is_missing(whole, pipeline, tmp_path):
    output = tmp_path / "parts"
    sample(pipeline, output, "--num_images", 3)
    (output / "000001.png").unlink()
    (output / ".000001.png.0a0b0c0d.tmp").write_bytes(b"half")  # as a process leaves it that is killed
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.png")}
    sample(pipeline, output, processes=2)
    assert pictures(output) == pictures(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path.name for path in output.iterdir()} == {*pictures(whole), "settings.json"}


def test_samples_are_not_mixed(whole, pipeline, tmp_path):
    before = pictures(whole)
    for more in (
        ("--seed", 1),
        ("--guidance_scale", 2),
        ("--steps", 3),
        ("--labels", LABELS[0]),
        ("--sampler", "heun"),
    ):
        assert "holds samples made with another" in sample(pipeline, whole, *more, fails=True)
    assert pictures(whole) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "something else than samples" in sample(pipeline, tmp_path / "mine", fails=True)
    assert "no pipeline at" in sample(tmp_path / "absent", tmp_path / "out", fails=True)


def test_layouts_of_a_bank_and_chosen_classes(tmp_path):
    """As the official release needs it, which has no layout model."""
    pipe = tiny_pipeline(layout_model=None, layout_scheduler=None)
    pipe.save_pretrained(tmp_path / "p")
    layouts = tiny_pipeline().generate_layout([0, 1, 2], num_inference_steps=2)
    LayoutBank(layouts, [0, 1, 2]).save(tmp_path / "bank.safetensors")
    assert "give layouts by --layouts" in sample(tmp_path / "p", tmp_path / "out", fails=True)
    more = ("--layouts", tmp_path / "bank.safetensors", "--labels", LABELS[2], 0, "--npz", tmp_path / "x.npz")
    sample(tmp_path / "p", tmp_path / "out", *more)
    with np.load(tmp_path / "x.npz") as packed:
        assert packed["arr_1"].tolist() == [2, 0, 2, 0, 2, 0, 2]
