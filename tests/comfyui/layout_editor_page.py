"""The Layout Editor in the real page as people use it: places are given in pixels of the picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from comfyui.comfyui_client import Workflow
from comfyui.comfyui_server import ComfyUIServer

if TYPE_CHECKING:  # it needs playwright, without which its tests skip
    from comfyui.comfyui_page import ComfyUIPage

NODE = "GPSLayoutEditor"
SIDE = 256
MARGIN = 26  # CSS pixels around the picture on the editor's canvas

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


SET_WIDGET = """([type, name, value]) => {
    app.graph.nodes.find(node => node.type === type).widgets.find(widget => widget.name === name).value = value;
    app.canvas.setDirty(true, true);
}"""


# Of the editor's canvas, at points of the window.
PIXELS = """points => {
    const canvas = document.querySelector('.gps-layout canvas'), box = canvas.getBoundingClientRect();
    const context = canvas.getContext('2d'), scale = canvas.width / box.width;
    return points.map(([x, y]) =>
        [...context.getImageData(Math.round((x - box.left) * scale), Math.round((y - box.top) * scale), 1, 1).data]);
}"""


def busy_picture() -> Image.Image:
    """Much to see in the left half, so that tokens there are small."""
    picture = Image.new("RGB", (SIDE, SIDE), (90, 120, 150))
    draw = ImageDraw.Draw(picture)
    for place in range(24):
        x, y = 8 + 13 * (place % 8), 60 + 36 * (place // 8)
        draw.ellipse((x, y, x + 9, y + 17), fill=(250 - 9 * place, 40 + 8 * place, (70 * place) % 255))
    return picture


def with_picture(server: ComfyUIServer, picture: Image.Image, name: str = "layout_editor.png") -> Workflow:
    """GRAPH with a picture."""
    return GRAPH | {"2": {"class_type": "LoadImage", "inputs": {"image": server.upload_image(picture, name)}}}


class Editor:
    """The editor, in a page of its server."""

    def __init__(self, server: ComfyUIServer, page: ComfyUIPage):
        self.server, self.page = server, page
        self.graph = with_picture(server, busy_picture())
        self.geometry = self.unedited = None

    def with_gaussians(self) -> Iterator[Editor]:
        """For a fixture: the editor with its Gaussians, nothing done yet; `unedited` is what they show."""
        self.open(self.graph)
        self.unedited = self.queue()
        yield self
        assert self.page.errors == []

    @property
    def canvas(self):
        return self.page.page.locator(".gps-layout canvas")

    def open(self, graph) -> None:
        if not self.page.untouched:
            self.page.open()
        self.page.ui_workflow_from_api(graph)
        self.look()

    def set(self, node: str, widget: str, value) -> None:
        """As somebody who changes a widget of another node."""
        self.page.evaluate(SET_WIDGET, [node, widget, value])
        self.page.page.wait_for_timeout(300)

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
        return json.loads(self.text or "{}")

    @property
    def text(self) -> str:
        return self.page.evaluate(VALUE)

    @property
    def notice(self):
        return self.page.page.locator(".gps-layout-notice")

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

    def held(self, key: str, action) -> None:
        self.page.page.keyboard.down(key)
        action()
        self.page.page.keyboard.up(key)

    def pixels(self, points) -> np.ndarray:
        """(P, 3): what is drawn at points of the picture."""
        return np.array(self.page.evaluate(PIXELS, [self.window(*point) for point in points]))[:, :3]

    def outline(self, geometry, mirrored: bool = False) -> np.ndarray:
        """(60, 3): what is drawn where the ellipse of a Gaussian, or its mirror image, should be."""
        (sigma_x, sigma_y, rho, x, y), half = geometry, (SIDE - 1) / 2
        shared = rho * sigma_x * sigma_y * (-1 if mirrored else 1)
        axes = np.linalg.cholesky([[sigma_x**2, shared], [shared, sigma_y**2]]) * 1.5 * half
        angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ axes.T + [(x + 1) * half, (y + 1) * half]
        return self.pixels(points.tolist())

    def handle(self, index: int, u: float, v: float) -> tuple[float, float]:
        """A handle of a selected token as it was, in whose frame the sides are at -1 and 1: they stand off 4 px."""
        (x, y), (radius_x, radius_y) = self.place(index), self.radii(index)
        box = self.canvas.bounding_box()
        scale = (box["width"] / 1.25 - 2 * MARGIN) / SIDE  # the canvas is higher than wide
        gap = 4 / 1.25 / scale
        return x + u * (radius_x + gap), y + v * (radius_y + gap)
