"""The training loop, by the autoencoder's script: stopped, killed, on full disks, with broken numbers, on processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from script_runs import run_script, start_script
from training_runs import (
    ENVIRONMENT,
    SCRIPT,
    TINY,
    arguments,
    assert_same_weights,
    curve,
    make_photographs,
    train_apart,
    train_here,
    weights,
)

from gpstoken_diffusers import AutoencoderGPSToken
from gpstoken_diffusers.training import loop
from gpstoken_diffusers.training.checkpoints import list_checkpoints
from gpstoken_diffusers.training.run_record import Curve, RunState

# A critic from the third step on, so that everything a run can hold is in its checkpoints.
ADVERSARIAL = ("--adversarial_weight", 0.1, "--critic_start", 2, "--critic_channels", 8)
STEPS = 8


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("photographs") / "x")


def settings(photographs: Path) -> tuple:
    """Of a run of eight steps with everything in it."""
    return (
        "--max_train_steps", STEPS, "--checkpointing_steps", 2, "--validation_steps", 2, "--validation_dir",
        photographs, "--texture_noise", 0.1, *ADVERSARIAL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(photographs, tmp_path_factory) -> Path:
    """A run that nothing disturbed.

    It and what is compared with it bit for bit have processes of their own: after many other tests, arithmetic in this
    process was seen to differ in its last bits.
    """
    output = tmp_path_factory.mktemp("whole") / "run"
    train_apart(photographs, output, *settings(photographs))
    return output


@pytest.fixture(scope="module")
def small_run(photographs, tmp_path_factory) -> Path:
    """Two steps, without a critic."""
    output = tmp_path_factory.mktemp("small") / "run"
    train_here(photographs, output, "--max_train_steps", 2)
    return output


def without_clock(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("minutes", "images_per_second")} for row in rows]


def test_a_run_leaves_what_it_promises(whole):
    rows = curve(whole)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for row in rows:
        assert {"loss", "l1", "l2", "grad_norm", "psnr", "ssim", "minutes", "lr", "images_per_second"} <= row.keys()
        assert all(np.isfinite(value) for value in row.values())
    assert "critic_loss" not in rows[0] and "critic_loss" in rows[1]
    assert [path.name for path in list_checkpoints(whole)] == ["checkpoint-6", "checkpoint-8"]
    assert Image.open(whole / "validation.png").size == (4 + 4 * (32 + 4), 4 + 2 * (32 + 4))  # px of white around each
    model = AutoencoderGPSToken.from_pretrained(whole / "model")
    assert model.config.sample_size == 32
    card = (whole / "model" / "README.md").read_text()
    assert "8 steps of 2 crops of 32 px" in card and "PSNR, dB" in card and '"critic_start": 2' in card
    assert not list(whole.glob("tmp-*"))


def test_stopped_runs_go_on_as_if_they_had_not_been(photographs, whole, tmp_path):
    """By time, then started again: the second part sees the rest of the same data, noise and schedule."""
    output = tmp_path / "run"
    train_apart(photographs, output, *settings(photographs), "--max_minutes", 0)
    assert [row["step"] for row in curve(output)] == [1]
    train_apart(photographs, output, *settings(photographs), "--resume_from_checkpoint", "latest")
    assert_same_weights(whole, output)
    assert without_clock(curve(output))[1:] == without_clock(curve(whole))


def test_a_rate_over_minutes_ends_with_the_time_of_all_starts(photographs, tmp_path):
    """The first start uses the time up, so that the second takes the step that is at hand, at the last rate."""
    output = tmp_path / "run"
    more = ("--lr_schedule", "minutes", "--warmup_steps", 0, "--final_lr_scale", 0.1, "--learning_rate", 1e-3)
    with pytest.raises(ValueError, match="needs --max_minutes"):
        train_here(photographs, output, *more)
    train_here(photographs, output, *more, "--max_minutes", 1e-6)
    train_here(photographs, output, *more, "--max_minutes", 1e-6, "--resume_from_checkpoint", "latest")
    assert [row["step"] for row in curve(output)] == [1, 2]
    assert curve(output)[1]["lr"] == pytest.approx(1e-4)


def test_linear_layers_stay_while_the_rest_is_trained(photographs, tmp_path):
    """As gpstoken-mini 2 is trained: any number of tokens, partition by error, textures cut short."""
    config = TINY | {"decoder_type": "patch", "region_pixels": 4, "partition_criterion": "error", "min_region_size": 4}
    model = AutoencoderGPSToken(**config, sample_size=32, map_size=16)
    model.save_pretrained(tmp_path / "start")
    more = ("--token_range", 2, 16, "--nested_share", 0.5, "--max_train_steps", 2, "--freeze", "linear")
    train_here(photographs, tmp_path / "run", *more, "--pretrained", tmp_path / "start")
    kept = {name for name, value in weights(tmp_path / "run").items() if torch.equal(value, model.state_dict()[name])}
    painter, reader = "decoder.unfold_texture.colour_", "refiner.region_picture.direct_"
    linear = {painter + "weight", painter + "bias", reader + "weight", reader + "bias"}
    others = {"stem.conv_in.weight", "refiner.texture_head.weight", "decoder.conv_out.weight"}
    assert kept & (linear | others) == linear
    with pytest.raises(ValueError, match='need decoder_type="patch"'):
        train_here(photographs, tmp_path / "other", *more)


def test_the_saved_model_is_the_average_of_the_weights(photographs, whole, tmp_path):
    """With decay 0 the average is the newest weights, up to a rounding; with the usual one it lags behind."""
    output = tmp_path / "run"
    train_here(photographs, output, *settings(photographs), "--ema_decay", 0)
    for run, same in ((output, True), (whole, False)):
        newest = load_file(run / "checkpoint-8" / "model.safetensors")
        averaged = weights(run)
        distances = [(newest[name] - value).abs().max().item() for name, value in averaged.items()]
        assert (max(distances) < 1e-6) == same


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_schedule_reaches_the_optimizer(photographs, whole, tmp_path, optimizer):
    """At the start of a warm-up of a million steps, weights hardly move; without it they do."""
    moved = []
    for number, warmup in enumerate((1_000_000, 0)):
        output = tmp_path / str(number)
        more = ("--pretrained", whole / "model", "--max_train_steps", 2, "--warmup_steps", warmup, "--weight_decay", 0)
        train_here(photographs, output, *more, "--optimizer", optimizer, "--checkpointing_steps", 2)
        newest, before = load_file(output / "checkpoint-2" / "model.safetensors"), weights(whole)
        moved.append(max((newest[name] - value).abs().max().item() for name, value in before.items()))
    assert moved[0] < 1e-7 < 1e-4 < moved[1]  # two steps of a millionth of 1e-3 or so, and two of the whole


KILLS_ITSELF = f"""
import os, runpy, signal, torch

saved, save = 0, torch.save
def save_and_die(*args, **kwargs):
    global saved
    saved += 1
    save(*args, **kwargs)
    if saved == 10:  # in the middle of a checkpoint, of which several files are written already
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_and_die
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""

ON_A_FULL_DISK = f"""
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.005)


def test_killed_runs_go_on_as_if_they_had_not_been(photographs, whole, tmp_path):
    """kill -9 while the second checkpoint is being written, then at a random moment, then nothing: the same run."""
    output = tmp_path / "run"
    more = (*settings(photographs), "--resume_from_checkpoint", "latest")
    (tmp_path / "driver.py").write_text(KILLS_ITSELF)
    codes, text = start_script([tmp_path / "driver.py", *arguments(photographs, output, *more)], tmp_path).wait()
    assert codes == [-signal.SIGKILL], text[-2000:]
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-2"], text[-2000:]
    assert list(output.glob("tmp-checkpoint-4/*"))
    running = start_script([SCRIPT, *arguments(photographs, output, *more)], tmp_path)
    wait_for(output / "checkpoint-4")
    time.sleep(random.uniform(0, 0.3))
    with contextlib.suppress(ProcessLookupError):  # a fast machine may be done by then
        os.kill(running.processes[0], signal.SIGKILL)
    running.wait()
    train_apart(photographs, output, *more)
    assert_same_weights(whole, output)
    assert without_clock(curve(output)) == without_clock(curve(whole))
    assert not list(output.glob("tmp-*"))


def test_a_full_disk_leaves_the_last_checkpoint_whole(photographs, whole, tmp_path):
    """Files may not grow beyond 100 kB from step 2 on: writing fails as on a full disk, by the system."""
    output = tmp_path / "run"
    more = (*settings(photographs), "--resume_from_checkpoint", "latest")
    train_here(photographs, output, *more, "--max_train_steps", 2)
    before = {path.name: path.read_bytes() for path in (output / "checkpoint-2").iterdir()}
    (tmp_path / "driver.py").write_text(ON_A_FULL_DISK)
    text = run_script([tmp_path / "driver.py", *arguments(photographs, output, *more)], tmp_path, fails=True)
    assert "The checkpoint of step 4 could not be written" in text and "Is the disk full?" in text
    assert {path.name: path.read_bytes() for path in (output / "checkpoint-2").iterdir()} == before
    assert not list(output.glob("tmp-*"))
    AutoencoderGPSToken.from_pretrained(output / "model")
    train_here(photographs, output, *more)
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-6", "checkpoint-8"]


def test_a_full_disk_while_the_model_is_written(photographs, tmp_path, monkeypatch):
    """It fills up right after the second checkpoint: that is whole, and so is the model of the first."""
    output = tmp_path / "run"
    more = ("--max_train_steps", 4, "--checkpointing_steps", 2)
    before, save = {}, loop.save_checkpoint

    def save_and_fill_the_disk(accelerator, output_dir, step, *rest):
        save(accelerator, output_dir, step, *rest)
        if step == 4:
            before.update({path.name: path.read_bytes() for path in (output / "model").iterdir()})
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(loop, "save_checkpoint", save_and_fill_the_disk)
    try:
        with pytest.raises(OSError, match="model could not be written after step 4 .*Is the disk full.*--resume_from"):
            train_here(photographs, output, *more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name: path.read_bytes() for path in (output / "model").iterdir()} == before
    monkeypatch.undo()
    train_here(photographs, output, *more, "--max_train_steps", 5, "--resume_from_checkpoint", "latest")
    assert [row["step"] for row in curve(output)] == [4, 5]


@pytest.mark.parametrize("change, message", [
    (("--optimizer", "adamw"), "optimizer is muon there and adamw here"),
    (ADVERSARIAL, "critic is False there and True here"),
    (("--freeze", "encoder"), "stem.conv_in.weight: .* there and not trained here"),
    (("--lora_rank", 2), "trained weights differ"),
    (("--config", "wider"), r"such as stem.*: \[.*32.*\] there and \[.*64.*\] here"),
])  # fmt: skip
def test_a_checkpoint_of_other_settings_is_refused(photographs, small_run, tmp_path, change, message):
    if change[0] == "--lora_rank":
        pytest.importorskip("peft")
    if change[0] == "--config":
        (tmp_path / "wide.json").write_text(json.dumps(TINY | {"stem_channels": 64}))
        change = ("--config", tmp_path / "wide.json")
    before = {path: path.read_bytes() for path in small_run.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=f"checkpoint-2 was trained with, got others: .*{message}.*--pretrained .*model"
    ):
        train_here(photographs, small_run, "--max_train_steps", 3, "--resume_from_checkpoint", "latest", *change)
    assert {path: path.read_bytes() for path in small_run.rglob("*") if path.is_file()} == before


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_batch(photographs, tmp_path):
    output = tmp_path / "run"
    train_here(photographs, output, "--max_train_steps", 2, "--checkpointing_steps", 2)
    kept = weights(output)
    with pytest.raises(FloatingPointError, match=r"After step \d: .*The batch is in .*broken-batch"):
        train_here(
            photographs, output, "--max_train_steps", 9, "--resume_from_checkpoint", "latest", "--learning_rate", 1e30,
            "--adam_learning_rate", 1e30, "--lr_schedule", "constant", "--warmup_steps", 0,
        )  # fmt: skip
    (dump,) = output.glob("broken-batch-*.safetensors")
    batch = load_file(dump)
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["pixel_values"].isfinite().all()
    assert set(batch) == {"pixel_values", "regions", "geometry"}
    assert all(torch.equal(kept[name], value) for name, value in weights(output).items())


def test_unreadable_pictures_are_counted_and_listed(photographs, tmp_path, capsys):
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    (folder / "broken.png").write_bytes(b"no picture")
    train_here(folder, tmp_path / "run", "--max_train_steps", 5)
    assert (tmp_path / "run" / "skipped.txt").read_text() == f"{folder / 'broken.png'}\n"
    assert "1 of them could not be read" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert "skipped=1" in capsys.readouterr().err


def test_batch_systems_may_end_a_run(photographs, tmp_path):
    """SIGTERM to all processes of a run, as they send it: the step is finished, a checkpoint and the model written,
    nothing validated, the exit status 0."""
    output = tmp_path / "run"
    more = ("--max_train_steps", 100_000, "--checkpointing_steps", 5, "--num_workers", 2)
    running = start_script([SCRIPT, *arguments(photographs, output, *more)], tmp_path)
    wait_for(output / "checkpoint-5")
    os.killpg(running.processes[0], signal.SIGTERM)
    codes, text = running.wait()
    assert codes == [0], text[-2000:]
    assert "go on with --resume_from_checkpoint latest" in text
    last = int(list_checkpoints(output)[-1].name.split("-")[1])
    assert last > 5 and f"\n{last:,} steps of 2 crops" in (output / "model" / "README.md").read_text()
    assert not (output / "curve.jsonl").exists()


@pytest.mark.parametrize("schedule", ["both", "alternating"])
def test_two_processes_learn_what_one_does(photographs, tmp_path, schedule):
    """The same global batches; sums of gradients are rounded in another order, which a few steps hardly amplify."""
    more = (*settings(photographs), "--texture_noise", 0, "--critic_schedule", schedule, "--optimizer", "adamw")
    train_here(photographs, tmp_path / "one" / "run", *more, "--batch_size", 4)
    train_apart(photographs, tmp_path / "two" / "run", *more, processes=2)
    one, two = curve(tmp_path / "one" / "run"), curve(tmp_path / "two" / "run")
    for name in ("loss", "l1", "psnr", "grad_norm", "adaptive_weight", "critic_loss"):
        values = [[row[name] for row in rows if name in row] for rows in (one, two)]
        assert len(values[0]) >= 3
        np.testing.assert_allclose(*values, rtol=2e-4, err_msg=name)


def test_accumulated_gradients_are_those_of_the_whole_batch(photographs, tmp_path):
    more = ("--max_train_steps", 3, "--validation_steps", 1, "--validation_dir", photographs, "--optimizer", "adamw")
    more += ("--token_jitter", 0)
    train_here(photographs, tmp_path / "whole" / "run", *more, "--batch_size", 4)
    train_here(photographs, tmp_path / "parts" / "run", *more, "--gradient_accumulation_steps", 2)
    whole, parts = curve(tmp_path / "whole" / "run"), curve(tmp_path / "parts" / "run")
    # float32 sums in another order
    np.testing.assert_allclose([row["loss"] for row in whole], [row["loss"] for row in parts], rtol=1e-4)
    np.testing.assert_allclose([row["psnr"] for row in whole], [row["psnr"] for row in parts], rtol=1e-4)


def test_a_launch_as_users_do_it(photographs, tmp_path):
    """accelerate launch, two loading processes, bfloat16, gradient checkpointing, a tracker."""
    pytest.importorskip("tensorboard")
    line = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    line += ["--mixed_precision", "no", "--dynamo_backend", "no", SCRIPT] + arguments(
        photographs, tmp_path / "run", "--max_train_steps", 2, "--num_workers", 2, "--mixed_precision", "bf16",
        "--gradient_checkpointing", "--report_to", "tensorboard", "--validation_dir", photographs,
    )  # fmt: skip
    done = subprocess.run(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    text = done.stdout
    assert "image/s" in text
    events = list((tmp_path / "run" / "logs").rglob("events.out.tfevents*"))
    assert any(b"validation" in file.read_bytes() and b"PNG" in file.read_bytes() for file in events)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_a_missing_checkpoint_is_named(photographs, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        train_here(photographs, tmp_path / "run", "--resume_from_checkpoint", tmp_path / "absent")


def test_a_folder_with_a_run_in_it_is_not_taken_for_another(photographs, tmp_path):
    output = tmp_path / "run"
    more = ("--max_train_steps", 6, "--checkpointing_steps", 2)
    train_here(photographs, output, *more)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="got .*run with checkpoint-4.*--overwrite"):
        train_here(photographs, output, *more, "--max_train_steps", 2)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    # Going back to an earlier checkpoint: the later one is of a run that did not happen.
    train_here(photographs, output, *more, "--resume_from_checkpoint", "checkpoint-4", "--max_minutes", 0)
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-4", "checkpoint-5"]
    train_here(photographs, output, *more, "--max_train_steps", 1, "--overwrite")
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-1"]
    assert [row["step"] for row in curve(output)] == [1]


def test_a_resumed_curve_forgets_what_will_come_again(tmp_path):
    record = Curve(tmp_path / "curve.jsonl")
    record.forget_after(3)  # nothing yet
    for step in (1, 2, 3):
        record.append({"step": step})
    with record.path.open("a") as file:
        file.write('{"step": 4, "lo')  # the process was killed here
    record.forget_after(2)
    record.append({"step": 3})
    assert [json.loads(line)["step"] for line in record.path.read_text().splitlines()] == [1, 2, 3]


def test_running_means():
    state = RunState()
    for value in (1.0, 2.0):
        state.average({"loss": value}, 0.75)
    assert state.averages == {"loss": 1.25}
    restored = RunState()
    restored.load_state_dict(state.state_dict())
    restored.average({"loss": 2.0}, 0.75)
    assert restored.averages == {"loss": 1.4375}
