"""One real server with the bundled model, for all clients."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_SECONDS = 300
STOP_SECONDS = 60
READY = "ready: curl "
# The cap on tokens is for schemathesis, which asks for 128 answers that fill the context.
OPTIONS = (
    "--devices=4", "--layouts=2+2", "--policy=static", "--port=0", "--served-model-name=demo",
    '--override-generation-config={"max_new_tokens": 32}',
)  # fmt: skip


class ServerError(Exception):
    """The server did not start, ended by itself, or wrote of an error of its own."""


@contextmanager
def served(log: Path) -> Iterator[str]:
    """The address of a server on a free port, until the block ends; what it says goes to ``log``.

    Raises:
        ServerError: when it does not start, or after the block.
    """
    command = [sys.executable, "-m", "fly_jax", "serve", str(ROOT / "checkpoints" / "demo" / "model"), *OPTIONS]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as errors,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            yield _url(process)
            ended = process.poll()
        finally:
            _stop(process)
    if ended is not None:
        raise ServerError(f"it ended by itself with {ended}")
    if process.returncode:
        raise ServerError(f"it ended with {process.returncode} when it was stopped")
    if wrong := [line for line in log.read_text().splitlines() if " ERROR " in line or line.startswith("Traceback")]:
        raise ServerError(f"its log has {len(wrong)} errors: {wrong[0]}")


def _url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    overdue = threading.Timer(START_SECONDS, process.kill)
    overdue.start()
    try:
        for line in process.stdout:
            if line.startswith(READY):
                return line.removeprefix(READY).partition("/v1")[0]
    finally:
        overdue.cancel()
    raise ServerError(f"it ended with {process.wait()} before it was ready, or was not within {START_SECONDS} s")


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
