"""What a probe has seen so far, from times alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from fly_jax.bench.abuse_parts.records import CallsSeen, StreamsSeen

MS = 1000.0
# A fraction of a millisecond is below what any of this can tell.
DIGITS = 1


def milliseconds(seconds: float) -> float:
    return round(seconds * MS, DIGITS)


@dataclass(slots=True)
class StreamWatch:
    """One stream after the other; times are seconds of any clock.

    Attributes:
        gaps: between two pieces of one stream.
    """

    clock: Callable[[], float]
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    longest_start: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    _since: float | None = None
    _is_started: bool = False

    def begin(self) -> None:
        """Forgets what was before; a silence that lasts counts from here on."""
        self.gaps.clear()
        self.failures.clear()
        self.tokens, self.longest_start = 0, 0.0
        if self._since is not None:
            self._since = self.clock()

    def sent(self) -> None:
        self._since, self._is_started = self.clock(), False

    def pieces(self, count: int) -> None:
        """Some came together."""
        now = self.clock()
        self._close(now)
        self._since, self._is_started = now, True
        self.gaps += [0.0] * (count - 1)
        self.tokens += count

    def ended(self, failure: str = "") -> None:
        """The answer is complete; or it was refused, or broke off after a silence that counts."""
        if failure:
            self.failures[failure] += 1
            if self._is_started:
                self._close(self.clock())
        self._since = None

    def stop(self) -> None:
        """The phase is over: a silence that lasts counts as far as it was seen."""
        if self._since is not None:
            self._close(self.clock())

    def _close(self, now: float) -> None:
        if self._since is None:
            return
        if self._is_started:
            self.gaps.append(now - self._since)
        else:
            self.longest_start = max(self.longest_start, now - self._since)


def streams_seen(watches: list[StreamWatch]) -> StreamsSeen:
    """All of them together; their median is that of all gaps."""
    gaps = [gap for each in watches for gap in each.gaps]
    return StreamsSeen(
        tokens=sum(each.tokens for each in watches),
        longest_gap_ms=milliseconds(max(gaps, default=0.0)),
        median_gap_ms=milliseconds(statistics.median(gaps)) if gaps else None,
        longest_start_ms=milliseconds(max((each.longest_start for each in watches), default=0.0)),
        failures=dict(sum((each.failures for each in watches), Counter[str]())),
    )


@dataclass(slots=True)
class CallWatch:
    """One call after the other."""

    clock: Callable[[], float]
    times: list[float] = field(default_factory=list)
    longest_gap: float = 0.0
    unanswered: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    _last_good: float = 0.0
    _asked: float | None = None

    def begin(self) -> None:
        """Forgets what was before; a call that is not answered yet counts from here on."""
        self.times.clear()
        self.failures.clear()
        self.longest_gap = 0.0
        self._last_good = self.clock()
        if self._asked is not None:
            self._asked = self._last_good

    def asked(self) -> None:
        self._asked = self.clock()

    def answered(self, failure: str = "") -> None:
        now = self.clock()
        if failure:
            self.failures[failure] += 1
        elif self._asked is not None:
            self.times.append(now - self._asked)
            self._gap(now)
            self._last_good = now
        self._asked = None

    def stop(self) -> None:
        """The phase is over: a call that is not answered counts as far as it was seen."""
        now = self.clock()
        self._gap(now)
        self.unanswered = 0.0 if self._asked is None else now - self._asked

    def _gap(self, now: float) -> None:
        self.longest_gap = max(self.longest_gap, now - self._last_good)

    def seen(self) -> CallsSeen:
        return CallsSeen(
            answers=len(self.times),
            longest_ms=milliseconds(max([*self.times, self.unanswered])),
            median_ms=milliseconds(statistics.median(self.times)) if self.times else None,
            longest_gap_ms=milliseconds(self.longest_gap),
            failures=dict(self.failures),
        )
