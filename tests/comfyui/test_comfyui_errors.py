"""Bad input on a real server: a clear message in the page's error box, and the server alive after it."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from comfyui.comfyui_client import ExecutionFailed, PromptRefused
from comfyui.make_example_workflows import MINI, box_mask, node
from gpstoken_diffusers import GPSTokens

DUCK = {
    "model": node("LoadGPSToken", model_name=MINI),
    "image": node("GPSExampleImage", picture="duck"),
    "encoded": node("GPSEncode", model=("model", 0), image=("image", 0), num_tokens=64),
}
TEXTURE = {"label": "Food", "seed": 1, "steps": 2, "sampler": "euler", "guidance": 3.0}


@pytest.fixture(scope="module", autouse=True)
def server(comfyui_clone):
    """The server; each test ends with a workflow that it must still run."""
    return comfyui_clone


@pytest.fixture(autouse=True)
def alive(server):
    yield
    assert server.run(shown(DUCK, ("encoded", 0)))["outcome"] == "success"


def shown(workflow: dict, tokens: tuple[str, int]) -> dict:
    """The workflow with a picture of tokens at its end."""
    return workflow | {
        "drawn": node("GPSVisualize", tokens=tokens, style="ellipses"),
        "picture": node("PreviewImage", images=("drawn", 0)),
    }


def texture(**changes) -> dict:
    return {"made": node("GPSTextureGenerate", model=("model", 0), layout=("encoded", 1), **TEXTURE | changes)}


def edit(**inputs) -> dict:
    return {"made": node("GPSEditTokens", tokens=("encoded", 0), **inputs)}


def encode_with(mask: dict) -> dict:
    return mask | {
        "made": node("GPSEncode", model=("model", 0), image=("image", 0), num_tokens=64, importance=("mask", 0))
    }


def in_mask(width: int, height: int, **changes) -> dict:
    return box_mask(width, height, (0, 0, 16, 16)) | texture(tokens=("encoded", 0), mask=("mask", 0), **changes)


OTHER_SIZE = {
    "large": node("ImageScale", image=("image", 0), upscale_method="area", width=320, height=256, crop="disabled"),
    "other": node("GPSEncode", model=("model", 0), image=("large", 0), num_tokens=64),
}
FEWER = {"fewer": node("GPSEncode", model=("model", 0), image=("image", 0), num_tokens=32)}

EDITS_OF_SEVEN = '{"version": 1, "num_tokens": 7, "changed": {}, "deleted": [3], "added": []}'

FAILURES = {
    "unknown label": (texture(label="Foood"), r"no class 'Foood'.*Did you mean 'Food & Drink'"),
    "label out of range": (texture(label="9000"), r"run from 0 to 8"),
    "unknown sampler": (texture(sampler="magic"), r"sampler"),
    "guidance interval reversed": (
        texture(guidance_start=0.8, guidance_end=0.2),
        r"guidance_interval .*\(first, last\) with 0 <= first <= last <= 1",
    ),
    "denoise without tokens": (texture(denoise=0.5), r"denoise is 0.5, but no tokens to start from"),
    "mask without tokens": (
        box_mask(256, 256, (0, 0, 16, 16)) | texture(mask=("mask", 0)),
        r"a mask is connected, but no tokens",
    ),
    "mask of another size": (in_mask(64, 48), r"mask has 64 x 48 pixels, the picture 256 x 256"),
    "importance of another size": (
        encode_with(box_mask(64, 64, (0, 0, 8, 8))),
        r"mask has 64 x 64 pixels.*mask editor",
    ),
    "empty mask": (
        {"mask": node("SolidMask", value=0.0, width=256, height=256)}
        | texture(tokens=("encoded", 0), mask=("mask", 0)),
        r"mask is empty, or reaches no token",
    ),
    "tokens and layout differ": (
        FEWER | texture(tokens=("fewer", 0)),
        r"tokens and their layout differ in num_tokens: 32 and 64",
    ),
    "nothing selected": (edit(action="move", smallest_px=900.0), r"No token is selected"),
    "pictures of two sizes": (
        OTHER_SIZE
        | box_mask(256, 256, (0, 0, 16, 16))
        | {"made": node("GPSMergeTokens", outside=("encoded", 0), inside=("other", 0), mask=("mask", 0))},
        r"two pictures differ in num_tokens|two pictures differ in image_size|differ in",
    ),
    "matching other counts": (
        FEWER | {"made": node("GPSSwapTexture", geometry=("encoded", 0), texture=("fewer", 0))},
        r"differ in num_tokens: 64 and 32",
    ),
    "a box that is none": (
        {"made": node("GPSLayoutFromBoxes", model=("model", 0), boxes="1, 2, three, 4", num_tokens=16)},
        r"Line 1 of boxes reads '1, 2, three, 4'",
    ),
    "a box outside": (
        {"made": node("GPSLayoutFromBoxes", model=("model", 0), boxes="250, 0, 64, 10", num_tokens=16)},
        r"box 0 is",
    ),
    "no box": ({"made": node("GPSLayoutFromBoxes", model=("model", 0), boxes=" ", num_tokens=16)}, r"no box"),
    "impossible edits": (
        {"made": node("GPSLayoutEditor", tokens=("encoded", 0), edits=EDITS_OF_SEVEN)},
        r"edits were made for 7 tokens, these are 64",
    ),
    "damaged edits": ({"made": node("GPSLayoutEditor", tokens=("encoded", 0), edits="{")}, r"Reset"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_node_says_what_is_wrong(server, name):
    change, message = FAILURES[name]
    with pytest.raises(ExecutionFailed) as caught:
        server.run(shown(DUCK | change, ("made", 0)))
    assert caught.value.node_id == "made"
    assert re.search(message, caught.value.exception_message, re.DOTALL), caught.value.exception_message
    assert caught.value.exception_type in ("ValueError", "TypeError")


def test_more_tokens_than_a_tile_has_regions(server):
    inputs = {"model": ("model", 0), "image": ("image", 0)}
    server.run(shown(DUCK | {"made": node("GPSEncode", **inputs, num_tokens=1024)}, ("made", 0)))
    with pytest.raises(PromptRefused, match="bigger than max"):
        server.queue(shown(DUCK | {"made": node("GPSEncode", **inputs, num_tokens=1025)}, ("made", 0)))


def test_a_batch_that_does_not_fit(server):
    workflow = DUCK | {
        "two": node("RepeatImageBatch", image=("image", 0), amount=2),
        "pair": node("GPSEncode", model=("model", 0), image=("two", 0), num_tokens=64),
    }
    workflow |= texture(tokens=("pair", 0))
    with pytest.raises(ExecutionFailed, match="tokens and their layout differ in batch_size: 2 and 1"):
        server.run(shown(workflow, ("made", 0)))


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["../../stolen", "/tmp/stolen", "a/../../../stolen", "", ".", "a/../.."])
def test_saving_stays_in_the_output_folder(server, name):
    workflow = DUCK | {"made": node("SaveGPSTokens", tokens=("encoded", 0), filename_prefix=name)}
    before = sorted(Path(server.base).rglob("*.safetensors"))
    with pytest.raises(ExecutionFailed, match="leads out of ComfyUI's output folder"):
        server.run(workflow)
    assert sorted(Path(server.base).rglob("*.safetensors")) == before
    assert not list(Path(server.base).parent.glob("stolen*")) and not list(Path("/tmp").glob("stolen*"))


def test_tokens_travel_through_a_file(server):
    workflow = DUCK | {"made": node("SaveGPSTokens", tokens=("encoded", 0), filename_prefix="ducks/duck")}
    pictures = server.images(server.run(workflow))["made"]
    assert [one.size for one in pictures] == [(256, 256)]
    (file,) = (Path(server.base) / "output" / "ducks").glob("duck_*.safetensors")
    assert GPSTokens.load(file).num_tokens == 64
    loaded = {"loaded": node("LoadGPSTokens", file=f"ducks/{file.name} [output]")}
    first = server.images(server.run(shown(DUCK, ("encoded", 0))))["picture"][0]
    again = server.images(server.run(shown(loaded, ("loaded", 0))))["picture"][0]
    assert first.tobytes() == again.tobytes()
    # A second file beside it; the first stays.
    workflow["encoded"]["inputs"]["num_tokens"] = 48
    server.run(workflow)
    assert len(list(file.parent.iterdir())) == 2 and GPSTokens.load(file).num_tokens == 64
    workflow["encoded"]["inputs"]["num_tokens"] = 64


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"tokens": [1, 2, 3]}))


BAD_FILES = {
    "other.safetensors": (
        lambda path: save_file({"weight": torch.zeros(2)}, path),
        "a safetensors file, but not of tokens",
    ),
    "empty.safetensors": (lambda path: path.write_bytes(b""), "the file is empty"),
    "pickle.safetensors": (write_pickle, "a Python pickle"),
    "noise.safetensors": (lambda path: path.write_bytes(bytes(range(256)) * 4), "not a safetensors file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_of_another_kind(server, name):
    write, message = BAD_FILES[name]
    path = Path(server.base) / "input" / name
    write(path)
    try:
        with pytest.raises(ExecutionFailed, match=message):
            server.run(shown({"loaded": node("LoadGPSTokens", file=name)}, ("loaded", 0)))
    finally:
        path.unlink()


@pytest.mark.parametrize("name", ["../c.db", "nothing.safetensors", "/etc/passwd", "../output/x.safetensors"])
def test_only_listed_files_are_read(server, name):
    with pytest.raises(PromptRefused, match="There is no tokens file"):
        server.queue(shown({"loaded": node("LoadGPSTokens", file=name)}, ("loaded", 0)))


# ---------------------------------------------------------------------- models


@pytest.mark.parametrize("name", ["nothing", "../../../etc", "/etc/passwd", ""])
def test_only_listed_models_are_loaded(server, name):
    workflow = DUCK | {"model": node("LoadGPSToken", model_name=name)}
    with pytest.raises(PromptRefused, match="There is no model"):
        server.queue(shown(workflow, ("encoded", 0)))


def test_models_of_another_kind(server):
    folder = Path(server.base) / "models" / "gpstoken"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evil.safetensors").write_bytes(pickle.dumps(print))
    save_file({"weight": torch.zeros(2)}, folder / "other.safetensors")
    assert {"evil.safetensors", "other.safetensors"} <= set(
        server.object_info("LoadGPSToken")["LoadGPSToken"]["input"]["required"]["model_name"][1]["options"]
    )
    try:
        for name, message in (("evil.safetensors", "pickle"), ("other.safetensors", "weight")):
            workflow = DUCK | {"model": node("LoadGPSToken", model_name=name)}
            with pytest.raises(ExecutionFailed, match=message):
                server.run(shown(workflow, ("encoded", 0)))
    finally:
        for path in folder.iterdir():
            path.unlink()


def test_a_tokenizer_alone_encodes_and_says_that_it_cannot_generate(server):
    from gpstoken_diffusers import AutoencoderGPSToken
    from gpstoken_diffusers.assets import MINI as MINI_TOKENIZER

    folder = Path(server.base) / "models" / "gpstoken" / "tokenizer"
    AutoencoderGPSToken.from_pretrained(MINI_TOKENIZER).save_pretrained(folder)
    workflow = DUCK | {"model": node("LoadGPSToken", model_name="tokenizer")}
    assert server.run(shown(workflow, ("encoded", 0)))["outcome"] == "success"
    with pytest.raises(ExecutionFailed, match="tokenizer has no transformer: it cannot generate"):
        server.run(shown(workflow | texture(), ("made", 0)))
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
