"""Files and folders that appear whole or not at all, and safetensors read without ever opening a pickle."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

# torch.save's zip archive, and bare pickles of protocol 2 to 5.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def check_writable(path: str | os.PathLike) -> None:
    """Raises OSError if there is something that a file must not replace: a read-only file, a device, a pipe."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # nothing is there; whatever else is wrong, writing says
        return
    # The bits, and not what the system would allow: to take a file's place its folder must be writable, no more.
    if not mode & 0o222:
        raise PermissionError(errno.EACCES, "cannot write the file (it is read-only)", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "cannot write the file (something else has its name)", str(path))


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write a file whole or not at all: a temporary file beside it, flushed to disk, takes its name last.

    Where the path is a link, the file that it leads to is written, and the link stays.

    Raises:
        OSError: the folder is missing or not writable, the disk is full, or the file is read-only or no regular file;
            an older file is left as it was.
    """
    check_writable(path)
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    # Cut, as a name may be nearly as long as the disk allows.
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # Ctrl-C too must leave no temporary file
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"cannot write the file ({error.strerror})", str(path)) from error
        raise


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` once the block ends without an error.

    After an error, Ctrl-C included, the old folder is as it was. If the process is killed, the next call clears away
    what it left, or puts the old folder back.
    """
    # ComfyUI loads no folder whose name ends in .disabled; the command line copies nodes into it.
    fresh, old = (folder.with_name(f".{folder.name}.{end}.disabled") for end in ("tmp", "old"))

    def put_back() -> None:
        if old.exists() and not folder.exists():
            old.rename(folder)

    put_back()
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except BaseException:
        put_back()
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def open_safetensors(path: str | os.PathLike, advice: str) -> Iterator[safe_open]:
    """A safetensors file opened for reading; says clearly what is wrong with a file that is not one.

    Args:
        path: the file.
        advice: what the user can do about a damaged file, a sentence.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, a pickle (whatever its name says), or of another kind.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    if not start:
        raise ValueError(f"{path}: the file is empty (0 bytes). {advice}")
    # A safetensors file begins with its header's length, which may read like a pickle's start, and then a brace.
    if start.startswith(_PICKLE_STARTS) and start[8:] != b"{":
        raise ValueError(
            f"{path}: this is a Python pickle (as torch.save writes), whatever its name says. Reading it could run "
            "code, so it was not read. Where you trust it, write its tensors with safetensors.torch.save_file."
        )
    with contextlib.ExitStack() as stack:
        name = os.fspath(path)
        try:
            name.encode()
        except UnicodeEncodeError:  # the library takes names in UTF-8 alone: another name of the same file
            name = f"/dev/fd/{stack.enter_context(open(path, 'rb')).fileno()}"
        try:
            yield stack.enter_context(safe_open(name, framework="pt"))
        except SafetensorError as error:
            whole = "a truncated or damaged safetensors file" if start[8:] == b"{" else "not a safetensors file"
            raise ValueError(f"{path}: {whole} ({error}). {advice}") from error


def check_format(header: dict[str, str], path: str | os.PathLike, name: str, version: int, otherwise: str) -> None:
    """Whether the header of a safetensors file says that this program can read it.

    Args:
        header: its strings, `format` and `format_version` among them.
        path: the file, for the messages.
        name: the format that it should have, `gpstoken.` and the plural of what the file holds.
        version: the highest version that this program reads.
        otherwise: what a file of another format is, and where the right ones come from; completes "PATH: ".

    Raises:
        ValueError: another format, no version, or a later one.
    """
    if header.get("format") != name:
        raise ValueError(f"{path}: {otherwise}")
    found, content = header.get("format_version", ""), name.removeprefix("gpstoken.")
    if not found.isdecimal():
        raise ValueError(f"{path}: the {content} are damaged: their format version reads {found!r}.")
    if int(found) > version:
        raise ValueError(
            f"{path}: {content} of format version {found}, but this program reads up to {version}. Upgrade it: "
            "pip install --upgrade gpstoken-diffusers"
        )
