"""What users see of the nodes in the page of a real server: example workflows, help pages, translations."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from comfyui import make_locales
from comfyui.comfyui_server import NODE_FOLDER

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
PARTS = sorted((ROOT / "subgraphs").glob("*.json"))
DOCS = ROOT / "comfyui_nodes" / "web" / "docs"

_PICTURES_LOADED = """([selector, count]) => {
    const pictures = [...document.querySelectorAll(selector)];
    return pictures.length === count && pictures.every(one => one.complete && one.naturalWidth > 0);
}"""
_HELP = ".node-help-content"

_NAMES = """node => ({
    title: LiteGraph.registered_node_types[node].title,
    inputs: LiteGraph.createNode(node).inputs.map(one => one.localized_name),
    widgets: LiteGraph.createNode(node).widgets.map(one => one.label),
    outputs: LiteGraph.createNode(node).outputs.map(one => one.localized_name),
})"""


@pytest.fixture(scope="module")
def nodes(comfyui_clone) -> dict:
    return make_locales.our_nodes(comfyui_clone.object_info())


# ---- example workflows ----


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflow_runs(comfyui_page_clone, artefacts, path):
    page = comfyui_page_clone
    page.open_template(path.stem, NODE_FOLDER)
    page.server.free()  # nodes that run say what came out; older servers do not repeat it where a result is kept
    assert page.queue_and_wait(timeout=180)["outcome"] == "success"
    encoders = sum(one["type"] == "GPSEncode" for one in json.loads(path.read_text(encoding="utf-8"))["nodes"])
    said = page.page.locator(".gps-encoded-size")
    page.page.wait_for_function(
        "count => document.querySelectorAll('.gps-encoded-size').length >= count",
        arg=encoders,
        timeout=30_000,
        polling=100,
    )
    assert all(re.fullmatch(r"[\d,]+ tokens, [\d,]+ kB", text) for text in said.all_text_contents())
    page.screenshot(artefacts / f"workflow {path.stem}.png")
    assert page.errors == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nodes_of_example_workflow_do_not_overlap(path):
    title = 30  # pixels above a node's position
    taller = 80  # at most, in Nodes 2.0, with the line of text that GPS Encode shows
    boxes = [
        (*one["pos"], one["pos"][0] + one["size"][0], one["pos"][1] + one["size"][1])
        for one in json.loads(path.read_text(encoding="utf-8"))["nodes"]
    ]
    for place, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:place]:
            apart = right <= other[0] or other[2] <= left or bottom + taller <= other[1] - title
            apart = apart or other[3] + taller <= top - title
            assert apart, f"{(left, top, right, bottom)} and {other}"


def test_templates_dialog_shows_our_workflows_with_pictures(comfyui_page_clone, artefacts):
    page = comfyui_page_clone
    page.open()
    page.evaluate("() => void app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.page.get_by_role("dialog").first
    dialog.get_by_text(NODE_FOLDER, exact=True).first.click()
    for path in WORKFLOWS:
        dialog.get_by_text(path.stem, exact=True).first.wait_for(timeout=30_000)
    shown = ["[role=dialog] img", len(WORKFLOWS)]
    page.page.wait_for_function(_PICTURES_LOADED, arg=shown, timeout=30_000, polling=100)
    page.screenshot(artefacts / "templates.png", fit=False)
    page.page.get_by_text(WORKFLOWS[0].stem, exact=True).first.click()
    page.page.wait_for_function(
        "() => app.graph.nodes.some(node => node.type === 'GPSEncode')", timeout=30_000, polling=100
    )
    assert page.errors == []


# ---- parts and files ----

# What is outside of a part: an example picture before it where it takes one, a preview after it.
_AROUND_PART = """() => {
    const [part] = app.graph.nodes;
    const beside = (type, place) => {
        const node = LiteGraph.createNode(type);
        node.pos = [place, 0];
        app.graph.add(node);
        return node;
    };
    const input = part.findInputSlot("image");
    if (input >= 0) beside("GPSExampleImage", -500).connect(0, part, input);
    part.connect(part.findOutputSlot("image"), beside("PreviewImage", 500), 0);
    return part.widgets.map(({name}) => name);
}"""


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.stem)
def test_a_part_is_offered_and_runs(comfyui_page_newest, path):
    page = comfyui_page_newest
    offered = page.server.get_json("/global_subgraphs").values()
    assert path.stem in [one["name"] for one in offered if one["info"]["node_pack"] == f"custom_nodes.{NODE_FOLDER}"]
    page.open()
    page.open_workflow(path)
    shown = page.evaluate(_AROUND_PART)  # widgets of the part, which older pages hide inside
    expected, size = {
        "GPS Generate": ({"batch_size", "label", "seed", "steps", "guidance"}, (256, 256)),
        "GPS Reconstruct": ({"model_name", "num_tokens"}, (768, 512)),
    }[path.stem]
    assert expected <= set(shown)
    (pictures,) = page.server.images(page.queue_and_wait(timeout=180)).values()
    assert {one.size for one in pictures} == {size}
    assert page.errors == []


def test_tokens_of_this_computer_are_uploaded(comfyui_page_clone, tmp_path):
    from gpstoken_diffusers import GPSTokenImageProcessor
    from gpstoken_diffusers.assets import EXAMPLE_PICTURES

    page, path = comfyui_page_clone, tmp_path / "from elsewhere.safetensors"
    GPSTokenImageProcessor().layout(GPSTokenImageProcessor.load_image(EXAMPLE_PICTURES["duck"]), num_tokens=16).save(
        path
    )
    page.open()
    graph = {
        "1": {"class_type": "LoadGPSTokens", "inputs": {}},
        "2": {"class_type": "GPSVisualize", "inputs": {"tokens": ["1", 0], "style": "ellipses"}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }
    page.ui_workflow_from_api(graph)
    widget = "app.graph.nodes.find(node => node.type === 'LoadGPSTokens').widgets.find(({name}) => name === '%s')"
    with page.page.expect_file_chooser() as chosen:
        page.evaluate(f"() => {widget % 'upload'}.callback()")
    chosen.value.set_files(path)
    name = path.name
    page.page.wait_for_function(f"name => {widget % 'file'}.value === name", arg=name, timeout=30_000, polling=100)
    assert page.server.images(page.queue_and_wait())["3"][0].size == (256, 256)
    (node,) = (node for node in page.ui_workflow()["nodes"] if node["type"] == "LoadGPSTokens")
    assert node["widgets_values"] == [name]  # the button has no value
    assert page.errors == []


# ---- help ----


def test_every_node_has_a_help_page(nodes):
    assert {path.stem for path in DOCS.glob("*.md")} == nodes.keys()
    assert {path.stem for path in (DOCS / "pictures").glob("*.jpg")} == nodes.keys()
    for name, found in nodes.items():
        text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        assert text.startswith(f"# {found['display_name']}\n")
        assert f"](pictures/{name}.jpg)" in text
        assert (DOCS / "pictures" / f"{name}.jpg").stat().st_size <= 60_000
        inputs = found["input"].get("required", {}).keys() | found["input"].get("optional", {}).keys()
        cells = {cell for row in re.findall(r"^\| (`.*?) \|", text, re.M) for cell in re.findall(r"`(\w+)`", row)}
        assert cells == inputs | set(found["output_name"]), name


@pytest.mark.parametrize("node", ["GPSEncode", "GPSLayoutEditor"])
def test_help_opens_for_a_selected_node(comfyui_page_clone, artefacts, node):
    page = comfyui_page_clone
    page.open()
    add = """node => {
        app.graph.clear();
        const added = LiteGraph.createNode(node);
        added.pos = [100, 200];
        app.graph.add(added);
        app.canvas.selectNode(added);
    }"""
    page.evaluate(add, node)
    page.page.locator("[data-testid=info-button]").click()
    help_page = page.page.locator(_HELP)
    expected = (DOCS / f"{node}.md").read_text(encoding="utf-8").split("\n")
    help_page.get_by_role("heading", name=expected[0].removeprefix("# ")).wait_for(timeout=30_000)
    assert expected[2].split(":")[0] in help_page.inner_text()
    page.page.wait_for_function(_PICTURES_LOADED, arg=[f"{_HELP} img", 1], timeout=30_000, polling=100)
    assert f"/docs/pictures/{node}.jpg" in page.page.locator(f"{_HELP} img").get_attribute("src")
    page.screenshot(artefacts / f"help {node}.png", fit=False)
    assert page.errors == []


# ---- languages ----


def test_english_is_that_of_the_schemas(nodes):
    assert make_locales.read("en", "nodeDefs.json") == make_locales.english(nodes), (
        "python tests/comfyui/make_locales.py writes it anew"
    )
    listed = json.loads((ROOT / "node_list.json").read_text(encoding="utf-8"))
    assert listed == make_locales.descriptions(make_locales.english(nodes))


@pytest.mark.parametrize("language", make_locales.LANGUAGES)
def test_language_has_all_texts(comfyui_clone, nodes, language):
    own = make_locales.paths(make_locales.read(language, "nodeDefs.json"))
    assert own.keys() == make_locales.paths(make_locales.english(nodes)).keys()
    main = make_locales.paths(make_locales.read(language, "main.json"))
    # Parts such as "edit" are left alone: other packs have such categories, and the page knows one text for all.
    assert {key for key in main if "nodeCategories" in key} == {"nodeCategories.GPSToken"}
    assert main.keys() == make_locales.paths(make_locales.read("en", "main.json")).keys()
    for path, text in (own | main).items():
        assert text.strip(), path
        assert not set(text) & set("@{}|"), f"{path}: the page takes these for its own syntax"
    served = comfyui_clone.get_json("/i18n")[language]
    assert make_locales.paths(served["nodeDefs"]).items() >= own.items()


@pytest.mark.parametrize("language", [language for language in make_locales.LANGUAGES if language != "en"])
def test_translations_differ_from_english(language):
    english = make_locales.paths(make_locales.read("en", "nodeDefs.json"))
    own = make_locales.paths(make_locales.read(language, "nodeDefs.json"))
    same = {path for path, text in own.items() if text == english[path]}
    assert all(path.endswith(".name") for path in same), same  # short names may agree: "Sampler", "dx"


@pytest.mark.parametrize("language", [language for language in make_locales.LANGUAGES if language != "en"])
def test_page_speaks_each_language(comfyui_page_newest, artefacts, language):
    """In the page of 0.3.75, texts of its own that it loads late take the place of all packs' Chinese ones."""
    page = comfyui_page_newest
    expected = make_locales.read(language, "nodeDefs.json")["GPSDecode"]
    try:
        page.server.post_json("/settings", {"Comfy.Locale": language})
        page.open()
        page.open_workflow(WORKFLOWS[0])
        shown = page.evaluate(_NAMES, "GPSDecode")
        page.screenshot(artefacts / f"language {language}.png")
    finally:
        page.server.post_json("/settings", {"Comfy.Locale": "en"})
    names = {name: one["name"] for name, one in expected["inputs"].items()}
    assert shown["title"] == expected["display_name"] != "GPS Decode"
    assert sorted(shown["inputs"]) == sorted(names.values())
    assert shown["widgets"] == [names[name] for name in ("width", "height", "scaling", "tiling", "memory_gb")]
    assert shown["outputs"] == [expected["outputs"]["0"]["name"]]
    assert page.errors == []
