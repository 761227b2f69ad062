"""Commands with models of a Hub of this machine: by short name, OWNER/NAME, and the download alone."""

from __future__ import annotations

import pickle
import shutil

import pytest
import torch
from command_runs import photo, save_tiny_model
from fresh_python import FreshPython
from golden_files import golden
from local_hub import LocalHub
from model_zoo import SMALL_CONFIG, noise_images
from pipeline_zoo import SMALL_GENERATOR, tiny_pipeline

from gpstoken_diffusers import GPSTokenPipeline, LayoutBank, partition_image


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = LocalHub(tmp_path_factory.mktemp("hub"))
    released = hub.root / "xtudbxk" / "GPSToken"
    released.mkdir(parents=True)
    for name in ("s64", "m128"):
        shutil.copy(golden("ae_small_weights.safetensors"), released / f"gpstoken_{name}.safetensors")
    save_tiny_model(hub.root / "someone" / "tokenizer")
    tiny_pipeline().save_pretrained(hub.root / "someone" / "pipeline")
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def python(hub, tmp_path_factory):
    python = FreshPython(tmp_path_factory.mktemp("home"), hub.address)
    yield python
    python.close()


@pytest.fixture
def run(python, hub):
    """Runs a command where the released presets have the sizes of the reference's small models; (code, said)."""
    hub.forget()

    def run(*argv: object) -> tuple[int, str]:
        code = f"""
import contextlib, io
from gpstoken_diffusers import cli
from gpstoken_diffusers.models import official_checkpoints as official
for name in ("s64", "m128"):
    official.PRESETS[name] = {SMALL_CONFIG!r}
official.GENERATOR_PRESETS["xl"].update({SMALL_GENERATOR!r})
said = io.StringIO()
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    result = cli.main({[str(argument) for argument in argv]!r})
result = result, said.getvalue()
"""
        return tuple(python(code))

    return run


def test_a_released_tokenizer_by_its_short_name(run, hub, tmp_path):
    image = photo(tmp_path / "photo.png", 64, 64)
    for count in range(2):
        code, said = run("encode", image, "-o", tmp_path / "t.safetensors", "--model", "m128")
        assert code == 0 and "64 tokens" in said
        assert hub.downloaded == ["gpstoken_m128.safetensors"], count  # at the first use
    code, said = run("decode", tmp_path / "t.safetensors", "-o", tmp_path / "p.png", "--model", "m128", "-q")
    assert (code, said) == (0, "")
    # What made the tokens is known by the name of its file, as where that file is given by its path.
    shutil.copy(golden("ae_small_weights.safetensors"), tmp_path / "gpstoken_m128.safetensors")
    path = tmp_path / "gpstoken_m128.safetensors"
    code, said = run("decode", tmp_path / "t.safetensors", "-o", tmp_path / "p.png", "--model", path)
    assert code == 0 and "was encoded by" not in said


def test_a_folder_of_the_same_name_is_taken(run, hub, tmp_path, monkeypatch):
    folder = save_tiny_model(tmp_path / "s64")
    image = photo(tmp_path / "photo.png")
    code, said = run("encode", image, "-o", tmp_path / "t.safetensors", "--model", folder)
    assert code == 0 and hub.downloaded == []


@pytest.mark.parametrize("name", ["someone/tokenizer", "someone/pipeline"])
def test_a_repository_of_the_hub(run, hub, tmp_path, name):
    code, said = run("encode", photo(tmp_path / "photo.png"), "-o", tmp_path / "t.safetensors", "--model", name)
    assert code == 0, said
    assert not any("transformer" in file for file in hub.downloaded), hub.downloaded


def test_generate_by_a_repository(run, tmp_path):
    code, said = run("generate", "--model", "someone/pipeline", "--label", "food", "-n", 1, "--steps", 1,
                     "-o", tmp_path / "g.png")  # fmt: skip
    assert code == 0, said
    assert (tmp_path / "g.png").is_file()


def test_download(run, hub):
    """One that is not there does not keep the others away."""
    code, said = run(
        "download", "s64", "someone/none/x.safetensors", "nonsense", "xtudbxk/GPSToken/gpstoken_m128.safetensors"
    )
    assert code == 1
    assert "s64: " in said and "gpstoken_m128.safetensors: " in said and f"{5_752_784:,} bytes" in said
    assert "no repository someone/none" in said and "no model nonsense" in said
    hub.forget()
    assert run("download", "s64", "-q") == (0, "") and hub.downloaded == []


@pytest.mark.parametrize(
    "command, message",
    [
        (["--model", "someone/none"], "no model at someone/none: there is no such folder here, nor on the Hub"),
        (["--model", "xtudbxk/GPSToken"], "holds no folder of save_pretrained"),
        (["--model", "models/x/none.safetensors"], "there is no such file here"),
        (["--model", "nowhere"], "no model at nowhere"),
        (["--model", "m128", "--preset", "l256"], "'l256' has 32 texture channels"),
    ],
)
def test_models_that_are_not_there(run, tmp_path, command, message):
    code, said = run("encode", photo(tmp_path / "photo.png"), "-o", tmp_path / "t.safetensors", *command)
    assert code == 1 and message in said and "Traceback" not in said


def test_generate_without_such_a_repository(run, tmp_path):
    code, said = run("generate", "--model", "someone/none", "-o", tmp_path / "g.png")
    assert code == 1 and "no pipeline at someone/none" in said


def test_convert_makes_a_pipeline_of_the_official_files(run, hub, tmp_path):
    layouts = partition_image(noise_images(2, 256, 256), 64).geometry
    content = {label: [layouts[label].numpy()] for label in range(2)}
    (tmp_path / "initg.pickle").write_bytes(pickle.dumps(content))
    generator, out = golden("sit_small_weights.safetensors"), tmp_path / "official"
    command = ("convert", generator, "--layouts", tmp_path / "initg.pickle", "-o", out)
    code, said = run(*command)
    assert code == 0 and "10 classes, 2 layouts" in said
    assert run(*command)[0] == 1
    assert run(*command, "--overwrite", "--autoencoder", "s64")[0] == 0
    pipe = GPSTokenPipeline.from_pretrained(out)
    assert torch.equal(pipe.layout_bank.layouts, layouts)
    assert pipe.config.sampling_defaults["num_inference_steps"] == 250
    code, said = run("generate", "--model", out, "--label", 1, "-n", 1, "--steps", 2, "-o", tmp_path / "g.png")
    assert code == 0, said
    (out / "transformer" / "thesis.tex").write_text("years of work")
    code, said = run(*command, "--overwrite")
    assert code == 1 and "thesis.tex" in said and (out / "transformer" / "thesis.tex").exists()
    code, said = run(*command[:-1], tmp_path / "other", "--preset", "m128")
    assert code == 1 and "--autoencoder" in said and not (tmp_path / "other").exists()


def test_plain_diffusers_opens_it(python, hub, tmp_path):
    """From a disk and from the Hub, with the layouts that go with it."""
    layouts = torch.tensor([[0.3, 0.3, 0.0, 0.1, -0.2]]).repeat(2, 6, 1)
    pipe = tiny_pipeline(
        layout_model=None, layout_bank=LayoutBank(layouts, [0, 2]), sampling_defaults={"num_inference_steps": 2}
    )
    pipe.save_pretrained(hub.root / "someone" / "banked")
    for load in ("trusted", "own"):
        for place in (str(hub.root / "someone" / "banked"), "someone/banked"):
            loaded = f"""
pipe = {load}(place)
pipe.set_progress_bar_config(disable=True)
output = pipe(2, output_type="tokens")
result = output.layout.tolist(), pipe.num_timesteps
"""
            assert python(loaded, place=place) == [layouts[:1].tolist(), 2]
