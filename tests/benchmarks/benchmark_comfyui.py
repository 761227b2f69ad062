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

from harness import table
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comfyui.comfyui_server import ComfyUIServer  # noqa: E402
from comfyui.fetch_comfyui import ensure_server  # noqa: E402
from comfyui.make_example_workflows import numbered, workflows  # noqa: E402

ROUNDS = 3
CHANGES = {"1_reconstruct": ("num_tokens", 128), "3_generate": ("seed", 2)}


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
    bare, starts, rows = [], [], {name: [] for name in CHANGES}
    for _ in tqdm(range(ROUNDS), unit="round"):
        with ComfyUIServer(install, None) as server:
            bare.append(server.start_seconds)
        with ComfyUIServer(install, "clone") as server:
            imported = re.search(r"([\d.]+) seconds: .*gpstoken_diffusers", server.log())[1]
            starts.append((server.start_seconds, float(imported)))
            empty = peak_megabytes(server)
            for name, (key, value) in CHANGES.items():
                workflow = numbered(workflows()[name][1])[0]
                server.free()
                first = seconds(server, workflow)
                for node in workflow.values():
                    if key in node["inputs"]:
                        node["inputs"][key] = value
                rows[name].append((first, seconds(server, workflow), peak_megabytes(server) - empty))
    ready, imported = (statistics.median(column) for column in zip(*starts, strict=True))
    print(f"server ready: {statistics.median(bare):.1f} s without the nodes, {ready:.1f} s with them; ", end="")
    print(f"ComfyUI counts {imported:.2f} s\n")
    medians = {name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in rows.items()}
    cells = [(name, f"{first:.1f}", f"{again:.1f}", f"{mb:.0f}") for name, (first, again, mb) in medians.items()]
    print(table(["workflow", "first Queue, s", "again, s", "more than empty, MB"], cells))


if __name__ == "__main__":
    main()
