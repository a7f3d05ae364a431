"""The definitions of ``vllm bench serve`` on records whose figures can be worked out by hand.

The two answered requests: sent at 1.0 with outputs at 1.2, 1.3 and 1.6; sent at 2.0 with outputs at 2.4 and 2.5, the
second of which held three tokens. A third failed after one output.
"""

from __future__ import annotations

import pytest

from fly_jax.bench import metrics
from fly_jax.bench.metrics import Peaks, Throughput
from fly_jax.errors import ConfigError
from tests.fly_jax.bench.records import record

FIRST = record(1.0, 1.2, 1.3, 1.6, prompt_tokens=10)
SECOND = record(2.0, 2.4, 2.5, prompt_tokens=30, output_tokens=4)
FAILED = record(1.5, 1.9, prompt_tokens=99, error="broke")
RECORDS = (FIRST, SECOND, FAILED)


def test_latencies_are_those_of_the_answered_requests() -> None:
    values = metrics.latencies(RECORDS)
    assert values.ttft == pytest.approx((0.2, 0.4))
    assert values.e2el == pytest.approx((0.6, 0.5))
    assert values.tpot == pytest.approx((0.4 / 2, 0.1 / 3))
    assert values.itl == pytest.approx((0.1, 0.3, 0.1))


def test_a_single_token_has_no_time_per_further_token() -> None:
    values = metrics.latencies([record(0.0, 0.5)])
    assert values.tpot == values.itl == ()
    assert values.ttft == values.e2el == (0.5,)


def test_figures_are_in_milliseconds_under_vllm_s_names() -> None:
    figures = metrics.latency_figures(RECORDS, (50.0, 99.0, 99.9))
    assert figures["mean_ttft_ms"] == pytest.approx(300)
    assert figures["median_ttft_ms"] == figures["p50_ttft_ms"] == pytest.approx(300)
    assert figures["std_ttft_ms"] == pytest.approx(100)
    assert figures["p99_ttft_ms"] == pytest.approx(200 + 0.99 * 200)
    assert figures["p99.9_ttft_ms"] == pytest.approx(200 + 0.999 * 200)
    assert figures["mean_tpot_ms"] == pytest.approx((200 + 100 / 3) / 2)
    assert figures["mean_itl_ms"] == pytest.approx(500 / 3)
    assert figures["median_itl_ms"] == pytest.approx(100)
    # The pooled gaps are 100, 100 and 300: the 99th percentile lies 0.98 of the way between the last two.
    assert figures["p99_itl_ms"] == pytest.approx(100 + 0.98 * 200)
    assert figures["mean_e2el_ms"] == pytest.approx(550)
    assert figures["std_e2el_ms"] == pytest.approx(50)
    assert len(figures) == 4 * (3 + 3)


def test_figures_of_nothing_are_zero() -> None:
    figures = metrics.latency_figures([FAILED])
    assert set(figures.values()) == {0.0}
    assert {"p50_ttft_ms", "p90_tpot_ms", "p99_itl_ms", "std_e2el_ms"} <= figures.keys()


def test_throughput_counts_answered_requests_over_the_whole_run() -> None:
    assert metrics.throughput(RECORDS, 4.0, {}) == Throughput(
        completed=2,
        failed=1,
        total_input_tokens=40,
        total_output_tokens=7,
        request_throughput=0.5,
        request_goodput=None,
        output_throughput=1.75,
        total_token_throughput=11.75,
    )


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 1000.0}, 2),
        ({"ttft": 300.0}, 1),
        ({"ttft": 100.0}, 0),
        ({"tpot": 50.0}, 1),
        ({"e2el": 550.0}, 1),
        ({"ttft": 300.0, "tpot": 50.0}, 0),
        ({"ttft": 500.0, "tpot": 50.0, "e2el": 600.0}, 1),
    ],
)
def test_goodput_counts_requests_that_keep_every_limit(limits: dict[str, float], good: int) -> None:
    assert metrics.throughput(RECORDS, 4.0, limits).request_goodput == good / 4.0


def test_a_limit_that_is_just_kept_is_kept_and_one_token_keeps_any_tpot() -> None:
    assert metrics.throughput([record(0.0, 0.25)], 1.0, {"ttft": 250.0, "tpot": 0.001}).request_goodput == 1.0


def test_peaks_of_tokens_a_second_and_of_requests_in_flight() -> None:
    one = record(0.0, 0.5, 0.9, 1.1)
    two = record(0.2, 1.2, 1.3)
    three = record(1.3, 1.4)  # leaves as the second one ends
    assert metrics.peaks([one, two, three]) == Peaks(4.0, 2)
    assert metrics.peaks([FAILED]) == Peaks(0.0, 0)


def test_goodput_limits_are_read_by_name() -> None:
    assert metrics.parse_goodput(["ttft:200", "tpot:50.5"]) == {"ttft": 200.0, "tpot": 50.5}


@pytest.mark.parametrize("word", ["ttft", "ttft:", "itl:5", "ttft:-1", "ttft:nan", "200"])
def test_goodput_limits_that_mean_nothing_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=f"--goodput takes NAME:MILLISECONDS .* got '{word}'"):
        metrics.parse_goodput([word])
