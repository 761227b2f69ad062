"""Fetch a Debian package without installing it: apt-get download, check its sha256, dpkg-deb -x."""

import os
import subprocess
import tempfile
from pathlib import Path

from fetching import sha256_of

from .sources import Source


class PackageUnavailable(Exception):
    """A package cannot be fetched or trusted; the message says why and what to do."""


def fetch_package(source: Source, cache: Path) -> Path:
    """Path of the package's .deb in `cache`, downloaded by apt-get unless it is there.

    Raises:
        PackageUnavailable: no apt-get, no such package or version, or a file with another sha256. A download is then
            thrown away, a file in the cache stays.
    """
    path = cache / source.deb_name
    if path.exists():
        _check(source, path, f"move {path} away and run again")
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        advice = (
            f"{source.package} {source.version} is a package of Debian 12: run `apt-get update` with a mirror of it "
            f"among the sources, or copy {source.deb_name} from one to {cache}"
        )
        _run(["apt-get", "download", f"{source.package}={source.version}"], folder, advice)
        (downloaded,) = Path(folder).glob("*.deb")
        _check(source, downloaded, "it was not kept")
        os.replace(downloaded, path)
    return path


def unpack_package(deb: Path, folder: Path) -> None:
    """Unpack `deb` into `folder`; nothing is installed and no script of the package runs.

    Raises:
        PackageUnavailable: no dpkg-deb, or it failed.
    """
    _run(["dpkg-deb", "-x", str(deb), str(folder)], folder, f"{deb} cannot be unpacked")


def _run(command: list[str], folder: str | Path, advice: str) -> None:
    try:
        run = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError as error:
        raise PackageUnavailable(f"there is no {command[0]} here. {advice}") from error
    if run.returncode:
        raise PackageUnavailable(f"{command[0]} failed: {run.stderr.strip()}. {advice}")


def _check(source: Source, path: Path, consequence: str) -> None:
    if (found := sha256_of(path)) != source.sha256:
        raise PackageUnavailable(
            f"{source.package}: {path.name} has sha256 {found}, expected {source.sha256}; {consequence}"
        )
