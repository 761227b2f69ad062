"""The training script for real: two steps, saving, resuming, two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_zoo import noise_images, tiny_model
from PIL import Image
from safetensors.torch import load_file

import gpstoken_diffusers
from gpstoken_diffusers import AutoencoderGPSToken
from gpstoken_diffusers.training.data import PhotographCrops, list_images
from gpstoken_diffusers.training.muon import Muon, orthogonalise, split_parameters

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "texture_channels": 4,
    "stem_channels": 32,
    "stem_num_layers": 1,
    "roi_size": 2,
    "hidden_size": 32,
    "num_layers": 1,
    "num_attention_heads": 2,
    "decoder_block_out_channels": [8, 16],
    "decoder_num_layers": 2,
    "lattice_size": 2,
    "lattice_channels": 8,
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for index in range(4):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((80, 60), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def train(photographs: Path, output: Path, *extra: str, processes: int = 1) -> None:
    (output.parent / "config.json").write_text(json.dumps(TINY))
    # `accelerate launch` starts several CPU processes through MPI alone; torchrun does so without.
    if processes == 1:
        launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    else:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [
        sys.executable, *launch, str(ROOT / "examples" / "train_autoencoder.py"),
        "--train_dir", str(photographs), "--output_dir", str(output), "--config", str(output.parent / "config.json"),
        "--resolution", "32", "--num_tokens", "6", "--batch_size", "2", "--warmup_steps", "1", "--num_workers", "0",
        "--mixed_precision", "no", *extra,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    environment["PYTHONPATH"] = str(Path(gpstoken_diffusers.__file__).parents[1])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "diffusion_pytorch_model.safetensors")


def test_resuming_continues_the_same_run(photographs, tmp_path):
    validation = ("--validation_dir", str(photographs), "--validation_steps", "2")
    train(photographs, tmp_path / "whole", "--max_train_steps", "4", "--checkpointing_steps", "2", *validation)
    curve = [json.loads(line) for line in (tmp_path / "whole" / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve] == [2, 4]
    assert all(np.isfinite([row["loss"], row["psnr"]]).all() for row in curve)
    assert Image.open(tmp_path / "whole" / "validation.png").size == (4 * 32, 2 * 32)
    model = AutoencoderGPSToken.from_pretrained(tmp_path / "whole" / "model")
    assert model.config.sample_size == 32
    # The second run is the first one cut off after step 2: its schedule is that of four steps.
    (tmp_path / "cut").mkdir()
    os.rename(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    train(photographs, tmp_path / "cut", "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for name in whole:
        assert torch.equal(whole[name], cut[name]), name
    moved = AutoencoderGPSToken(**{**model.config})
    assert not torch.equal(moved.stem.conv_in.weight, model.stem.conv_in.weight)


def test_two_processes_train(photographs, tmp_path):
    train(photographs, tmp_path / "two", "--max_train_steps", "2", processes=2)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "two").values())


def test_samples_do_not_depend_on_who_asks(photographs):
    first, second = (PhotographCrops(photographs, 32, 6, length=8, seed=3) for _ in range(2))
    second[1]
    for name, value in first[5].items():
        assert torch.equal(value, second[5][name]), name
    assert not torch.equal(first[5]["pixel_values"], first[6]["pixel_values"])
    assert first[0]["regions"].shape == (6, 4)
    assert first[0]["pixel_values"].abs().max() <= 1


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        list_images(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no image"):
        list_images(tmp_path)


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 9)])
def test_orthogonalised_updates_have_unit_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix).float())
    # The iteration's coefficients trade accuracy for speed: singular values end between about 0.7 and 1.2, but for
    # those that were tiny to begin with.
    assert values.max() < 1.3
    assert values.median() > 0.6


def test_muon_learns_and_takes_only_matrices():
    torch.manual_seed(0)
    target, layer = torch.randn(8, 8), torch.nn.Linear(8, 8, bias=False)
    optimizer = Muon([layer.weight], lr=0.05)
    inputs = torch.randn(64, 8)
    losses = []
    for _ in range(300):
        loss = (layer(inputs) - inputs @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def test_every_parameter_has_one_optimizer():
    model = AutoencoderGPSToken(**TINY, sample_size=32, map_size=8, stem_patch_size=4, decoder_type="lattice")
    matrices, others = split_parameters(model)
    ids = [id(parameter) for parameter in (*matrices, *others)]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    assert all(parameter.ndim >= 2 for parameter in matrices)
    assert any(parameter is model.refiner.texture_head.weight for parameter in others)


def test_folders_are_drawn_from_equally_often(tmp_path):
    for name, color, count in (("few", "black", 1), ("many", "white", 9)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (32, 32), color).save(tmp_path / name / f"{number}.png")
    crops = PhotographCrops([tmp_path / "few", tmp_path / "many"], 32, 1, length=400)
    white = sum(crops[index]["pixel_values"].mean() > 0 for index in range(400)) / 400
    assert abs(white - 0.5) < 0.1  # four standard deviations
    alone = PhotographCrops(tmp_path / "few", 32, 1, length=4)
    assert all(alone[index]["pixel_values"].max() == -1 for index in range(4))


def test_texture_noise_is_relative_and_for_training_alone():
    model = tiny_model("lattice")
    pixels = noise_images(2, 32, 32)
    with torch.no_grad():
        plain = model(pixels).sample
        torch.manual_seed(0)
        noisy = model(pixels, texture_noise=0.5).sample
        assert torch.equal(model(pixels, texture_noise=0.0).sample, plain)
    assert 0 < (noisy - plain).square().mean() < plain.var()
