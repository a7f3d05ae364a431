"""Routes whose bodies are read wherever they stall nobody, by their size."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from serving.clients import client_of
from serving.disconnect import ClientGoneError, client_gone, unless_disconnected
from serving.large_bodies import LARGE_BYTES
from serving.protocol import Body
from serving.reading import Reading
from serving.state import state_of


class ReadRequest(Request):
    """A request whose large body another process has read."""

    def __init__(self, request: Request, reading: Reading) -> None:
        super().__init__(request.scope, request.receive)
        self.reading = reading

    async def body(self) -> bytes:
        return b"{}"  # it is long gone; to the framework it is one that is not empty

    async def json(self) -> Any:
        return self.reading.body


class BodyRoute(APIRoute):
    """A route whose endpoint takes its ``body`` as one of those that :class:`serving.reading.Reader` reads."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        model: type[Body] = get_type_hints(self.endpoint)["body"]

        async def read_first(request: Request) -> Response:
            # The framework keeps its own request, and a body that was read through it, as long as the answer lasts.
            reader = Request(request.scope, request.receive)
            if len(await reader.body()) < LARGE_BYTES or "json" not in reader.headers.get("content-type", "").lower():
                return await handle(reader)
            reading = state_of(request).large_bodies.read(model, await reader.body(), client_of(request))
            del reader
            try:
                return await handle(ReadRequest(request, await unless_disconnected(request.receive, reading)))
            except ClientGoneError:
                return client_gone()

        return read_first


async def result_of(request: Request, body: Body) -> Any:
    """What :meth:`serving.reading.Reader.read` makes of the body.

    Raises:
        InvalidRequestError, ContextLengthError: the body asks for what cannot be.
    """
    if isinstance(request, ReadRequest):
        return request.reading.result
    return await state_of(request).reading_threads.read(body, len(await request.body()))
