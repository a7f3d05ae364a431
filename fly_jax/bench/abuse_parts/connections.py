"""Phases of connections that are held and not used."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from fly_jax.bench.abuse_parts.abuser import Abuser, own_address
from fly_jax.bench.abuse_parts.records import Figures
from fly_jax.bench.client import COMPLETIONS

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]

START = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SLOW_HEADERS = f"{START}X-Slow: ".encode()
SLOW_BODY = f"{START}Content-Length: 100000\r\n\r\n".encode()
# Slow senders are never silent for longer than this.
BYTE_SECONDS = 1.0
OPENED_AT_ONCE = 100
OPEN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Held:
    """One connection: how long the server kept it, None: longer than we did; and the status that it sent, if any."""

    closed_after: float | None
    status: str


async def slow_headers(abuser: Abuser) -> Figures:
    """Connections that send their headers a byte a second."""
    return await _hold_all(abuser, SLOW_HEADERS, trickles=True)


async def slow_bodies(abuser: Abuser) -> Figures:
    """Connections that send their bodies a byte a second."""
    return await _hold_all(abuser, SLOW_BODY, trickles=True)


async def idle_connections(abuser: Abuser) -> Figures:
    """Connections that send nothing."""
    return await _hold_all(abuser, b"", trickles=False)


async def many_connections(abuser: Abuser) -> Figures:
    """More connections than the server can have files, all silent."""
    _raise_own_limit()
    connections = await _open(abuser, abuser.sizes.connections)
    deadline = time.monotonic() + abuser.sizes.connections_seconds
    held = await asyncio.gather(*(_hold(each, deadline, trickles=False) for each in connections))
    return _figures(abuser, held)


async def _hold_all(abuser: Abuser, opening: bytes, *, trickles: bool) -> Figures:
    connections = await _open(abuser, abuser.sizes.held_connections)
    for _, writer in connections:
        if opening:
            writer.write(opening)
    deadline = time.monotonic() + abuser.sizes.hold_seconds
    held = await asyncio.gather(*(_hold(each, deadline, trickles=trickles) for each in connections))
    return _figures(abuser, held)


def _figures(abuser: Abuser, held: Sequence[Held]) -> Figures:
    for each in held:
        abuser.answers[each.status] += 1
    ends = [each.closed_after for each in held if each.closed_after is not None]
    return {
        "opened": len(held),
        "still_open": len(held) - len(ends),
        "first_closed_s": round(min(ends), 1) if ends else None,
        "last_closed_s": round(max(ends), 1) if ends else None,
    }


async def _open(abuser: Abuser, count: int) -> list[Connection]:
    """So many, or as many as can be had."""
    opened: list[Connection] = []
    for begin in range(0, count, OPENED_AT_ONCE):
        few = min(OPENED_AT_ONCE, count - begin)
        found = await asyncio.gather(*(_connect(abuser) for _ in range(few)))
        opened += [each for each in found if each is not None]
    return opened


async def _connect(abuser: Abuser) -> Connection | None:
    where, address = urlsplit(abuser.url), own_address(abuser.url)
    try:
        async with asyncio.timeout(OPEN_SECONDS):
            return await asyncio.open_connection(
                where.hostname, where.port or 80, local_addr=None if address is None else (address, 0)
            )
    except OSError as error:  # TimeoutError too
        abuser.answers[type(error).__name__] += 1
        return None


async def _hold(connection: Connection, deadline: float, *, trickles: bool) -> Held:
    """Keeps it until the server closes it or the time is over, then closes it."""
    reader, writer = connection
    started, received = time.monotonic(), b""
    is_open = True
    try:
        while is_open and (left := deadline - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(min(left, BYTE_SECONDS)):
                    data = await reader.read(4096)
                    is_open, received = bool(data), received + data
            except TimeoutError:
                if trickles:
                    writer.write(b"a")
    except OSError:
        is_open = False
    ended = time.monotonic()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    status = received.split(b" ")[1].decode() if received.startswith(b"HTTP/1.1 ") else ""
    return Held(None if is_open else ended - started, status or ("still open" if is_open else "closed"))


def _raise_own_limit() -> None:
    """As many files as this user may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
