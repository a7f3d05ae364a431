"""When requests of a synthetic workload are sent."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fly_jax.bench.arrivals import RampUp, arrival_times
from fly_jax.errors import ConfigError

COUNT = 20_000


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert arrival_times(3, math.inf, 1.0, seed=0) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(burstiness: float) -> None:
    times = arrival_times(COUNT, 50.0, burstiness, seed=3)
    gaps = np.diff(times, prepend=0.0)
    assert (gaps >= 0).all()
    assert times[-1] == pytest.approx(COUNT / 50.0)
    # A gamma distribution's standard deviation is its mean over the root of its shape.
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_a_run_however_short_offers_the_rate_that_was_asked_for() -> None:
    for seed in range(20):
        assert arrival_times(5, 2.0, 0.5, seed)[-1] == pytest.approx(2.5)


def test_a_seed_repeats_a_run_and_another_does_not() -> None:
    assert arrival_times(50, 4.0, 1.0, seed=7) == arrival_times(50, 4.0, 1.0, seed=7)
    assert arrival_times(50, 4.0, 1.0, seed=7) != arrival_times(50, 4.0, 1.0, seed=8)


def test_the_rate_of_a_ramp() -> None:
    linear, exponential = RampUp("linear", 2.0, 8.0), RampUp("exponential", 2.0, 8.0)
    assert [linear.rate_at(each) for each in (0.0, 0.5, 1.0)] == [2.0, 5.0, 8.0]
    assert [exponential.rate_at(each) for each in (0.0, 0.5, 1.0)] == pytest.approx([2.0, 4.0, 8.0])


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
def test_a_ramp_begins_at_one_rate_and_ends_at_the_other(strategy: str) -> None:
    ramp = RampUp(strategy, 10.0, 100.0)
    gaps = np.diff(arrival_times(COUNT, math.inf, 100.0, 0, ramp), prepend=0.0)
    for index in (0, COUNT // 2, COUNT - 200):
        rate = ramp.rate_at((index + 100) / COUNT)
        assert 1 / gaps[index : index + 200].mean() == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize(
    ("rate", "burstiness", "message"),
    [(0.0, 1.0, "--request-rate .* got 0"), (math.nan, 1.0, "--request-rate"), (1.0, -1.0, "--burstiness .* got -1")],
)
def test_what_is_not_positive_is_refused(rate: float, burstiness: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arrival_times(1, rate, burstiness, 0)


def test_ramps_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="--ramp-up-start-rps must be a positive number, got 0"):
        RampUp("exponential", 0.0, 1.0)
    with pytest.raises(ConfigError, match="--ramp-up-strategy must be one of linear, exponential, got 'cubic'"):
        RampUp("cubic", 1.0, 2.0)
