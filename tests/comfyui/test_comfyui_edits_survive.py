"""No edit of the Layout Editor is ever lost, whatever ComfyUI does to the node, in any page that people have."""

from __future__ import annotations

import json

import pytest

from comfyui.conftest import PAGES
from comfyui.layout_editor_page import LOOK_AT

UNDO, REDO = (f"() => app.extensionManager.workflow.activeWorkflow.changeTracker.{name}()" for name in ("undo", "redo"))
COPY = """() => {
    const node = app.graph.nodes.find(node => node.type === 'GPSLayoutEditor'), copy = node.clone();
    copy.pos = [node.pos[0] + 700, node.pos[1]];
    app.graph.add(copy);
}"""
REMOVE_COPY = "() => app.graph.remove(app.graph.nodes.filter(node => node.type === 'GPSLayoutEditor')[1])"
ALL_EDITS = """() => [app.graph, ...app.graph.subgraphs.values()].flatMap(graph => graph.nodes)
    .filter(node => node.type === 'GPSLayoutEditor')
    .map(node => node.widgets.find(widget => widget.name === 'edits').value)"""
TO_SUBGRAPH = """() => {
    const node = app.graph.nodes.find(node => node.type === 'GPSLayoutEditor');
    app.canvas.setGraph(app.graph.convertToSubgraph(new Set([node])).subgraph);
}"""
INTO_SUBGRAPH = "() => app.canvas.setGraph([...app.graph.subgraphs.values()][0])"
COMMAND = "name => app.extensionManager.command.execute(name)"
# What erased edits came some frames after the node.
FRAMES = """async () => {
    for (let frame = 0; frame < 40; frame++) await new Promise((done) => requestAnimationFrame(done));
}"""


@pytest.fixture(params=PAGES)
def any_editor(request, open_page):
    from comfyui.layout_editor_page import NODE, Editor

    server = request.getfixturevalue("comfyui_clone" if request.param == "own page" else "comfyui_newest_page")
    page = open_page(server, NODE, request.param)
    yield from Editor(server, page).with_gaussians()
    page.close()


def test_no_edit_is_lost(any_editor, artefacts, tmp_path, request):
    editor, page = any_editor, any_editor.page
    token = editor.small_token(50, 90)
    editor.drag(editor.place(token), (150, 150))
    edits = editor.text
    assert json.loads(edits)["changed"].keys() == {str(token)}
    page.screenshot(artefacts / f"edited, {request.node.callspec.id}.png", fit=False)

    def settle():
        page.evaluate(FRAMES)

    def look():
        page.evaluate(LOOK_AT)
        settle()

    # ComfyUI's undo and redo make the node anew; the editor shows what the widget holds, and goes on working.
    settle()
    page.evaluate(UNDO)
    look()
    assert editor.text == "" and "no edits" in editor.status
    page.evaluate(REDO)
    look()
    assert editor.text == edits and "1 changed" in editor.status
    editor.press("Escape")
    editor.click(150, 150)
    editor.press("ArrowRight", "ArrowLeft")
    assert "1 selected" in editor.status and editor.text == edits

    # A copy has the same edits; neither loses them.
    page.evaluate(COPY)
    settle()
    assert page.evaluate(ALL_EDITS) == [edits, edits]
    page.evaluate(REMOVE_COPY)

    # Another workflow and back.
    page.evaluate(COMMAND, "Comfy.NewBlankWorkflow")
    settle()
    page.evaluate(COMMAND, "Workspace.PreviousOpenedWorkflow")
    look()
    assert editor.text == edits and "1 changed" in editor.status

    # Saved and opened again, in the graph and inside a subgraph.
    for wrap in (None, TO_SUBGRAPH):
        if wrap:
            page.evaluate(wrap)
            settle()
            assert page.evaluate(ALL_EDITS) == [edits]
        path = tmp_path / "saved.json"
        path.write_text(json.dumps(page.ui_workflow()))
        if not wrap:
            page.open()
        page.open_workflow(path)
        settle()
        if wrap:
            page.evaluate(INTO_SUBGRAPH)
            settle()
        assert page.evaluate(ALL_EDITS) == [edits]
        assert "1 changed" in editor.status
