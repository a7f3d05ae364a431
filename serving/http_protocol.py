"""Uvicorn's HTTP over h11, which bounds the size of headers, with an end to whatever a client can leave unfinished."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from serving.connections import RESERVED, RESERVED_PLACE, ConnectionCounts, ConnectionLimits, Phase
from serving.errors import ApiError

# Read in one pass of the event loop where it may be anything: chunks of one byte take 12 us each. Of a body whose
# length was declared, what is left of it.
READ_BYTES = 4 * 1024
MOST_READ_BYTES = 256 * 1024


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
        self._received = 0  # bytes of the request
        self._received_before = 0  # when its time was last looked at
        self._unread_before = 0

    # -- what the transport calls -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._read_at_most(READ_BYTES)
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
        begins = not self._begun_request
        super().data_received(data)
        if self.transport.is_closing():
            return
        phase = self._awaited()
        if phase is not self._phase or (begins and phase is Phase.HEADERS):
            self._wait_for(phase)
        self._read_at_most(self._left_of_body() if phase is Phase.BODY else READ_BYTES)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # The next request may have come already, or a part of it; headers have the time of an idle connection.
        self._wait_for(None)
        if self._awaited() is Phase.BODY:
            self._wait_for(Phase.BODY)
        self._watch_unread()
        if self in self.config.reserved:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # it has its answer, or is getting it
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_stalled()
        self._stalled = self.loop.call_later(self.config.limits.reading, self._end, Phase.READING)

    def resume_writing(self) -> None:
        self._stop_stalled()
        super().resume_writing()

    def _read_at_most(self, size: int) -> None:
        if hasattr(self.transport, "max_size"):
            self.transport.max_size = min(MOST_READ_BYTES, max(READ_BYTES, size))

    def _left_of_body(self) -> int:
        """Bytes, by what was declared; 0 where nothing was."""
        declared = next((value for name, value in self.headers if name == b"content-length"), b"")
        return int(declared) - self._received if declared.isdigit() and len(declared) < 20 else 0

    # -- what is waited for -----------------------------------------------------------------------------------

    def _awaited(self) -> Phase | None:
        if self.conn.their_state is h11.SEND_BODY:  # also where the answer came before its end
            return Phase.BODY
        return Phase.HEADERS if self.cycle is None or self.cycle.response_complete else None

    @property
    def _begun_request(self) -> bool:
        """Some of a request has come, and not all of its headers."""
        return bool(self.conn.trailing_data[0])

    def _wait_for(self, phase: Phase | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._phase = phase
        if phase is not Phase.BODY:  # whose first bytes may have come with the headers
            self._received = 0
        self._received_before = 0
        if phase is not None:
            is_reserved = phase is Phase.HEADERS and self in self.config.reserved
            seconds = self.config.limits.reserved if is_reserved else self.config.limits.seconds(phase)
            self._timer = self.loop.call_later(seconds, self._time_out, phase)

    def _time_out(self, phase: Phase) -> None:
        limits = self.config.limits
        if phase is Phase.BODY and self._received - self._received_before >= limits.body * limits.body_bytes_per_second:
            self._received_before = self._received
            self._timer = self.loop.call_later(limits.body, self._time_out, phase)
            return
        self._end(phase)

    def _end(self, phase: Phase) -> None:
        self.config.counts.timed_out[phase] += 1
        if phase is Phase.READING:
            self.transport.abort()
            return
        # A connection that was opened ahead of its request, as browsers do, ends without a word.
        if self._begun_request if phase is Phase.HEADERS else not self.cycle.response_started:
            message = f"the request's {phase} took longer than {self.config.limits.seconds(phase):g} s: send faster"
            self.transport.write(_raw(ApiError(408, message, code="request_timeout")))
        self._watch_unread()
        self.transport.close()

    def _watch_unread(self) -> None:
        """A closed connection lasts until its answer has been read: of one that is not, no more is waited for."""
        self._unread_before = self.transport.get_write_buffer_size()
        if self._stalled is None and self._unread_before:
            self._stalled = self.loop.call_later(self.config.limits.reading, self._look_at_unread)

    def _look_at_unread(self) -> None:
        self._stalled = None
        if 0 < self._unread_before <= self.transport.get_write_buffer_size():
            self._end(Phase.READING)
        else:
            self._watch_unread()

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
