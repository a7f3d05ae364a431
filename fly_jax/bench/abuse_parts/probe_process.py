"""Starts the probes as a child process, and reads what they saw."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict

from fly_jax.bench.abuse_parts.probes import ProbeSettings
from fly_jax.bench.abuse_parts.records import CallsSeen, ProbesSeen, StreamsSeen
from fly_jax.errors import ConfigError

READY_SECONDS = 120
ANSWER_SECONDS = 60


class ProbeProcess:
    """A process that runs probes for one phase after the other."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def start(self, settings: ProbeSettings) -> None:
        """Returns when they measure.

        Raises:
            ConfigError: the server does not answer them.
        """
        await self._say(json.dumps(asdict(settings)))
        await self._line(READY_SECONDS)

    async def stop(self) -> ProbesSeen:
        """What they saw since they began to measure.

        Raises:
            ConfigError: their process has ended, or does not answer.
        """
        await self._say("stop")
        return _seen(await self._line(ANSWER_SECONDS))

    async def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        with contextlib.suppress(ConnectionError):  # what has ended answers nothing, and that is told below
            await self._process.stdin.drain()

    async def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                line = await self._process.stdout.readline()
        except TimeoutError:
            line = b""
        if not line:
            raise ConfigError(
                f"the well-behaved clients got no answers within {seconds} s: is the server up, and does it answer "
                "/health and /v1/completions?"
            )
        return line


@contextlib.asynccontextmanager
async def probe_process() -> AsyncIterator[ProbeProcess]:
    """A process that ends with the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fly_jax.bench.abuse_parts.probes",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield ProbeProcess(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _seen(line: bytes) -> ProbesSeen:
    found = json.loads(line)
    return ProbesSeen(
        streams=StreamsSeen(**found["streams"]),
        health=CallsSeen(**found["health"]),
        short=CallsSeen(**found["short"]),
        lag_ms=found["lag_ms"],
    )
