from __future__ import annotations

import math
import random

import pytest

from fly_jax.policy.arrival_rates import (
    FIRST_GUESS,
    SHORTEST_WINDOW,
    TIME_CONSTANT,
    LoadEstimator,
)

# Of weights that decay, in the shortest window.
FIRST_WINDOW = TIME_CONSTANT * (1 - math.exp(-SHORTEST_WINDOW / TIME_CONSTANT))


def test_nothing_arrives_at_no_rate() -> None:
    assert LoadEstimator().rates(5.0) == (0.0, 0.0)


@pytest.mark.parametrize("seconds", [1.0, 2.0, TIME_CONSTANT, 10 * TIME_CONSTANT])
@pytest.mark.parametrize("interval", [0.01, 0.1])
def test_a_steady_stream_is_estimated_rightly_from_its_first_second_on(seconds: float, interval: float) -> None:
    estimator, start = LoadEstimator(), 1e6
    for index in range(round(seconds / interval)):
        estimator.arrived(start + index * interval, 100, 20)
    prompt_rate, output_rate = estimator.rates(start + seconds)
    assert prompt_rate == pytest.approx(100 / interval, rel=0.06)
    assert output_rate == pytest.approx(20 / interval, rel=0.06)


def test_the_first_arrival_is_no_infinite_rate() -> None:
    estimator = LoadEstimator()
    estimator.arrived(3.0, 500, 10)
    assert estimator.rates(3.0) == pytest.approx((500 / FIRST_WINDOW, 10 / FIRST_WINDOW))
    rates = [estimator.rates(3.0 + seconds)[0] for seconds in range(30)]
    assert rates == sorted(rates, reverse=True)
    assert all(math.isfinite(rate) for rate in rates)
    assert rates[-1] < 1.0


def test_a_stream_that_ends_is_forgotten_in_a_few_time_constants() -> None:
    estimator = LoadEstimator()
    for index in range(1000):
        estimator.arrived(index * 0.02, 100, 20)
    assert estimator.rates(20.0)[0] == pytest.approx(5000, rel=0.02)
    assert estimator.rates(20.0 + TIME_CONSTANT)[0] == pytest.approx(5000 / math.e, rel=0.02)
    assert estimator.rates(20.0 + 8 * TIME_CONSTANT)[0] < 3.0


def test_a_burst_is_seen_in_a_fraction_of_a_second_and_forgotten_when_it_ends() -> None:
    estimator = LoadEstimator()
    for index in range(100):
        estimator.arrived(0.2 * index, 100, 10)
    assert estimator.rates(20.0)[0] == pytest.approx(500, rel=0.05)
    for index in range(60):
        estimator.arrived(20.0 + 0.005 * index, 100, 10)  # 20 000 tokens a second
    assert estimator.rates(20.3)[0] > 0.4 * 20_000
    assert estimator.rates(20.3 + 3 * TIME_CONSTANT)[0] < 200


def test_one_long_prompt_after_a_quiet_time_is_no_burst() -> None:
    estimator = LoadEstimator()
    for index in range(20):
        estimator.arrived(float(index), 100, 10)
    before = estimator.rates(20.0)[0]
    estimator.arrived(20.0, 9000, 10)
    assert estimator.rates(20.0)[0] == pytest.approx(before + 9000 / TIME_CONSTANT, rel=0.01)


def test_random_arrivals_are_estimated_without_bias() -> None:
    draw, estimates = random.Random(0), []
    for _ in range(200):
        estimator, now = LoadEstimator(), 0.0
        while now < 6.0:
            estimator.arrived(now, draw.randint(50, 150), 10)
            now += draw.expovariate(20.0)
        estimates.append(estimator.rates(now)[0])
    assert sum(estimates) / len(estimates) == pytest.approx(2000, rel=0.08)


@pytest.mark.parametrize(
    ("finished", "limit", "expected"),
    [
        ((), 1000, FIRST_GUESS),
        ((), 16, 16),
        ((40,), 1000, 40),
        ((40, 60), 1000, 50),
        ((40, 60), 30, 30),
        ((0,), 1000, 0),
        ((10,) * 500 + (200,) * 500, 1000, 200),
    ],
)
def test_a_request_is_expected_to_be_as_long_as_those_that_ended(
    finished: tuple[int, ...], limit: int, expected: float
) -> None:
    estimator = LoadEstimator()
    for tokens in finished:
        estimator.finished(tokens)
    estimator.arrived(0.0, 1, limit)
    assert estimator.rates(0.0)[1] == pytest.approx(expected / FIRST_WINDOW, rel=1e-3)


def test_a_clock_that_stands_still_or_jitters_does_no_harm() -> None:
    estimator = LoadEstimator()
    for now in (1.0, 1.0, 0.999, 1.0):
        estimator.arrived(now, 100, 10)
    assert estimator.rates(0.5)[0] == pytest.approx(400 / FIRST_WINDOW, rel=1e-3)
