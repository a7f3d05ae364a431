"""When requests arrive: rates over time, and gamma gaps between arrivals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fly_jax.bench.random_streams import Stream, generator
from fly_jax.bench.workload_fields import Fields

# Requests a second; more than any client sends, and few enough to compute with.
HIGHEST_RATE = 1e9


@dataclass(frozen=True)
class Phase:
    """A stretch of time with its own rate.

    Attributes:
        seconds: how long it lasts; infinite: until the workload ends.
        rates: requests a second: where the phase begins, one drawn uniformly from ``[smallest, largest]``.
        end_rate: the rate goes there linearly from the beginning to the end of the phase; None: it stays.
        tag: of the requests that arrive meanwhile.
    """

    seconds: float
    rates: tuple[float, float]
    end_rate: float | None = None
    tag: str = ""


@dataclass(frozen=True)
class Arrivals:
    """How requests arrive.

    Attributes:
        phases: one after the other, and then again from the first.
        burstiness: shape of the gamma distribution of gaps: 1 is a Poisson process, less is burstier.
        requests: how many there are at most; None: no limit.
        seconds: how long they arrive; None: no limit.
    """

    phases: tuple[Phase, ...]
    burstiness: float
    requests: int | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Arrival:
    """When a request is to be sent, in seconds from the start, and the tag of the phase."""

    at: float
    tag: str


def read_arrivals(fields: Fields) -> Arrivals:
    """The keys ``requests``, ``seconds``, ``burstiness`` and ``[[phases]]``.

    Raises:
        ConfigError: a field is wrong, or the arrivals would never begin or never end.
    """
    requests = fields.integer("requests", minimum=1) if fields.has("requests") else None
    seconds = fields.number("seconds", above=0) if fields.has("seconds") else None
    if requests is None and seconds is None:
        raise fields.error("requests or seconds is missing; without both the workload would never end")
    tables = fields.tables("phases")
    phases = tuple(_read_phase(each, only=len(tables) == 1) for each in tables)
    if not any(phase.rates[1] > 0 or phase.end_rate for phase in phases):
        raise fields.error("no phase has a rate above 0, so no request would ever arrive")
    return Arrivals(phases, fields.number("burstiness", minimum=0.01, default=1.0), requests, seconds)


def _read_phase(fields: Fields, *, only: bool) -> Phase:
    if fields.has("rate") == fields.has("rate_range"):
        raise fields.error(f"give one of rate and rate_range, got {'both' if fields.has('rate') else 'neither'}")
    if fields.has("rate"):
        rates = (fields.number("rate", minimum=0, maximum=HIGHEST_RATE),) * 2
    else:
        rates = fields.numbers_range("rate_range", minimum=0, maximum=HIGHEST_RATE)
    end_rate = fields.number("end_rate", minimum=0, maximum=HIGHEST_RATE) if fields.has("end_rate") else None
    endless = only and end_rate is None and not fields.has("seconds")
    seconds = math.inf if endless else fields.number("seconds", above=0)
    phase = Phase(seconds, rates, end_rate, fields.text("tag", ""))
    fields.finish()
    return phase


def planned_arrivals(arrivals: Arrivals, seed: int, requests: int | None = None) -> list[Arrival]:
    """The arrivals of a seed, in order; fewer of them are the first of more.

    Args:
        requests: in the place of the workload's own number; its seconds still end it.
    """
    limit = arrivals.requests if requests is None else requests
    end = math.inf if arrivals.seconds is None else arrivals.seconds
    before_end = itertools.takewhile(
        lambda arrival: arrival.at < end, _arrive(arrivals.phases, arrivals.burstiness, end, seed)
    )
    return list(itertools.islice(before_end, limit))


def _arrive(phases: Sequence[Phase], burstiness: float, end: float, seed: int) -> Iterator[Arrival]:
    """Arrivals of the phases that begin before the end.

    Gaps of mean 1 are measured in expected requests and turned into time by the rate, so a change of the rate acts
    at once, also on a gap that has begun.
    """
    gaps = generator(seed, Stream.GAPS)
    rates = generator(seed, Stream.RATES)
    begun = 0.0
    gap = float(gaps.gamma(burstiness, 1 / burstiness))
    for phase in itertools.cycle(phases):
        if begun >= end:
            return
        first = float(rates.uniform(*phase.rates))
        last = first if phase.end_rate is None else phase.end_rate
        expected = _expected(first, last, phase.seconds)
        passed = 0.0
        while passed + gap < expected:
            passed += gap
            yield Arrival(begun + _time_of(passed, first, last, phase.seconds), phase.tag)
            gap = float(gaps.gamma(burstiness, 1 / burstiness))
        gap -= expected - passed
        begun += phase.seconds


def _expected(first: float, last: float, seconds: float) -> float:
    """Requests that a linear rate brings."""
    return 0.0 if first == last == 0 else (first + last) / 2 * seconds


def _time_of(requests: float, first: float, last: float, seconds: float) -> float:
    """When a linear rate has brought that many."""
    slope = 0.0 if math.isinf(seconds) else (last - first) / seconds
    root = math.sqrt(max(first**2 + 2 * slope * requests, 0.0))
    return 2 * requests / (first + root) if requests else 0.0
