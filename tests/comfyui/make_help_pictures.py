#!/usr/bin/env python
"""Makes the pictures of the nodes' help pages and the screenshots of the README anew, by running the nodes.

    python tests/comfyui/make_help_pictures.py

The server is that of the tests, with this checkout as a clone; the screenshots are of its page, with example workflows.
Run make_example_workflows.py first where those have changed.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))

from comfyui.comfyui_page import ComfyUIPage, open_browser  # noqa: E402
from comfyui.comfyui_server import ComfyUIServer  # noqa: E402
from comfyui.fetch_comfyui import ensure_newest_page, ensure_server, find_chromium  # noqa: E402
from comfyui.make_example_workflows import MINI, WORKFLOWS, Workflow, box_mask, node  # noqa: E402

HELP_PICTURES = ROOT / "comfyui_nodes" / "web" / "docs" / "pictures"
EDITOR_PICTURE = HELP_PICTURES / "GPSLayoutEditor.jpg"
HELP_BYTES, HELP_HEIGHT = 60_000, 256
SCREENSHOTS = {
    "comfyui_generate.jpg": "3_generate",
    "comfyui_editor.jpg": "6_edit_a_layout_by_hand",
}
SCREENSHOT_BYTES = 200_000
WINDOW = (1600, 800)


def _save(picture: Image.Image, path: Path, largest: int, quality: int = 85) -> None:
    """A JPEG of at most `largest` bytes, of less quality where it must be."""
    while True:
        file = io.BytesIO()
        picture.convert("RGB").save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= largest:
            path.write_bytes(file.getvalue())
            return
        quality -= 5


def row(pictures: list[Image.Image], height: int = HELP_HEIGHT) -> Image.Image:
    """Pictures of one height beside each other, with a little white between."""
    scaled = [one.convert("RGB").resize((round(one.width * height / one.height), height)) for one in pictures]
    sheet = Image.new("RGB", (sum(one.width for one in scaled) + 4 * (len(scaled) - 1), height), "white")
    left = 0
    for one in scaled:
        sheet.paste(one, (left, 0))
        left += one.width + 4
    return sheet


def tokens_workflow() -> Workflow:
    """One graph with an example of nearly every node; the key of each preview is a node id, or begins with one."""
    model = ("model", 0)
    importance = {"importance_strength": 4.0}
    sampling = {"seed": 1, "steps": 20, "guidance": 3.0, "denoise": 1.0, "sampler": "unipc"}
    graph: Workflow = {
        "model": node("LoadGPSToken", model_name=MINI, dtype="auto"),
        "kingfisher": node("GPSExampleImage", picture="kingfisher"),
        "duck": node("GPSExampleImage", picture="duck"),
        "honey pot": node("GPSExampleImage", picture="honey pot"),
        **box_mask(256, 256, (64, 64, 128, 128)),
    }
    for name, count in (("kingfisher", 256), ("duck", 128), ("honey pot", 128)):
        graph[f"tokens of {name}"] = node("GPSEncode", model=model, image=(name, 0), num_tokens=count, **importance)
    duck, pot = ("tokens of duck", 0), ("tokens of honey pot", 0)
    graph |= {
        "lower half": node("SolidMask", value=1.0, width=256, height=136),
        "halves": node(
            "MaskComposite", destination=("ground", 0), source=("lower half", 0), x=0, y=120, operation="add"
        ),
        "head": node("SolidMask", value=1.0, width=150, height=130),
        "head mask": node("MaskComposite", destination=("ground", 0), source=("head", 0), x=0, y=0, operation="add"),
        "moved": node("GPSEditTokens", tokens=duck, action="duplicate", mask=("head mask", 0), dx=100.0, dy=0.0),
        "merged": node("GPSMergeTokens", outside=duck, inside=pot, mask=("halves", 0)),
        "swapped": node("GPSSwapTexture", geometry=duck, texture=pot),
        "frames": node("GPSInterpolate", first=duck, last=pot, frames=4, start=0.0, end=1.0),
        "from image": node("GPSLayoutFromImage", model=model, image=("duck", 0), num_tokens=128, **importance),
        "from mask": node("GPSLayoutFromMask", model=model, mask=("mask", 0), num_tokens=128, strength=8.0),
        "from boxes": node("GPSLayoutFromBoxes", model=model, boxes="64, 64, 128, 128\n96, 96, 32, 32", num_tokens=128),
        "generated": node(
            "GPSLayoutGenerate", model=model, label="Smileys", seed=12, steps=20, guidance=2.0, batch_size=4
        ),
        "textured": node(
            "GPSTextureGenerate", model=model, layout=("generated", 0), label="Smileys", **sampling | {"seed": 12}
        ),
        "SaveGPSTokens": node("SaveGPSTokens", tokens=duck, filename_prefix="help/duck"),
    }

    def show(key: str, image: tuple[str, int]) -> None:
        graph[key] = node("PreviewImage", images=image)

    def drawn(key: str, tokens: tuple[str, int], style: str = "ellipses", **image: Any) -> None:
        graph[f"drawn {key}"] = node("GPSVisualize", tokens=tokens, style=style, width=0, height=0, **image)
        show(key, (f"drawn {key}", 0))

    def painted(key: str, tokens: tuple[str, int]) -> None:
        graph[f"painted {key}"] = node("GPSDecode", model=model, tokens=tokens)
        show(key, (f"painted {key}", 0))

    for name in ("kingfisher", "duck", "honey pot"):
        show(f"GPSExampleImage {name}", (name, 0))
    bird = ("tokens of kingfisher", 0)
    drawn("GPSEncode", bird, image=("kingfisher", 0))
    painted("GPSDecode", bird)
    drawn("GPSVisualize ellipses", duck, image=("duck", 0))
    drawn("GPSVisualize glow", duck, "glow", image=("duck", 0))
    drawn("GPSLayoutFromImage", ("from image", 0), image=("duck", 0))
    drawn("GPSLayoutFromMask", ("from mask", 0))
    drawn("GPSLayoutFromBoxes", ("from boxes", 0))
    drawn("GPSLayoutGenerate", ("generated", 0))
    painted("GPSTextureGenerate", ("textured", 0))
    painted("GPSEditTokens", ("moved", 0))
    painted("GPSMergeTokens", ("merged", 0))
    painted("GPSSwapTexture", ("swapped", 0))
    painted("GPSInterpolate", ("frames", 0))
    return graph


def file_workflow(file: str) -> Workflow:
    """The picture of tokens that were saved."""
    return {
        "model": node("LoadGPSToken", model_name=MINI, dtype="auto"),
        "tokens": node("LoadGPSTokens", file=file),
        "decoded": node("GPSDecode", model=("model", 0), tokens=("tokens", 0)),
        "LoadGPSTokens": node("PreviewImage", images=("decoded", 0)),
    }


def make_help_pictures(server: ComfyUIServer) -> None:
    """Writes a picture for every node; LoadGPSToken's shows what the model does, the editor's comes from its page."""
    HELP_PICTURES.mkdir(exist_ok=True)
    found = server.images(server.run(tokens_workflow(), timeout=300))
    file = max(option for option in _files(server) if option.startswith("help/duck"))
    found |= server.images(server.run(file_workflow(file)))
    sheets: dict[str, list[Image.Image]] = {}
    for key in [*tokens_workflow(), "LoadGPSTokens"]:  # in the order in which they are described
        sheets.setdefault(key.split()[0], []).extend(found.get(key, []))
    sheets["LoadGPSToken"] = [*found["GPSExampleImage kingfisher"], *found["GPSEncode"], *found["GPSDecode"]]
    for name, pictures in sheets.items():
        if pictures:
            _save(row(pictures), HELP_PICTURES / f"{name}.jpg", HELP_BYTES)


def _files(server: ComfyUIServer) -> list[str]:
    return server.object_info("LoadGPSTokens")["LoadGPSTokens"]["input"]["required"]["file"][1]["options"]


def take_screenshots(page: ComfyUIPage) -> None:
    """Writes the README's screenshots, and, from the second of them, the help picture of the Layout Editor."""
    page.server.post_json("/settings", {"LiteGraph.Canvas.MinFontSizeForLOD": 0})  # text however small the graph is
    for name, workflow in SCREENSHOTS.items():
        page.open()
        page.open_workflow(WORKFLOWS / f"{workflow}.json")
        page.queue_and_wait(timeout=300)
        if "editor" in name:
            move_head(page)
            page.queue_and_wait(timeout=300)
            # What is selected fills the picture.
            page.evaluate("""() => app.canvas.selectItems(app.graph.nodes.filter(
                node => ['GPSEncode', 'GPSLayoutEditor'].includes(node.type) || node.title === 'edited'))""")
        _take(page.screenshot, ROOT / "docs" / "pictures" / name, SCREENSHOT_BYTES)
    _take(lambda path: page.page.screenshot(path=path, clip=_editor(page)), EDITOR_PICTURE, HELP_BYTES)


def move_head(page: ComfyUIPage) -> None:
    """In the Layout Editor: draws a box around the duck's head, and drags what it holds to the right."""
    box = page.page.locator(".gps-layout canvas").bounding_box()

    def pull(start: tuple[float, float], end: tuple[float, float]) -> None:
        """From a place of the editor to another, in widths and heights of it."""
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
        page.mouse.move(*places[0])
        page.mouse.down()
        page.mouse.move(*places[1], steps=8)
        page.mouse.up()

    page.page.keyboard.down("Shift")
    pull((0.04, 0.03), (0.52, 0.46))
    page.page.keyboard.up("Shift")
    pull((0.33, 0.22), (0.53, 0.22))


def _editor(page: ComfyUIPage) -> dict[str, float]:
    """Where in the window the editor is: its node, whatever it is made of."""
    x, y, width, height = page.evaluate(
        "() => app.graph.nodes.find(node => node.type === 'GPSLayoutEditor').getBounding()"
    )
    (left, top), (right, bottom) = page.position(x, y), page.position(x + width, y + height)
    return {"x": left, "y": top, "width": right - left, "height": bottom - top}


def _take(take: Callable[[str], Any], path: Path, largest: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        take(f"{folder}/shot.png")
        _save(Image.open(f"{folder}/shot.png"), path, largest)


def main() -> None:
    with ComfyUIServer(ensure_server(), "clone", frontend=ensure_newest_page()) as server:
        make_help_pictures(server)
        server.post_json("/settings", {"Comfy.VueNodes.Enabled": True})  # Nodes 2.0
        print(f"{HELP_PICTURES}: {len(list(HELP_PICTURES.iterdir()))} pictures")
        with open_browser(find_chromium()) as browser, ComfyUIPage(browser, server, "GPSEncode", WINDOW) as page:
            take_screenshots(page)
    print(", ".join(SCREENSHOTS))


if __name__ == "__main__":
    main()
