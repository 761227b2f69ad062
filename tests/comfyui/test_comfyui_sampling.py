"""Seeds, caching, previews, cancelling and memory on a real server."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from comfyui.make_example_workflows import MINI, node, numbered


def generation(**changes) -> dict:
    """Two stages and the picture; `changes` are inputs of the second stage."""
    texture = {"label": "Food", "seed": 1, "steps": 6, "sampler": "euler", "guidance": 3.0}
    return {
        "model": node("LoadGPSToken", model_name=MINI, dtype="auto"),
        "layout": node(
            "GPSLayoutGenerate", model=("model", 0), label="Food", seed=7, steps=6, guidance=2.0, batch_size=1
        ),
        "tokens": node("GPSTextureGenerate", model=("model", 0), layout=("layout", 0), **texture | changes),
        "decoded": node("GPSDecode", model=("model", 0), tokens=("tokens", 0)),
        "picture": node("PreviewImage", images=("decoded", 0)),
    }


def picture_of(server, workflow: dict) -> np.ndarray:
    return np.asarray(server.images(server.run(workflow))["picture"][0])


def cached(server, entry: dict) -> set[str]:
    """Keys of the nodes that did not run again."""
    return {key for event, data in server.events(entry) if event == "execution_cached" for key in data["nodes"]}


def test_the_same_seed_gives_the_same_picture(comfyui_clone):
    first = picture_of(comfyui_clone, generation(seed=11))
    comfyui_clone.free()
    again = picture_of(comfyui_clone, generation(seed=11))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, picture_of(comfyui_clone, generation(seed=12)))


def test_a_picture_does_not_depend_on_its_batch(comfyui_clone):
    """Picture k of a batch has the seed + k, in both stages."""
    batch, alone = generation(seed=11), generation(seed=12)
    batch["layout"]["inputs"]["batch_size"] = 2
    alone["layout"]["inputs"]["seed"] = 8
    second = np.asarray(comfyui_clone.images(comfyui_clone.run(batch))["picture"][1]).astype(int)
    # Sums in another order, and eight bits.
    assert np.abs(second - picture_of(comfyui_clone, alone)).max() <= 1


def test_only_what_changed_runs_again(comfyui_clone):
    comfyui_clone.run(generation(seed=20))
    entry = comfyui_clone.run(generation(seed=21))
    assert cached(comfyui_clone, entry) == {"model", "layout"}
    entry = comfyui_clone.run(generation(seed=21))
    assert cached(comfyui_clone, entry) >= {"model", "layout", "tokens", "decoded"}


@pytest.mark.parametrize("stage, key", [("GPSTextureGenerate", "tokens"), ("GPSLayoutGenerate", "layout")])
def test_cancelling_stops_within_a_step_or_two(comfyui_clone, stage, key):
    """A thousand steps take half a minute and more; interrupted after the first of them, the node is gone at once."""
    workflow = generation(seed=30)
    workflow[key]["inputs"]["steps"] = 1000
    workflow[key]["inputs"]["seed"] = 31
    started = time.monotonic()
    prompt = comfyui_clone.queue(workflow)
    while key not in running(comfyui_clone, prompt):
        assert time.monotonic() - started < 60
        time.sleep(0.05)
    time.sleep(1.0)
    asked = time.monotonic()
    comfyui_clone.interrupt()
    entry = comfyui_clone.wait(prompt, timeout=30)
    assert entry["outcome"] == "interrupted"
    assert time.monotonic() - asked < 5
    interrupted = dict(comfyui_clone.events(entry))["execution_interrupted"]
    assert interrupted["node_type"] == stage
    # And the server goes on.
    assert picture_of(comfyui_clone, generation(seed=32)).std() > 10


def running(server, prompt: str) -> set[str]:
    """Keys of nodes that have begun, as the log of progress says."""
    log = server.log()
    begun = set()
    if "texture:" in log.rpartition("got prompt")[2]:
        begun.add("tokens")
    if "layout:" in log.rpartition("got prompt")[2]:
        begun.add("layout")
    return begun


def test_two_models_are_unloaded_in_the_middle_and_come_back(comfyui_clone):
    """ComfyUI holds each network by itself, takes all of them away between two nodes, and the graph goes on."""
    expected = picture_of(comfyui_clone, generation(seed=40))
    comfyui_clone.free()
    workflow = generation(seed=40) | {
        "other": node("LoadGPSToken", model_name=MINI, dtype="float32"),
        "image": node("GPSExampleImage", picture="duck"),
        "encoded": node("GPSEncode", model=("other", 0), image=("image", 0), num_tokens=64),
        "probe": node("LoadedModels", tokens=("tokens", 0), unload=True),
        "probe other": node("LoadedModels", tokens=("encoded", 0), unload=True),
        "decoded other": node("GPSDecode", model=("other", 0), tokens=("probe other", 0)),
        "duck": node("PreviewImage", images=("decoded other", 0)),
    }
    workflow["decoded"]["inputs"]["tokens"] = ["probe", 0]
    entry = comfyui_clone.run(workflow)
    held = [set(entry["outputs"][key]["text"]) for key in ("probe", "probe other")]
    assert {"GPSTokenTransformerModel", "AutoencoderGPSToken"} <= held[0] | held[1]
    assert all("0 left" in one for one in held)
    pictures = comfyui_clone.images(entry)
    assert np.array_equal(np.asarray(pictures["picture"][0]), expected)
    assert np.asarray(pictures["duck"][0]).std() > 10


@pytest.mark.parametrize("sampler", ["heun", "unipc", "dpm++", "sde", "official-sde", "official-ode"])
def test_every_sampler_makes_a_picture(comfyui_clone, sampler):
    picture = picture_of(comfyui_clone, generation(seed=50, sampler=sampler, steps=8))
    assert picture.shape == (256, 256, 3) and picture.std() > 10


def test_guidance_in_an_interval(comfyui_clone):
    everywhere = picture_of(comfyui_clone, generation(seed=60))
    part = picture_of(comfyui_clone, generation(seed=60, guidance_start=0.3, guidance_end=0.7))
    off = picture_of(comfyui_clone, generation(seed=60, guidance=1.0))
    assert not np.array_equal(everywhere, part) and not np.array_equal(part, off)


def test_a_file_that_was_exchanged_is_read_again(comfyui_clone):
    """Under the same name: the tokens of one picture, then of another; unchanged, they come from the cache."""
    from gpstoken_diffusers import GPSTokenImageProcessor
    from gpstoken_diffusers.assets import EXAMPLE_PICTURES

    path = Path(comfyui_clone.base) / "input" / "exchanged.safetensors"
    workflow = {
        "loaded": node("LoadGPSTokens", file=path.name),
        "drawn": node("GPSVisualize", tokens=("loaded", 0), style="ellipses"),
        "picture": node("PreviewImage", images=("drawn", 0)),
    }
    seen = []
    for name in ("duck", "honey pot"):
        picture = GPSTokenImageProcessor.load_image(EXAMPLE_PICTURES[name])
        GPSTokenImageProcessor().layout(picture, num_tokens=32).save(path)
        seen.append(picture_of(comfyui_clone, workflow))
    path_again = comfyui_clone.run(workflow)
    assert not np.array_equal(*seen)
    assert "loaded" in cached(comfyui_clone, path_again)
    path.unlink()


_LISTEN = """() => {
    window.previews = [];
    app.api.addEventListener('b_preview', ({detail}) => window.previews.push(detail.size));
}"""


def test_the_page_sees_previews_while_it_samples(comfyui_page_clone):
    page = comfyui_page_clone
    workflow, _ = numbered(generation(seed=70, steps=20))
    page.ui_workflow_from_api(workflow)
    page.evaluate(_LISTEN)
    page.queue_and_wait(timeout=120)
    sizes = page.evaluate("() => window.previews")
    assert len(sizes) >= 2 and min(sizes) > 1000  # bytes of pictures
    assert page.errors == []
