"""The Layout Editor in the real page: mouse and keys, what becomes of them, and what workflows carry."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from comfyui.comfyui_client import ExecutionFailed

NODE = "GPSLayoutEditor"
SIDE = 256
MARGIN = 26  # CSS pixels around the picture on the editor's canvas
REACH_PX = 80  # beyond: 3 sigmas of a small token, then what the decoder's convolutions look at, is out of reach

GRAPH = {
    "1": {"class_type": "LoadGPSToken", "inputs": {"model_name": "gpstoken-mini (shipped)", "dtype": "float32"}},
    "2": {"class_type": "LoadImage", "inputs": {}},
    "3": {"class_type": "GPSEncode", "inputs": {"model": ["1", 0], "image": ["2", 0], "num_tokens": 64}},
    "4": {"class_type": NODE, "inputs": {"tokens": ["3", 0], "image": ["2", 0], "edits": ""}},
    "5": {"class_type": "GPSDecode", "inputs": {"model": ["1", 0], "tokens": ["4", 0]}},
    "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
}

# The editor fills the view, at another zoom than 1.
LOOK_AT = """() => {
    const node = app.graph.nodes.find(node => node.type === 'GPSLayoutEditor');
    app.canvas.ds.scale = 1.25;
    app.canvas.ds.offset = [-node.pos[0] + 160, -node.pos[1] + 70];
    app.canvas.deselectAll();
    app.canvas.select(node);
    app.canvas.setDirty(true, true);
}"""

VALUE = """() => {
    const node = app.graph.nodes.find(node => node.type === 'GPSLayoutEditor');
    return node.widgets.find(widget => widget.name === 'edits').value;
}"""


def busy_picture() -> Image.Image:
    """Much to see in the left half, so that tokens there are small."""
    picture = Image.new("RGB", (SIDE, SIDE), (90, 120, 150))
    draw = ImageDraw.Draw(picture)
    for place in range(24):
        x, y = 8 + 13 * (place % 8), 60 + 36 * (place // 8)
        draw.ellipse((x, y, x + 9, y + 17), fill=(250 - 9 * place, 40 + 8 * place, (70 * place) % 255))
    return picture


class Editor:
    """The editor as people use it, in pixels of the picture."""

    def __init__(self, server, page):
        self.server, self.page = server, page
        self.geometry = None

    @property
    def canvas(self):
        return self.page.page.locator(".gps-layout canvas")

    def open(self, graph) -> None:
        self.page.open()
        self.page.ui_workflow_from_api(graph)
        self.look()

    def look(self) -> None:
        self.page.evaluate(LOOK_AT)
        self.page.page.wait_for_timeout(500)

    def queue(self) -> np.ndarray:
        """Runs the workflow; the decoded picture."""
        entry = self.page.queue_and_wait()
        self.geometry = entry["outputs"]["4"]["layout_editor"][0]["geometry"]
        self.page.page.wait_for_timeout(300)
        return np.asarray(self.server.images(entry)["6"][0]).astype(int)

    @property
    def edits(self) -> dict:
        return json.loads(self.page.evaluate(VALUE) or "{}")

    @property
    def status(self) -> str:
        return self.page.page.locator(".gps-layout-counts").inner_text()

    def place(self, index: int) -> tuple[float, float]:
        """Centre of a token before all edits."""
        x, y = self.geometry[index][3:]
        return (x + 1) * (SIDE - 1) / 2, (y + 1) * (SIDE - 1) / 2

    def radii(self, index: int) -> tuple[float, float]:
        """Of a token's ellipse before all edits; its correlation must be next to nothing."""
        return tuple(1.5 * sigma * (SIDE - 1) / 2 for sigma in self.geometry[index][:2])

    def small_token(self, x: float, y: float) -> int:
        """The token nearest to a point of those 8 to 40 px large."""
        sizes = {i: max(self.radii(i)) for i in range(len(self.geometry))}
        fitting = [i for i, size in sizes.items() if 8 < 2 * size < 40]
        return min(fitting, key=lambda i: math.dist(self.place(i), (x, y)))

    def window(self, x: float, y: float) -> tuple[float, float]:
        """Where in the window a point of the picture is."""
        box, zoom = self.canvas.bounding_box(), 1.25
        width, height = box["width"] / zoom, box["height"] / zoom
        scale = min(width - 2 * MARGIN, height - 2 * MARGIN) / SIDE
        left, top = (width - SIDE * scale) / 2, (height - SIDE * scale) / 2
        return box["x"] + (left + (x + 0.5) * scale) * zoom, box["y"] + (top + (y + 0.5) * scale) * zoom

    def drag(self, start, end) -> None:
        mouse = self.page.mouse
        mouse.move(*self.window(*start))
        mouse.down()
        mouse.move(*self.window(*end), steps=4)
        mouse.up()

    def click(self, x: float, y: float) -> None:
        self.page.mouse.click(*self.window(x, y))

    def button(self, name: str) -> None:
        self.page.page.locator(f".gps-layout-{name}").click()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.page.keyboard.press(key)

    def handle(self, index: int, u: float, v: float) -> tuple[float, float]:
        """A handle of a selected token as it was, in whose frame the sides are at -1 and 1: they stand off 4 px."""
        (x, y), (radius_x, radius_y) = self.place(index), self.radii(index)
        box = self.canvas.bounding_box()
        scale = (box["width"] / 1.25 - 2 * MARGIN) / SIDE  # the canvas is higher than wide
        gap = 4 / 1.25 / scale
        return x + u * (radius_x + gap), y + v * (radius_y + gap)


@pytest.fixture(scope="module")
def graph(comfyui_clone):
    name = comfyui_clone.upload_image(busy_picture(), "layout_editor.png")
    return GRAPH | {"2": {"class_type": "LoadImage", "inputs": {"image": name}}}


@pytest.fixture(scope="module")
def open_editor(comfyui_clone, open_page):
    return Editor(comfyui_clone, open_page(comfyui_clone, NODE))


@pytest.fixture
def editor(open_editor, graph):
    """The editor with its Gaussians, nothing done yet."""
    open_editor.open(graph)
    open_editor.unedited = open_editor.queue()
    yield open_editor
    assert open_editor.page.errors == []


def distance_map(*places) -> np.ndarray:
    """(SIDE, SIDE): how far each pixel is from the nearest of some places, along the axis that is farther."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.min([np.maximum(abs(x - px), abs(y - py)) for px, py in places], axis=0)


def test_a_moved_gaussian_changes_the_picture_there_and_workflows_carry_it(editor, artefacts, tmp_path):
    token = editor.small_token(50, 90)
    start, end = editor.place(token), (170.0, 200.0)
    assert editor.status == "64 tokens · 0 selected · no edits"
    editor.drag(start, end)
    assert editor.status == "64 tokens · 1 selected · 1 changed"
    edits = editor.edits
    assert list(edits["changed"]) == [str(token)] and edits["num_tokens"] == 64
    assert not edits["deleted"] and not edits["added"]
    geometry = edits["changed"][str(token)]
    assert geometry[:3] == pytest.approx(editor.geometry[token][:3], abs=2e-6)
    assert [(c + 1) * (SIDE - 1) / 2 for c in geometry[3:]] == pytest.approx(end, abs=1.0)
    moved = editor.queue()
    editor.page.screenshot(artefacts / "layout_editor_moved.png", fit=False)
    change = np.abs(moved - editor.unedited).max(axis=-1)
    assert change[distance_map(start) < 4].max() > 8 and change[distance_map(end) < 4].max() > 2
    assert change[distance_map(start, end) > REACH_PX].max() == 0

    workflow = editor.page.ui_workflow()
    (node,) = (node for node in workflow["nodes"] if node["type"] == NODE)
    assert node["widgets_values"] == [json.dumps(edits, separators=(",", ":"))]
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(workflow))
    editor.page.open()
    editor.page.open_workflow(path)
    editor.look()
    assert editor.edits == edits and editor.status == "1 changed"
    assert np.array_equal(editor.queue(), moved)
    assert editor.status == "64 tokens · 0 selected · 1 changed"
    # The restored ellipse is where it was left.
    editor.click(*end)
    assert "1 selected" in editor.status
    editor.press("Delete")
    assert editor.edits["deleted"] == [token] and editor.edits["changed"] == {}


def test_delete_takes_gaussians_and_not_the_node(editor):
    token = editor.small_token(50, 90)
    editor.click(*editor.place(token))
    editor.press("Delete")
    assert editor.edits["deleted"] == [token]
    editor.press("Backspace", "Delete")  # nothing is selected now
    assert editor.page.evaluate("() => app.graph.nodes.length") == len(GRAPH)
    assert editor.status == "63 tokens · 0 selected · 1 deleted"
    deleted = editor.queue()
    change = np.abs(deleted - editor.unedited).max(axis=-1)
    assert change[distance_map(editor.place(token)) < 4].max() > 8
    # One token fewer to add up: elsewhere rounding may differ.
    assert change[distance_map(editor.place(token)) > REACH_PX].max() <= 1


def test_double_click_and_button_add(editor):
    token = editor.small_token(50, 90)
    x, y = editor.place(token)
    editor.page.mouse.dblclick(*editor.window(x + 1, y + 1))
    (added,) = editor.edits["added"]
    assert added["from"] == token and added["geometry"][:3] == pytest.approx(editor.geometry[token][:3], abs=2e-6)
    editor.button("add")
    one, other = editor.edits["added"]
    assert one == added and other["from"] == token and other["geometry"][3] > added["geometry"][3]
    assert editor.status == "66 tokens · 1 selected · 2 added"
    assert np.abs(editor.queue() - editor.unedited)[distance_map((x, y)) < 6].max() > 2


def test_undo_redo_and_reset(editor):
    token = editor.small_token(50, 90)
    nodes = editor.page.evaluate("() => app.graph.nodes.length")
    editor.drag(editor.place(token), (150, 150))
    moved = editor.edits
    editor.press("Delete")
    deleted = editor.edits
    assert deleted["deleted"] == [token]
    editor.press("Control+z")
    assert editor.edits == moved and "1 selected" in editor.status
    editor.press("Control+z")
    assert editor.edits == {}
    editor.press("Control+Shift+z", "Control+y")
    assert editor.edits == deleted
    editor.button("undo")
    assert editor.edits == moved
    editor.button("redo")
    editor.button("reset")
    assert editor.edits == {} and editor.status == "64 tokens · 0 selected · no edits"
    editor.button("undo")
    assert editor.edits == deleted
    # ComfyUI's own undo has seen none of these keys.
    assert editor.page.evaluate("() => app.graph.nodes.length") == nodes
    editor.button("reset")
    assert np.array_equal(editor.queue(), editor.unedited)


def test_handles_scale_along_an_axis_and_turn(editor):
    token = editor.small_token(50, 90)
    sigma_x, sigma_y, rho, x, y = editor.geometry[token]
    editor.click(*editor.place(token))
    side = editor.handle(token, 1, 0)
    middle = editor.place(token)
    editor.drag(side, (middle[0] + 2 * (side[0] - middle[0]), side[1]))
    scaled = editor.edits["changed"][str(token)]
    assert scaled[0] == pytest.approx(2 * sigma_x, rel=0.1)
    assert scaled[1] == pytest.approx(sigma_y, rel=0.05) and scaled[3:] == pytest.approx([x, y], abs=1e-3)
    editor.press("Control+z")
    corner = editor.handle(token, 1, 1)
    editor.drag(corner, [2 * c - m for c, m in zip(corner, middle, strict=True)])
    scaled = editor.edits["changed"][str(token)]
    assert scaled[:2] == pytest.approx([2 * sigma_x, 2 * sigma_y], rel=0.1)
    assert scaled[2] == pytest.approx(rho, abs=0.05)

    # A long one, so that turning it shows.
    editor.press("Control+z")
    editor.drag(side, (middle[0] + 2.5 * (side[0] - middle[0]), side[1]))
    long = editor.edits["changed"][str(token)]
    top = editor.handle(token, 0, -1)
    stem = 18 / 1.25 / ((editor.canvas.bounding_box()["width"] / 1.25 - 2 * MARGIN) / SIDE)
    reach = middle[1] - top[1] + stem
    editor.drag((middle[0], middle[1] - reach), (middle[0] + reach, middle[1]))  # a quarter
    turned = editor.edits["changed"][str(token)]
    assert turned[:2] == pytest.approx([long[1], long[0]], rel=0.1)
    assert turned[3:] == pytest.approx([x, y], abs=1e-3)
    editor.queue()


def test_boxes_and_shift_select_and_all_move_together(editor):
    one, other = editor.small_token(30, 80), editor.small_token(80, 140)
    assert one != other
    editor.click(*editor.place(one))
    editor.page.page.keyboard.down("Shift")
    editor.click(*editor.place(other))
    assert "2 selected" in editor.status
    editor.click(*editor.place(other))
    assert "1 selected" in editor.status
    editor.drag((-1, -1), (SIDE, SIDE))
    editor.page.page.keyboard.up("Shift")
    assert "64 selected" in editor.status
    editor.press("ArrowRight")
    changed = editor.edits["changed"]
    assert len(changed) == 64
    step = 2 / (SIDE - 1)
    moves = [changed[str(i)][3] - geometry[3] for i, geometry in enumerate(editor.geometry)]
    assert moves == pytest.approx([step] * 64, abs=3e-6)
    editor.press("Escape")
    assert "0 selected" in editor.status


def test_comfyuis_own_undo_keeps_the_editor_alive(editor):
    editor.drag(editor.place(editor.small_token(50, 90)), (150, 150))
    edits = editor.edits
    assert edits["changed"]
    editor.page.page.wait_for_timeout(300)
    editor.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.undo()")
    editor.page.page.wait_for_timeout(1000)
    assert editor.edits == {} and editor.status == "64 tokens · 0 selected · no edits"
    editor.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.redo()")
    editor.page.page.wait_for_timeout(1000)
    assert editor.edits == edits and editor.status == "64 tokens · 0 selected · 1 changed"


def test_the_wheel_still_zooms_the_graph(editor):
    before = editor.page.evaluate("() => app.canvas.ds.scale")
    editor.page.mouse.move(*editor.window(100, 100))
    editor.page.mouse.wheel(0, 100)
    editor.page.page.wait_for_timeout(300)
    assert editor.page.evaluate("() => app.canvas.ds.scale") < before


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
