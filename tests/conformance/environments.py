"""A virtual environment for each client, kept in a folder that git ignores and made again when its packages change."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".cache" / "conformance"
INSTALL_SECONDS = 900


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
        wanted = "\n".join((sys.version, *self.requirements))
        if not (stamp.exists() and stamp.read_text() == wanted):
            shutil.rmtree(folder, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(folder)])
            _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *self.requirements])
            stamp.write_text(wanted)
        return python


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise NotInstalledError(f"not installed within {INSTALL_SECONDS} s") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotInstalledError((errors or done.stderr.splitlines() or ["no reason given"])[-1])
