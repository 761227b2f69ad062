"""What a client does with a running ComfyUI server, over its HTTP interface and with the standard library alone."""

from __future__ import annotations

import io
import json
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image

Workflow = dict[str, dict[str, Any]]


class PromptRefused(Exception):
    """The server's answer to a workflow that it will not run.

    Args:
        error: what is wrong with the whole.
        node_errors: per node id, what is wrong with the node.
    """

    def __init__(self, error: dict[str, Any] | str, node_errors: dict[str, Any]):
        self.error, self.node_errors = error, node_errors or {}
        details = [
            f"node {node} ({found.get('class_type')}): {problem.get('message')}: {problem.get('details')}"
            for node, found in self.node_errors.items()
            for problem in found.get("errors", [])
        ]
        whole = error.get("message", error) if isinstance(error, dict) else error
        super().__init__("\n".join([str(whole), *details]))


class ExecutionFailed(Exception):
    """A node has raised: its id, the exception's type, message and traceback, and the history entry."""

    def __init__(self, failure: dict[str, Any], entry: dict[str, Any]):
        self.node_id, self.node_type = failure["node_id"], failure["node_type"]
        self.exception_type, self.exception_message = failure["exception_type"], failure["exception_message"]
        self.traceback = "".join(failure["traceback"])
        self.entry = entry
        super().__init__(
            f"node {self.node_id} ({self.node_type}): {self.exception_type}: {self.exception_message}\n{self.traceback}"
        )


class ComfyUIClient:
    """Talks to the server at `address`, such as `http://127.0.0.1:8188`."""

    def __init__(self, address: str):
        self.address = address

    # ---- running workflows ----

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """What the server says of all nodes, or of one: {} for a node that it does not have."""
        return self.get_json("/object_info" if node is None else f"/object_info/{urllib.parse.quote(node)}")

    def queue(self, workflow: Workflow) -> str:
        """Queues a workflow in the API format and gives its prompt id; raises [`PromptRefused`]."""
        try:
            return self.post_json("/prompt", {"prompt": workflow})["prompt_id"]
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            answer = json.loads(error.read())
            raise PromptRefused(answer["error"], answer["node_errors"]) from None

    def wait(self, prompt_id: str, timeout: float = 120) -> dict[str, Any]:
        """Waits until a prompt is done and gives its history entry, with `entry["outcome"]` added.

        The outcome is "success" or "interrupted" (the server's own status is "error" for an interrupted prompt, too).
        Raises [`ExecutionFailed`] where a node has raised.
        """
        deadline = time.monotonic() + timeout
        while not (history := self.get_json(f"/history/{prompt_id}")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"prompt {prompt_id} should be done after {timeout} s: {self.get_json('/queue')}")
            time.sleep(0.05)
        entry = history[prompt_id]
        events = dict(self.events(entry))
        if failure := events.get("execution_error"):
            raise ExecutionFailed(failure, entry)
        entry["outcome"] = "interrupted" if "execution_interrupted" in events else entry["status"]["status_str"]
        return entry

    def run(self, workflow: Workflow, timeout: float = 120) -> dict[str, Any]:
        """Queues a workflow and waits for its end: what [`wait`] gives and raises."""
        return self.wait(self.queue(workflow), timeout)

    def events(self, prompt: str | dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """What the server has noted of a finished prompt, by id or history entry, in order: (event, its data)."""
        entry = self.get_json(f"/history/{prompt}")[prompt] if isinstance(prompt, str) else prompt
        return [(event, data) for event, data in entry["status"]["messages"]]

    def interrupt(self) -> None:
        """Asks the node that runs now to stop."""
        self.post_json("/interrupt", {})

    def free(self) -> None:
        """Makes the server unload all models and forget all results."""
        self.post_json("/free", {"unload_models": True, "free_memory": True})
        # It does so after the next thing that it runs or when it has nothing to run, and tells nobody. A prompt that
        # came at once would still meet the old results.
        blank = {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 0}}
        self.run({"1": blank, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})

    # ---- pictures ----

    def images(self, entry: dict[str, Any]) -> dict[str, list[Image.Image]]:
        """The pictures that a history entry lists, by node id."""
        return {
            node: [self._image(found) for found in output["images"]]
            for node, output in entry["outputs"].items()
            if output.get("images")
        }

    def upload_image(self, image: Path | str | Image.Image, name: str | None = None) -> str:
        """Puts a picture into the server's input folder and gives the name by which LoadImage knows it."""
        if isinstance(image, Image.Image):
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            content, name = buffer.getvalue(), name or f"{secrets.token_hex(4)}.png"
        else:
            content, name = Path(image).read_bytes(), name or Path(image).name
        boundary = secrets.token_hex(16)
        body = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = body.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        answer = self.request("/upload/image", body, f"multipart/form-data; boundary={boundary}")
        return json.loads(answer)["name"]

    def _image(self, found: dict[str, str]) -> Image.Image:
        picture = Image.open(io.BytesIO(self.request(f"/view?{urllib.parse.urlencode(found)}")))
        picture.load()
        return picture

    # ---- HTTP ----

    def get_json(self, path: str) -> Any:
        return json.loads(self.request(path))

    def post_json(self, path: str, data: Any) -> Any:
        answer = self.request(path, json.dumps(data).encode(), "application/json")
        return json.loads(answer) if answer else None

    def request(self, path: str, body: bytes | None = None, content_type: str = "") -> bytes:
        """The body of the answer to a GET, or to a POST where there is a body to send."""
        headers = {"Content-Type": content_type} if content_type else {}
        request = urllib.request.Request(self.address + path, data=body, headers=headers)
        # No proxy: the server is on this machine.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return answer.read()
