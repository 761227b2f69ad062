"""Released tokenizers, fetched from the Hub into ComfyUI's own folder of models."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .progress import Progress

RELEASED = {f"gpstoken_{preset}.safetensors": preset for preset in ("s64", "m128", "l256")}
"""File names of the released tokenizers, and the short names by which the package knows them."""
_PARTS = 1000  # of the progress bar

# In a process of its own, which can be ended at once. It says the size and then the path, or why there is none.
_FETCH = """
import contextlib, sys
package, preset, cache = sys.argv[1:]
sys.path.insert(0, package)
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from gpstoken_diffusers import AutoencoderGPSToken
from gpstoken_diffusers.models.hub_files import hub_file
file = hub_file(preset)
with contextlib.suppress(Exception):  # for the progress bar alone
    print(get_hf_file_metadata(hf_hub_url(file.repository, file.name)).size, flush=True)
try:
    print(AutoencoderGPSToken.download_single_file(preset, cache_dir=cache))
except (OSError, ValueError) as error:
    sys.exit(f"gpstoken: {error}")
"""


def fetch(name: str, folder: Path) -> Path:
    """Downloads a file of `RELEASED` into a folder, with progress and Cancel; a later call goes on where one ended.

    Raises OSError: it cannot be had, or the folder cannot be written to.
    """
    import gpstoken_diffusers

    package = Path(gpstoken_diffusers.__file__).resolve().parents[1]
    cache = folder / ".download"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as notes:
        said, wrong = Path(notes, "said"), Path(notes, "wrong")
        command = [sys.executable, "-c", _FETCH, str(package), RELEASED[name], str(cache)]
        with open(said, "wb") as out, open(wrong, "wb") as err:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            _watch(process, cache, said)
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            reason = wrong.read_text(errors="replace").rpartition("gpstoken: ")[2].strip()
            reason = reason or f"The download ended with status {process.returncode}."
            raise OSError(f"{name} is not in {folder} and could not be downloaded. {reason}")
        path = said.read_text().splitlines()[-1]
    os.replace(os.path.realpath(path), folder / name)
    shutil.rmtree(cache, ignore_errors=True)
    return folder / name


def _watch(process: subprocess.Popen, cache: Path, said: Path) -> None:
    """Shows how far a download is until it ends. Raises ComfyUI's interruption on Cancel."""
    progress, best = Progress(_PARTS), 0.0
    while process.poll() is None:
        time.sleep(0.1)
        size, done = said.read_text().partition("\n")[0], 0
        for part in cache.rglob("*.incomplete"):
            with contextlib.suppress(OSError):  # it has just got its final name
                done += part.stat().st_size
        best = max(best, min(1.0, done / int(size))) if size.isdecimal() else 0.0
        progress.share(best)  # at its end the file has its final name
