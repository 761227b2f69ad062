"""Fetch a Debian package without installing it: apt-get download, check its sha256, dpkg-deb -x."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from fetching import sha256_of

from .sources import Source


class PackageUnavailable(Exception):
    """A package cannot be had or must not be trusted; the message says why and what to do."""


def fetch_package(source: Source, cache: Path) -> Path:
    """Path of the package's .deb below `cache`, downloaded there by apt-get unless it is there already.

    Raises:
        PackageUnavailable: no apt-get, no such package or version, or a file with another sha256. In the last
            case a download is thrown away and a file of the cache stays as it is.
    """
    path = cache / source.deb_name
    if path.exists():
        _check(source, path, f"move {path} away and run again")
        return path
    if shutil.which("apt-get") is None:
        raise PackageUnavailable(
            f"{source.package}: apt-get was not found. This script runs on Debian 12 and its relatives; "
            f"elsewhere copy {source.deb_name} from a Debian mirror to {cache}"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        wanted = f"{source.package}={source.version}"
        command = ["apt-get", "download", wanted]
        run = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=_plain_english())
        downloads = list(Path(folder).glob("*.deb"))
        if run.returncode or not downloads:
            raise PackageUnavailable(_why_not(source, run.stderr))
        _check(source, downloads[0], "it was not kept")
        os.replace(downloads[0], path)
    return path


def unpack_package(deb: Path, folder: Path) -> None:
    """Unpack `deb` below `folder`; nothing is installed and no script of the package runs.

    Raises:
        PackageUnavailable: no dpkg-deb, or it failed.
    """
    if shutil.which("dpkg-deb") is None:
        raise PackageUnavailable(f"{deb.name}: dpkg-deb was not found (Debian package dpkg)")
    run = subprocess.run(["dpkg-deb", "-x", str(deb), str(folder)], stderr=subprocess.PIPE, text=True)
    if run.returncode:
        raise PackageUnavailable(f"{deb.name}: dpkg-deb could not unpack it: {run.stderr.strip()}")


def _check(source: Source, path: Path, consequence: str) -> None:
    found = sha256_of(path)
    if found != source.sha256:
        raise PackageUnavailable(
            f"{source.package}: {path.name} has sha256 {found}, expected {source.sha256}; {consequence}"
        )


def _why_not(source: Source, stderr: str) -> str:
    command = ["apt-cache", "policy", source.package]
    policy = subprocess.run(command, capture_output=True, text=True, env=_plain_english()).stdout
    served = [line.split()[-1] for line in policy.splitlines() if line.strip().startswith("Candidate:")]
    if not served or served[0] == "(none)":
        return (
            f"{source.package}: apt-get does not know it; run `apt-get update`, and see that a mirror of "
            f"Debian 12 is among the sources. apt-get said: {stderr.strip()}"
        )
    if served[0] != source.version:
        return (
            f"{source.package}: the registry serves version {served[0]}, but the photographs were chosen "
            f"from {source.version} (Debian 12)"
        )
    return f"{source.package}: apt-get download failed: {stderr.strip()}"


def _plain_english() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}
