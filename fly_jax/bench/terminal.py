"""What commands say to people on a terminal, and to shells when Ctrl-C ends them."""

from __future__ import annotations

import sys

from rich.console import Console

# The exit code of a command that Ctrl-C has ended, as shells expect it.
INTERRUPTED_CODE = 130
# Where nobody sees a table being broken: in a pipe or a file.
WIDTH_OF_FILES = 160


def console() -> Console:
    """For tables on standard output: as wide as the terminal, or wide enough for all columns if there is none."""
    return Console(width=None if Console().is_terminal else WIDTH_OF_FILES)


def say(text: str) -> None:
    """On standard error, so that results can be piped without it."""
    print(text, file=sys.stderr)
