#!/usr/bin/env python
"""What the nodes cost a ComfyUI: start-up, the first Queue, memory.

    python tests/benchmarks/benchmark_comfyui.py

Starts a real server with the nodes and without them in turn, and runs two example workflows on it: as they are opened
(the model is loaded, nothing is cached), and with another seed or number of tokens after that.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comfyui.comfyui_server import ComfyUIServer  # noqa: E402
from comfyui.fetch_comfyui import ensure_server  # noqa: E402
from comfyui.make_example_workflows import numbered, workflows  # noqa: E402

ROUNDS = 3


def peak_megabytes(server: ComfyUIServer) -> float:
    """The most that the server's process has held in memory."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def seconds(server: ComfyUIServer, workflow: dict) -> float:
    started = time.perf_counter()
    server.run(workflow, timeout=600)
    return time.perf_counter() - started


def main() -> None:
    install = ensure_server()
    starts: dict[str | None, list[float]] = {None: [], "clone": []}
    imports, rows = [], {}
    for _ in range(ROUNDS):
        for way, found in starts.items():
            with ComfyUIServer(install, way) as server:
                found.append(server.start_seconds)
                if way is None:
                    continue
                imports.append(float(re.search(r"([\d.]+) seconds: .*gpstoken_diffusers", server.log())[1]))
                empty = peak_megabytes(server)
                for name, key, value in (("1_reconstruct", "num_tokens", 128), ("3_generate", "seed", 2)):
                    workflow = numbered(workflows()[name][1])[0]
                    server.free()
                    first = seconds(server, workflow)
                    for one in workflow.values():
                        if key in one["inputs"]:
                            one["inputs"][key] = value
                    rows.setdefault(name, []).append((first, seconds(server, workflow), peak_megabytes(server) - empty))
    print(f"server ready: {statistics.median(starts[None]):.1f} s without the nodes, ", end="")
    print(f"{statistics.median(starts['clone']):.1f} s with them; ComfyUI counts {statistics.median(imports):.2f} s")
    for name, found in rows.items():
        first, second, memory = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{name}: first Queue {first:.1f} s, again {second:.1f} s, at most {memory:.0f} MB more than empty")


if __name__ == "__main__":
    main()
