"""Pure ASGI middleware: each passes ``receive`` and ``send`` on, so that disconnects and streams come through."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.byte_budget import ByteBudget, HeldBody
from serving.connections import RESERVED_PLACE, ConnectionCounts
from serving.errors import AUTHENTICATION, RETRY_AFTER_SECONDS, SERVER, ApiError, shutting_down, to_api_error

REQUEST_ID_HEADER = "X-Request-Id"
HEALTH = "/health"
GENERATING_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
# Probes and scrapers have no key; /layout has a guard of its own.
OPEN_PATHS = frozenset({"/health", "/version", "/load", "/metrics", "/layout"})
# Reading a bit more of a body that is refused lets clients get to the answer before the connection closes.
DISCARD_BYTES = 64 * 1024 * 1024
# Of bodies that are being received or read: several of the largest, but not one for each connection.
MAX_HELD_BYTES = 128 * 1024 * 1024
# So much of each is not counted: a short request finds room however many long ones there are.
UNCOUNTED_BYTES = 64 * 1024
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def same_secret(given: str, expected: str) -> bool:
    """Compares digests, so that the time taken tells neither content nor length."""
    digests = (hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in (given, expected))
    return hmac.compare_digest(*digests)


def bearer_token(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


class RequestId:
    """Notes when a request came, and its id: the client's own where it is a plain one, else a new one.

    The answer carries the id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, arrival=time.monotonic())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class ErrorBoundary:
    """Nothing that goes wrong inside leaves as anything but a JSON error.

    The only one to cancel a request's task is the server that ran out of shutdown time: the client is told so.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except (Exception, asyncio.CancelledError) as exc:
            if started:
                raise
            error = shutting_down() if isinstance(exc, asyncio.CancelledError) else to_api_error(exc)
            await error.response()(scope, receive, send)


class OneByOne:
    """Lets one request a pass of the event loop in, so that a thousand at once hold up neither streams nor health."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != HEALTH:
            async with self._turn:
                await asyncio.sleep(0)
        await self._app(scope, receive, send)


class OnlyHealth:
    """Answers nothing but ``/health`` on connections beyond the limit."""

    def __init__(self, app: ASGIApp, counts: ConnectionCounts) -> None:
        self._app = app
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or RESERVED_PLACE not in scope.get("state", {}) or scope["path"] == HEALTH:
            await self._app(scope, receive, send)
            return
        self._counts.refused += 1
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS), "Connection": "close"}
        error = ApiError(
            503, "too many connections: try later", type=SERVER, code="too_many_connections", headers=headers
        )
        await error.response()(scope, receive, send)


class InFlight:
    """Counts generating requests between their arrival and the last byte of their answer."""

    def __init__(self) -> None:
        self.count = 0


class CountInFlight:
    def __init__(self, app: ASGIApp, in_flight: InFlight) -> None:
        self._app = app
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in GENERATING_PATHS:
            await self._app(scope, receive, send)
            return
        self._in_flight.count += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight.count -= 1


class RequireApiKey:
    """Asks for an API key everywhere but on the open paths, so that a new route is never open by oversight.

    The number of the key that was given is left in the request's state.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._api_keys = api_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        given = bearer_token(Headers(scope=scope))
        # All are compared, so that the time taken does not tell which it was.
        matches = [same_secret(given, key) for key in self._api_keys]
        if not any(matches):
            message = "missing or wrong API key: send it as 'Authorization: Bearer KEY'"
            headers = {"WWW-Authenticate": "Bearer"}
            error = ApiError(401, message, type=AUTHENTICATION, code="invalid_api_key", headers=headers)
            await error.response()(scope, receive, send)
            return
        scope.setdefault("state", {})["api_key_number"] = matches.index(True)
        await self._app(scope, receive, send)


class LimitBody:
    """Reads the body before anything else does, up to the limit, and hands it on in one piece.

    Refusing while the framework reads would surface as its own parse error; the routes read whole bodies anyway.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, held: ByteBudget, client_of: Callable[[Request], str]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._held = held
        self._client_of = client_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._held.body(self._client_of(Request(scope))) as held:
            try:
                body = await self._read(Headers(scope=scope), receive, held)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            if body is None:
                return
            pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
            del body

            async def replay() -> Message:
                return pending.pop() if pending else await receive()

            async def send_after_reading(message: Message) -> None:
                held.release()  # nobody needs the body when there is an answer to it
                await send(message)

            await self._app(scope, replay, send_after_reading)

    async def _read(self, headers: Headers, receive: Receive, held: HeldBody) -> bytes | None:
        """The body; None when the client left before it was complete.

        Raises:
            ApiError: it is too large, or its length is not certain.
            QueueFullError, ClientQueueFullError: too much is held already.
        """
        if "content-length" in headers and "transfer-encoding" in headers:
            # A proxy may believe the one and h11 the other.
            reason = "a request has either Content-Length or Transfer-Encoding: leave one out"
            raise ApiError(400, reason, headers={"Connection": "close"})
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes + DISCARD_BYTES:
            raise self._too_large()
        parts: list[bytes] = []
        total = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            uncounted = max(0, UNCOUNTED_BYTES - total)
            total += len(part)
            if total > self._max_bytes:
                parts.clear()
                held.release()
            else:
                held.grow(max(0, len(part) - uncounted))
                parts.append(part)
            if total > self._max_bytes + DISCARD_BYTES or not message.get("more_body", False):
                break
        if total > self._max_bytes:
            raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self._max_bytes} bytes: split the request"
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
