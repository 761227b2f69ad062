"""The command `gpstoken`: what each command writes, says and returns."""

from __future__ import annotations

import csv
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import golden
from model_zoo import SMALL_CONFIG, tiny_model
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor, GPSTokens, cli, convert
from gpstoken_diffusers.cli import arguments, codec, commands, conversion

COMMANDS = ("demo", "encode", "decode", "reconstruct", "panel", "convert", "doctor")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A tiny random model of 32-px tiles and 6 tokens, as a user would keep it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("map").save_pretrained(folder)
    GPSTokenImageProcessor(tile_size=32, num_tokens=6).save_pretrained(folder)
    return folder


def photo(path: Path, height: int = 40, width: int = 56, seed: int = 0) -> Path:
    """Write a picture with smooth and with busy places; 2 x 2 tiles unless said otherwise."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    noise = random.uniform(-1, 1, (height, width, 3)) * np.linspace(0, 90, height)[:, None, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((ramp + noise).clip(0, 255).astype(np.uint8)).save(path)
    return path


def run(*argv: object) -> int:
    return cli.main([str(argument) for argument in argv])


def tables(folder: Path) -> tuple[list[dict[str, str]], dict]:
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads((folder / "metrics.json").read_text())


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# Parser and exit codes


def test_help_loads_nothing_heavy():
    # Importing PyTorch alone takes seconds; this way the help answers in a fraction of one.
    code = (
        "import sys; from gpstoken_diffusers.cli import main; main(['--help']); main(['encode', '--help']);"
        "print(sorted({'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'tqdm'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[1]
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


def raising(error: BaseException):
    def function(*args, **kwargs):
        raise error

    return function


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


# reconstruct


def test_reconstruct_a_folder(model_folder, tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photo(photos / "a.png", seed=1)
    photo(photos / "a.jpg", 33, 31, seed=2)  # the same stem: the outputs must not collide
    photo(photos / "A.BMP", 9, 70, seed=3)  # too small for SSIM
    photo(photos / "deep" / "a.png", seed=4)
    (photos / "notes.txt").write_text("not a picture, and not named like one")
    (photos / "._a.jpg").write_bytes(b"what another system leaves behind")
    assert run("reconstruct", photos, "-o", out, "--model", model_folder) == 0
    assert names_in(out) == {"a.png.png", "a.jpg.png", "A.BMP.png", "metrics.csv", "metrics.json"}

    rows, document = tables(out)
    assert [row["file"] for row in rows] == ["A.BMP", "a.jpg", "a.png", "mean"]
    pictures = {row["file"]: row for row in document["pictures"]}
    for row in rows[:-1]:
        original = np.asarray(Image.open(photos / row["file"]).convert("RGB"))
        result = np.asarray(Image.open(out / f"{row['file']}.png"))
        assert original.shape == result.shape == (int(row["height"]), int(row["width"]), 3)
        # The figures are those of the 8-bit pictures; 1e-6: they pass through float32.
        assert float(row["psnr"]) == pytest.approx(peak_signal_noise_ratio(original, result), abs=1e-6)
        if row["file"] == "A.BMP":
            assert row["ssim"] == "" and pictures["A.BMP"]["ssim"] is None
        else:
            options = {
                "gaussian_weights": True,
                "sigma": 1.5,
                "use_sample_covariance": False,
                "channel_axis": -1,
            }
            expected = structural_similarity(original, result, **options)
            assert float(row["ssim"]) == pytest.approx(expected, abs=1e-6)
        assert pictures[row["file"]]["psnr"] == float(row["psnr"])
        assert float(row["seconds"]) > 0
    assert [int(row["tokens"]) for row in rows[:-1]] == [18, 12, 24]  # 6 for each of 3, 2 and 4 tiles
    mean = sum(float(row["psnr"]) for row in rows[:-1]) / 3
    assert float(rows[-1]["psnr"]) == document["mean"]["psnr"] == pytest.approx(mean)
    assert document["settings"]["model"] == "tiny" and document["settings"]["num_tokens"] == 6
    said = capsys.readouterr()
    assert "3 reconstructed" in said.out and f"PSNR {mean:.2f} dB" in said.out
    assert "3/3" in said.err  # the progress bar


def test_reconstruct_recursive_and_quiet(model_folder, tmp_path, capsys):
    photos = tmp_path / "photos"
    photo(photos / "a.png")
    photo(photos / "deep" / "er" / "a.png", seed=4)
    out = photos / "out"  # results below the pictures are not taken for pictures
    for _ in range(2):
        assert run("reconstruct", photos, "-o", out, "--recursive", "--model", model_folder, "--quiet") == 0
        assert names_in(out) == {"a.png.png", "deep/er/a.png.png", "metrics.csv", "metrics.json"}
    assert capsys.readouterr() == ("", "")


def test_reconstruct_files_one_by_one(model_folder, tmp_path):
    for name in ("a.png", "b.png"):
        assert run("reconstruct", photo(tmp_path / name), "-o", tmp_path / "out", "--model", model_folder) == 0
    rows, _ = tables(tmp_path / "out")
    assert [row["file"] for row in rows] == ["a.png", "b.png", "mean"]


def test_reconstruct_goes_on(model_folder, tmp_path, monkeypatch, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    for seed, name in enumerate(("a", "b", "c", "d")):
        photo(photos / f"{name}.png", 32, 32, seed=seed)
    encoded = []
    encode = codec.Codec.encode
    monkeypatch.setattr(
        codec.Codec,
        "encode",
        lambda self, path, *rest: encoded.append(path.name) or encode(self, path, *rest),
    )
    options = ("reconstruct", photos, "-o", out, "--model", model_folder)
    assert run(*options) == 0
    assert encoded == ["a.png", "b.png", "c.png", "d.png"]
    first = tables(out)

    encoded.clear()
    assert run(*options) == 0
    assert encoded == []
    assert tables(out) == first
    assert "0 reconstructed, 4 done before" in capsys.readouterr().out

    # One lost, one cut off, one whose source has changed, and one untouched; the tables are lost too.
    (out / "a.png.png").unlink()
    whole = (out / "b.png.png").read_bytes()
    (out / "b.png.png").write_bytes(whole[: len(whole) // 2])
    photo(photos / "c.png", 40, 40, seed=9)
    (out / "metrics.csv").unlink()
    (out / "metrics.json").unlink()
    untouched = (out / "d.png.png").stat().st_mtime_ns
    assert run(*options) == 0
    assert encoded == ["a.png", "b.png", "c.png"]
    assert (out / "d.png.png").stat().st_mtime_ns == untouched
    assert Image.open(out / "c.png.png").size == (40, 40)
    rows, _ = tables(out)
    unchanged = [0, 1, 3]
    assert [rows[i]["psnr"] for i in unchanged] == [first[0][i]["psnr"] for i in unchanged]

    # Results of other settings are not mixed with these, and not lost without a word.
    encoded.clear()
    for extra in (("--num-tokens", 4), ("--mode", "merge"), ("--dtype", "bfloat16")):
        assert run(*options, *extra) == 1
    assert "num_tokens 6 there, 4 now" in capsys.readouterr().err
    assert encoded == []
    assert run(*options, "--num-tokens", 4, "--overwrite") == 0
    assert encoded == ["a.png", "b.png", "c.png", "d.png"]
    assert {row["tokens"] for row in tables(out)[0][:-2]} == {"4", "16"}


def test_reconstruct_notices_other_weights(model_folder, tmp_path, capsys):
    other = tmp_path / model_folder.name  # the same name
    tiny_model("map", seed=1).save_pretrained(other)
    image = photo(tmp_path / "a.png")
    assert run("reconstruct", image, "-o", tmp_path / "out", "--model", model_folder) == 0
    assert run("reconstruct", image, "-o", tmp_path / "out", "--model", other) == 1
    assert "weights" in capsys.readouterr().err


def test_reconstruct_writes_valid_json_for_a_perfect_picture(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(codec.Codec, "decode", lambda *args: Image.open(tmp_path / "a.png"))
    photo(tmp_path / "a.png", 32, 32)
    assert run("reconstruct", tmp_path / "a.png", "-o", tmp_path / "out", "--model", model_folder) == 0
    rows, document = tables(tmp_path / "out")
    assert rows[0]["psnr"] == "inf" and document["pictures"][0]["psnr"] is None
    assert "Infinity" not in (tmp_path / "out" / "metrics.json").read_text()


# convert, and official files as --model


@pytest.fixture
def small_as_l256(monkeypatch, tmp_path) -> Path:
    """The reference's small autoencoder under the name of a released one, whose presets take its sizes."""
    for preset in convert.PRESETS:
        monkeypatch.setitem(convert.PRESETS, preset, SMALL_CONFIG)
    path = tmp_path / "gpstoken_l256.safetensors"
    path.symlink_to(golden("ae_small_weights.safetensors"))
    return path


def test_convert_writes_a_folder(small_as_l256, tmp_path, capsys):
    out = tmp_path / "new" / "l256"
    assert run("convert", small_as_l256, "-o", out) == 0
    said = capsys.readouterr()
    assert "gpstoken_l256.safetensors as the preset l256 (by the file's name" in said.err
    assert "parameters in float32" in said.out
    assert names_in(out) == {"config.json", "diffusion_pytorch_model.safetensors", "preprocessor_config.json"}
    assert [path.name for path in out.parent.iterdir()] == ["l256"]
    converted = AutoencoderGPSToken.from_pretrained(out).state_dict()
    original = AutoencoderGPSToken.from_single_file(small_as_l256).state_dict()
    assert converted.keys() == original.keys()
    assert all(torch.equal(converted[name], original[name]) for name in original)
    assert GPSTokenImageProcessor.from_pretrained(out).num_tokens == SMALL_CONFIG["num_tokens"]

    image = photo(tmp_path / "photo.png", 64, 64)
    for name, model in {"folder": out, "file": small_as_l256}.items():
        assert run("encode", image, "-o", tmp_path / f"{name}.safetensors", "--model", model) == 0
    tokens = [GPSTokens.load(tmp_path / f"{name}.safetensors").as_tensor() for name in ("folder", "file")]
    assert torch.equal(*tokens)


def test_convert_takes_preset_config_and_dtype(small_as_l256, tmp_path, capsys):
    assert run("convert", small_as_l256, "-o", tmp_path / "a", "--preset", "m128", "--dtype", "bfloat16") == 0
    assert "as the preset m128 (as asked for)" in capsys.readouterr().err
    assert AutoencoderGPSToken.from_pretrained(tmp_path / "a", dtype=torch.bfloat16).dtype == torch.bfloat16
    size = (tmp_path / "a" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 0.6 * small_as_l256.stat().st_size
    (tmp_path / "config.json").write_text(json.dumps({**SMALL_CONFIG, "num_tokens": 99}))
    assert run("convert", small_as_l256, "-o", tmp_path / "b", "--config", tmp_path / "config.json") == 0
    assert AutoencoderGPSToken.load_config(tmp_path / "b")["num_tokens"] == 99
    assert (
        run(
            "convert",
            small_as_l256,
            "-o",
            tmp_path / "c",
            "--config",
            tmp_path / "config.json",
            "--preset",
            "s64",
        )
        == 1
    )
    assert not (tmp_path / "c").exists()


def test_convert_overwrites_only_its_own_and_only_when_asked(small_as_l256, tmp_path, capsys):
    out = tmp_path / "l256"
    out.mkdir()  # an empty folder is as good as none
    assert run("convert", small_as_l256, "-o", out) == 0
    assert run("convert", small_as_l256, "-o", out, "--dtype", "float16") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run("convert", small_as_l256, "-o", out, "--dtype", "float16", "--overwrite") == 0
    assert AutoencoderGPSToken.from_pretrained(out, dtype=torch.float16).dtype == torch.float16
    (out / "thesis.tex").write_text("years of work")
    assert run("convert", small_as_l256, "-o", out, "--overwrite") == 1
    assert "thesis.tex" in capsys.readouterr().err
    assert (out / "thesis.tex").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"l256", small_as_l256.name}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_convert_that_fails_leaves_what_was_there(error, small_as_l256, tmp_path, monkeypatch):
    out = tmp_path / "l256"
    assert run("convert", small_as_l256, "-o", out) == 0
    before = {name: (out / name).read_bytes() for name in names_in(out)}
    monkeypatch.setattr(conversion.GPSTokenImageProcessor, "save_pretrained", raising(error))
    options = ("--dtype", "float16", "--overwrite")
    assert run("convert", small_as_l256, "-o", out, *options) == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert run("convert", small_as_l256, "-o", tmp_path / "new") != 0
    assert {name: (out / name).read_bytes() for name in names_in(out)} == before
    assert {path.name for path in tmp_path.iterdir()} == {"l256", small_as_l256.name}


def test_convert_that_cannot_take_its_place_puts_the_old_folder_back(small_as_l256, tmp_path, monkeypatch):
    out = tmp_path / "l256"
    assert run("convert", small_as_l256, "-o", out) == 0
    before = {name: (out / name).read_bytes() for name in names_in(out)}
    rename = Path.rename

    def fail_for_new_folders(self, target):
        if self.name.endswith(".tmp"):
            raise OSError(13, "Permission denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new_folders)
    assert run("convert", small_as_l256, "-o", out, "--dtype", "float16", "--overwrite") == 1
    assert {name: (out / name).read_bytes() for name in names_in(out)} == before
    assert {path.name for path in tmp_path.iterdir()} == {"l256", small_as_l256.name}
