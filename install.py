"""Run by ComfyUI-Manager after a clone's requirements: builds the native libraries where there is a compiler.

Nothing is downloaded, and a machine without a compiler is no error: plain PyTorch does the work then. CMAKE_ARGS, if it
is set, is passed on to CMake: `CMAKE_ARGS=-DGPSTOKEN_CUDA=OFF` leaves nvcc alone.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Configure, build and install into the package's folder; say what became of it."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        print("gpstoken: no cmake here, so no native libraries: plain PyTorch does the work, more slowly.")
        return
    with tempfile.TemporaryDirectory() as build:
        ninja = shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")
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
                return
    built = sorted(path.name for path in (HERE / "gpstoken_diffusers" / "lib").glob("*gpstoken_*"))
    print(f"gpstoken: native libraries: {', '.join(built) or 'none, as there is no C++ compiler'}")


if __name__ == "__main__":
    main()
