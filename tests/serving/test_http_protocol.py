"""One connection without a socket, on a clock that is moved by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from serving.connections import ConnectionCounts, ConnectionLimits, Phase
from serving.http_protocol import MOST_READ_BYTES, READ_BYTES, GuardedProtocol, HttpConfig

LIMITS = ConnectionLimits(keep_alive=5, headers=10, body=30, body_bytes_per_second=10, reading=60)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST %s HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the whole body, but for ``/early``, which is answered at once."""
    while scope["path"] != "/early" and (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


class Clock(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        return self.now

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def advance(self, seconds: float) -> None:
        self.now += seconds
        await self.settle()


class Transport:
    """Keeps what is written; ``unread`` bytes of it are said to wait for the client."""

    def __init__(self) -> None:
        self.max_size = MOST_READ_BYTES
        self.unread = 0
        self.written = b""
        self.is_closed = self.is_aborted = False

    def get_extra_info(self, _name: str) -> None:
        return None

    def is_closing(self) -> bool:
        return self.is_closed or self.is_aborted

    def get_write_buffer_size(self) -> int:
        return self.unread

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_aborted = True

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


class Client:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.transport, self.counts = clock, Transport(), ConnectionCounts()
        config = HttpConfig(application, LIMITS, self.counts, lifespan="off", log_config=None)
        self.protocol = GuardedProtocol(config, ServerState(), {})
        self.protocol.connection_made(cast(asyncio.Transport, self.transport))

    async def send(self, data: bytes, after: float = 0.0) -> None:
        await self.clock.advance(after)
        self.protocol.data_received(data)
        await self.clock.settle()

    @property
    def is_over(self) -> bool:
        return self.transport.is_closing()

    @property
    def answers(self) -> list[int]:
        return [int(part.split(b" ", 1)[0]) for part in self.transport.written.split(b"HTTP/1.1 ")[1:]]


def with_client(work: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        client = Client(clock)
        await work(client)
        client.protocol.connection_lost(OSError())
        assert client.counts.open == 0
        await clock.settle()

    clock = Clock()
    try:
        asyncio.set_event_loop(clock)
        clock.run_until_complete(run())
        # Nothing of a connection that is over waits for the clock any more.
        assert not [handle for handle in clock._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]
    finally:
        asyncio.set_event_loop(None)
        clock.close()


def test_a_body_that_comes_steadily_has_more_time_and_one_that_stops_has_not() -> None:
    async def work(client: Client) -> None:
        await client.send(POST % (b"/", b"Content-Length: 5000"))
        for _ in range(10):
            await client.send(b"x" * 150, after=14.0)
            assert not client.is_over
        await client.clock.advance(30.0)
        await client.clock.advance(30.0)
        assert client.is_over
        assert client.answers == [408]
        error = json.loads(client.transport.written.partition(b"\r\n\r\n")[2])["error"]
        assert error["message"] == "the request's body took longer than 30 s: send faster"
        assert client.counts.timed_out[Phase.BODY] == 1

    with_client(work)


def test_what_was_sent_early_buys_no_long_silence() -> None:
    async def work(client: Client) -> None:
        await client.send(POST % (b"/", b"Content-Length: 1000000"))
        await client.send(b"x" * 900_000)
        await client.clock.advance(30.0)
        assert not client.is_over
        await client.clock.advance(30.0)
        assert client.answers == [408]

    with_client(work)


def test_the_body_of_a_request_behind_another_has_its_time_too() -> None:
    async def work(client: Client) -> None:
        await client.send(GET + POST % (b"/", b"Content-Length: 100") + b"{")
        assert client.answers == [200]
        await client.clock.advance(29.0)
        assert not client.is_over
        await client.clock.advance(1.0)
        assert client.answers == [200, 408]

    with_client(work)


def test_an_idle_connection_ends_without_a_word() -> None:
    async def work(client: Client) -> None:
        await client.send(GET)
        await client.clock.advance(5.0)
        assert client.is_over
        assert client.answers == [200]
        assert not client.counts.timed_out.total()

    with_client(work)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_the_rest_of_a_body_behind_its_answer_is_no_next_request(is_chunked: bool) -> None:
    async def work(client: Client) -> None:
        await client.send(POST % (b"/early", CHUNKED if is_chunked else b"Content-Length: 5"))
        assert client.answers == [200]
        await client.send(b"5\r\nxxxxx\r\n0\r\n\r\n" if is_chunked else b"xxxxx", after=0.5)
        await client.send(GET[:20], after=9.0)
        await client.send(GET[20:], after=9.0)
        assert client.answers == [200, 200]
        await client.send(POST % (b"/early", b"Content-Length: 500"))
        await client.send(b"x")
        await client.clock.advance(30.0)
        assert client.is_over
        assert client.answers == [200, 200, 200]

    with_client(work)


def test_nonsense_behind_an_answer_ends_the_connection() -> None:
    async def work(client: Client) -> None:
        await client.send(POST % (b"/early", CHUNKED))
        await client.send(b"zzz\r\n")
        assert client.transport.is_aborted
        assert client.answers == [200]

    with_client(work)


def test_nonsense_in_place_of_a_request_is_told_so() -> None:
    async def work(client: Client) -> None:
        await client.send(b"nonsense\r\n\r\n")
        assert client.is_over
        assert client.answers == [400]

    with_client(work)


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_client_that_reads_nothing_of_its_answer_is_given_up(goes_on: bool) -> None:
    async def work(client: Client) -> None:
        client.protocol.pause_writing()
        await client.clock.advance(59.0)
        if goes_on:
            client.protocol.resume_writing()
            assert not client.protocol.flow.write_paused
        await client.clock.advance(1.0)
        assert client.transport.is_aborted == (not goes_on)
        assert client.counts.timed_out[Phase.READING] == (not goes_on)

    with_client(work)


@pytest.mark.parametrize("request_", [GET, GET.replace(b"Host", b"Connection: close\r\nHost")])
def test_an_answer_too_short_to_be_paused_for_must_be_read_as_well(request_: bytes) -> None:
    async def work(client: Client) -> None:
        client.transport.unread = 1000
        await client.send(request_)
        await client.clock.advance(5.0)
        assert client.transport.is_closed
        await client.clock.advance(55.0)
        assert client.transport.is_aborted
        assert client.counts.timed_out[Phase.READING] == 1

    with_client(work)


def test_a_client_that_reads_slowly_is_waited_for() -> None:
    async def work(client: Client) -> None:
        client.transport.unread = 1000
        await client.send(GET)
        for client.transport.unread in (700, 400, 0):
            await client.clock.advance(60.0)
        assert not client.transport.is_aborted
        assert not client.counts.timed_out.total()

    with_client(work)


def test_no_more_is_read_at_once_than_can_be_taken_apart_in_a_few_milliseconds() -> None:
    async def work(client: Client) -> None:
        assert client.transport.max_size == READ_BYTES
        await client.send(POST % (b"/", b"Content-Length: 300000"))
        assert client.transport.max_size == MOST_READ_BYTES
        await client.send(b"x" * 280_000)
        assert READ_BYTES < client.transport.max_size <= 20_000
        await client.send(b"x" * 20_000)
        assert client.transport.max_size == READ_BYTES
        await client.send(POST % (b"/", CHUNKED))
        assert client.transport.max_size == READ_BYTES

    with_client(work)
