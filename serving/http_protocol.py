"""Uvicorn's HTTP over h11, which bounds the size of headers, with an end to whatever a client can leave unfinished."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from serving.connections import RESERVED, RESERVED_PLACE, ConnectionCounts, ConnectionLimits, Phase
from serving.errors import ApiError


class HttpConfig(uvicorn.Config):
    """What all connections of a server share.

    Attributes:
        places: connections that are served; others are in ``reserved``, the oldest first.
    """

    def __init__(self, app: Any, limits: ConnectionLimits, counts: ConnectionCounts, **options: Any) -> None:
        super().__init__(app, http=GuardedProtocol, timeout_keep_alive=limits.keep_alive, **options)  # type: ignore[arg-type]
        self.limits, self.counts = limits, counts
        self.places = limits.places()
        self.reserved: dict[GuardedProtocol, None] = {}


class GuardedProtocol(H11Protocol):
    """One connection. Uvicorn ends those that are idle between two requests; this one the others that wait."""

    config: HttpConfig

    def __init__(
        self,
        config: HttpConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._phase: Phase | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._began = 0.0
        self._received = 0  # bytes of the request
        self._has_spoken = False

    # -- what the transport calls -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.config.counts.open += 1
        if len(self.connections) - len(self.config.reserved) > self.config.places:
            self._take_reserved_place()
        self._wait_for(Phase.HEADERS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_for(None)
        self._stop_stalled()
        self.config.reserved.pop(self, None)
        self.config.counts.open -= 1
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        self._has_spoken = True
        super().data_received(data)
        phase = self._awaited()
        if phase is not self._phase and not self.transport.is_closing():
            self._wait_for(phase)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for(None)
        if self in self.config.reserved:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.config.limits.reading, self._end, Phase.READING)

    def resume_writing(self) -> None:
        self._stop_stalled()
        super().resume_writing()

    # -- what is waited for -----------------------------------------------------------------------------------

    def _awaited(self) -> Phase | None:
        if self.cycle is None or self.cycle.response_complete:
            return Phase.HEADERS
        return Phase.BODY if self.cycle.more_body else None

    def _wait_for(self, phase: Phase | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._phase = phase
        if phase is not Phase.BODY:  # whose first bytes may have come with the headers
            self._received = 0
        if phase is not None:
            self._began = self.loop.time()
            is_reserved = phase is Phase.HEADERS and self in self.config.reserved
            seconds = self.config.limits.reserved if is_reserved else self.config.limits.seconds(phase)
            self._timer = self.loop.call_later(seconds, self._time_out, phase)

    def _time_out(self, phase: Phase) -> None:
        limits = self.config.limits
        if phase is Phase.BODY:
            until = self._began + limits.body + self._received / limits.body_bytes_per_second
            if self.loop.time() < until:
                self._timer = self.loop.call_at(until, self._time_out, phase)
                return
        self._end(phase)

    def _end(self, phase: Phase) -> None:
        self.config.counts.timed_out[phase] += 1
        if phase is Phase.READING:
            self.transport.abort()
            return
        # A connection that was opened ahead of its request, as browsers do, ends without a word.
        if self._has_spoken and (phase is Phase.HEADERS or not self.cycle.response_started):
            message = f"the request's {phase} took longer than {self.config.limits.seconds(phase):g} s: send faster"
            self.transport.write(_raw(ApiError(408, message, code="request_timeout")))
        self.transport.close()

    def _stop_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    # -- beyond the limit -------------------------------------------------------------------------------------

    def _take_reserved_place(self) -> None:
        """Only health is answered there; the oldest that has not asked yet gives way to the newest."""
        reserved = self.config.reserved
        reserved[self] = None
        self.app_state = {**self.app_state, RESERVED_PLACE: True}
        if len(reserved) > RESERVED:
            oldest = next(iter(reserved))
            reserved.pop(oldest)
            self.config.counts.refused += 1
            oldest.transport.close()


def _raw(error: ApiError) -> bytes:
    """The last answer of a connection, past the state machine that still waits for the request."""
    body = bytes(error.response().body)
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body
