"""Compiled kernels on disk, so that each is compiled once for a machine and not in every process."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from ...safe_files import write_atomically

__all__ = ["CACHE", "read_kernel", "write_kernel"]

logger = logging.getLogger(__name__)

CACHE = Path("~/.cache/gpstoken/kernels")
"""Folder of compiled kernels, one file each. It can be deleted at any time."""

_MAGIC = b"gpstoken kernel 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size


def read_kernel(key: str, folder: Path = CACHE) -> tuple[str, bytes] | None:
    """What [`write_kernel`] stored under a key, name and code, or None.

    A file that is truncated, changed or stored under another key counts as none. That finds damage, not forgery.
    Whoever can write to the folder can replace a kernel.
    """
    try:
        content = (folder.expanduser() / f"{key}.kernel").read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + _DIGEST_BYTES
    payload = content[start:]
    if content[:start] != _MAGIC + _digest(key, payload):
        logger.warning("a damaged file in %s is ignored, and its kernel compiled again.", folder)
        return None
    name, _, code = payload.partition(b"\n")
    return name.decode(), code


def write_kernel(key: str, name: str, code: bytes, folder: Path = CACHE) -> None:
    """Stores a kernel atomically: several processes may do so at once. Warns if the folder cannot be written.

    Args:
        key: hash of everything that the code depends on, in hexadecimal: the file's name.
        name: the kernel's name in the code.
        code: for the driver.
        folder: made if it is not there; "~" stands for the user's.
    """
    payload = name.encode() + b"\n" + code
    try:
        path = folder.expanduser() / f"{key}.kernel"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _MAGIC + _digest(key, payload) + payload)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        logger.warning("kernels cannot be kept in %s (%s): every process compiles its own.", folder, error)


def _digest(key: str, payload: bytes) -> bytes:
    return hashlib.sha256(key.encode() + payload).digest()
