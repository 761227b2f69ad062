"""The command `gpstoken`: help, exit codes, and what the commands for one picture write and say."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_runs import names_in, photo, raising, run, save_tiny_model
from model_zoo import tiny_model
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor, GPSTokens
from gpstoken_diffusers.cli import arguments, commands
from gpstoken_diffusers.models import official_checkpoints as convert

COMMANDS = ("demo", "encode", "decode", "reconstruct", "panel", "convert", "doctor")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


# Parser and exit codes


def test_help_loads_nothing_heavy():
    # Importing PyTorch alone takes seconds; this way the help answers in a fraction of one.
    code = (
        "import sys; from gpstoken_diffusers.cli import main; main(['--help']); main(['encode', '--help']);"
        "print(sorted({'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'tqdm'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command, capsys):
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: gpstoken {command}" in text
    assert command == "doctor" or f"  gpstoken {command} " in text.split("examples:")[1]


def test_python_m_runs_the_command(monkeypatch, capsys):
    import runpy

    monkeypatch.setattr(sys, "argv", ["gpstoken", "--version"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module("gpstoken_diffusers", run_name="__main__")
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith("gpstoken 0.")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["paint"],
        ["encode", "photo.jpg"],  # no output
        ["encode", "photo.jpg", "-o", "t.safetensors", "--num-tokens", "many"],
        ["encode", "photo.jpg", "-o", "t.safetensors", "--device", "tpu"],
        ["decode", "t.safetensors", "-o", "p.png", "--mode", "both"],
        ["convert", "w.safetensors", "-o", "folder", "--preset", "xl"],
    ],
    ids=" ".join,
)
def test_wrong_usage_returns_2(argv, capsys):
    assert run(*argv) == 2
    assert "usage: gpstoken" in capsys.readouterr().err


def test_parser_knows_the_presets():
    assert set(arguments.PRESETS) == set(convert.PRESETS)  # spelled out there, to import nothing


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "gpstoken: interrupted\n"),
        (ValueError("no such thing"), 1, "gpstoken: error: no such thing\n"),
        (
            OSError(28, "No space left on device", "t.png"),
            1,
            "gpstoken: error: t.png: No space left on device\n",
        ),
        (
            torch.OutOfMemoryError("CUDA wants more"),
            1,
            "gpstoken: error: out of memory. Use --dtype bfloat16",
        ),
        (MemoryError(), 1, "gpstoken: error: out of memory. Use --dtype bfloat16"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes_of_errors(error, code, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "load_codec", raising(error))
    assert run("demo", "-o", tmp_path) == code
    assert capsys.readouterr().err.startswith(text)


def test_bugs_and_debug_show_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "load_codec", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run("demo", "-o", tmp_path)
    monkeypatch.setattr(commands, "load_codec", raising(ValueError("a mistake")))
    with pytest.raises(ValueError, match="a mistake"):
        run("demo", "-o", tmp_path, "--debug")


# demo, encode, decode, panel, doctor


def test_demo_leaves_pictures_and_figures(model_folder, tmp_path, monkeypatch, capsys):
    with Image.open(commands.DEMO_PHOTOGRAPH) as shipped:
        assert min(shipped.size) >= 256
    # The tiny model's tiles are so small that the whole photograph has hundreds of them.
    monkeypatch.setattr(commands, "DEMO_PHOTOGRAPH", photo(tmp_path / "demo.png", 48, 64))
    out = tmp_path / "new" / "outputs"
    assert run("demo", "-o", out, "--model", model_folder) == 0
    assert names_in(out) == {
        "input.png", "gaussians.png", "ellipses.png", "reconstruction.png", "panel.png", "tokens.safetensors",
    }  # fmt: skip
    pictures = {path.stem: np.asarray(Image.open(path)) for path in out.glob("*.png")}
    assert {pictures[name].shape for name in ("input", "gaussians", "ellipses", "reconstruction")} == {(48, 64, 3)}
    assert np.array_equal(pictures["input"], np.asarray(Image.open(tmp_path / "demo.png")))
    assert not np.array_equal(pictures["gaussians"], pictures["ellipses"])
    tokens = GPSTokens.load(out / "tokens.safetensors")
    expected = peak_signal_noise_ratio(pictures["input"], pictures["reconstruction"])
    said = capsys.readouterr().out
    assert f"PSNR {expected:.2f} dB" in said
    assert f"{tokens.num_tokens} tokens (4 tiles of 6)" in said and f"{tokens.num_bytes:,} bytes" in said
    assert str(out) in said


def test_encode_and_decode_are_the_models(model_folder, tmp_path):
    image = photo(tmp_path / "photo.png")
    assert run("encode", image, "-o", tmp_path / "deep" / "t.safetensors", "--model", model_folder) == 0
    assert run("decode", tmp_path / "deep" / "t.safetensors", "-o", tmp_path / "p.png", "--model", model_folder) == 0

    model = AutoencoderGPSToken.from_pretrained(model_folder)
    features = GPSTokenImageProcessor.from_pretrained(model_folder)(Image.open(image))
    with torch.no_grad():
        tokens = model.encode(**features).tokens
        sample = model.decode(tokens).sample
    written = GPSTokens.load(tmp_path / "deep" / "t.safetensors")
    assert torch.equal(written.as_tensor(), tokens.as_tensor())
    assert (written.image_size, written.tile_grid) == ((40, 56), (2, 2))
    # 8-bit values are the nearest ones: cutting off decimals would be up to 1 away.
    exact = (sample[0].permute(1, 2, 0).clamp(-1, 1).numpy().astype(np.float64) + 1) * 127.5
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    # 1e-4: float32 pixel values in [0, 255] round differently where they fall on a half.
    assert np.abs(picture - exact).max() <= 0.5 + 1e-4


def test_encode_options_change_the_partition(model_folder, tmp_path, capsys):
    image = photo(tmp_path / "photo.png", 32, 32)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = {
        "plain": (),
        "four": ("--num-tokens", 4),
        "left": ("--importance", tmp_path / "mask.png", "--importance-strength", 50),
        "off": ("--importance", tmp_path / "mask.png", "--importance-strength", 0),
    }
    tokens = {}
    for name, extra in options.items():
        path = tmp_path / f"{name}.safetensors"
        assert run("encode", image, "-o", path, "--model", model_folder, *extra) == 0
        tokens[name] = GPSTokens.load(path)
    assert "4 tokens, 36 numbers, 144 bytes" in capsys.readouterr().out
    features = GPSTokenImageProcessor.from_pretrained(model_folder)(
        Image.open(image), importance=mask / np.float32(255), importance_strength=50
    )
    assert (features["regions"][..., 2] < 16).sum() > 3  # the mask has drawn tokens to the left half
    with torch.no_grad():
        expected = AutoencoderGPSToken.from_pretrained(model_folder).encode(**features).tokens
    assert torch.equal(tokens["left"].as_tensor(), expected.as_tensor())
    assert not torch.equal(tokens["left"].geometry, tokens["plain"].geometry)
    assert torch.equal(tokens["off"].geometry, tokens["plain"].geometry)


def test_polished_tokens_are_the_models(model_folder, tmp_path, capfd):
    image = photo(tmp_path / "photo.png")
    (tmp_path / "photos").mkdir()
    photo(tmp_path / "photos" / "photo.png")
    more = ("--model", model_folder, "--polish", 2)
    assert run("encode", image, "-o", tmp_path / "t.safetensors", *more) == 0
    assert "polish: 100%" in capfd.readouterr().err
    features = GPSTokenImageProcessor.from_pretrained(model_folder)(Image.open(image))
    with torch.no_grad():
        expected = AutoencoderGPSToken.from_pretrained(model_folder).encode(**features, polish_steps=2).tokens
    assert torch.equal(GPSTokens.load(tmp_path / "t.safetensors").as_tensor(), expected.as_tensor())
    assert run("encode", tmp_path / "photos", "-o", tmp_path / "all", *more) == 0
    assert torch.equal(GPSTokens.load(tmp_path / "all" / "photo.png.safetensors").as_tensor(), expected.as_tensor())
    # Others than those that are there are not mixed in.
    assert run("encode", tmp_path / "photos", "-o", tmp_path / "all", "--model", model_folder) == 1
    assert "polish" in capfd.readouterr().err
    assert run("encode", image, "-o", tmp_path / "n.safetensors", "--model", model_folder, "--polish", -1) == 1
    assert "--polish -1" in capfd.readouterr().err


def test_decode_modes_and_formats(model_folder, tmp_path):
    tokens = tmp_path / "t.safetensors"
    run("encode", photo(tmp_path / "photo.png"), "-o", tokens, "--model", model_folder)
    pictures = {}
    for name, extra in {
        "merge.png": ("--mode", "merge"),
        "tile.png": ("--mode", "tile"),
        "default.webp": (),
    }.items():
        assert run("decode", tokens, "-o", tmp_path / name, "--model", model_folder, *extra) == 0
        pictures[name] = np.asarray(Image.open(tmp_path / name))
        assert pictures[name].shape == (40, 56, 3)
    assert not np.array_equal(pictures["merge.png"], pictures["tile.png"])
    assert np.array_equal(pictures["default.webp"], pictures["tile.png"])  # the model's own mode; webp is lossless


def test_decode_at_another_size(model_folder, tmp_path, capsys):
    tokens = tmp_path / "t.safetensors"
    run("encode", photo(tmp_path / "photo.png"), "-o", tokens, "--model", model_folder)
    plain = ("decode", tokens, "-o", tmp_path / "p.png", "--model", model_folder)
    for extra, size in {
        ("--width", 112): (112, 80),  # one alone keeps the ratio of 56 x 40
        ("--height", 20): (28, 20),
        ("--width", 30, "--height", 50): (30, 50),
        ("--width", 1): (1, 1),
        (): (56, 40),
    }.items():
        assert run(*plain, *extra) == 0
        assert Image.open(tmp_path / "p.png").size == size
    assert "56 x 40 px" in capsys.readouterr().out
    assert run(*plain, "--height", 80) == 0
    with torch.no_grad():
        model = AutoencoderGPSToken.from_pretrained(model_folder)
        sample = model.decode(GPSTokens.load(tokens), size=(80, 112)).sample
    expected = GPSTokenImageProcessor().postprocess(sample)[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "p.png")), np.asarray(expected))
    assert run(*plain, "--width", 0) == 1
    assert "--width 0: a picture has at least 1 pixel" in capsys.readouterr().err
    assert run(*plain, "--width", 1.5) == 2


def test_decode_warns_of_another_models_tokens(model_folder, tmp_path, capsys):
    other = tmp_path / "other"
    tiny_model("map", seed=1).save_pretrained(other)  # no preprocessor_config.json: the configuration will do
    tokens = tmp_path / "t.safetensors"
    run("encode", photo(tmp_path / "photo.png"), "-o", tokens, "--model", other)
    run("decode", tokens, "-o", tmp_path / "p.png", "--model", other)
    assert capsys.readouterr().err == ""
    assert run("decode", tokens, "-o", tmp_path / "p.png", "--model", model_folder) == 0
    assert "was encoded by other, and is decoded by tiny" in capsys.readouterr().err
    assert run("decode", tokens, "-o", tmp_path / "p.png", "--model", model_folder, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_log_lines_end_with_the_command(model_folder, tmp_path):
    before = list(logging.getLogger("gpstoken_diffusers").handlers)
    run("encode", photo(tmp_path / "photo.png"), "-o", tmp_path / "t.safetensors", "--model", model_folder)
    assert logging.getLogger("gpstoken_diffusers").handlers == before


def test_panel_shows_four_pictures(model_folder, tmp_path, monkeypatch, capsys):
    columns = []
    monkeypatch.setattr(commands, "side_by_side", lambda given, footer: columns.append((given, footer)) or given[0][1])
    monkeypatch.setattr(commands, "PANEL_SIDE", 50)
    image = photo(tmp_path / "photo.png", 40, 100)
    for style in ("glow", "ellipses"):
        options = ("-o", tmp_path / f"{style}.png", "--style", style, "--model", model_folder)
        assert run("panel", image, *options) == 0
    (glow, footer), (ellipses, _) = columns
    titles = ["input", "initial Gaussians", "refined Gaussians", "reconstruction"]
    assert [title for title, _ in glow] == [title for title, _ in ellipses] == titles
    assert {picture.size for _, picture in glow} == {(50, 20)}  # large pictures are reduced
    drawn = [np.asarray(picture) for _, picture in glow] + [np.asarray(ellipses[1][1])]
    assert all(not np.array_equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert "PSNR " in footer and "SSIM " in footer and "48 tokens" in footer
    assert footer in capsys.readouterr().out


def test_panel_as_a_file(model_folder, tmp_path):
    assert run("panel", photo(tmp_path / "photo.png"), "-o", tmp_path / "p.png", "--model", model_folder) == 0
    picture = Image.open(tmp_path / "p.png")
    assert picture.width > 4 * 256 and picture.height > 256


def test_doctor_tells_of_the_backends(capsys):
    assert run("doctor") == 0
    said = capsys.readouterr().out
    assert "splat_gaussians" in said and "partition_image" in said


def test_dtype_and_device(model_folder, tmp_path):
    options = ("-o", tmp_path / "t.safetensors", "--model", model_folder, "--device", "cpu")
    image = photo(tmp_path / "photo.png", 32, 32)
    assert run("encode", image, *options, "--dtype", "bfloat16") == 0
    assert GPSTokens.load(tmp_path / "t.safetensors").dtype == torch.bfloat16
    assert run("decode", tmp_path / "t.safetensors", "-o", tmp_path / "p.png", "--model", model_folder) == 0
    assert run("encode", image, *options) == 0
    assert GPSTokens.load(tmp_path / "t.safetensors").dtype == torch.float32
