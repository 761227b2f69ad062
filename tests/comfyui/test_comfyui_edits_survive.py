"""No edit of the Layout Editor is ever lost, whatever ComfyUI does to the node, in any page that people have."""

from __future__ import annotations

import json

import pytest

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
SETTLE_MS = 1500  # what erased edits came some frames after the node


@pytest.fixture(scope="package")
def newest_page(server_install):
    """A server with the checkout that serves the newest page."""
    from comfyui.conftest import _server
    from comfyui.fetch_comfyui import ensure_newest_page

    yield from _server(server_install, "clone", ensure_newest_page())


@pytest.fixture(params=["own page", "newest page", "newest page, Nodes 2.0"])
def any_editor(request, open_page):
    from comfyui.layout_editor_page import NODE, Editor

    own = request.param == "own page"
    server = request.getfixturevalue("comfyui_clone" if own else "newest_page")
    if not own:
        server.post_json("/settings", {"Comfy.VueNodes.Enabled": request.param.endswith("2.0")})
    page = open_page(server, NODE)
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
        page.page.wait_for_timeout(SETTLE_MS)

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
        page.open()
        page.open_workflow(path)
        settle()
        if wrap:
            page.evaluate(INTO_SUBGRAPH)
            settle()
        assert page.evaluate(ALL_EDITS) == [edits]
        assert "1 changed" in editor.status
