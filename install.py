"""Run by ComfyUI-Manager after a clone's requirements: builds the native libraries where there is a compiler.

A machine without a compiler is no error: plain PyTorch does the work then. cmake and ninja are installed where they are
missing; where that fails, the exit status is 1, so that whoever runs this knows to run it again. CMAKE_ARGS, if it is
set, is passed on to CMake: `CMAKE_ARGS=-DGPSTOKEN_CUDA=OFF` leaves nvcc alone.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = ("cmake>=3.23", "ninja>=1.11")


def tool(name: str) -> str | None:
    """A program beside this Python, or on the PATH."""
    beside = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    return shutil.which(name, path=os.pathsep.join(beside)) or shutil.which(name)


def install_cmake() -> None:
    """What the requirements bring, but perhaps have not yet."""
    done = subprocess.run([sys.executable, "-m", "pip", "install", *TOOLS], capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout + done.stderr)


def main() -> int:
    """Configure, build and install into the package's folder; say what became of it. Gives the exit status."""
    if tool("cmake") is None:
        install_cmake()
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None:
        print(
            "gpstoken: no cmake here yet, so no native libraries: plain PyTorch does the work, more slowly. To build "
            f'them:\n"{sys.executable}" -m pip install -r "{HERE / "requirements.txt"}"\n'
            f'"{sys.executable}" "{HERE / "install.py"}"'
        )
        return 1
    with tempfile.TemporaryDirectory() as build:
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        steps = (
            [cmake, "-S", str(HERE), "-B", build, *generator, *shlex.split(os.environ.get("CMAKE_ARGS", ""))],
            [cmake, "--build", build, "--config", "Release"],
            [cmake, "--install", build, "--prefix", str(HERE / "gpstoken_diffusers")],
        )
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode != 0:
                print(done.stdout + done.stderr)
                print("gpstoken: the native libraries could not be built: plain PyTorch does the work, more slowly.")
                return 0  # nothing that running it again would change
    built = sorted(path.name for path in (HERE / "gpstoken_diffusers" / "lib").glob("*gpstoken_*"))
    print(f"gpstoken: native libraries: {', '.join(built) or 'none, as there is no C++ compiler'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
