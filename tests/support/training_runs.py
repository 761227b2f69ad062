"""Runs of the training script at toy size, in this process or as a user starts them."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file
from script_runs import ROOT, run_script

import gpstoken_diffusers

SCRIPT = ROOT / "examples" / "train" / "train_autoencoder.py"
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
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "1",
    "PYTHONPATH": str(Path(gpstoken_diffusers.__file__).parents[1]),
}


def make_photographs(folder: Path, count: int = 4, size: tuple[int, int] = (80, 60)) -> Path:
    """Blurred noise."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def arguments(photographs: Path, output: Path, *more: object) -> list[str]:
    """A command line for the script; what is given last wins."""
    output.parent.mkdir(parents=True, exist_ok=True)
    config = output.parent / "config.json"
    config.write_text(json.dumps(TINY))
    toy = {
        "--train_dir": photographs, "--output_dir": output, "--resolution": 32, "--num_tokens": 6,
        "--batch_size": 2, "--warmup_steps": 1, "--num_workers": 0, "--mixed_precision": "no", "--report_to": "none",
    }  # fmt: skip
    if "--pretrained" not in more and "--config" not in more:
        toy["--config"] = config
    return [str(part) for pair in toy.items() for part in pair] + [str(part) for part in more]


def load_script(path: Path = SCRIPT):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_here(photographs: Path, output: Path, *more: object) -> None:
    """Runs the script's main in this process, from a fresh start."""
    # accelerate keeps what it knows of a process for good; a second run must not see the first one's.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = os.environ.get("ACCELERATE_USE_CPU")
    os.environ["ACCELERATE_USE_CPU"] = "1"
    try:
        load_script().main(arguments(photographs, output, *more))
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("ACCELERATE_USE_CPU") if before is None else None
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def train_apart(photographs: Path, output: Path, *more: object, **how) -> str:
    """Runs the script in processes of its own, and returns what it wrote; `how` as for `run_script`."""
    return run_script([SCRIPT, *arguments(photographs, output, *more)], output.parent, **how)


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Of the saved model."""
    return load_file(output / "model" / "diffusion_pytorch_model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def curve(output: Path) -> list[dict]:
    """Lines of curve.jsonl."""
    return [json.loads(line) for line in (output / "curve.jsonl").read_text().splitlines()]
