"""Which layout the server had when, and what its switches cost streams: read from ``GET /layout`` while a run lasts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

POLL_SECONDS = 0.25
# How long an answer is waited for: a late poll is only left out, but without the first answer there is no timeline.
POLL_TIMEOUT_SECONDS = 4 * POLL_SECONDS
START_TIMEOUT_SECONDS = 60.0

Fetch = Callable[[float], Awaitable[dict[str, Any] | None]]


@dataclass(frozen=True, slots=True)
class LayoutChange:
    """The layout from ``at`` on, in seconds from the start of the run, to within one poll."""

    at: float
    layout: str


@dataclass(frozen=True, slots=True)
class LayoutTimeline:
    """What was seen of layouts; empty for servers that have none.

    Attributes:
        changes: the layout at the start, and each later one.
        switch_stalls: seconds; for each switch during the run the longest that any stream in flight went without a
            token across it, as the server saw it.
    """

    changes: tuple[LayoutChange, ...] = ()
    switch_stalls: tuple[float, ...] = ()

    @property
    def switches(self) -> int:
        return len(self.switch_stalls)


class LayoutWatcher:
    """Polls a server and puts together its timeline.

    Args:
        fetch: what ``GET /layout`` returns; None where there is no such thing, or no answer in so many seconds.
        clock: seconds from the start of the run.
    """

    def __init__(self, fetch: Fetch, clock: Callable[[], float]) -> None:
        self._fetch = fetch
        self._clock = clock
        self._changes: list[LayoutChange] = []
        self._stalls: dict[int, float] = {}
        self._switches_before = 0

    async def start(self) -> bool:
        """Reads the first layout; False if the server has none, and nothing more is to be asked of it."""
        state = await self._fetch(START_TIMEOUT_SECONDS)
        if state is None or not {"layout", "switch_history"} <= state.keys():
            return False
        self._switches_before = max((report["number"] for report in state["switch_history"]), default=0)
        self._changes = [LayoutChange(0.0, state["layout"])]
        return True

    async def watch(self) -> None:
        """Polls until it is cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await self.poll()

    async def poll(self) -> None:
        """Notes what has happened since the last poll; an unanswered one is left out."""
        state = await self._fetch(POLL_TIMEOUT_SECONDS)
        if state is not None:
            self._note(state, self._clock())

    def _note(self, state: dict[str, Any], at: float) -> None:
        # Two switches between two polls leave the layout as it was; the history has both.
        for report in state["switch_history"]:
            number = report["number"]
            if number <= self._switches_before:
                continue
            if number not in self._stalls:
                self._changes.append(LayoutChange(at, report["target"]))
            # A report's figures may still grow until all streams have gone on.
            self._stalls[number] = report["worst_gap_seconds"]

    def timeline(self) -> LayoutTimeline:
        """What has been seen so far."""
        stalls = tuple(self._stalls[number] for number in sorted(self._stalls))
        return LayoutTimeline(tuple(self._changes), stalls)
