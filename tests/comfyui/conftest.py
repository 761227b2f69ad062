"""Servers, pages and a folder for pictures. Where something cannot be had, tests are skipped, or fail on request.

GPSTOKEN_REQUIRE_COMFYUI=1 makes them fail: a machine that is meant to run these tests must not pass by skipping them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import pytest

from comfyui.comfyui_server import ComfyUIServer
from comfyui.fetch_comfyui import ServerInstall, Unobtainable, ensure_newest_page, ensure_server, find_chromium

# Settings of the pages that people have: the server's own, and the newest, in which desktops have Nodes 2.0.
PAGES = {
    "own page": {"Comfy.VueNodes.Enabled": False},
    "newest page": {"Comfy.VueNodes.Enabled": False},
    "newest page, Nodes 2.0": {"Comfy.VueNodes.Enabled": True},
}

OUR_NODE = "GPSEncode"  # a page of a server with our nodes is ready when it knows this one


def missing(what: str) -> NoReturn:
    """Ends a test that cannot run here."""
    if os.environ.get("GPSTOKEN_REQUIRE_COMFYUI") == "1":
        pytest.fail(f"GPSTOKEN_REQUIRE_COMFYUI=1, but {what}", pytrace=False)
    pytest.skip(what)


# The scope of most is this package: servers take memory, and playwright keeps other tests from using asyncio meanwhile.
@pytest.fixture(scope="package")
def server_install() -> ServerInstall:
    try:
        return ensure_server()
    except Unobtainable as error:
        missing(f"no ComfyUI: {error} (python tests/comfyui/fetch_comfyui.py fetches it)")


@pytest.fixture(scope="package")
def comfyui_here(server_install) -> None:
    """ComfyUI's modules can be imported in this process; they compute on the CPU."""
    sys.path += [str(server_install.source), str(server_install.packages)]
    import utils.install_util  # noqa: F401 some packages leave a module of this name behind
    from comfy.cli_args import args

    args.cpu = True


# A node that passes tokens on, says which models ComfyUI holds, and makes it unload them all if asked to.
PROBE = """
import comfy.model_management as memory

class LoadedModels:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"tokens": ("GPS_TOKENS",), "unload": ("BOOLEAN",)}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = ("GPS_TOKENS",), "look", True, "tests"

    def look(self, tokens, unload):
        names = [type(one.model.model.network).__name__ for one in memory.current_loaded_models]
        if unload:
            memory.unload_all_models()
        return {"ui": {"text": [*names, f"{len(memory.current_loaded_models)} left"]}, "result": (tokens,)}

NODE_CLASS_MAPPINGS = dict(LoadedModels=LoadedModels)  # ComfyUI-Manager looks for braces
"""


def _server(install: ServerInstall, way: str) -> Iterator[ComfyUIServer]:
    with ExitStack() as stack:
        try:
            server = stack.enter_context(ComfyUIServer(install, way, {"probe/__init__.py": PROBE}))
        except Unobtainable as error:
            missing(f"the nodes cannot be installed for ComfyUI: {error}")
        yield server


@pytest.fixture(scope="package")
def comfyui_clone(server_install) -> Iterator[ComfyUIServer]:
    """A server with this checkout in custom_nodes."""
    yield from _server(server_install, "clone")


@pytest.fixture(scope="package")
def comfyui_newest_page(server_install, comfyui_clone) -> Iterator[ComfyUIServer]:
    """Another server with this checkout, which serves the newest page."""
    with ComfyUIServer(server_install, "clone", frontend=ensure_newest_page(), beside=comfyui_clone) as server:
        yield server


@pytest.fixture(scope="package")
def comfyui_pip(server_install) -> Iterator[ComfyUIServer]:
    """A server with the wheel of this checkout installed, and what our own command puts into custom_nodes."""
    yield from _server(server_install, "pip")


@pytest.fixture(scope="package")
def open_page() -> Iterator[Callable[..., Any]]:
    """Opens the page of a server: `open_page(server, node)` gives a `ComfyUIPage`, closed after the last test.

    `version` is one of `PAGES`, and the server must be one that serves it.
    """
    try:
        from comfyui.comfyui_page import ComfyUIPage, open_browser
    except ModuleNotFoundError as error:
        missing(f"the page needs {error.name}: pip install '.[comfyui]'")
    if (chromium := find_chromium()) is None:
        missing("the page needs Chromium: install it, or set GPSTOKEN_CHROMIUM to a Chromium or Chrome")
    with ExitStack() as stack:
        browser = stack.enter_context(open_browser(chromium))

        def open_page(server, node, version="own page"):
            return stack.enter_context(ComfyUIPage(browser, server, node, settings=PAGES[version]))

        yield open_page


@pytest.fixture(scope="package")
def comfyui_page_clone(comfyui_clone, open_page):
    return open_page(comfyui_clone, OUR_NODE)


@pytest.fixture(scope="package")
def comfyui_page_newest(comfyui_newest_page, open_page):
    return open_page(comfyui_newest_page, OUR_NODE, "newest page")


@pytest.fixture(scope="package")
def comfyui_page_pip(comfyui_pip, open_page):
    return open_page(comfyui_pip, OUR_NODE)


@pytest.fixture(scope="package")
def layout_editor(comfyui_clone, open_page):
    """An `Editor`: the Layout Editor in a page of its own."""
    from comfyui.layout_editor_page import NODE, Editor  # needs what a page needs

    return Editor(comfyui_clone, open_page(comfyui_clone, NODE))


@pytest.fixture
def editor(layout_editor):
    """The Layout Editor with its Gaussians, nothing done yet."""
    yield from layout_editor.with_gaussians()


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory) -> Path:
    """Where screenshots go: $GPSTOKEN_ARTEFACTS, or a temporary folder."""
    if named := os.environ.get("GPSTOKEN_ARTEFACTS"):
        Path(named).mkdir(parents=True, exist_ok=True)
        return Path(named).resolve()
    return tmp_path_factory.mktemp("artefacts")
