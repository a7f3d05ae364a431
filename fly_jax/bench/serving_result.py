"""The result of a load run as one JSON object, with the keys of ``vllm bench serve`` and some of our own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fly_jax.bench import metrics
from fly_jax.bench.arrivals import RampUp
from fly_jax.bench.load import LoadResult
from fly_jax.bench.requests import RequestRecord

# Lists with an entry for each request, in the order in which they were sent; times are in seconds.
BY_REQUEST: dict[str, Callable[[RequestRecord], Any]] = {
    "input_lens": lambda record: record.prompt_tokens,
    "output_lens": lambda record: 0 if record.error else record.output_tokens,
    "start_times": lambda record: record.sent_at,
    "ttfts": metrics.time_to_first_token,
    "itls": metrics.gaps,
    "tags": lambda record: record.planned.tag,
    "errors": lambda record: record.error,
}


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a result says of its run besides what was measured.

    Attributes:
        backend: kind of API, with vLLM's names: ``openai``, ``vllm`` or ``openai-chat``.
        request_rate: requests a second asked for; infinite: all at once.
        workload: name of what was sent.
        burstiness: of the arrivals; None: as the workload says.
        goodput: limits in milliseconds by latency.
        ramp_up: which then sets the rate of each request.
        percentiles: to compute besides those that every result has.
        clipped, skipped: requests and entries of the workload, as its plan counts them.
        label: the user's name for the run.
    """

    backend: str
    model_id: str
    workload: str
    seed: int
    request_rate: float = math.inf
    burstiness: float | None = 1.0
    max_concurrency: int | None = None
    goodput: Mapping[str, float] = field(default_factory=dict)
    ramp_up: RampUp | None = None
    percentiles: tuple[float, ...] = ()
    clipped: int = 0
    skipped: int = 0
    label: str | None = None


def build_result(load: LoadResult, facts: RunFacts, *, detailed: bool = False) -> dict[str, Any]:
    """All figures of a run; times of single requests are in seconds, figures named ``_ms`` in milliseconds.

    Args:
        detailed: with the generated texts.
    """
    records = load.sent.records
    percentiles = sorted({*metrics.PERCENTILES, *facts.percentiles})
    counted = metrics.throughput(records, load.duration, facts.goodput)
    result: dict[str, Any] = {
        "endpoint_type": facts.backend,
        "backend": facts.backend,
        "label": facts.label,
        "model_id": facts.model_id,
        "tokenizer_id": facts.model_id,
        "num_prompts": len(records),
        "request_rate": facts.request_rate if math.isfinite(facts.request_rate) else "inf",
        "burstiness": facts.burstiness,
        "max_concurrency": facts.max_concurrency,
        **_of_ramp(facts.ramp_up),
        "workload": facts.workload,
        "clipped_requests": facts.clipped,
        "skipped_entries": facts.skipped,
        "seed": facts.seed,
        "goodput_limits_ms": dict(facts.goodput),
        "interrupted": load.sent.interrupted,
        "duration": load.duration,
        **dataclasses.asdict(counted),
        "without_usage": sum(not record.has_usage for record in metrics.answered_among(records)),
        **dataclasses.asdict(metrics.peaks(records)),
        **metrics.latency_figures(records, percentiles),
        **_of_layouts(load),
        **_of_client(load, counted.total_output_tokens),
        "by_tag": _by_tag(records, percentiles),
        **{key: [of(record) for record in records] for key, of in BY_REQUEST.items()},
    }
    if detailed:
        result["generated_texts"] = [record.text for record in records]
    return result


def _of_ramp(ramp_up: RampUp | None) -> dict[str, Any]:
    return {} if ramp_up is None else {f"ramp_up_{key}": each for key, each in dataclasses.asdict(ramp_up).items()}


def _of_layouts(load: LoadResult) -> dict[str, Any]:
    timeline = load.timeline
    return {
        "layout_timeline": [dataclasses.asdict(change) for change in timeline.changes],
        "layout_switches": timeline.switches,
        "switch_stall_ms": [1e3 * stall for stall in timeline.switch_stalls],
    }


def _of_client(load: LoadResult, output_tokens: int) -> dict[str, Any]:
    lags = np.asarray(load.sent.lags or (0.0,)) * 1e3
    return {
        "schedule_lag_ms": {
            "p50": float(np.percentile(lags, 50)),
            "p99": float(np.percentile(lags, 99)),
            "max": float(lags.max()),
        },
        "client_cpu_us_per_token": 1e6 * load.cpu_seconds / output_tokens if output_tokens else 0.0,
    }


def _by_tag(records: Sequence[RequestRecord], percentiles: Sequence[float]) -> dict[str, dict[str, float]]:
    """Counts and latencies of each tag, the latencies 0 where none was answered; nothing for a workload of one part."""
    parts: dict[str, list[RequestRecord]] = {}
    for record in records:
        parts.setdefault(record.planned.tag, []).append(record)
    return {tag: _of_part(part, percentiles) for tag, part in parts.items() if tag}


def _of_part(records: Sequence[RequestRecord], percentiles: Sequence[float]) -> dict[str, float]:
    completed = len(metrics.answered_among(records))
    counts = {"completed": completed, "failed": len(records) - completed}
    return {**counts, **metrics.latency_figures(records, percentiles)}
