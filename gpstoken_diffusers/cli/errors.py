"""What went wrong, in one line of plain characters. Imports nothing heavy."""

from __future__ import annotations

import errno

# What a disk has for every file, and not for one.
_ENDS_A_RUN = {errno.ENOSPC, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)}


def reason(error: Exception) -> str:
    """What went wrong, for people."""
    if is_out_of_memory(error):
        text = "out of memory. Use --dtype bfloat16, a smaller --memory-budget, another --device, or a smaller picture."
        return printable(f"{text} ({str(error).strip().splitlines()[0]})" if str(error).strip() else text)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return printable(f"{error.filename}: {error.strerror}")
    return printable(str(error) or type(error).__name__)


def is_users(error: Exception) -> bool:
    """Whether the message alone helps: a mistake of the user or a lack of memory, not a bug of ours."""
    return isinstance(error, (ValueError, TypeError, OSError)) or is_out_of_memory(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Of any device. On a CPU, PyTorch raises a RuntimeError."""
    # By name, as torch may not be loaded yet.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


def ends_run(error: OSError) -> bool:
    """Whether it will happen to every other file too, as on a full disk."""
    return error.errno in _ENDS_A_RUN


def printable(text: str) -> str:
    """Text in which nothing acts on a terminal: control characters and undecodable names are written as escapes."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
