"""What the server's process and its ``/layout`` tell while a phase runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from fly_jax.bench.abuse_parts.records import ServerSeen

SAMPLE_SECONDS = 0.25
LAYOUT_SECONDS = 30
KIB_A_MIB = 1024


@dataclass(frozen=True, slots=True)
class WatchedServer:
    """
    Attributes:
        pid: of its process on this machine; None: its memory cannot be known.
        log: the file that its log goes to; None: its growth cannot be known.
    """

    url: str
    pid: int | None = None
    log: Path | None = None

    def rss_mib(self) -> float | None:
        """Resident memory, where there is a /proc."""
        if self.pid is None:
            return None
        with contextlib.suppress(OSError, ValueError, StopIteration):
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
            line = next(each for each in lines if each.startswith("VmRSS:"))
            return round(int(line.split()[1]) / KIB_A_MIB, 1)
        return None

    def log_bytes(self) -> int | None:
        return None if self.log is None or not self.log.exists() else self.log.stat().st_size

    async def switches(self) -> int | None:
        """Made so far; None if the server does not say, or not in time."""
        timeout = aiohttp.ClientTimeout(total=LAYOUT_SECONDS)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as http, http.get(f"{self.url}/layout") as response:
                last = (await response.json())["last_switch"]
                return 0 if last is None else int(last["number"])
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError):
            return None


class PhaseWatch:
    """Of one phase, from its begin to its end."""

    def __init__(self, server: WatchedServer, switches: int | None) -> None:
        self._server = server
        self._switches = switches
        self._rss = server.rss_mib()
        self._peak = self._rss
        self._log = server.log_bytes()

    async def sample(self) -> None:
        """Never returns."""
        while True:
            now = self._server.rss_mib()
            self._peak = now if self._peak is None or (now or 0.0) > self._peak else self._peak
            await asyncio.sleep(SAMPLE_SECONDS)

    async def end(self) -> ServerSeen:
        return ServerSeen(
            switches=_grown(self._switches, await self._server.switches()),
            rss_before_mib=self._rss,
            rss_peak_mib=self._peak,
            rss_after_mib=self._server.rss_mib(),
            log_bytes=_grown(self._log, self._server.log_bytes()),
        )


@contextlib.asynccontextmanager
async def watching(server: WatchedServer) -> AsyncIterator[PhaseWatch]:
    """Samples the server's memory until the block ends."""
    watch = PhaseWatch(server, await server.switches())
    sampling = asyncio.create_task(watch.sample())
    try:
        yield watch
    finally:
        sampling.cancel()


def _grown(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before
