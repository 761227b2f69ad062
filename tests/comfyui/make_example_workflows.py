#!/usr/bin/env python
"""Writes example_workflows/ anew, with its pictures, by running all of it.

    python tests/comfyui/make_example_workflows.py

Each workflow is written here as ComfyUI's API takes it. The page of a real server turns it into a workflow file, this
script sets the nodes in columns, the server runs it, and what comes out becomes the picture of the Templates dialog.
The server is that of the tests, with this checkout as a clone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))

from comfyui.comfyui_page import ComfyUIPage, open_browser  # noqa: E402
from comfyui.comfyui_server import ComfyUIServer  # noqa: E402
from comfyui.fetch_comfyui import ensure_server, find_chromium  # noqa: E402

WORKFLOWS = ROOT / "example_workflows"
PARTS = ROOT / "subgraphs"
MINI = "gpstoken-mini (shipped)"
PICTURE_PX = 384

# In the page's units: a node's title takes 30 above its position.
GAP = 70.0
# Nodes 2.0 are up to 50 higher than the classic ones, and GPS Encode shows a line of text when it has run.
GAP_BELOW = 140.0
NOTE_HEIGHT = 180.0
SMALLEST = {
    "PreviewImage": (400, 420),
    "GPSLayoutEditor": (460, 560),
    "GPSTextureGenerate": (300, 640),  # grows when it shows previews
    "LoadGPSToken": (320, 0),
    "GPSExampleImage": (320, 0),
    "SolidMask": (320, 0),
}

# By which the page offers a model that a workflow names and that is not there.
RELEASES = [
    {
        "name": f"gpstoken_{preset}.safetensors",
        "url": f"https://huggingface.co/xtudbxk/GPSToken/resolve/main/gpstoken_{preset}.safetensors",
        "directory": "gpstoken",
    }
    for preset in ("s64", "m128", "l256")
]

Workflow = dict[str, dict[str, Any]]


def node(kind: str, title: str = "", **inputs: Any) -> dict[str, Any]:
    """A node in the API format; an input of another node is (its key, number of the output)."""
    inputs = {name: list(value) if isinstance(value, tuple) else value for name, value in inputs.items()}
    return {"class_type": kind, "inputs": inputs} | ({"_meta": {"title": title}} if title else {})


def box_mask(width: int, height: int, box: tuple[int, int, int, int]) -> Workflow:
    """A mask that is bright in a box (x, y, width, height); its output is that of "mask"."""
    x, y, box_width, box_height = box
    return {
        "ground": node("SolidMask", "all of the picture", value=0.0, width=width, height=height),
        "box": node("SolidMask", "the box", value=1.0, width=box_width, height=box_height),
        "mask": node(
            "MaskComposite", "the mask", destination=("ground", 0), source=("box", 0), x=x, y=y, operation="add"
        ),
    }


def workflows() -> dict[str, tuple[str, Workflow]]:
    """Name -> (what it shows, the workflow); the node "picture" makes the picture of the Templates dialog."""
    load = {"model": node("LoadGPSToken", model_name=MINI, dtype="auto")}
    sampling = {"steps": 20, "sampler": "unipc", "guidance": 3.0, "guidance_start": 0.0, "guidance_end": 1.0}
    importance = {"importance_strength": 4.0}
    encoding = importance | {"memory_gb": 0.0}
    model = ("model", 0)

    def example(picture: str) -> dict[str, Any]:
        return node("GPSExampleImage", picture=picture)

    def decode(tokens: tuple[str, int]) -> dict[str, Any]:
        return node(
            "GPSDecode", model=model, tokens=tokens, width=0, height=0, scaling="resample", tiling="auto", memory_gb=0.0
        )

    def preview(images: tuple[str, int], title: str = "") -> dict[str, Any]:
        return node("PreviewImage", title, images=images)

    def encode(image: str, num_tokens: int, **others: Any) -> dict[str, Any]:
        return node("GPSEncode", model=model, image=(image, 0), num_tokens=num_tokens, **encoding | others)

    return {
        "1_reconstruct": (
            "A photograph as Gaussian tokens, and back.\n\nPut **Load Image** in the place of the example for a "
            "picture "
            "of your own; any size will do. *num_tokens* is per 256 x 256 px: fewer make it coarser.",
            load
            | {
                "image": example("kingfisher"),
                "tokens": encode("image", 256),
                "decoded": decode(("tokens", 0)),
                "picture": preview(("decoded", 0), "reconstruction"),
                "ellipses": node(
                    "GPSVisualize", tokens=("tokens", 0), style="ellipses", image=("image", 0), width=0, height=0
                ),
                "gaussians": preview(("ellipses", 0), "its Gaussians"),
            },
        ),
        "2_focus_tokens_by_a_mask": (
            "Tokens go where the mask is bright.\n\nWith **Load Image**, draw the mask in its mask editor and "
            "connect its "
            "MASK output. Compare both reconstructions around the bird's head: both have 64 tokens for each tile.",
            load
            | box_mask(768, 512, (200, 75, 230, 130))
            | {
                "image": example("kingfisher"),
                "even": encode("image", 64),
                "focused": encode("image", 64, importance=("mask", 0), importance_strength=4.0),
                "decoded": decode(("even", 0)),
                "without": preview(("decoded", 0), "without the mask"),
                "decoded focused": decode(("focused", 0)),
                "picture": preview(("decoded focused", 0), "with the mask"),
                "ellipses": node(
                    "GPSVisualize", tokens=("focused", 0), style="ellipses", image=("image", 0), width=0, height=0
                ),
                "gaussians": preview(("ellipses", 0), "Gaussians with the mask"),
            },
        ),
        "3_generate": (
            "New pictures of a class, in two stages: first where Gaussians lie, then what they show.\n\nChange the "
            "seed of "
            "the second stage alone for other pictures in the same layouts: the first does not run again.",
            load
            | {
                "layout": node(
                    "GPSLayoutGenerate", model=model, label="Smileys", seed=12, steps=20, guidance=2.0, batch_size=4
                ),
                "tokens": node(
                    "GPSTextureGenerate",
                    model=model,
                    layout=("layout", 0),
                    label="Smileys",
                    seed=12,
                    denoise=1.0,
                    **sampling,
                ),
                "decoded": decode(("tokens", 0)),
                "picture": preview(("decoded", 0), "pictures"),
                "lights": node("GPSVisualize", tokens=("layout", 0), style="glow", width=0, height=0),
                "gaussians": preview(("lights", 0), "their layouts"),
            },
        ),
        "4_layout_of_a_picture_texture_of_a_class": (
            "The shapes of one picture, filled with what a class looks like.\n\nA picture of 256 x 256 px is one tile, "
            "which is what the model generates; in larger ones each tile is drawn by itself.",
            load
            | {
                "image": example("duck"),
                "layout": node("GPSLayoutFromImage", model=model, image=("image", 0), num_tokens=128, **importance),
                "tokens": node(
                    "GPSTextureGenerate",
                    model=model,
                    layout=("layout", 0),
                    label="Food",
                    seed=3,
                    denoise=1.0,
                    **sampling,
                ),
                "decoded": decode(("tokens", 0)),
                "picture": preview(("decoded", 0), "picture"),
                "ellipses": node(
                    "GPSVisualize", tokens=("layout", 0), style="ellipses", image=("image", 0), width=0, height=0
                ),
                "gaussians": preview(("ellipses", 0), "the layout"),
            },
        ),
        "5_inpaint": (
            "Tokens under the mask are drawn anew; all others stay exactly as they are.\n\nWith *denoise* below 1, "
            "the new "
            "tokens start from the old ones.",
            load
            | box_mask(256, 256, (40, 20, 176, 90))
            | {
                "image": example("honey pot"),
                "encoded": encode("image", 128),
                "tokens": node(
                    "GPSTextureGenerate",
                    model=model,
                    layout=("encoded", 1),
                    tokens=("encoded", 0),
                    mask=("mask", 0),
                    label="Food",
                    seed=5,
                    denoise=1.0,
                    **sampling,
                ),
                "decoded": decode(("tokens", 0)),
                "picture": preview(("decoded", 0), "inpainted"),
                "before": decode(("encoded", 0)),
                "preview before": preview(("before", 0), "as encoded"),
            },
        ),
        "6_edit_a_layout_by_hand": (
            "Run once: the editor then shows the picture and its Gaussians.\n\nDrag them, pull their handles, delete "
            "or add some, and run again. What you did is saved with the workflow.",
            load
            | {
                "image": example("duck"),
                "encoded": encode("image", 128),
                "edited": node("GPSLayoutEditor", tokens=("encoded", 0), image=("image", 0), edits=""),
                "decoded": decode(("edited", 0)),
                "picture": preview(("decoded", 0), "edited"),
                "ellipses": node(
                    "GPSVisualize", tokens=("edited", 0), style="ellipses", image=("decoded", 0), width=0, height=0
                ),
                "gaussians": preview(("ellipses", 0), "its Gaussians"),
            },
        ),
        "7_merge_two_pictures": (
            "Tokens of one picture under the mask, of the other elsewhere.\n\nBoth pictures must have the same size "
            "and "
            "come from the same model.",
            load
            | box_mask(256, 256, (0, 120, 256, 136))
            | {
                "first": example("duck"),
                "second": example("honey pot"),
                "tokens first": encode("first", 128),
                "tokens second": encode("second", 128),
                "merged": node(
                    "GPSMergeTokens", outside=("tokens first", 0), inside=("tokens second", 0), mask=("mask", 0)
                ),
                "decoded": decode(("merged", 0)),
                "picture": preview(("decoded", 0), "duck above, honey pot below"),
            },
        ),
    }


def parts() -> dict[str, tuple[Workflow, list[str], list[tuple[str, str]]]]:
    """Name -> (workflow, keys of the nodes that become one, their widgets that it shows).

    What other nodes give to those, and take from them, become the part's inputs and outputs.
    """
    described = workflows()
    generate = described["3_generate"][1]
    shown = [("layout", "batch_size"), ("layout", "seed")]
    shown += [("tokens", name) for name in ("label", "seed", "steps", "guidance")]
    return {
        "GPS Reconstruct": (
            described["1_reconstruct"][1],
            ["model", "tokens", "decoded"],
            [("model", "model_name"), ("tokens", "num_tokens")],
        ),
        "GPS Generate": (generate, ["model", "layout", "tokens", "decoded"], shown),
    }


# The page's own way to make one node of several; then the node alone, as the page publishes a part.
_MAKE_PART = """([name, members, shown]) => {
    const nodes = new Set(members.map((id) => app.graph.getNodeById(id)));
    const {node, subgraph} = app.graph.convertToSubgraph(nodes);
    node.title = subgraph.name = name;
    node.properties.proxyWidgets = shown.map(([id, widget]) => [String(id), widget]);
    node.pos = [0, 0];
    const whole = app.graph.serialize(), one = whole.nodes.find(({id}) => id === node.id);
    one.id = 1;
    one.inputs?.forEach((slot) => { slot.link = null; });
    one.outputs?.forEach((slot) => { slot.links = []; });
    const definitions = {subgraphs: whole.definitions.subgraphs.filter(({id}) => id === subgraph.id)};
    return {revision: 0, last_node_id: 1, last_link_id: 0, nodes: [one], links: [], version: 0.4, definitions};
}"""


def make_part(page: ComfyUIPage, name: str) -> dict[str, Any]:
    """A part as a workflow file of one node, whose definition holds the others."""
    described, members, shown = parts()[name]
    workflow, numbers = numbered(described)
    page.ui_workflow_from_api(workflow)
    places = [[int(numbers[key]), widget] for key, widget in shown]
    return page.evaluate(_MAKE_PART, [name, [int(numbers[key]) for key in members], places])


def numbered(workflow: Workflow) -> tuple[Workflow, dict[str, str]]:
    """The workflow with numbers for keys, as workflow files have them, and which number each key became."""
    numbers = {key: str(number) for number, key in enumerate(workflow, start=1)}
    renamed = {}
    for key, one in workflow.items():
        inputs = {
            name: [numbers[value[0]], value[1]] if isinstance(value, list) else value
            for name, value in one["inputs"].items()
        }
        renamed[numbers[key]] = one | {"inputs": inputs}
    return renamed, numbers


def arrange(graph: dict[str, Any], text: str) -> dict[str, Any]:
    """Sets nodes in columns, each right of what it needs and about as high, and a note in the top left corner."""
    nodes = {one["id"]: one for one in graph["nodes"]}
    sources: dict[int, list[int]] = {number: [] for number in nodes}
    for _, source, _, target, *_ in graph["links"]:
        sources[target].append(source)

    def depth(number: int) -> int:
        return 1 + max(map(depth, sources[number]), default=-1)

    def height_of_sources(number: int) -> float:
        # The model goes to nearly every node, and would pull all of them up.
        found = [nodes[one]["pos"][1] for one in sources[number] if nodes[one]["type"] != "LoadGPSToken"]
        return sum(found) / len(found) if found else 0.0

    columns: dict[int, list[int]] = {}
    for number in sorted(nodes):
        columns.setdefault(depth(number), []).append(number)
    left = 0.0
    for column in sorted(columns):
        top = NOTE_HEIGHT + GAP_BELOW if column == 0 else 0.0
        members = sorted(columns[column], key=lambda number: (height_of_sources(number), number))
        for number in members:
            width, height = map(max, nodes[number]["size"], SMALLEST.get(nodes[number]["type"], (0, 0)))
            nodes[number].update(pos=[left, top], size=[width, height])
            if nodes[number]["type"] == "LoadGPSToken":
                nodes[number].setdefault("properties", {})["models"] = RELEASES
            # The page's own choice, randomize, would run everything anew on each Queue.
            values = ["fixed" if value == "randomize" else value for value in nodes[number].get("widgets_values", [])]
            nodes[number]["widgets_values"] = values
            top += height + GAP_BELOW
        left += max(nodes[number]["size"][0] for number in members) + GAP
    note = {
        "id": max(nodes) + 1,
        "type": "MarkdownNote",
        "pos": [0.0, 0.0],
        "size": [max(nodes[number]["size"][0] for number in columns[0]), NOTE_HEIGHT],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [text],
        "title": "What this is",
    }
    return graph | {"nodes": [*graph["nodes"], note], "last_node_id": note["id"]}


# Previews that the picture of the Templates dialog shows beside each other, and the part of them; else "picture" alone.
THUMBNAILS = {
    "2_focus_tokens_by_a_mask": (("without", "picture"), (200, 40, 400, 340)),
    "5_inpaint": (("preview before", "picture"), None),
    "6_edit_a_layout_by_hand": (("gaussians",), None),
}


def row(pictures: list[Image.Image]) -> Image.Image:
    """Up to four pictures of one height beside each other, as small as a thumbnail needs."""
    scaled = [one.convert("RGB").resize((round(one.width * PICTURE_PX / one.height), PICTURE_PX)) for one in pictures]
    sheet = Image.new("RGB", (sum(one.width for one in scaled), PICTURE_PX), "white")
    left = 0
    for one in scaled:
        sheet.paste(one, (left, 0))
        left += one.width
    return sheet


def square(pictures: list[Image.Image]) -> Image.Image:
    """One or two pictures in a row, or four in a square."""
    if len(pictures) != 4:
        return row(pictures)
    half = PICTURE_PX // 2
    sheet = Image.new("RGB", (2 * half, 2 * half), "white")
    for place, one in enumerate(pictures):
        sheet.paste(one.convert("RGB").resize((half, half)), (place % 2 * half, place // 2 * half))
    return sheet


def main() -> None:
    WORKFLOWS.mkdir(exist_ok=True)
    PARTS.mkdir(exist_ok=True)
    with ComfyUIServer(ensure_server(), "clone") as server, open_browser(find_chromium()) as browser:
        with ComfyUIPage(browser, server, "GPSEncode") as page:
            for name, (text, described) in workflows().items():
                workflow, numbers = numbered(described)
                graph = arrange(page.ui_workflow_from_api(workflow), text)
                (WORKFLOWS / f"{name}.json").write_text(json.dumps(graph, indent=1) + "\n", encoding="utf-8")
                pictures = server.images(server.run(workflow, timeout=300))
                keys, part = THUMBNAILS.get(name, (("picture",), None))
                shown = [one.crop(part) if part else one for key in keys for one in pictures[numbers[key]]]
                square(shown).save(WORKFLOWS / f"{name}.jpg", quality=88)
                print(name)
            for name in parts():
                text = json.dumps(make_part(page, name), indent=1) + "\n"
                (PARTS / f"{name}.json").write_text(text, encoding="utf-8")
                print(name)


if __name__ == "__main__":
    main()
