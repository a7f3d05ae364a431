"""The client that misbehaves: it counts what it is answered and minds nothing."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from fly_jax.bench.abuse_parts.sizes import Sizes
from fly_jax.bench.client import COMPLETIONS

OK = "200"
# Between a refusal and the next try of one that floods.
RETRY_SECONDS = 0.2
# On Linux all of 127/8 is this machine's: a server that tells clients apart by address must see two.
OTHER_LOOPBACK = "127.0.0.2"


@dataclass(slots=True)
class Abuser:
    """
    Attributes:
        model: its name; empty: none is sent.
        answers: what came so far, by status or by what happened.
    """

    url: str
    model: str
    sizes: Sizes
    session: aiohttp.ClientSession
    answers: Counter[str] = field(default_factory=Counter)

    async def post(self, path: str, body: bytes) -> str:
        """Sends a body and reads the whole answer; returns its status, or the name of what happened."""
        return await self._counted(lambda: self._post(path, body, None))

    async def seconds_to_start(self, body: bytes) -> float | None:
        """Of a stream: until its first piece; None if it was refused or broke off before. The rest is read too."""
        starts: list[float] = []
        await self._counted(lambda: self._post(COMPLETIONS, body, starts))
        return starts[0] if starts else None

    async def flood(self, body: bytes, requests: int, seconds: float, *, again: bool) -> None:
        """Keeps so many requests up for so long, then leaves; with ``again``, a new one follows each that ends."""

        async def one() -> None:
            while await self.post(COMPLETIONS, body) and again:
                await asyncio.sleep(RETRY_SECONDS)

        tasks = [asyncio.create_task(one()) for _ in range(requests)]
        await asyncio.wait(tasks, timeout=seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def body(self, **fields: Any) -> bytes:
        """JSON of a request."""
        named = {"model": self.model} if self.model else {}
        return json.dumps({**named, **fields}, separators=(",", ":")).encode()

    async def _post(self, path: str, body: bytes, starts: list[float] | None) -> str:
        sent = time.monotonic()
        async with self.session.post(f"{self.url}{path}", data=body) as response:
            async for _ in response.content.iter_any():
                if starts is not None and response.status == 200:
                    starts.append(time.monotonic() - sent)
            return str(response.status)

    async def _counted(self, call: Callable[[], Awaitable[str]]) -> str:
        status = "left"
        try:
            status = await call()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            status = type(error).__name__
        finally:  # a request that we left ourselves is counted as well
            self.answers[status] += 1
        return status


def own_address(url: str) -> str | None:
    """The address to come from, so that the server takes us and the others for two clients; None: any."""
    is_here = urlsplit(url).hostname in ("127.0.0.1", "localhost")
    return OTHER_LOOPBACK if is_here and sys.platform == "linux" else None


@asynccontextmanager
async def abusing(url: str, model: str, sizes: Sizes, api_key: str | None) -> AsyncIterator[Abuser]:
    """An abuser; what it has open is closed with the block."""
    address = own_address(url)
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    connector = aiohttp.TCPConnector(limit=0, force_close=True, local_addr=None if address is None else (address, 0))
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        yield Abuser(url, model, sizes, session)
