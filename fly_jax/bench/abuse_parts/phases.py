"""The phases in the order in which they are run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fly_jax.bench.abuse_parts import connections, large_inputs, unfairness
from fly_jax.bench.abuse_parts.abuser import Abuser
from fly_jax.bench.abuse_parts.records import Figures

IDLE, STREAMS = "idle", "streams"


@dataclass(frozen=True, slots=True)
class Phase:
    """One way to abuse a server.

    Attributes:
        run: does it, and returns what only this phase can tell.
        has_crowd: beside several well-behaved streams and not one.
    """

    name: str
    run: Callable[[Abuser], Awaitable[Figures]]
    has_crowd: bool = False

    @property
    def baseline(self) -> str:
        """The phase without abuse that it is to be compared with."""
        return STREAMS if self.has_crowd else IDLE


async def no_abuse(abuser: Abuser) -> Figures:
    """The well-behaved clients alone."""
    await asyncio.sleep(abuser.sizes.idle_seconds)
    return {}


PHASES = (
    Phase(IDLE, no_abuse),
    Phase("large-texts", large_inputs.large_texts),
    Phase("largest-text", large_inputs.largest_text),
    Phase("large-chat", large_inputs.large_chat),
    Phase("tokenize", large_inputs.large_tokenize),
    Phase("detokenize", large_inputs.large_detokenize),
    Phase("token-ids", large_inputs.large_ids),
    Phase("slow-headers", connections.slow_headers),
    Phase("slow-bodies", connections.slow_bodies),
    Phase("idle-connections", connections.idle_connections),
    Phase("many-connections", connections.many_connections),
    Phase(STREAMS, no_abuse, has_crowd=True),
    Phase("wide-requests", unfairness.wide_requests, has_crowd=True),
    Phase("waiting-places", unfairness.waiting_places),
    Phase("plain-flood", unfairness.plain_flood),
    Phase("priority-flood", unfairness.priority_flood),
    # Last: what memory the server keeps when everybody has gone.
    Phase("afterwards", no_abuse),
)
NAMES = tuple(phase.name for phase in PHASES)
