"""An OpenAI-compatible server that answers at once, for measuring what a client costs.

``python -m tests.fly_jax.bench.null_server`` prints the port that it listens on and serves until it is stopped. Every
request gets eight pieces of one token each, the usage and the end in a single write, so that what a run shows beyond
that is the client's own: how late its requests leave and how much CPU time a token takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator

TOKENS = 8


def answer() -> bytes:
    """One whole response, head included."""
    pieces = [{"choices": [{"index": 0, "text": "x", "finish_reason": None}]} for _ in range(TOKENS - 1)]
    last = {"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": TOKENS, "total_tokens": 4 + TOKENS}}
    events = [b"data: " + json.dumps(each).encode() + b"\n\n" for each in (*pieces, last, usage)]
    body = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in (*events, b"data: [DONE]\n\n")) + b"0\r\n\r\n"
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + body


def models() -> bytes:
    body = json.dumps({"object": "list", "data": [{"id": "null", "max_model_len": 1 << 20}]}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


ANSWERS = {b"/v1/completions": answer(), b"/v1/models": models()}
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


class NullProtocol(asyncio.Protocol):
    """Just as much of HTTP/1.1 as a well-behaved client needs; ``on_request`` hears of each path."""

    def __init__(self, on_request: Callable[[bytes], None] = lambda _: None) -> None:
        self._on_request = on_request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        length = 0
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        if len(body) >= length:
            self._received = body[length:]
            path = head.split(b" ", 2)[1]
            self._on_request(path)
            self._transport.write(ANSWERS.get(path, NOT_FOUND))


async def serve(on_listening: Callable[[int], None], on_request: Callable[[bytes], None] = lambda _: None) -> None:
    """Serves on a free port, which it tells, until it is cancelled."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: NullProtocol(on_request), "127.0.0.1", 0, backlog=4096)
    on_listening(server.sockets[0].getsockname()[1])
    await server.serve_forever()


@contextlib.contextmanager
def null_server(on_request: Callable[[bytes], None] = lambda _: None) -> Iterator[str]:
    """One in a thread; yields its URL."""
    ports: list[int] = []
    is_up = threading.Event()
    loop = asyncio.new_event_loop()

    def on_listening(port: int) -> None:
        ports.append(port)
        is_up.set()

    task = loop.create_task(serve(on_listening, on_request))

    def main() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=main, name="null-server", daemon=True)
    thread.start()
    assert is_up.wait(120)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(120)
        assert not thread.is_alive()
        loop.close()


if __name__ == "__main__":
    asyncio.run(serve(lambda port: print(port, flush=True)))
