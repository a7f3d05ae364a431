"""Server-sent events, and the response that writes them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Generic, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.disconnect import stop, wait_for_disconnect
from serving.errors import ApiError, shutting_down

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


def event(json_text: str) -> bytes:
    """One event. JSON escapes line breaks, so the text is always a single data line."""
    return b"data: " + json_text.encode("utf-8") + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The status line has left long ago: the error travels in the stream, where OpenAI's client looks for it."""
    return event(json.dumps(error.body(), ensure_ascii=False))


class Primed(Generic[T]):
    """A stream whose first item has been awaited, so that errors of the start were still raised as such."""

    def __init__(self, stream: AsyncGenerator[T, None], first: list[T]) -> None:
        self._stream = stream
        self._first = first

    @classmethod
    async def start(cls, stream: AsyncGenerator[T, None]) -> Primed[T]:
        async for item in stream:
            return cls(stream, [item])
        return cls(stream, [])

    def __aiter__(self) -> Primed[T]:
        return self

    async def __anext__(self) -> T:
        return self._first.pop() if self._first else await anext(self._stream)

    async def aclose(self) -> None:
        await self._stream.aclose()


class EventStream(Response, Generic[T]):
    """Writes events until they end or the client leaves, then closes what they are made from.

    Starlette's own streaming response leaves the closing of its iterator to the garbage collector; here an abandoned
    stream frees its blocks in the engine at once.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], source: Primed[T]) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self._events = events
        self._source = source
        self._is_open = False
        # Proxies that buffer would turn a stream into one late answer.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    def init_headers(self, headers: dict[str, str] | None = None) -> None:  # type: ignore[override]
        super().init_headers(headers)
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.create_task(self._write(send))
        watcher = asyncio.create_task(wait_for_disconnect(receive))
        try:
            await asyncio.wait({writer, watcher}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await stop(writer, watcher)
            if not self._is_open:
                raise
            await self._end(send, error_event(shutting_down()) + DONE)
        finally:
            await stop(writer, watcher)
            await self._events.aclose()
            await self._source.aclose()
        if not writer.cancelled() and (error := writer.exception()) is not None:
            raise error

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._is_open = True
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await self._end(send, b"")

    async def _end(self, send: Send, data: bytes) -> None:
        self._is_open = False
        await send({"type": "http.response.body", "body": data, "more_body": False})
