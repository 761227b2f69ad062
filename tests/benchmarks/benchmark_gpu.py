"""All that only a GPU can show: the tests marked "gpu", by kernels of nvcc and of NVRTC, and all timings.

    python tests/benchmarks/benchmark_gpu.py --output outputs/gpu
    python tests/benchmarks/benchmark_gpu.py --output outputs/gpu --only splat models  # some parts; --list names them

Each part is a process of its own, whose output goes to the screen and to OUTPUT/PART.log; a part that fails stops none
of the others. At the end a table says which passed, and the exit code is 1 if one failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """One command: arguments of Python, and what its environment has beside this one's."""

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def parts(output: Path) -> dict[str, Part]:
    """By name, in the order in which they run. output: where the tables of the models go."""

    def script(name: str, *arguments: str, folder: str | None = None) -> Part:
        more = ["--output", str(output / folder)] if folder else []
        return Part([str(HERE / f"benchmark_{name}.py"), *arguments, *more])

    models = ("models", "--device", "cuda")
    compiled = (*models, "--compile", "reduce-overhead")
    return {
        "tests": Part(["-m", "pytest", "-m", "gpu", str(HERE.parent)]),
        "tests-nvrtc": Part(["-m", "pytest", "-m", "gpu", str(HERE.parent)], {"GPSTOKEN_BACKEND": "nvrtc"}),
        "splat": script("splat", "--device", "cuda"),
        "partition": script("partition", "--device", "cuda"),
        "generation": script("generation", "--tables", "speed"),
        "training": script("training", "--device", "cuda", "--batch_size", "32", "--steps", "60"),
        "models": script(*models, "--batch_size", "8", "--peers", folder="eager"),
        "models-compiled": script(*compiled, "--batch_size", "8", "--peers", folder="compiled"),
        "models-one": script(*compiled, folder="compiled-one-picture"),
    }


def run(name: str, part: Part, output: Path) -> bool:
    """Runs a part, to the screen and to its log; whether it succeeded."""
    print(f"\n=== {name}: python {' '.join(part.arguments)}", flush=True)
    environment = {**os.environ, **part.environment}
    with (output / f"{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *part.arguments],
            cwd=output,  # not the checkout, whose package has no native libraries beside its sources
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
        return process.wait() == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--only", nargs="+", choices=list(parts(Path())), help="Default: all.")
    parser.add_argument("--list", action="store_true", help="Print the parts and their commands, and stop.")
    args = parser.parse_args()
    output = args.output.resolve()
    chosen = {name: part for name, part in parts(output).items() if not args.only or name in args.only}
    if args.list:
        for name, part in chosen.items():
            settings = "".join(f"{key}={value} " for key, value in part.environment.items())
            print(f"{name}: {settings}python {' '.join(part.arguments)}")
        return 0
    if not torch.cuda.is_available():
        print("benchmark_gpu: error: torch sees no CUDA device on this machine.", file=sys.stderr)
        return 1
    output.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, part in chosen.items():
        started = time.perf_counter()
        passed = run(name, part, output)
        lines.append(f"| {name} | {'passed' if passed else 'FAILED'} | {time.perf_counter() - started:.0f} s |")
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n| part | | time |\n|---|---|---|")
    print("\n".join(lines))
    return int(any("FAILED" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
