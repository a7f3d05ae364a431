"""Noticing that a client has left while something runs for it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive

T = TypeVar("T")
# Nobody reads it, but logs and tests do: nginx's number for a client that closed the connection.
CLIENT_CLOSED_REQUEST = 499


class ClientGoneError(Exception):
    """The client closed the connection before there was an answer."""


def client_gone() -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client has left. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Runs ``work`` to its end, or cancels it as soon as the client leaves.

    Raises:
        ClientGoneError: the client left first; ``work`` has been cancelled and has cleaned up.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        await stop(task, watcher)


async def stop(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks and waits until they have cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
