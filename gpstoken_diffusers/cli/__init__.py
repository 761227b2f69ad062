"""The command `gpstoken`.

Exit codes: 0 all went well; 1 a mistake in what was asked for, or a file that could not be processed; 2 an
unknown command or option; 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence

from .arguments import build_parser
from .errors import is_users, printable, reason
from .made_folders import empty_ones_removed

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: that of this process) and return its exit code."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as usage:  # argparse has printed help, or what is wrong
        return usage.code
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that it cannot print is no failure
            stream.reconfigure(errors="backslashreplace")
    with _log_to_stderr(quiet=args.quiet):
        try:
            # PyTorch is imported here and not above: `gpstoken --help` answers at once.
            module = importlib.import_module(f".{args.module}", __name__)
            with empty_ones_removed():
                return getattr(module, args.function)(args)
        except KeyboardInterrupt:
            print("gpstoken: interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if args.debug or not is_users(error):
                raise
            print(f"gpstoken: error: {reason(error)}", file=sys.stderr)
            return 1


@contextlib.contextmanager
def _log_to_stderr(quiet: bool) -> Iterator[None]:
    """Show this package's own log messages as lines of the command; with `quiet`, errors alone."""
    logger = logging.getLogger("gpstoken_diffusers")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("gpstoken: %(message)s"))
    handler.setLevel(logging.ERROR if quiet else logging.WARNING)
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *where: logger.warning("warning: %s", message)
        try:
            yield
        finally:
            logger.removeHandler(handler)


class _Lines(logging.Formatter):
    """Messages hold names and what files say: nothing in them may act on the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
