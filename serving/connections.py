"""How many connections there may be, for how long one may keep the server waiting, and what became of them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from fly_jax.errors import ConfigError
from fly_jax.platform import raise_file_limit

logger = logging.getLogger(__name__)

# Connections that the kernel holds for us until we take them.
BACKLOG = 2048
# Taken in one pass of the event loop, at 0.2 ms each: whoever streams waits for the pass to end.
ACCEPTED_AT_ONCE = 16
# Beyond the limit, so that health can be asked for: an answer that there is no place needs a connection too. Many times
# what is accepted in one go, or a flood would push out those that ask before they are heard.
RESERVED = 256
# In a request's state: its connection is one of those.
RESERVED_PLACE = "reserved_place"
# Files for models, logs and the engine, and for connections that were accepted and will be refused.
_OTHER_FILES = 640


class Phase(StrEnum):
    """What a connection keeps the server waiting for."""

    HEADERS = "headers"
    BODY = "body"
    READING = "reading"
    """Of an answer, by the client."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """
    Attributes:
        connections: most that are open at once; one more is told so and closed, unless it asks for ``/health``.
        keep_alive: seconds that a connection may be idle between two requests.
        headers: seconds until the headers of a request are complete, from the connection or its first byte on.
        body: seconds until the body is complete, and as many again if ``body_bytes_per_second`` have come in them.
        reading: seconds for which a client may read nothing of an answer that waits for it.
        reserved: seconds that a connection beyond the limit has in place of ``headers``.
    """

    connections: int = 2048
    keep_alive: float = 5.0
    headers: float = 10.0
    body: float = 30.0
    body_bytes_per_second: int = 16 * 1024
    reading: float = 60.0
    reserved: float = 2.0

    def __post_init__(self) -> None:
        if self.connections < 1:
            raise ConfigError(f"limit_concurrency must be at least 1, got {self.connections}")
        for name in ("keep_alive", "headers", "body", "reading", "reserved"):
            if not 0.0 < (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"timeout_{name} must be more than 0 seconds, got {value}")

    def seconds(self, phase: Phase) -> float:
        return {Phase.HEADERS: self.headers, Phase.BODY: self.body, Phase.READING: self.reading}[phase]

    def places(self) -> int:
        """``connections``, or as many as this process may have files for; says so in the log."""
        wanted = self.connections + RESERVED + _OTHER_FILES
        files = raise_file_limit(wanted)
        places = max(1, min(self.connections, files - RESERVED - _OTHER_FILES))
        if places < self.connections:
            logger.warning(
                "at most %d connections, not the %d of --limit-concurrency: they need %d open files and this process "
                "may have %d: raise ulimit -n",
                places,
                self.connections,
                wanted,
                files,
            )
        return places


@dataclass(slots=True)
class ConnectionCounts:
    """What the connections of one application have come to.

    Attributes:
        open: now.
        refused: told that there is no place, or closed without a word when there were too many even of those.
        timed_out: closed by us, by what they kept us waiting for.
    """

    open: int = 0
    refused: int = 0
    timed_out: Counter[Phase] = field(default_factory=lambda: Counter(dict.fromkeys(Phase, 0)))
