"""A run as one JSON object, and as a table."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from fly_jax.bench.load import LoadResult, SentRequests
from fly_jax.bench.serving_result import RunFacts, build_result
from fly_jax.bench.serving_table import WIDTH, table
from fly_jax.bench.timeline import LayoutChange, LayoutTimeline
from tests.fly_jax.bench.records import record

RECORDS = (
    record(0.0, 0.2, 0.3, tag="low", prompt_tokens=10, text="ab"),
    record(1.0, 1.4, 1.6, 1.7, tag="high", prompt_tokens=20, text="cde"),
    record(1.5, 1.9, tag="high", prompt_tokens=30, error="broke"),
)
TIMELINE = LayoutTimeline((LayoutChange(0.0, "1+1"), LayoutChange(1.25, "2")), (0.05,))


def result(timeline: LayoutTimeline = TIMELINE, *, detailed: bool = False, **facts: Any) -> dict[str, Any]:
    sent = SentRequests(RECORDS, (0.001, 0.002, 0.003), interrupted=False)
    load = LoadResult(sent, timeline, duration=2.0, cpu_seconds=0.0004, has_layouts=bool(timeline.changes))
    given = {"backend": "openai", "model_id": "org/model", "workload": "burst", "seed": 3, **facts}
    return build_result(load, RunFacts(**given), detailed=detailed)


def test_the_keys_of_vllm_are_there_and_hold_the_figures() -> None:
    found = result(request_rate=4.0, goodput={"ttft": 300.0}, max_concurrency=8)
    expected = {
        "backend": "openai",
        "model_id": "org/model",
        "tokenizer_id": "org/model",
        "num_prompts": 3,
        "request_rate": 4.0,
        "burstiness": 1.0,
        "max_concurrency": 8,
        "duration": 2.0,
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 30,
        "total_output_tokens": 5,
        "request_throughput": 1.0,
        "request_goodput": 0.5,
        "output_throughput": 2.5,
        "total_token_throughput": 17.5,
        "input_lens": [10, 20, 30],
        "output_lens": [2, 3, 0],
        "errors": ["", "", "broke"],
    }
    assert {key: found[key] for key in expected} == expected
    assert found["ttfts"] == pytest.approx([0.2, 0.4, 0.4])
    assert [len(gaps) for gaps in found["itls"]] == [1, 2, 0]
    assert "generated_texts" not in found


def test_latencies_are_those_of_the_answered_requests_in_milliseconds() -> None:
    """Two answered requests: TTFT 200 and 400, TPOT 100 and 150, E2EL 300 and 700; gaps of 100, 200 and 100."""
    found = result()
    expected = {
        "ttft": (300, 300, 100, 300, 380, 398),
        "tpot": (125, 125, 25, 125, 145, 149.5),
        "itl": (400 / 3, 100, 200 * 2**0.5 / 6, 100, 180, 198),
        "e2el": (500, 500, 200, 500, 660, 696),
    }
    for latency, figures in expected.items():
        keys = [f"{figure}_{latency}_ms" for figure in ("mean", "median", "std", "p50", "p90", "p99")]
        assert [found[key] for key in keys] == pytest.approx(figures), latency


def test_our_own_keys() -> None:
    found = result()
    assert (found["workload"], found["seed"], found["interrupted"]) == ("burst", 3, False)
    assert found["start_times"] == [0.0, 1.0, 1.5]
    assert found["tags"] == ["low", "high", "high"]
    assert found["layout_timeline"] == [{"at": 0.0, "layout": "1+1"}, {"at": 1.25, "layout": "2"}]
    assert (found["layout_switches"], found["switch_stall_ms"]) == (1, [50.0])
    assert found["schedule_lag_ms"] == pytest.approx({"p50": 2.0, "p99": 2.98, "max": 3.0})
    assert found["client_cpu_us_per_token"] == pytest.approx(80.0)
    assert list(found["by_tag"]) == ["low", "high"]
    assert found["by_tag"]["low"]["mean_ttft_ms"] == pytest.approx(200)
    assert found["by_tag"]["high"]["p99_ttft_ms"] == pytest.approx(400)
    counts = [(part["completed"], part["failed"]) for part in found["by_tag"].values()]
    assert counts == [(1, 0), (1, 1)]


def test_it_is_json_with_an_infinite_rate_too() -> None:
    found = json.loads(json.dumps(result(request_rate=math.inf), allow_nan=False))
    assert found["request_rate"] == "inf"
    assert found["request_goodput"] is None


def test_texts_are_there_when_asked_for_and_further_percentiles() -> None:
    found = result(detailed=True, percentiles=(99.9,))
    assert found["generated_texts"] == ["ab", "cde", ""]
    assert found["p99.9_ttft_ms"] > found["p99_ttft_ms"]


def test_the_table_shows_what_was_asked_for_under_vllm_s_headings() -> None:
    text = table(result(request_rate=4.0), ("ttft", "e2el"), (90.0, 99.0))
    lines = {line.rpartition(":")[0]: line.rpartition(":")[2].strip() for line in text.splitlines() if ":" in line}
    assert lines["Successful requests"] == "2"
    assert lines["Request throughput (req/s)"] == "1.00"
    assert lines["Mean TTFT (ms)"] == "300.00"
    assert lines["P90 E2EL (ms)"] == "660.00"
    assert lines["Layout switches"] == "1"
    assert lines["Worst stall across a switch (ms)"] == "50.00"
    assert lines["P99 schedule lag (ms)"] == "2.98"
    assert "Request goodput (req/s)" not in lines
    assert "Maximum request concurrency" not in lines
    assert "ITL" not in text
    assert all(len(line) <= WIDTH for line in text.splitlines())


def test_the_table_of_another_server_says_nothing_of_layouts() -> None:
    assert "ayout" not in table(result(LayoutTimeline()), ("ttft",), (99.0,))
