"""The Layout Editor in the real page: mouse and keys, what becomes of them, and what workflows carry."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest

from comfyui.layout_editor_page import GRAPH, MARGIN, NODE, SIDE

REACH_PX = 80  # beyond: 3 sigmas of a small token, then what the decoder's convolutions look at, is out of reach


def distance_map(*places) -> np.ndarray:
    """(SIDE, SIDE): how far each pixel is from the nearest of some places, along the axis that is farther."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.min([np.maximum(abs(x - px), abs(y - py)) for px, py in places], axis=0)


def ellipse_axes(geometry) -> tuple[float, float, float]:
    """Long and short radius in pixels, and the degrees from the x axis to the long one, clockwise as it is seen."""
    (sigma_x, sigma_y, rho), half = geometry[:3], (SIDE - 1) / 2
    shared = rho * sigma_x * sigma_y
    squares, axes = np.linalg.eigh([[sigma_x**2, shared], [shared, sigma_y**2]])
    short, long = 1.5 * half * np.sqrt(squares)
    return long, short, math.degrees(math.atan(axes[1, 1] / axes[0, 1]))


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
    editor.press("Control+z", "Backspace")
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
    assert [(c + 1) * (SIDE - 1) / 2 for c in added["geometry"][3:]] == pytest.approx([x + 1, y + 1], abs=1.0)
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


def test_ellipses_are_drawn_where_their_gaussians_lie(editor, artefacts):
    token, mouse = editor.small_token(50, 90), editor.page.mouse
    middle = editor.place(token)
    editor.click(*middle)
    side = editor.handle(token, 1, 0)
    editor.drag(side, (middle[0] + 3 * (side[0] - middle[0]), side[1]))
    stem = 18 / 1.25 / ((editor.canvas.bounding_box()["width"] / 1.25 - 2 * MARGIN) / SIDE)
    reach = middle[1] - editor.handle(token, 0, -1)[1] + stem
    mouse.move(*editor.window(middle[0], middle[1] - reach))
    mouse.down()
    # 35 degrees clockwise, which are 30 while Shift is held.
    turn = math.radians(35)
    end = editor.window(middle[0] + 3 * reach * math.sin(turn), middle[1] - 3 * reach * math.cos(turn))
    editor.held("Shift", lambda: mouse.move(*end, steps=4))
    mouse.up()
    turned = editor.edits["changed"][str(token)]
    long, short, degrees = ellipse_axes(turned)
    assert long > 2 * short and degrees == pytest.approx(30, abs=2)
    # Half as long again by the handle at its end, and turned as before.
    direction, gap = np.array([math.cos(math.pi / 6), math.sin(math.pi / 6)]), reach - stem - editor.radii(token)[1]
    editor.drag(middle + (long + gap) * direction, middle + 1.5 * (long + gap) * direction)
    turned = editor.edits["changed"][str(token)]
    assert ellipse_axes(turned) == pytest.approx((1.5 * long, short, degrees), rel=0.05)

    red, _, blue = editor.outline(turned).T
    assert (blue - red > 100).mean() > 0.8  # it is selected

    def white_share(mirrored=False):
        return (editor.outline(turned, mirrored).min(axis=1) > 200).mean()  # as what lies under the mouse is

    def check():
        # The page lays its nodes out anew when it comes to it, on a busy machine after seconds.
        deadline = time.monotonic() + 10
        while True:
            editor.press("Escape")
            mouse.move(*editor.window(*middle))
            editor.page.page.wait_for_timeout(300)
            if (share := white_share()) > 0.9 or time.monotonic() > deadline:
                break
        assert share > 0.9
        assert white_share(mirrored=True) < 0.5

    check()
    editor.page.screenshot(artefacts / "layout_editor_turned.png", fit=False)
    editor.page.evaluate("() => app.graph.nodes.find(node => node.type === 'GPSLayoutEditor').setSize([620, 560])")
    editor.page.page.wait_for_timeout(500)
    check()


def test_the_picture_lies_behind_the_ellipses_while_it_is_connected(editor):
    places = [(x, y) for x in range(4, SIDE, 9) for y in range(4, SIDE, 9)]
    shaded = 0.65 * np.array([90, 120, 150])  # the ground of the picture, under a shade

    def share():
        return (np.abs(editor.pixels(places) - shaded).max(axis=1) < 12).mean()

    assert share() > 0.25
    editor.page.evaluate(
        "() => { const node = app.graph.nodes.find(node => node.type === 'GPSLayoutEditor');"
        " node.disconnectInput(node.inputs.findIndex(input => input.name === 'image')); }"
    )
    editor.queue()
    assert share() < 0.05


def test_a_group_moves_together_and_escape_takes_a_drag_back(editor):
    one, other = editor.small_token(30, 80), editor.small_token(80, 140)
    (x, y), mouse, half = editor.place(one), editor.page.mouse, (SIDE - 1) / 2

    def shifts():
        changed = editor.edits["changed"]
        assert changed.keys() == {str(one), str(other)}
        return [
            (changed[str(token)][axis] - editor.geometry[token][axis]) * half
            for token in (one, other)
            for axis in (3, 4)
        ]

    # A box from its last corner to its first.
    editor.held("Shift", lambda: editor.drag((x + 1, y + 1), (x - 1, y - 1)))
    assert "1 selected" in editor.status
    editor.held("Shift", lambda: editor.click(*editor.place(other)))
    assert "2 selected" in editor.status
    mouse.move(*editor.window(x, y))
    mouse.down()
    editor.held("Shift", lambda: mouse.move(*editor.window(x + 40, y + 9), steps=4))
    mouse.up()
    assert shifts() == pytest.approx([40, 0, 40, 0], abs=0.5)  # straight along one axis
    editor.press("Control+z")
    mouse.move(*editor.window(x, y))
    mouse.down()
    mouse.move(*editor.window(x + 40, y + 9), steps=4)
    editor.press("Escape")
    mouse.up()
    assert editor.edits == {} and "2 selected" in editor.status
    editor.press("ArrowRight")
    assert shifts() == pytest.approx([1, 0, 1, 0], abs=1e-3)
    editor.press("ArrowLeft")
    assert editor.edits == {} and "no edits" in editor.status  # back where they were
    editor.press("ArrowRight", "Shift+ArrowDown")
    assert shifts() == pytest.approx([1, 10, 1, 10], abs=1e-3)
    editor.click(x + 1, y + 10)
    assert "1 selected" in editor.status
    # What was undone is gone once something else is done.
    editor.press("Control+z", "ArrowLeft")
    assert editor.page.page.locator(".gps-layout-redo").is_disabled()


def test_gaussians_stay_near_the_picture(editor):
    token = editor.small_token(50, 90)
    editor.click(*editor.place(token))
    editor.press(*["Shift+ArrowLeft"] * 25)
    assert editor.edits["changed"][str(token)][3] == -1.5
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


def test_wheel_and_middle_button_are_the_graphs(editor):
    before = editor.page.evaluate("() => app.canvas.ds.scale")
    editor.page.mouse.move(*editor.window(100, 100))
    editor.page.mouse.wheel(0, 100)
    editor.page.page.wait_for_timeout(300)
    assert editor.page.evaluate("() => app.canvas.ds.scale") < before
    offset = editor.page.evaluate("() => [...app.canvas.ds.offset]")
    editor.page.mouse.down(button="middle")
    x, y = editor.window(100, 100)
    editor.page.mouse.move(x + 80, y + 40, steps=4)
    editor.page.mouse.up(button="middle")
    moved = editor.page.evaluate("() => [...app.canvas.ds.offset]")
    assert moved[0] > offset[0] and moved[1] > offset[1]
