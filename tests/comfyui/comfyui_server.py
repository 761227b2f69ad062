"""A real ComfyUI server with our nodes in it, in one of the two ways in which people install them."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from comfyui.comfyui_client import ComfyUIClient
from comfyui.fetch_comfyui import ServerInstall, Unobtainable, clean_environment, run

CHECKOUT = Path(__file__).resolve().parents[2]
NODE_FOLDER = "gpstoken_diffusers"

_START_SECONDS = 180  # some ten on an idle machine
_STOP_SECONDS = 15
_NO_CUDA = {"CMAKE_ARGS": "-DGPSTOKEN_CUDA=OFF"}  # the server runs on the CPU, and nvcc takes minutes

# Reads until the pipe from the test process closes, however that ended, then ends the server's process group.
_WATCHER = "import os, signal, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), signal.SIGKILL)"

_LIST_PACKAGES = """
import json
from importlib import metadata
found = {}
for distribution in metadata.distributions():
    found.setdefault(distribution.name, distribution.version)
print(json.dumps(found))
"""


class ComfyUIServer(ComfyUIClient):
    """A context manager: inside, the server runs; after it, it does not, nor does anything that it has started.

    Args:
        install: what [`ensure_server`] gave.
        way: how our nodes come into it. "clone": the checkout in custom_nodes, then what ComfyUI-Manager runs, pip for
            each line of requirements.txt and install.py. "pip": the wheel, then `gpstoken_diffusers comfyui install`.
            None: they do not.
        nodes: further files for custom_nodes: path and text.
        frontend: a folder with another version of ComfyUI's page; None serves the version that came with the server.
        beside: a server that runs, whose installation and folders this one shares: no installing, which takes longest.

    Attributes:
        base: the folder with custom_nodes, input, models, output, temp and user.
        python: the python that runs the server.
        node_folder: the copy of the checkout inside custom_nodes, for the way "clone".
        packages_before, packages_after: names and versions of the installed packages before and after our nodes came.
        process: the server's process.
        start_seconds: from the start of that process to its first answer.
    """

    def __init__(
        self,
        install: ServerInstall,
        way: Literal["clone", "pip"] | None,
        nodes: Mapping[str, str] | None = None,
        frontend: Path | None = None,
        beside: ComfyUIServer | None = None,
    ):
        self.install, self.way, self.nodes = install, way, nodes or {}
        self.frontend, self.beside = frontend, beside
        self.folder = self.process = None

    def __enter__(self) -> ComfyUIServer:
        self.folder = Path(tempfile.mkdtemp(prefix="gpstoken-comfyui-"))
        atexit.register(self.stop)  # a context manager whose end never comes, as in a debugger that is left
        try:
            self._prepare()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def log(self) -> str:
        """What the server has printed so far."""
        path = self.folder / "server.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def stop(self) -> None:
        """Ends the server, whatever it is doing, and removes its folder."""
        atexit.unregister(self.stop)
        if self.process is not None:
            end_group(self.process)
            self._watcher.kill()
            self._watcher.communicate()
            self.process = None
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def request(self, path: str, body: bytes | None = None, content_type: str = "") -> bytes:
        try:
            return super().request(path, body, content_type)
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            if self.process is None or self.process.poll() is not None:
                raise RuntimeError(f"the server is not running any more; its log ends\n{self._log_tail()}") from error
            raise

    # ---- our nodes ----

    def _prepare(self) -> None:
        if self.beside is not None:
            self.python, self.base, self.node_folder = self.beside.python, self.beside.base, self.beside.node_folder
            return
        self.python = self.install.make_environment(self.folder / "venv")
        self.base = self.folder / "base"
        for name in ("custom_nodes", "input", "models", "output", "temp", "user"):
            (self.base / name).mkdir(parents=True)
        for name, text in self.nodes.items():
            path = self.base / "custom_nodes" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.node_folder = self.base / "custom_nodes" / NODE_FOLDER
        self.packages_before = self.packages_after = self._packages()
        if self.way is not None:
            self._clone() if self.way == "clone" else self._pip()
            self.packages_after = self._packages()

    def _clone(self) -> None:
        copy_checkout(self.node_folder)
        requirements = self.node_folder / "requirements.txt"
        if requirements.is_file():
            for line in map(str.strip, requirements.read_text().splitlines()):
                if line and not line.startswith("#"):
                    run([self.python, "-m", "pip", "install", line], folder=self.node_folder)
        if (self.node_folder / "install.py").is_file():
            self._run_ours("install.py", folder=self.node_folder)

    def _pip(self) -> None:
        run([self.python, "-m", "pip", "install", built_wheel(self.install)], folder=self.folder)
        self._run_ours("-m", "gpstoken_diffusers", "comfyui", "install", str(self.base), folder=self.folder)

    def _run_ours(self, *arguments: str, folder: Path) -> None:
        """Our own commands: if one fails, something is broken, not missing."""
        try:
            run([self.python, *arguments], folder=folder, environment=clean_environment(**_NO_CUDA))
        except Unobtainable as error:
            raise RuntimeError(f"{error} (all that it printed is above)") from None

    def _packages(self) -> dict[str, str]:
        command = [self.python, "-c", _LIST_PACKAGES]
        return json.loads(subprocess.check_output(command, env=clean_environment(), cwd=self.folder))

    # ---- the process ----

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        super().__init__(f"http://127.0.0.1:{port}")
        command = [self.python, "-u", "main.py", "--cpu", "--port", port, "--listen", "127.0.0.1"]
        command += ["--base-directory", self.base, "--database-url", f"sqlite:///{self.folder / 'comfyui.db'}"]
        command += ["--temp-directory", self.folder]  # each server empties its own when it starts
        command += ["--front-end-root", self.frontend] if self.frontend else []
        command += ["--disable-api-nodes", "--disable-auto-launch", "--preview-method", "auto"]
        with open(self.folder / "server.log", "wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.install.source,
                env=clean_environment(HF_HUB_OFFLINE="1"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._watcher = watch(self.process)
        started = time.monotonic()
        deadline = started + _START_SECONDS
        while True:
            try:
                self.get_json("/system_stats")
                self.start_seconds = time.monotonic() - started
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    message = f"the server should answer after {_START_SECONDS} s; its log ends\n{self._log_tail()}"
                    raise RuntimeError(message) from error
            time.sleep(0.2)

    def _log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log().splitlines()[-lines:])


def copy_checkout(folder: Path) -> None:
    """Copies what a clone of the checkout as it is now would hold: no ignored files, but those not yet committed."""
    # The checkout may belong to someone else, which git refuses to read unless told.
    listing = ["git", "-c", "safe.directory=*", "-C", CHECKOUT, "ls-files", "-z", "-co", "--exclude-standard"]
    for name in run(listing).split("\0"):
        if name and (CHECKOUT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, folder / name)


@functools.cache
def built_wheel(install: ServerInstall) -> Path:
    """The wheel of the checkout as it is now, built once per process."""
    folder = Path(tempfile.mkdtemp(prefix="gpstoken-wheel-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    python = install.make_environment(folder / "venv")
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, CHECKOUT]
    run(command, environment=clean_environment(**_NO_CUDA))
    (wheel,) = folder.glob("*.whl")
    return wheel


def watch(process: subprocess.Popen) -> subprocess.Popen:
    """Starts a process that ends the process group of `process` when this one is gone, even if it was killed."""
    command = [sys.executable, "-S", "-c", _WATCHER, str(process.pid)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def end_group(process: subprocess.Popen, patience: float = _STOP_SECONDS) -> None:
    """Asks a process and its children to end; those that have not after `patience` seconds are killed."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(patience)
    with contextlib.suppress(ProcessLookupError):  # children may outlive the process
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
