"""Programs that end within their time, with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program ended and all that it wrote; ``code`` is None if it was stopped because its time was over."""

    code: int | None
    output: str


def run(command: Sequence[str], *, seconds: float, environment: Mapping[str, str] | None = None) -> Finished:
    """Runs a program for at most that long.

    What it writes goes to a file: something that it left running could keep a pipe open for ever.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return Finished(code, output.read())
