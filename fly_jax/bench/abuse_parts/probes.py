"""Well-behaved clients in a process of their own, so that an abuser's work on Python does not hold them up.

``python -m fly_jax.bench.abuse_parts.probes`` reads a :class:`ProbeSettings` as JSON, writes ``ready`` when its streams
run, and at the next line writes a :class:`ProbesSeen` as JSON and ends them; then all over again until its input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field

import aiohttp

from fly_jax.bench.abuse_parts.records import ProbesSeen
from fly_jax.bench.abuse_parts.watch import CallWatch, StreamWatch, milliseconds, streams_seen
from fly_jax.bench.client import COMPLETIONS, StreamedAnswer, StreamFailed

HEALTH_SECONDS = 0.02
SHORT_SECONDS = 0.1
# Between a refusal and the next try of a client that behaves.
RETRY_SECONDS = 0.2
SHORT_PROMPT = "Hello"


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """
    Attributes:
        model: its name; empty: none is sent.
        streams: at once.
        prompt, max_tokens: of each stream.
    """

    url: str
    model: str
    streams: int
    prompt: str
    max_tokens: int
    api_key: str | None = field(default=None, repr=False)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}


class Probes:
    """Streams, ``/health`` and short prompts, each again and again until the process ends."""

    def __init__(self, settings: ProbeSettings) -> None:
        clock = time.monotonic
        self._settings = settings
        self._streams = [StreamWatch(clock) for _ in range(settings.streams)]
        self._health, self._short = CallWatch(clock), CallWatch(clock)
        self._watches: tuple[StreamWatch | CallWatch, ...] = (*self._streams, self._health, self._short)
        self._lag = 0.0

    async def run(self) -> None:
        """Never returns."""
        timeout = aiohttp.ClientTimeout(total=None)
        # Each probe of /health has a connection of its own, as those of load balancers do.
        once = aiohttp.TCPConnector(limit=0, force_close=True)
        kept = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        async with (
            aiohttp.ClientSession(connector=once, timeout=timeout) as probing,
            aiohttp.ClientSession(connector=kept, timeout=timeout, headers=self._settings.headers) as asking,
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(self._measure_lag())
            tasks.create_task(_repeat(self._health, lambda: self._get_health(probing), HEALTH_SECONDS))
            tasks.create_task(_repeat(self._short, lambda: self._ask_short(asking), SHORT_SECONDS))
            for watch in self._streams:
                tasks.create_task(self._stream(asking, watch))

    async def until_ready(self) -> None:
        """Every stream has begun, and each call was answered once."""
        while not (all(each.tokens for each in self._streams) and self._health.times and self._short.times):
            await asyncio.sleep(HEALTH_SECONDS)

    def begin(self) -> None:
        for each in self._watches:
            each.begin()
        self._lag = 0.0

    def stop(self) -> ProbesSeen:
        for each in self._watches:
            each.stop()
        return ProbesSeen(streams_seen(self._streams), self._health.seen(), self._short.seen(), milliseconds(self._lag))

    async def _measure_lag(self) -> None:
        while True:
            due = time.monotonic() + HEALTH_SECONDS
            await asyncio.sleep(HEALTH_SECONDS)
            self._lag = max(self._lag, time.monotonic() - due)

    async def _get_health(self, session: aiohttp.ClientSession) -> int:
        async with session.get(f"{self._settings.url}/health") as response:
            await response.read()
            return response.status

    async def _ask_short(self, session: aiohttp.ClientSession) -> int:
        body = {**self._named, "prompt": SHORT_PROMPT, "max_tokens": 1, "temperature": 0}
        async with session.post(f"{self._settings.url}{COMPLETIONS}", json=body) as response:
            await response.read()
            return response.status

    async def _stream(self, session: aiohttp.ClientSession, watch: StreamWatch) -> None:
        while True:
            watch.sent()
            failure = await named_failure(lambda: self._read_stream(session, watch))
            watch.ended(failure)
            if failure:
                await asyncio.sleep(RETRY_SECONDS)

    async def _read_stream(self, session: aiohttp.ClientSession, watch: StreamWatch) -> int:
        settings = self._settings
        body = {
            **self._named,
            "prompt": settings.prompt,
            "max_tokens": settings.max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        answer = StreamedAnswer()
        async with session.post(f"{settings.url}{COMPLETIONS}", json=body) as response:
            if response.status != 200:
                return response.status
            async for data in response.content.iter_any():
                known = len(answer.token_times)
                answer.feed(data, time.monotonic())
                if new := len(answer.token_times) - known:
                    watch.pieces(new)
        if not answer.complete:
            raise StreamFailed("broke off")
        return 200

    @property
    def _named(self) -> dict[str, str]:
        return {"model": self._settings.model} if self._settings.model else {}


async def _repeat(watch: CallWatch, call: Callable[[], Awaitable[int]], every: float) -> None:
    """At this pace, or as soon as the one before is answered."""
    while True:
        due = time.monotonic() + every
        watch.asked()
        watch.answered(await named_failure(call))
        await asyncio.sleep(max(due - time.monotonic(), 0.0))


async def named_failure(call: Callable[[], Awaitable[int]]) -> str:
    """Empty after status 200; else the status, or the name of what happened."""
    try:
        status = await call()
    except StreamFailed:
        return "broken stream"
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return type(error).__name__
    return "" if status == 200 else str(status)


async def _main() -> None:
    while line := await asyncio.to_thread(sys.stdin.readline):
        await _probe_once(ProbeSettings(**json.loads(line)))


async def _probe_once(settings: ProbeSettings) -> None:
    probes = Probes(settings)
    running = asyncio.create_task(probes.run())
    ready = asyncio.create_task(probes.until_ready())
    await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        running.result()
    probes.begin()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    print(json.dumps(asdict(probes.stop())), flush=True)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(_main())
