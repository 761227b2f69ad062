"""How a training script is started: its arguments, accelerate's settings, threads, trackers."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import accelerate.tracking
import pytest
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import LoggerType
from script_runs import ROOT
from training_runs import ENVIRONMENT

from gpstoken_diffusers.training.launch import add_loop_arguments, make_accelerator, start_trackers

SCRIPTS = {path.stem: path for path in (ROOT / "examples" / "train").glob("*.py") if "import torch" in path.read_text()}
TRAINING = ("train_autoencoder", "train_layout", "train_texture")


@pytest.fixture(scope="module")
def parse():
    scripts = {name: importlib.import_module(name) for name in (*TRAINING, "encode_dataset")}
    place = {"encode_dataset": ["--data", "x", "--output", "y"]}
    given = {name: place.get(name, ["--train_dir", "x", "--output_dir", "y"]) for name in scripts}
    return lambda name, *line: scripts[name].parse_args([*given[name], *map(str, line)])


@pytest.mark.parametrize("names, option, bad, expected", [
    (TRAINING, "max_train_steps", (0, -5, 1.5, "many"), "an integer of at least 1"),
    (TRAINING, "batch_size", (0, -1), "an integer of at least 1"),
    (TRAINING, "gradient_accumulation_steps", (0,), "an integer of at least 1"),
    (TRAINING, "checkpointing_steps", (0, -1), "an integer of at least 1"),
    (TRAINING, "checkpoints_total_limit", (0, -1), "an integer of at least 1"),
    (TRAINING, "validation_steps", (0,), "an integer of at least 1"),
    (TRAINING, "learning_rate", (0, -1e-3, "nan", "inf", "fast"), "a number above 0"),
    (TRAINING, "adam_learning_rate", (0, -1), "a number above 0"),
    (TRAINING, "weight_decay", (-0.1, "inf"), "a number of at least 0"),
    (TRAINING, "adam_betas", ((1, 0.9), (0.9, -1)), "a share from 0 to below 1"),
    (TRAINING, "ema_decay", (1.5, -1), "a share from 0 to 1"),
    (TRAINING, "warmup_steps", (-1,), "an integer of at least 0"),
    (TRAINING, "num_workers", (-1,), "an integer of at least 0"),
    (TRAINING, "seed", (-1,), "an integer of at least 0"),
    (TRAINING, "max_minutes", (-1,), "a number of at least 0"),
    (TRAINING[1:], "label_dropout", (1.5, -1), "a share from 0 to 1"),
    (TRAINING[:1], "num_tokens", (0, -3), "an integer of at least 1"),
    (TRAINING[:1], "resolution", (0,), "an integer of at least 1"),
    (TRAINING[:1], "max_validation_images", (0,), "an integer of at least 1"),
    (TRAINING[:1], "token_jitter", (1, -0.1), "a share from 0 to below 1"),
    (TRAINING[:1], "critic_learning_rate", (0,), "a number above 0"),
    (TRAINING[:1], "texture_noise", (-1,), "a number of at least 0"),
    (("encode_dataset",), "num_tokens", (0, -3), "an integer of at least 1"),
    (("encode_dataset",), "views", (0,), "an integer of at least 1"),
    (("encode_dataset",), "num_workers", (-1,), "an integer of at least 0"),
])  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(parse, capsys, names, option, bad, expected):
    for name in names:
        for value in bad:
            values = value if isinstance(value, tuple) else (value,)
            with pytest.raises(SystemExit):
                parse(name, f"--{option}", *values)
            assert f"argument --{option}: expected {expected}, got " in capsys.readouterr().err


@pytest.mark.parametrize("name", TRAINING)
def test_a_pretrained_model_has_sizes_of_its_own(parse, capsys, name):
    for extra in [("--config", "c.json")] + [("--preset", "mini")] * (name == "train_autoencoder"):
        with pytest.raises(SystemExit):
            parse(name, "--pretrained", "folder", *extra)
        assert f"leave {'--preset and --config' if name == 'train_autoencoder' else '--config'} out" in (
            capsys.readouterr().err
        )


WITHOUT_TORCH = """
import importlib.abc, os, runpy, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            os._exit(0)

sys.meta_path.insert(0, Finder())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("name", sorted(SCRIPTS.keys() - {"assemble_pipeline"}))
def test_threads_do_not_spin_beside_a_busy_neighbour(name):
    """What libgomp reads when torch is imported; what the user says counts."""
    for said, expected in (({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")):
        environment = {key: value for key, value in ENVIRONMENT.items() if key != "GOMP_SPINCOUNT"} | said
        command = [sys.executable, "-c", WITHOUT_TORCH, str(SCRIPTS[name])]
        assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout == f"{expected}\n"


@pytest.fixture
def accelerator(tmp_path, monkeypatch):
    """(command line) -> its arguments and accelerator, as of a process that accelerate has just started."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")

    def make(*line: str):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        parser = argparse.ArgumentParser()
        add_loop_arguments(parser)
        args = parser.parse_args(["--output_dir", str(tmp_path / "run"), "--report_to", "none", *line])
        return args, make_accelerator(args)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("launched, flag, expected", [
    ("no", None, "no"), ("bf16", None, "bf16"), (None, None, "bf16"), ("no", "bf16", "bf16"), ("bf16", "no", "no"),
])  # fmt: skip
def test_accelerate_decides_the_precision_unless_the_script_is_told(accelerator, monkeypatch, launched, flag, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:  # as accelerate launch hands it on
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    args, made = accelerator(*(("--mixed_precision", flag) if flag else ()))
    assert (args.mixed_precision, made.mixed_precision) == (expected, expected)


def test_what_cannot_be_had_is_refused(accelerator, monkeypatch):
    with pytest.raises(ValueError, match="got --report_to comet_ml: pip install"):
        accelerator("--report_to", "comet_ml")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="no, fp16, bf16, got fp8 from accelerate"):
        accelerator()


TRACKER = """
import json, types
config = types.SimpleNamespace(update=lambda *args, **options: None)
def init(**options):
    with open("calls.json", "w") as file:
        json.dump(options, file)
"""


def test_a_run_is_a_run_in_a_project_of_all_runs(accelerator, tmp_path, monkeypatch):
    """A package that takes the place of wandb, which accelerate's own tracker calls."""
    (tmp_path / "wandb.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        accelerate.tracking, "_available_trackers", [LoggerType.WANDB]
    )  # looked for when it was imported
    monkeypatch.chdir(tmp_path)
    for line, project in (((), "gpstoken"), (("--tracker_project_name", "mine"), "mine")):
        args, made = accelerator("--report_to", "wandb", *line)
        start_trackers(made, args)
        assert json.loads(Path("calls.json").read_text()) == {"project": project, "name": "run"}
