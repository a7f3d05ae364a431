"""Arrivals: counts and times of plans, without a clock."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter

import pytest

from fly_jax.bench.phases import Arrivals, Phase, planned_arrivals

# Nearly no randomness: a gap's standard deviation is a ten-thousandth of its mean.
REGULAR = 1e8


def _constant(rate: float, **limits: float | None) -> Arrivals:
    settings = {"burstiness": 1.0, "seconds": None, **limits}
    requests = settings.get("requests")
    burstiness, seconds = settings["burstiness"], settings["seconds"]
    assert burstiness is not None
    phases = (Phase(math.inf, (rate, rate)),)
    return Arrivals(phases, burstiness, None if requests is None else int(requests), seconds)


def test_regular_arrivals_come_at_the_rate() -> None:
    arrivals = planned_arrivals(_constant(4, burstiness=REGULAR, requests=8), seed=1)
    assert [each.at for each in arrivals] == pytest.approx([n / 4 for n in range(1, 9)], abs=1e-3)


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(burstiness: float, variation: float) -> None:
    arrivals = planned_arrivals(_constant(10, burstiness=burstiness, requests=20_000), seed=3)
    gaps = [after.at - before.at for before, after in itertools.pairwise(arrivals)]
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.06)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(variation, rel=0.06)


def test_arrivals_end_at_the_first_limit() -> None:
    assert len(planned_arrivals(_constant(10, requests=7), seed=0)) == 7
    assert len(planned_arrivals(_constant(10, requests=7), seed=0, requests=3)) == 3
    assert len(planned_arrivals(_constant(10, requests=7), seed=0, requests=9)) == 9
    timed = planned_arrivals(_constant(10, seconds=50), seed=0)
    assert 400 < len(timed) < 600
    assert 49 < timed[-1].at < 50
    assert planned_arrivals(_constant(1e-6, seconds=1), seed=0) == []


def test_fewer_arrivals_are_the_first_of_more_and_seeds_repeat() -> None:
    many, few, other = (
        planned_arrivals(_constant(10, requests=count), seed) for count, seed in ((50, 1), (20, 1), (50, 2))
    )
    assert many[:20] == few
    assert planned_arrivals(_constant(10, requests=50), seed=1) == many
    assert other != many


def test_phases_alternate_each_at_its_rate_and_with_its_tag() -> None:
    phases = (Phase(10, (3, 3), tag="low"), Phase(5, (20, 20), tag="high"))
    arrivals = planned_arrivals(Arrivals(phases, 1.0, None, 1500), seed=0)
    for each in arrivals:
        assert each.tag == ("low" if each.at % 15 < 10 else "high")
    counts = Counter(each.tag for each in arrivals)
    # 100 rounds: Poisson counts of mean 3000 and 10,000, five standard deviations wide.
    assert counts["low"] == pytest.approx(3000, abs=5 * math.sqrt(3000))
    assert counts["high"] == pytest.approx(10_000, abs=5 * math.sqrt(10_000))
    assert [each.at for each in arrivals] == sorted(each.at for each in arrivals)


def test_a_rate_is_drawn_anew_from_its_range_whenever_its_phase_begins() -> None:
    arrivals = planned_arrivals(Arrivals((Phase(10, (10, 30)),) * 2, REGULAR, None, 2000), seed=0)
    counts = [count for _, count in sorted(Counter(int(each.at // 10) for each in arrivals).items())]
    assert len(counts) == 200
    assert 99 <= min(counts) < 120
    assert 280 < max(counts) <= 301
    assert statistics.mean(counts) == pytest.approx(200, rel=0.1)


def test_a_gap_that_has_begun_goes_on_at_the_new_rate() -> None:
    phases = (Phase(1.5, (1, 1)), Phase(10, (10, 10)))
    times = [each.at for each in planned_arrivals(Arrivals(phases, REGULAR, 3, None), seed=0)]
    assert times == pytest.approx([1.0, 1.55, 1.65], abs=1e-3)


def test_nothing_arrives_in_a_phase_without_a_rate() -> None:
    phases = (Phase(2, (0, 0)), Phase(1.2, (2, 2)))
    times = [each.at for each in planned_arrivals(Arrivals(phases, REGULAR, 3, None), seed=0)]
    assert times == pytest.approx([2.5, 3.0, 5.5], abs=2e-3)


def test_a_ramp_brings_what_its_mean_rate_brings_and_more_towards_its_end() -> None:
    phases = (Phase(100, (0, 0), end_rate=20, tag="up"), Phase(100, (20, 20), end_rate=0, tag="down"))
    arrivals = planned_arrivals(Arrivals(phases, REGULAR, None, 200), seed=0)
    tens = Counter(int(each.at // 10) for each in arrivals)
    expected = [10 + 20 * n for n in range(10)]
    assert [tens[n] for n in range(10)] == pytest.approx(expected, abs=1)
    assert [tens[n] for n in range(10, 20)] == pytest.approx(expected[::-1], abs=1)


def test_arrivals_end_though_no_more_can_come() -> None:
    phases = (Phase(1, (0, 0)), Phase(1, (1e-12, 1e-12)))
    assert planned_arrivals(Arrivals(phases, 1.0, 5, 10), seed=0) == []
