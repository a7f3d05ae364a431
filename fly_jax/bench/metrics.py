"""Latencies and throughput from records, with the definitions of ``vllm bench serve``. Pure functions.

- TTFT: from sending to the first output. E2EL: from sending to the last output.
- TPOT: (E2EL - TTFT) / (output tokens - 1), of requests with more than one output token.
- ITL: every gap between two successive outputs of a request, of all requests pooled.

Requests that failed count in no latency and no token total, only in ``failed``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fly_jax.bench.requests import RequestRecord
from fly_jax.errors import ConfigError

LATENCIES = ("ttft", "tpot", "itl", "e2el")
LIMITED = ("ttft", "tpot", "e2el")
PERCENTILES = (50.0, 90.0, 99.0)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds; ``itl`` is pooled, ``tpot`` lacks requests of a single token."""

    ttft: tuple[float, ...]
    tpot: tuple[float, ...]
    itl: tuple[float, ...]
    e2el: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Throughput:
    """Rates are per second of the whole run; ``request_goodput`` is None where no limits were given."""

    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    request_goodput: float | None
    output_throughput: float
    total_token_throughput: float


@dataclass(frozen=True, slots=True)
class Peaks:
    """Most output pieces within one second of the run, and most answered requests in flight at once."""

    max_output_tokens_per_s: float
    max_concurrent_requests: int


def time_to_first_token(record: RequestRecord) -> float:
    """Seconds; 0 if nothing came."""
    return record.token_times[0] - record.sent_at if record.token_times else 0.0


def gaps(record: RequestRecord) -> list[float]:
    """Seconds between successive outputs."""
    return [after - before for before, after in itertools.pairwise(record.token_times)]


def latencies(records: Sequence[RequestRecord]) -> Latencies:
    """Of the requests that were answered."""
    answered = answered_among(records)
    return Latencies(
        ttft=tuple(time_to_first_token(record) for record in answered),
        tpot=tuple(_time_per_output_token(record) for record in answered if record.output_tokens > 1),
        itl=tuple(gap for record in answered for gap in gaps(record)),
        e2el=tuple(_end_to_end(record) for record in answered),
    )


def latency_figures(records: Sequence[RequestRecord], percentiles: Sequence[float] = PERCENTILES) -> dict[str, float]:
    """``mean_ttft_ms``, ``p99_itl_ms`` and so on, in milliseconds; 0 where there is nothing to measure."""
    values = latencies(records)
    figures = {}
    for name in LATENCIES:
        sample = np.asarray(getattr(values, name) or (0.0,)) * 1e3
        figures[f"mean_{name}_ms"] = float(sample.mean())
        figures[f"median_{name}_ms"] = float(np.median(sample))
        figures[f"std_{name}_ms"] = float(sample.std())
        for percentile in percentiles:
            figures[f"p{percent_text(percentile)}_{name}_ms"] = float(np.percentile(sample, percentile))
    return figures


def throughput(records: Sequence[RequestRecord], duration: float, limits: Mapping[str, float]) -> Throughput:
    """Counts, and rates over ``duration`` seconds.

    Args:
        limits: milliseconds by name, from ``LIMITED``; a request is good if it keeps all of them.
    """
    answered = answered_among(records)
    inputs = sum(record.prompt_tokens for record in answered)
    outputs = sum(record.output_tokens for record in answered)
    good = sum(_keeps(record, limits) for record in answered)
    return Throughput(
        completed=len(answered),
        failed=len(records) - len(answered),
        total_input_tokens=inputs,
        total_output_tokens=outputs,
        request_throughput=len(answered) / duration,
        request_goodput=good / duration if limits else None,
        output_throughput=outputs / duration,
        total_token_throughput=(inputs + outputs) / duration,
    )


def peaks(records: Sequence[RequestRecord]) -> Peaks:
    """Seconds are counted from the first request that was answered."""
    answered = answered_among(records)
    if not answered:
        return Peaks(0.0, 0)
    start = min(record.sent_at for record in answered)
    seconds = np.asarray([int(at - start) for record in answered for at in record.token_times])
    # An end sorts before a start at the same time: the two were never in flight together.
    changes = sorted(
        itertools.chain.from_iterable(((record.sent_at, 1), (record.token_times[-1], -1)) for record in answered)
    )
    in_flight = itertools.accumulate(change for _, change in changes)
    return Peaks(float(np.bincount(seconds).max()), max(in_flight))


def percent_text(percentile: float) -> str:
    """``99`` or ``99.9``, as in ``vllm bench serve``; every digit counts, or 99.99999 would be 100."""
    return str(int(percentile)) if percentile == int(percentile) else str(percentile)


def parse_goodput(given: Sequence[str]) -> dict[str, float]:
    """Limits in milliseconds from words such as ``ttft:200``.

    Raises:
        ConfigError: a word has another form, an unknown name or a limit that is not a positive number.
    """
    limits = {}
    for word in given:
        name, _, limit = word.partition(":")
        try:
            limits[name] = float(limit)
        except ValueError:
            limits[name] = 0.0
        if name not in LIMITED or not 0 < limits[name] < math.inf:
            known = ", ".join(LIMITED)
            raise ConfigError(f"--goodput takes NAME:MILLISECONDS with a name of {known}, got {word!r}")
    return limits


def answered_among(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    return [record for record in records if not record.error]


def _end_to_end(record: RequestRecord) -> float:
    return record.token_times[-1] - record.sent_at


def _time_per_output_token(record: RequestRecord) -> float:
    return (_end_to_end(record) - time_to_first_token(record)) / (record.output_tokens - 1)


def _keeps(record: RequestRecord, limits: Mapping[str, float]) -> bool:
    """A single token has no time per further token, which keeps every limit."""
    measured = {
        "ttft": time_to_first_token(record),
        "tpot": _time_per_output_token(record) if record.output_tokens > 1 else 0.0,
        "e2el": _end_to_end(record),
    }
    return all(measured[name] <= limit / 1e3 for name, limit in limits.items())
