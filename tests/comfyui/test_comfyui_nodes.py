"""The nodes inside ComfyUI's own modules, without a server: names from other nodes, launch flags, progress, memory."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import make_dataclass
from types import SimpleNamespace

import pytest
import torch
from local_hub import LocalHub, write_released

from gpstoken_diffusers import GPSTokenImageProcessor
from gpstoken_diffusers.models.hub_files import RELEASES
from gpstoken_diffusers.schedulers.presets import SAMPLER_PRESETS

SHIPPED = "gpstoken-mini (shipped)"


@pytest.fixture
def here(comfyui_here, tmp_path, monkeypatch):
    """ComfyUI's modules and our nodes by name, with folders of their own."""
    import comfy.cli_args
    import comfy.model_management
    import comfy.utils
    import folder_paths
    import nodes
    from comfy_api.v0_0_2 import io
    from gpstoken_diffusers.comfyui_nodes import extension, models

    for name in ("input", "output", "temp", "models"):
        (tmp_path / name).mkdir()
    for name in ("input", "output", "temp"):
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, models.FOLDER, ([str(tmp_path / "models")], set()))
    ours = {node.__name__: node for node in extension.NODES}
    for name, node in ours.items():
        node.GET_SCHEMA()
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
    yield SimpleNamespace(
        args=comfy.cli_args.args, memory=comfy.model_management, utils=comfy.utils, nodes=nodes, io=io, models=models,
        folder=tmp_path, **ours,
    )  # fmt: skip
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)


@pytest.fixture
def mini(here):
    return here.models.GPSModel.load(SHIPPED, "float32")


def run(node, **inputs):
    """What a node gives, as ComfyUI calls it."""
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE({}).execute(**inputs)


def picture(height, width, seed=0):
    """IMAGE: smooth noise, with much and little to see."""
    noise = torch.rand(1, 3, height // 16, width // 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bilinear").movedim(1, -1)


def tokens_file(path, seed=0):
    GPSTokenImageProcessor().layout(picture(256, 256, seed).movedim(-1, 1), num_tokens=16).save(path)


# ---- names that another node gives ----


class AnyName:
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("COMBO",), "give", "tests"


def validated(prompt: dict, node: str) -> tuple:
    """In a thread of its own, as the one that drives a page has a running loop."""
    import execution

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, execution.validate_inputs("prompt", prompt, node, {})).result()


@pytest.mark.parametrize("kind, name", [("LoadGPSToken", "model_name"), ("LoadGPSTokens", "file")])
def test_a_name_may_come_from_another_node(here, monkeypatch, kind, name):
    monkeypatch.setitem(here.nodes.NODE_CLASS_MAPPINGS, "any name", AnyName)
    inputs = {"dtype": "auto"} if kind == "LoadGPSToken" else {}
    prompt = {"1": {"class_type": "any name", "inputs": {}}, "2": {"class_type": kind, "inputs": inputs}}
    prompt["2"]["inputs"][name] = ["1", 0]
    valid, errors, _ = validated(prompt, "2")
    assert valid, errors
    prompt["2"]["inputs"][name] = "no such"
    valid, errors, _ = validated(prompt, "2")
    assert not valid and "no such" in str(errors)


def test_a_name_from_another_node_is_looked_up_when_it_is_there(here):
    tokens_file(here.folder / "input" / "a.safetensors")
    before = here.LoadGPSTokens.fingerprint_inputs(file=None)
    assert run(here.LoadGPSTokens, file="a.safetensors").args[0].num_tokens == 16
    tokens_file(here.folder / "input" / "b.safetensors", seed=1)
    assert here.LoadGPSTokens.fingerprint_inputs(file=None) != before  # whichever it is, it may have changed
    with pytest.raises(ValueError, match=r"no tokens file 'c.safetensors'"):
        run(here.LoadGPSTokens, file="c.safetensors")
    before = here.LoadGPSToken.fingerprint_inputs(model_name=None, dtype=None)
    assert before == here.LoadGPSToken.fingerprint_inputs(model_name=None, dtype=None)
    (here.folder / "models" / "x.safetensors").write_bytes(b"x")
    assert here.LoadGPSToken.fingerprint_inputs(model_name=None, dtype=None) != before
    with pytest.raises(ValueError, match="There is no model 'y'"):
        run(here.LoadGPSToken, model_name="y")


# ---- lists of files ----


def write_model(folder, name="model_index.json"):
    folder.mkdir(parents=True)
    (folder / name).write_text("{}")
    (folder / "part.safetensors").touch()


def test_models_behind_links_and_in_every_root_are_listed(here, monkeypatch):
    first, second, elsewhere = (here.folder / name for name in ("models", "second", "elsewhere"))
    write_model(first / "own")
    write_model(first / "own" / "autoencoder", "config.json")  # a part of it
    write_model(elsewhere / "linked")
    write_model(elsewhere / "deep" / "tokenizer", "config.json")
    write_model(second / "other", "config.json")
    (elsewhere / "single.safetensors").touch()
    (first / "linked").symlink_to(elsewhere / "linked")
    (first / "all").symlink_to(elsewhere / "deep")
    (first / "single.safetensors").symlink_to(elsewhere / "single.safetensors")
    for loop in ("loop", "again"):  # walked by their links, each would double the work of the other
        (first / "own" / loop).symlink_to(first)
    (first / "nowhere").symlink_to(first / "gone")
    roots = ([str(first), str(second), str(here.folder / "not there")], set())
    monkeypatch.setitem(here.models.folder_paths.folder_names_and_paths, here.models.FOLDER, roots)
    started = time.monotonic()
    names = [name for name in here.models.list_models()[1:] if name not in here.models.RELEASED]
    assert names == ["all/tokenizer", "linked", "other", "own", "single.safetensors"]
    assert time.monotonic() - started < 5
    assert here.models.find_model("other") == second / "other"
    assert here.models.find_model("all\\tokenizer") == first / "all" / "tokenizer"  # saved on Windows
    before = here.LoadGPSToken.fingerprint_inputs(model_name="linked")
    (elsewhere / "linked" / "part.safetensors").write_bytes(b"new")
    assert here.LoadGPSToken.fingerprint_inputs(model_name="linked") != before


def test_folders_are_searched_again_only_where_something_changed(here, monkeypatch):
    searched = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: searched.append(str(path)) or scandir(path))
    output, below = here.folder / "output", here.folder / "output" / "a" / "b"
    below.mkdir(parents=True)
    tokens_file(below / "x.safetensors")
    for folder in (here.folder / "input", output, output / "a", below):
        os.utime(folder, (1e9, 1e9))  # long ago
    for _ in range(3):
        schema = here.LoadGPSTokens.INPUT_TYPES()
        assert here.LoadGPSTokens.validate_inputs(file="a/b/x.safetensors [output]") is True
        here.LoadGPSTokens.fingerprint_inputs(file="a/b/x.safetensors [output]")
        run(here.LoadGPSTokens, file="a/b/x.safetensors [output]")
    assert schema["required"]["file"][1]["options"] == ["a/b/x.safetensors [output]"]
    assert len(searched) == 4
    # A new file, a new folder, and one that is gone are seen at once, however quickly they follow each other.
    names = lambda: here.LoadGPSTokens.INPUT_TYPES()["required"]["file"][1]["options"]  # noqa: E731
    for number in range(5):
        (below / f"{number}.safetensors").touch()
        assert f"a/b/{number}.safetensors [output]" in names()
    (output / "c").mkdir()
    assert len(names()) == 6
    (output / "c" / "y.safetensors").touch()
    assert "c/y.safetensors [output]" in names()
    (below / "x.safetensors").unlink()
    assert "a/b/x.safetensors [output]" not in names()


# ---- what ComfyUI was started with ----

FLAGS = {
    "fp8_e4m3fn_unet": torch.bfloat16,
    "fp8_e5m2_unet": torch.bfloat16,
    "fp8_e8m0fnu_unet": torch.bfloat16,
    "fp64_unet": torch.float32,
    "fp32_unet": torch.float32,
    "bf16_unet": torch.bfloat16,
    "fp16_unet": torch.float16,
}


@pytest.mark.parametrize("flag", FLAGS)
def test_auto_takes_the_nearest_precision_that_networks_compute_in(here, monkeypatch, caplog, flag):
    monkeypatch.setattr(here.args, flag, True)
    here.models._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = [here.models.GPSModel.load(SHIPPED, "auto") for _ in range(2)]
    assert {model.patcher.model.network.dtype for model in found} == {FLAGS[flag]}
    said = [record.message for record in caplog.records if "cannot compute" in record.message]
    assert len(said) == (flag[:3] == "fp8" or flag == "fp64_unet")
    if FLAGS[flag] is torch.float16:  # takes seconds on a CPU, and no user would ask for it there
        return
    tokens = run(here.GPSEncode, model=found[0], image=picture(64, 64), num_tokens=16).args[0]
    assert run(here.GPSDecode, model=found[0], tokens=tokens).args[0].isfinite().all()


@pytest.mark.parametrize("state", ["NO_VRAM", "LOW_VRAM", "NORMAL_VRAM", "HIGH_VRAM"])
def test_networks_are_loaded_whole_or_not_at_all(here, monkeypatch, state):
    device = torch.device("meta")  # weights can go there
    monkeypatch.setattr(here.memory, "get_torch_device", lambda: device)
    monkeypatch.setattr(here.memory, "vram_state", here.memory.VRAMState[state])
    monkeypatch.setattr(
        here.memory, "get_free_memory", lambda given, torch_free_too=False: (1e12, 1e12) if torch_free_too else 1e12
    )
    monkeypatch.setattr(here.memory, "current_loaded_models", [])
    model = here.models.GPSModel.load(SHIPPED, "float32")
    network = model.autoencoder()
    assert {weight.device for weight in network.parameters()} == {device}
    # A part of it cannot be taken away; ComfyUI then takes all.
    assert model.patcher.partially_unload(torch.device("cpu"), 1000) == 0
    assert {weight.device for weight in network.parameters()} == {device}


# ---- progress, Cancel, previews ----


def listen(here, then=None) -> list:
    """(done, total, preview) of each report from now on."""
    reports = []

    def hook(value, total, preview, node_id=None):
        reports.append((value, total, preview))
        if then:
            then()

    here.utils.set_progress_bar_global_hook(hook)
    return reports


def codec_runs(here, mini, height=700, width=760):
    """Encode and Decode of a picture of nine tiles."""
    tokens = run(here.GPSEncode, model=mini, image=picture(height, width), num_tokens=32).args[0]
    return {
        "encode": lambda: run(here.GPSEncode, model=mini, image=picture(height, width), num_tokens=32),
        "decode": lambda: run(here.GPSDecode, model=mini, tokens=tokens),
    }


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_progress_and_cancel_of_a_large_picture(here, mini, what):
    again = codec_runs(here, mini)[what]
    reports = listen(here)
    again()
    shares = [value / total for value, total, _ in reports]
    assert len(shares) >= 3 and shares == sorted(shares) and 0 < shares[0] < 0.6 and shares[-1] == 1
    reports = listen(here, then=here.memory.interrupt_current_processing)
    with pytest.raises(here.memory.InterruptProcessingException):
        again()
    assert len(reports) == 1  # after the first piece, not at the end
    listen(here)
    again()  # and nothing is left behind


def test_cancel_does_not_wait_for_a_tile(here, mini):
    autoencoder = mini.patcher.model.network
    begun = []
    last = list(autoencoder.refiner.modules())[-1]
    hook = next(iter(autoencoder.stem.children())).register_forward_hook(
        lambda *given: here.memory.interrupt_current_processing()
    )
    late = last.register_forward_hook(lambda *given: begun.append(1))
    with pytest.raises(here.memory.InterruptProcessingException):
        run(here.GPSEncode, model=mini, image=picture(256, 256), num_tokens=16)
    hook.remove(), late.remove()
    assert not begun


def texture(here, mini):
    layout = mini.processor.layout(picture(256, 256).movedim(-1, 1), num_tokens=16)
    inputs = {"label": "Food", "seed": 1, "steps": 3, "sampler": "euler", "guidance": 1.0}
    return run(here.GPSTextureGenerate, model=mini, layout=layout, **inputs)


@pytest.mark.parametrize("method, shown", [("none", False), ("auto", True), ("taesd", True)])
def test_previews_follow_comfyuis_settings(here, mini, monkeypatch, method, shown):
    from comfy.cli_args import LatentPreviewMethod

    monkeypatch.setattr(here.args, "preview_method", LatentPreviewMethod(method))
    monkeypatch.setattr(here.args, "preview_size", 96)
    reports = listen(here)
    texture(here, mini)
    previews = [preview for *_, preview in reports if preview is not None]
    assert bool(previews) is shown and len(reports) == 3
    assert all(preview[0] == "JPEG" and preview[2] == 96 for preview in previews)


# ---- memory ----


def test_the_cache_of_results_sees_the_model(here, mini, caplog):
    from comfy.model_patcher import ModelPatcher

    weights = sum(weight.nbytes for patcher in mini.get_models() for weight in patcher.model.parameters())
    assert weights <= mini.get_ram_usage() < 1.1 * weights
    assert isinstance(mini.patcher, ModelPatcher) and mini.patcher in mini.get_models()
    here.memory.unload_all_models()
    with caplog.at_level(logging.INFO):
        mini.autoencoder()
    assert "Requested to load AutoencoderGPSToken" in caplog.text and "_Box" not in caplog.text


def test_preview_any_shows_what_travels_along_the_wires(here, mini):
    from comfy_extras.nodes_preview_any import PreviewAny

    tokens, layout = run(here.GPSEncode, model=mini, image=picture(64, 64), num_tokens=16).args
    for value, words in ((mini, (SHIPPED, "transformer", "float32")), (tokens, ("16",)), (layout, ("16",))):
        (text,) = PreviewAny().main(value)["ui"]["text"]
        assert all(word in text for word in words) and " at 0x" not in text


def test_a_memory_budget_is_kept_to_and_changes_nothing_else(here, mini):
    image = picture(300, 520)
    tokens = run(here.GPSEncode, model=mini, image=image, num_tokens=32).args[0]
    small = run(here.GPSEncode, model=mini, image=image, num_tokens=32, memory_gb=0.1).args[0]
    # Sums in another order: rounding.
    torch.testing.assert_close(small.geometry, tokens.geometry, rtol=1e-3, atol=1e-4)
    whole = run(here.GPSDecode, model=mini, tokens=tokens).args[0]
    torch.testing.assert_close(
        run(here.GPSDecode, model=mini, tokens=tokens, memory_gb=0.1).args[0], whole, rtol=0, atol=2e-3
    )
    for node, inputs in ((here.GPSEncode, {"image": image, "num_tokens": 32}), (here.GPSDecode, {"tokens": tokens})):
        with pytest.raises(ValueError, match=r"memory budget of .* is too small for .*: it takes at least [\d.]+ MB"):
            run(node, model=mini, memory_gb=0.001, **inputs)


def test_the_budget_follows_the_memory_that_is_free(here, mini, monkeypatch):
    network = mini.patcher.model.network
    for free, limited in ((1e12, False), (2e8, True), (0, True)):
        monkeypatch.setattr(here.memory, "get_free_memory", lambda *given, free=free, **options: free)
        with mini.at_work():
            budget = network.memory_budget
        assert (budget is not None) is limited and network.memory_budget is None
        run(here.GPSEncode, model=mini, image=picture(300, 300), num_tokens=32)  # however little: as much as it needs
    assert budget < 2e8


# ---- inputs and outputs ----


def test_encode_says_what_came_out(here, mini):
    output = run(here.GPSEncode, model=mini, image=picture(256, 512).repeat(2, 1, 1, 1), num_tokens=32)
    tokens = output.args[0]
    size = (tokens.geometry.nbytes + tokens.texture.nbytes) / 1000
    assert output.ui.as_dict()["text"] == (f"2 pictures of 64 tokens, {size:.0f} kB",)
    tokens.save(here.folder / "file")
    assert (here.folder / "file").stat().st_size == pytest.approx(size * 1000, abs=1000)  # a file has a header


def test_the_mask_of_a_picture_without_transparency_is_no_mask(here, mini):
    empty = torch.zeros(1, 64, 64)
    image = picture(256, 256)
    plain, layout = run(here.GPSEncode, model=mini, image=image, num_tokens=16).args
    masked = run(here.GPSEncode, model=mini, image=image, num_tokens=16, importance=empty).args[0]
    assert torch.equal(masked.geometry, plain.geometry)
    alone = run(here.GPSLayoutFromImage, model=mini, image=image, num_tokens=16, importance=empty).args[0]
    assert torch.equal(alone.geometry, layout.geometry)
    moved = run(here.GPSEditTokens, tokens=plain, action="move", mask=empty, dx=8.0).args[0]
    assert torch.equal(moved.geometry, run(here.GPSEditTokens, tokens=plain, action="move", dx=8.0).args[0].geometry)
    inputs = {"label": "", "seed": 1, "steps": 1, "sampler": "euler", "guidance": 1.0, "layout": layout}
    made, anew = (
        run(here.GPSTextureGenerate, model=mini, tokens=plain, denoise=0.5, mask=mask, **inputs).args[0]
        for mask in (empty, None)
    )
    assert torch.equal(made.texture, anew.texture)
    # A mask that shows something, or is of another size, is one.
    for mask in (empty + 1, torch.zeros(1, 32, 64)):
        with pytest.raises(ValueError, match="a mask must have the picture's size"):
            run(here.GPSEncode, model=mini, image=image, num_tokens=16, importance=mask)


def test_dates_in_names_of_files(here, monkeypatch):
    from gpstoken_diffusers.comfyui_nodes import nodes_files

    monkeypatch.setattr(time, "localtime", lambda *given: time.struct_time((2026, 3, 4, 5, 6, 7, 2, 63, 0)))
    for name, expected in {
        "%date:yyyy-MM-dd%/a": "2026-03-04/a_00001_.safetensors",
        "a%date:yy-M-d_hh.mm.ss%": "a26-3-4_05.06.07_00001_.safetensors",
        "%date:h m s%": "5 6 7_00001_.safetensors",
        "%year%%date:MM%": "202603_00001_.safetensors",
    }.items():
        assert nodes_files.save_path(name).relative_to(here.folder / "output").as_posix() == expected
    with pytest.raises(ValueError, match="leads out"):
        nodes_files.save_path("%date:../..%/a")


UNLISTED = ["../input/a", "/a", "b/../a", "./a", "b//a", "c"]


@pytest.mark.parametrize(
    "name",
    [*(f"{name}.safetensors" for name in UNLISTED), "a.safetensors/", "a.json", "", "b", "a.safetensors [output]"],
)
def test_only_names_of_the_list_are_found(here, name):
    from gpstoken_diffusers.comfyui_nodes import nodes_files

    (here.folder / "input" / "b").mkdir()
    for path in ("a.safetensors", "b/a.safetensors", "a.json"):
        (here.folder / "input" / path).touch()
    assert nodes_files.find_file("b/a.safetensors") == here.folder / "input" / "b" / "a.safetensors"
    with pytest.raises(ValueError, match="no tokens file"):
        nodes_files.find_file(name)


def test_menus_and_limits(here):
    inputs = {one.id: one for one in here.GPSTextureGenerate.define_schema().inputs}
    assert set(inputs["sampler"].options) == set(SAMPLER_PRESETS)
    for node in (here.GPSEncode, here.GPSLayoutFromImage, here.GPSLayoutFromMask, here.GPSLayoutFromBoxes):
        (count,) = (one for one in node.define_schema().inputs if one.id == "num_tokens")
        assert count.max == 1024


def test_newer_versions_find_the_nodes_by_other_words(here, monkeypatch):
    from gpstoken_diffusers.comfyui_nodes import extension

    assert not any(hasattr(node.define_schema(), "search_aliases") for node in extension.NODES)  # 0.3.75 has none
    fields = [("search_aliases", list, None), ("has_intermediate_output", bool, False)]
    newer = make_dataclass("Schema", fields, bases=(here.io.Schema,))
    monkeypatch.setattr(here.io, "Schema", newer)
    assert here.GPSLayoutEditor.define_schema().has_intermediate_output  # shown again after a page was opened anew
    words = {node.__name__: node.define_schema().search_aliases for node in extension.NODES}
    assert all({"gaussian", "splat", "tokenizer"} <= set(found) for found in words.values())
    assert {name for name, found in words.items() if "vae" in found} == {"LoadGPSToken", "GPSEncode", "GPSDecode"}


# ---- released tokenizers ----


@pytest.fixture
def hub(here, tmp_path, monkeypatch):
    hub = LocalHub(tmp_path / "hub")
    folder = hub.root / "xtudbxk" / "GPSToken"
    folder.mkdir(parents=True)
    write_released(folder / "gpstoken_s64.safetensors", "s64")
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield hub
    hub.close()


def test_released_tokenizers_are_offered_and_downloaded_when_first_used(here, hub):
    from gpstoken_diffusers.comfyui_nodes import downloads

    assert {f"gpstoken_{preset}.safetensors" for preset in RELEASES} == downloads.RELEASED.keys()
    assert set(downloads.RELEASED) < set(here.models.list_models())
    name, folder = "gpstoken_s64.safetensors", here.folder / "models"
    before = here.LoadGPSToken.fingerprint_inputs(model_name=name)
    assert here.LoadGPSToken.validate_inputs(model_name=name) is True
    # Cancel ends it within a moment, and leaves no file that looks whole.
    listen(here, then=here.memory.interrupt_current_processing)
    with pytest.raises(here.memory.InterruptProcessingException):
        run(here.LoadGPSToken, model_name=name)
    assert not (folder / name).exists()
    reports = listen(here)
    model = run(here.LoadGPSToken, model_name=name, dtype="bfloat16").args[0]
    assert model.patcher.model.network.config.sample_size == 256 and name in str(model)
    assert [path.name for path in folder.iterdir()] == [name]
    shares = [value / total for value, total, _ in reports]
    assert shares == sorted(shares)
    assert (
        here.models.list_models().count(name) == 1 and here.LoadGPSToken.fingerprint_inputs(model_name=name) == before
    )
    downloaded = list(hub.downloaded)
    run(here.LoadGPSToken, model_name=name, dtype="bfloat16")
    assert hub.downloaded == downloaded


def test_a_release_that_cannot_be_had_says_what_to_do(here, hub):
    with pytest.raises(OSError, match=r"gpstoken_m128.safetensors is not in .*models and could not be downloaded. No "):
        run(here.LoadGPSToken, model_name="gpstoken_m128.safetensors")
    assert "gpstoken_m128.safetensors" not in [path.name for path in (here.folder / "models").iterdir()]
