"""The command `gpstoken`.

Exit codes: 0 all went well; 1 a mistake in what was asked for, or a file that could not be processed; 2 an
unknown command or option; 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator, Sequence

from .arguments import build_parser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: that of this process) and return its exit code."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as usage:  # argparse has printed help, or what is wrong
        return usage.code
    with _log_to_stderr(quiet=args.quiet):
        try:
            # PyTorch is imported here and not above: `gpstoken --help` answers at once.
            module = importlib.import_module(f".{args.module}", __name__)
            return getattr(module, args.function)(args)
        except KeyboardInterrupt:
            print("gpstoken: interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if args.debug or not _is_users(error):
                raise
            print(f"gpstoken: error: {_text(error)}", file=sys.stderr)
            return 1


def _is_users(error: Exception) -> bool:
    """Whether the message alone helps: a mistake of the user or a lack of memory, not a bug of ours."""
    # By name, as torch may not be loaded yet.
    return isinstance(error, (ValueError, TypeError, OSError, MemoryError)) or (
        type(error).__name__ == "OutOfMemoryError"
    )


def _text(error: Exception) -> str:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        advice = "out of memory. Use --dtype bfloat16, another --device, or a smaller picture."
        return f"{advice} ({error})" if str(error) else advice
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _log_to_stderr(quiet: bool) -> Iterator[None]:
    """Show this package's own log messages as lines of the command; with `quiet`, errors alone."""
    logger = logging.getLogger("gpstoken_diffusers")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("gpstoken: %(message)s"))
    handler.setLevel(logging.ERROR if quiet else logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
