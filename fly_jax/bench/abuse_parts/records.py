"""What one phase showed: the values that the parts hand to each other, and that the result file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Figures = Mapping[str, int | float | None]
Counts = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class StreamsSeen:
    """What well-behaved streams saw, each followed by a new one when it ends.

    Attributes:
        tokens: pieces of output of all of them.
        longest_gap_ms: between two pieces of one stream, or from the last piece to the end of the phase.
        median_gap_ms: of all of them; None without two pieces.
        longest_start_ms: from sending a request to its first piece, or to the end of the phase.
        failures: requests that were refused or broke off, by status or by what happened.
    """

    tokens: int
    longest_gap_ms: float
    median_gap_ms: float | None
    longest_start_ms: float
    failures: Counts


@dataclass(frozen=True, slots=True)
class CallsSeen:
    """What one call, made again and again, saw: of ``/health``, or of a short prompt.

    Attributes:
        answers: that were good.
        longest_ms: from asking to a good answer, or to the end of the phase.
        median_ms: of the good answers; None without any.
        longest_gap_ms: between two good answers, or from the last one to the end of the phase.
        failures: by status or by what happened.
    """

    answers: int
    longest_ms: float
    median_ms: float | None
    longest_gap_ms: float
    failures: Counts


@dataclass(frozen=True, slots=True)
class ProbesSeen:
    """What the others saw while a phase ran.

    Attributes:
        lag_ms: longest that the probes' own process woke up late: what of the figures may be the machine's.
    """

    streams: StreamsSeen
    health: CallsSeen
    short: CallsSeen
    lag_ms: float


@dataclass(frozen=True, slots=True)
class ServerSeen:
    """What the server's process and its counters say of a phase; None where they cannot be read.

    Attributes:
        switches: changes of layout during the phase.
        rss_before_mib, rss_peak_mib, rss_after_mib: resident memory.
        log_bytes: by which the log grew.
    """

    switches: int | None = None
    rss_before_mib: float | None = None
    rss_peak_mib: float | None = None
    rss_after_mib: float | None = None
    log_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """One phase.

    Attributes:
        seconds: how long the abuse lasted.
        answers: what the abuser was answered, by status or by what happened.
        figures: of this phase alone, by name.
    """

    name: str
    seconds: float
    answers: Counts
    figures: Figures
    probes: ProbesSeen
    server: ServerSeen
