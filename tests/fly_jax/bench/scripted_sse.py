"""A server of one scripted answer, byte for byte, and what it was asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def piece(text: str, finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]})


def chat_piece(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})


def usage(prompt_tokens: int, completion_tokens: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}})


def chunk(data: bytes) -> bytes:
    """As HTTP/1.1 sends it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def stream(*events: bytes) -> list[bytes]:
    """A whole answer of these events."""
    return [HEAD, *map(chunk, events), END]


def plain(status: str, body: bytes) -> list[bytes]:
    return [b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)]


@dataclass
class Scripted:
    """What the server was asked, one entry a request."""

    url: str = ""
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)


@contextlib.asynccontextmanager
async def scripted(writes: Sequence[bytes], *, hold: bool = False) -> AsyncIterator[Scripted]:
    """Answers every request with these writes; then closes, or holds the connection open without a word more."""
    seen = Scripted()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}
        seen.paths.append(lines[0].split(" ")[1])
        seen.headers.append(headers)
        seen.bodies.append(json.loads(await reader.readexactly(int(headers["content-length"]))))
        for data in writes:
            writer.write(data)
            await writer.drain()
        if hold:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        seen.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield seen
