"""Scripts run as users run them, each in a process of its own, without waiting for the imports every time."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Importing takes most of a short run: one process imports, and every script runs in forks of it.
_SERVER = """
import json, os, runpy, socket, sys
import accelerate, diffusers, torch, torchvision
import gpstoken_diffusers
for name in gpstoken_diffusers.__all__:
    getattr(gpstoken_diffusers, name)

def become(rank, run, port):
    os.setsid()  # a group of its own, as that of a program that a shell starts
    # What accelerate launch and torchrun set up.
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run["processes"], "LOCAL_WORLD_SIZE": run["processes"]}
    if run["processes"] > 1:
        os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.chdir(run["folder"])
    log = os.open(run["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    script, *sys.argv[1:] = run["command"]
    sys.argv[0] = script
    if script.endswith(".py"):
        sys.path[0] = os.path.dirname(os.path.abspath(script))
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)

for line in sys.stdin:
    run = json.loads(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(run["processes"]):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                become(rank, run, port)
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except BaseException:
                import traceback
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        children.append(child)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen:
    """It ends when this process does, with its input."""
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", _SERVER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT / "tests", env=environment, **pipes)


@dataclass(frozen=True)
class Running:
    """A script that was started: its processes, each of which leads a process group, and where it writes."""

    command: list[str]
    processes: list[int]
    log: Path

    def wait(self) -> tuple[list[int], str]:
        """Exit codes of its processes, and what they wrote."""
        return json.loads(_server().stdout.readline()), self.log.read_text()


def start_script(command: list[object], folder: Path, processes: int = 1) -> Running:
    """Starts a script as `run_script` does; wait for it before another one is started."""
    if not hasattr(os, "fork"):
        pytest.skip("starts processes by fork")
    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    run = {"command": [str(part) for part in command], "folder": str(folder), "log": str(log)}
    server = _server()
    server.stdin.write(json.dumps({**run, "processes": processes}) + "\n")
    server.stdin.flush()
    return Running(run["command"], json.loads(server.stdout.readline()), log)


def run_script(command: list[object], folder: Path, processes: int = 1, fails: bool = False) -> str:
    """Runs a script (its path) or a module (its name) with its arguments on the CPU, and returns what it wrote.

    Args:
        command: what to run.
        folder: where to run it; its output goes to log.txt there.
        processes: how many train together.
        fails: whether it must fail; the test fails where the script does otherwise.
    """
    running = start_script(command, folder, processes)
    codes, text = running.wait()
    assert any(codes) == fails, f"{' '.join(running.command)}\n{text[-4000:]}"
    return text
