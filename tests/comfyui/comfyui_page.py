"""ComfyUI's page in a real headless browser: opens workflows, queues them as a user does, takes pictures."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Mouse, Page, sync_playwright
from playwright.sync_api import TimeoutError as BrowserTimeout

from comfyui.comfyui_client import PromptRefused, Workflow
from comfyui.comfyui_server import ComfyUIServer

_FLAGS = ["--no-sandbox", "--disable-gpu", "--use-angle=swiftshader", "--disable-dev-shm-usage"]
_FLAGS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # the page asks for things from elsewhere
_OURS = "/extensions/gpstoken"
_TRANSLATED_HELP = re.compile(r"/docs/\w+/[\w-]+\.md\b")
_LOAD_SECONDS = 90
_SETTLE_SECONDS = 2  # moving the view and loading previews are animations: nothing says when they are over

_SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}  # the minimap hides a part of the graph

# The graph that a page shows by itself comes after `vueAppReady`, and would replace what a test opens earlier.
_READY = """node => window.app && app.graph && app.vueAppReady && app.graph.nodes.length
    && window.LiteGraph && LiteGraph.registered_node_types[node]"""

_SHOWN = "() => app.graph.nodes.map(node => node.type).sort()"

_WATCH = """() => {
    window.finishedPrompts = {};
    for (const event of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(event, ({detail}) => { window.finishedPrompts[detail.prompt_id] = event; });
}"""

_POSITION = """([x, y]) => {
    const {left, top} = app.canvas.canvas.getBoundingClientRect(), {offset, scale} = app.canvas.ds;
    return [left + (x + offset[0]) * scale, top + (y + offset[1]) * scale];
}"""


@contextmanager
def open_browser(executable: str) -> Iterator[Browser]:
    """A headless Chromium. Only one at a time, as playwright's event loop belongs to the thread."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class ComfyUIPage:
    """A context manager: inside, the page of a server is open, and every node type is registered.

    Args:
        browser: what [`open_browser`] gives.
        server: the server whose page to open.
        node: id of a node that must be there before the page counts as ready.
        size: width and height of the window.
        settings: of the page, beside those that all have.
    """

    def __init__(
        self,
        browser: Browser,
        server: ComfyUIServer,
        node: str,
        size: tuple[int, int] = (1600, 1000),
        settings: dict[str, Any] | None = None,
    ):
        self.browser, self.server, self.node, self.size = browser, server, node, size
        self.settings = settings or {}
        self.page: Page | None = None

    def __enter__(self) -> ComfyUIPage:
        self.open()
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        if self.page is not None:
            self.page.context.close()
            self.page = None

    # ---- opening ----

    def open(self, query: str = "") -> None:
        """Opens the page anew, as in a browser that has never been there: the workflow of before is gone.

        `untouched` is whether no workflow has been opened since.
        """
        self.close()
        self.server.post_json("/settings", _SETTINGS | self.settings)
        width, height = self.size
        self.page = self.browser.new_context(viewport={"width": width, "height": height}).new_page()
        self.page.add_init_script("localStorage.setItem('vueNodesBannerDismissed', 'true')")
        self._messages: list[str] = []
        self.page.on("console", lambda found: found.type == "error" and self._note(found.text, found.location["url"]))
        self.page.on("pageerror", lambda error: self._note(str(error), error.stack or ""))
        self.page.on("requestfailed", lambda request: self._note("request failed", request.url))
        self.page.on("response", lambda answer: answer.status >= 400 and self._note(f"{answer.status}", answer.url))
        self.page.goto(f"{self.server.address}/{query}", wait_until="domcontentloaded", timeout=_LOAD_SECONDS * 1000)
        self._wait(_READY, self.node, _LOAD_SECONDS, f"the page should be ready and know the node {self.node}")
        self.evaluate(_WATCH)
        self.untouched = True

    def open_template(self, name: str, source: str) -> None:
        """Opens the page anew with a workflow template, as the link of a template does.

        Args:
            name: the template's file name without .json.
            source: the folder of custom_nodes that has it in one of its template folders.
        """
        path = "/".join(urllib.parse.quote(part) for part in ("/api/workflow_templates", source, f"{name}.json"))
        expected = _node_types(self.server.get_json(path))
        self.open("?" + urllib.parse.urlencode({"template": name, "source": source}))
        self._wait_for_nodes(expected, f"template {name} of {source}")

    def open_workflow(self, path: Path | str) -> None:
        """Opens a workflow file in the page that is open: JSON of either format, or a picture that carries one."""
        path, self.untouched = Path(path), False
        self.evaluate("() => app.graph.clear()")
        self.page.set_input_files("#comfy-file-input", path)
        if path.suffix == ".json":
            self._wait_for_nodes(_node_types(json.loads(path.read_text())), path.name)
        else:
            self._wait("() => app.graph.nodes.length", None, _LOAD_SECONDS, f"{path.name} should carry a workflow")

    # ---- running ----

    def queue_and_wait(self, timeout: float = 120) -> dict[str, Any]:
        """Queues the open workflow by the keyboard and waits until the page knows that it is done.

        Gives the history entry, with its "outcome", and raises what [`ComfyUIServer.wait`] does, or [`PromptRefused`].
        After a failure a dialog that tells of it covers the page until [`open`] is called.
        """
        try:
            with self.page.expect_response(lambda found: found.url.endswith("/api/prompt"), timeout=30_000) as caught:
                self.page.keyboard.press("Control+Enter")
        except BrowserTimeout:
            raise RuntimeError(f"Control+Enter should queue the workflow; no prompt was sent: {self.errors}") from None
        answer = caught.value.json()
        if caught.value.status != 200:
            raise PromptRefused(answer["error"], answer["node_errors"])
        prompt_id = answer["prompt_id"]
        self._wait("id => window.finishedPrompts[id]", prompt_id, timeout, "the page should hear of the workflow's end")
        return self.server.wait(prompt_id, timeout=10)

    # ---- looking ----

    def screenshot(self, path: Path | str, fit: bool = True) -> None:
        """A picture of the window, with the whole graph in view unless `fit` is off."""
        self.fit_view() if fit else self.settle()
        self.page.screenshot(path=path)

    def fit_view(self) -> None:
        """Brings the whole graph into view."""
        self.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.settle()

    def settle(self) -> None:
        """Waits until the page should have stopped moving."""
        self.page.wait_for_timeout(_SETTLE_SECONDS * 1000)

    @property
    def errors(self) -> list[str]:
        """What the console, failed requests and uncaught exceptions have said of our files since the page opened.

        The page asks for a translated help page first, and takes the other where there is none.
        """
        return [message for message in self._messages if _OURS in message and not _TRANSLATED_HELP.search(message)]

    @property
    def all_errors(self) -> list[str]:
        """The same of all files: ComfyUI's own page is not free of errors."""
        return list(self._messages)

    @property
    def mouse(self) -> Mouse:
        return self.page.mouse

    def position(self, x: float, y: float) -> tuple[float, float]:
        """Where in the window a point of the graph is, for the mouse: it may lie under a button before `fit_view`."""
        return tuple(self.evaluate(_POSITION, [x, y]))

    def evaluate(self, expression: str, argument: Any = None) -> Any:
        """The value of a JavaScript expression, or of a function called with `argument`, inside the page."""
        return self.page.evaluate(expression, argument)

    # ---- workflows ----

    def api_workflow(self) -> Workflow:
        """The open workflow in the API format, as the page would queue it."""
        return self.evaluate("async () => (await app.graphToPrompt()).output")

    def ui_workflow(self) -> dict[str, Any]:
        """The open workflow in the format of workflow files."""
        return json.loads(self.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def ui_workflow_from_api(self, workflow: Workflow) -> dict[str, Any]:
        """Opens a workflow in the API format, which lays it out, and gives it in the format of workflow files."""
        known = "types => types.filter(type => !LiteGraph.registered_node_types[type])"
        if missing := self.evaluate(known, _node_types(workflow)):
            raise ValueError(f"the workflow needs nodes that the page does not know: {', '.join(missing)}")
        self.untouched = False
        self.evaluate("async workflow => { await app.loadApiJson(workflow, 'workflow') }", workflow)
        self._wait_for_nodes(_node_types(workflow), "the API workflow")
        return self.ui_workflow()

    def _wait_for_nodes(self, expected: list[str], what: str) -> None:
        same = "expected => JSON.stringify(app.graph.nodes.map(node => node.type).sort()) === JSON.stringify(expected)"
        try:
            self._wait(same, expected, _LOAD_SECONDS, f"{what} should open with the nodes {expected}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}, but the page shows {self.evaluate(_SHOWN)}") from None

    def _wait(self, condition: str, argument: Any, seconds: float, expected: str) -> None:
        try:
            # A timer: in a page that nobody looks at frames, the default, may be rare.
            self.page.wait_for_function(condition, arg=argument, timeout=seconds * 1000, polling=100)
        except BrowserTimeout:
            raise TimeoutError(f"{expected} after {seconds} s; errors: {self._messages[-5:]}") from None

    def _note(self, text: str, where: str) -> None:
        self._messages.append(f"{text} ({where})" if where and where not in text else text)


def _node_types(workflow: dict[str, Any]) -> list[str]:
    """Sorted, of a workflow in either format."""
    if isinstance(workflow.get("nodes"), list):
        return sorted(node["type"] for node in workflow["nodes"])
    return sorted(node["class_type"] for node in workflow.values())
