"""A virtual environment for each client, kept in a folder that git ignores.

It is made again when its requirements, this Python or its place are no longer those that it was made for.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.processes import run

FOLDER = Path(__file__).parents[2] / ".cache" / "conformance"
INSTALL_SECONDS = 300
# Without a network the first refused connections tell enough. Most of what is installed is never imported.
PIP = ("--quiet", "--disable-pip-version-check", "--no-input", "--timeout", "20", "--retries", "1", "--no-compile")


class NotInstalledError(Exception):
    """The client's packages cannot be had here; the message says why."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Packages by the requirements that pip is given."""

    name: str
    requirements: tuple[str, ...]

    def python(self) -> Path:
        """The environment's Python; the first time it is made.

        Raises:
            NotInstalledError: pip could not install the packages.
        """
        folder = FOLDER / self.name
        python, stamp = folder / "bin" / "python", folder / "installed"
        made_for = "\n".join((sys.version, sys.base_prefix, str(folder), *self.requirements))
        if not (python.exists() and stamp.exists() and stamp.read_text() == made_for):
            shutil.rmtree(folder, ignore_errors=True)
            _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
            _run([sys.executable, "-m", "pip", "--python", str(python), "install", *PIP, *self.requirements])
            stamp.write_text(made_for)
        return python


def _run(command: list[str]) -> None:
    done = run(command, seconds=INSTALL_SECONDS)
    if done.code is None:
        raise NotInstalledError(f"not installed within {INSTALL_SECONDS} s")
    if done.code:
        raise NotInstalledError(_reason(done.output))


def _reason(output: str) -> str:
    """Pip's last error, and the last warning, which alone tells that there was no connection."""
    lines = output.splitlines()
    told = [[line for line in lines if line.startswith(kind)][-1:] for kind in ("ERROR", "WARNING")]
    return "; ".join(line for kind in told for line in kind) or "".join(lines[-1:]) or "no reason given"
