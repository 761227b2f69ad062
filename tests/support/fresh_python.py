"""Python processes that know diffusers and nothing of this package yet, and a Hub that is a folder of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# Importing diffusers takes seconds: one process does it, and every case runs in a fork of that process.
_SERVER = """
import hashlib, json, os, sys
import torch
from diffusers import DiffusionPipeline

def trusted(folder, **settings):
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **settings)

def own(folder, **settings):
    from gpstoken_diffusers import GPSTokenPipeline
    return GPSTokenPipeline.from_pretrained(folder, **settings)

def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    layout = {} if pipe.layout_model is not None else {"layout": torch.tensor([[0.3, 0.3, 0.0, 0.1, -0.2]] * 6)}
    images = pipe(0, num_inference_steps=2, layout_num_inference_steps=2, generator=seed, output_type="np", **layout)
    return hashlib.sha256(images.images.tobytes()).hexdigest()

torch.set_num_threads(1)
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a case prints is no answer
if "gpstoken_diffusers" in sys.modules:
    sys.exit("diffusers has imported gpstoken_diffusers by itself")
for line in sys.stdin:
    case = os.fork()
    if case == 0:
        names = json.loads(line)
        names = {**globals(), **names}
        try:
            exec(names["code"], names)
            answer = {"result": names.get("result")}
        except Exception as error:
            answer = {"raised": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\\n")
        answers.flush()
        os._exit(0)
    status = os.waitpid(case, 0)[1]
    if status != 0:
        answers.write(json.dumps({"raised": f"Crash: status {status}"}) + "\\n")
        answers.flush()
"""


class Raised(Exception):
    """What a case raised: the type's name and the message."""


class FreshPython:
    """Runs code in processes in which diffusers is imported, and nothing else.

    Args:
        home: where these processes keep what they download and the code that they run.
        hub: address of the Hub that they know.
    """

    def __init__(self, home: Path, hub: str):
        environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": hub, "OMP_NUM_THREADS": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SERVER],
            env=environment,
            cwd=Path(__file__).parent,  # at the root of a checkout its sources would hide the installed package
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, code: str, **names: Any) -> Any:
        """Runs `code` with these names (text and numbers), and gives what it calls `result`.

        It also has `DiffusionPipeline`, `sys`, `torch`, the two ways to load, `trusted(folder)` and `own(folder)`, and
        `picture(pipe)`, what a pipeline draws for one seed. Raises [`Raised`] for whatever it raises.
        """
        names = {name: str(value) if isinstance(value, Path) else value for name, value in names.items()}
        self.process.stdin.write(json.dumps({**names, "code": textwrap.dedent(code)}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("The process that runs the cases has ended: its own error is above.")
        answer = json.loads(line)
        if "raised" in answer:
            raise Raised(answer["raised"])
        return answer["result"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class FakeHub:
    """Serves the folders `<root>/<owner>/<name>` as repositories of one commit, and takes note of what is asked for."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, root: Path):
        self.root, self.downloaded = root, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path, _, _ = self.path.partition("?")
                parts = path.strip("/").split("/")
                if parts[:2] == ["api", "models"]:
                    self.answer(hub.describe("/".join(parts[2:4]), tree="tree" in parts[4:5]), {})
                elif parts[2:3] == ["resolve"]:
                    file = hub.root.joinpath(*parts[:2], *parts[4:])
                    if self.command == "GET":
                        hub.downloaded.append("/".join(parts[4:]))
                    self.answer(file.read_bytes() if file.is_file() else None, {"ETag": f'"{abs(hash(file)):x}"'})
                else:
                    self.answer(None, {})

            do_HEAD = do_GET

            def answer(self, body: bytes | None, headers: dict[str, str]) -> None:
                self.send_response(404 if body is None else 200)
                if body is None:
                    headers = {"X-Error-Code": "EntryNotFound"}
                headers = {**headers, "X-Repo-Commit": hub.COMMIT, "Content-Length": str(len(body or b""))}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body or b"")

            def log_message(self, *arguments) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def describe(self, repository: str, tree: bool) -> bytes | None:
        folder = self.root / repository
        if not folder.is_dir():
            return None
        files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if tree:
            listing = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": f"{abs(hash(file)):x}"}
                for name, file in files.items()
            ]
            return json.dumps(listing).encode()
        siblings = [{"rfilename": name} for name in files]
        return json.dumps({"id": repository, "sha": self.COMMIT, "siblings": siblings}).encode()

    def close(self) -> None:
        self.server.shutdown()
