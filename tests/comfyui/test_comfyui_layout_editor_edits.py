"""The Layout Editor when the edits in a workflow and the layout that comes in do not belong together."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import ImageOps

from comfyui.comfyui_client import ExecutionFailed
from comfyui.layout_editor_page import NODE, busy_picture, with_picture


@pytest.fixture(scope="module")
def graph(comfyui_clone):
    return with_picture(comfyui_clone, busy_picture())


@pytest.fixture(scope="module")
def other_picture(comfyui_clone) -> str:
    """One with another layout."""
    return comfyui_clone.upload_image(ImageOps.mirror(busy_picture()), "layout_editor_other.png")


def queue_other_picture(editor, picture: str) -> None:
    """Queues another picture under the edits: they are not applied, the page says so, and nothing is lost."""
    edits = editor.text
    editor.set("LoadImage", "image", picture)
    entry = editor.page.queue_and_wait()
    assert "4" in entry["outputs"] and "6" not in entry["outputs"]
    dialog = editor.page.page.get_by_role("dialog")
    dialog.get_by_text("made on another layout").first.wait_for(timeout=10_000)
    editor.page.page.locator(".p-dialog-close-button").first.click()
    dialog.first.wait_for(state="hidden")
    editor.geometry = entry["outputs"]["4"]["layout_editor"][0]["geometry"]
    assert editor.text == edits


def test_edits_of_another_layout_wait_for_a_decision(editor, graph, other_picture, artefacts):
    token = editor.small_token(50, 90)
    editor.drag(editor.place(token), (170, 200))
    assert len(editor.edits["fingerprint"]) == 8
    moved, edits = editor.queue(), editor.text
    assert editor.notice.is_hidden()

    queue_other_picture(editor, other_picture)
    editor.page.screenshot(artefacts / "layout_editor_foreign.png", fit=False)
    assert editor.notice.is_visible() and "made on another layout" in editor.notice.inner_text()
    assert editor.status == "64 tokens · 0 selected · edits not applied"
    # Nothing but a decision changes what was saved.
    editor.drag(editor.place(token), (100, 30))
    assert "0 selected" in editor.status
    editor.page.mouse.dblclick(*editor.window(60, 60))
    editor.press("ArrowRight", "Control+a", "Delete")
    assert editor.text == edits and "0 selected" in editor.status
    assert editor.page.page.locator(".gps-layout-add").is_disabled()

    # The first picture comes back, and with it what was done to it.
    editor.set("LoadImage", "image", graph["2"]["inputs"]["image"])
    assert np.array_equal(editor.queue(), moved)
    assert editor.notice.is_hidden() and editor.status == "64 tokens · 0 selected · 1 changed"

    queue_other_picture(editor, other_picture)
    editor.button("reset")
    assert editor.edits == {} and editor.notice.is_hidden()
    unedited = editor.queue()
    editor.button("undo")
    assert editor.text == edits and editor.notice.is_visible()
    editor.button("adopt")
    assert editor.notice.is_hidden() and editor.status == "64 tokens · 0 selected · 1 changed"
    before, adopted = json.loads(edits), editor.edits
    assert adopted["changed"] == before["changed"] and adopted["fingerprint"] != before["fingerprint"]
    assert np.abs(editor.queue() - unedited).max() > 8
    editor.button("undo")
    assert editor.text == edits and editor.notice.is_visible()


def test_edits_without_a_fingerprint_apply_and_get_one(editor):
    token, other = editor.small_token(50, 90), editor.small_token(80, 140)
    older = {"version": 1, "num_tokens": 64, "changed": {}, "deleted": [token], "added": []}
    editor.set(NODE, "edits", json.dumps(older))
    assert editor.status == "63 tokens · 0 selected · 1 deleted"
    assert np.abs(editor.queue() - editor.unedited).max() > 8
    editor.click(*editor.place(other))
    editor.press("ArrowDown")
    edits = editor.edits
    assert edits["version"] == 2 and len(edits["fingerprint"]) == 8
    assert edits["deleted"] == [token] and list(edits["changed"]) == [str(other)]


def test_edits_for_another_number_of_tokens_are_kept_until_reset(editor):
    text = json.dumps({"version": 1, "num_tokens": 128, "changed": {}, "deleted": [3], "added": []})
    editor.set(NODE, "edits", text)
    assert "another number of tokens" in editor.notice.inner_text()
    assert editor.page.page.locator(".gps-layout-adopt").is_hidden()
    editor.click(*editor.place(editor.small_token(50, 90)))
    editor.press("ArrowRight", "Delete")
    assert editor.text == text
    editor.button("reset")
    assert editor.text == "" and editor.notice.is_hidden()
    assert np.array_equal(editor.queue(), editor.unedited)


def test_edits_from_another_machine_apply(comfyui_clone, graph):
    first = comfyui_clone.run(graph)
    shown = first["outputs"]["4"]["layout_editor"][0]
    # What arithmetic of another machine may make of the fingerprint. The page goes on with that which the edits carry.
    theirs = [number + (-1) ** place for place, number in enumerate(shown["fingerprint"])]
    edits = {"version": 2, "num_tokens": 64, "fingerprint": theirs, "changed": {}, "deleted": [3], "added": []}
    with_edits = graph | {"4": {"class_type": NODE, "inputs": graph["4"]["inputs"] | {"edits": json.dumps(edits)}}}
    entry = comfyui_clone.run(with_edits)
    assert entry["outputs"]["4"]["layout_editor"][0] == shown | {
        "fingerprint": theirs,
        "background": entry["outputs"]["4"]["layout_editor"][0]["background"],
    }
    assert comfyui_clone.images(entry)["6"][0].tobytes() != comfyui_clone.images(first)["6"][0].tobytes()


def test_a_layout_has_no_tokens_to_decode_and_edits_of_other_tokens_say_what_to_do(comfyui_clone, graph):
    with_layout = graph | {"4": {"class_type": NODE, "inputs": {"tokens": ["3", 1]}}}
    alone = {number: node for number, node in with_layout.items() if number in "1234"}
    entry = comfyui_clone.run(alone)
    shown = entry["outputs"]["4"]["layout_editor"][0]
    assert len(shown["geometry"]) == 64 and shown["background"] is None
    visualize = {"class_type": "GPSVisualize", "inputs": {"tokens": ["4", 1], "style": "ellipses"}}
    assert comfyui_clone.images(comfyui_clone.run(with_layout | {"5": visualize}))["6"]
    entry = comfyui_clone.run(with_layout)
    assert "6" not in entry["outputs"]  # blocked, and the page is told why
    edits = {"version": 1, "num_tokens": 128, "changed": {}, "deleted": [3], "added": []}
    inputs = graph["4"]["inputs"] | {"edits": json.dumps(edits)}
    with pytest.raises(ExecutionFailed, match="made for 128 tokens, these are 64: press Reset in the editor"):
        comfyui_clone.run(graph | {"4": {"class_type": NODE, "inputs": inputs}})
