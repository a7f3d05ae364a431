from __future__ import annotations

import dataclasses
import math
import random

import pytest

from fly_jax.layout import DeviceGroup, Layout
from fly_jax.load import RequestLoad
from fly_jax.load_estimator import FIRST_GUESS, SHORTEST_WINDOW, TIME_CONSTANT, WAITING_SEEN, LoadEstimator, load_of
from fly_jax.sampling_params import SamplingParams
from tests.fly_jax.simulated_runner import simulated_engine

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


def test_a_load_shows_running_waiting_and_paused_requests() -> None:
    engine, _ = simulated_engine(layout="2+2")
    engine.add_request("normal", [1] * 8, SamplingParams(max_tokens=20, ignore_eos=True))
    wide = SamplingParams(max_tokens=30, ignore_eos=True, tensor_parallel_size=2, priority=-3)
    engine.add_request("wide", [1] * 8, wide)
    engine.step()
    scheduler = engine.scheduler
    paused, group = scheduler.requests["wide"], scheduler.requests["wide"].held_table.group
    scheduler.groups[group].running.remove(paused)
    scheduler.pause(paused)
    engine.add_request("late", [1] * 5, SamplingParams(max_tokens=7))
    load = load_of(scheduler, (3.0, 4.0), 9.0, 8.0)
    assert (load.now, load.last_switch, load.prompt_rate, load.output_rate) == (9.0, 8.0, 3.0, 4.0)
    assert load.layout == Layout.parse("2+2", 4)
    other = DeviceGroup(2 - group.start, 2)
    running = RequestLoad(scheduler.requests["normal"].num_tokens, 1, 28)
    assert {each.group: each.running for each in load.groups} == {group: (), other: (running,)}
    assert {each.group: each.free_blocks for each in load.groups} == {
        each: engine.kv.free_blocks(each) for each in (group, other)
    }
    assert load.waiting == (RequestLoad(5, 5, 12),)
    assert load.paused == (RequestLoad(paused.num_tokens, 1, 38, 2, -3, group),)
    assert list(load.requests()) == [(running, other), (load.paused[0], group), (load.waiting[0], None)]


def test_a_long_queue_is_seen_by_its_head() -> None:
    engine, _ = simulated_engine(max_queued=1000)
    for index in range(WAITING_SEEN + 50):
        engine.add_request(f"r{index}", [1] * (1 + index % 9), SamplingParams(max_tokens=4))
    load = load_of(engine.scheduler, (0.0, 0.0), 0.0, None)
    assert len(load.waiting) == WAITING_SEEN
    assert load.waiting[:3] == tuple(RequestLoad(n, n, n + 4) for n in (1, 2, 3))


def test_a_request_that_needs_width_is_seen_wherever_it_waits() -> None:
    engine, _ = simulated_engine(max_queued=1000)
    low = SamplingParams(max_tokens=4, priority=1)
    engine.add_request("oldest", [1] * 3, low)
    engine.add_request("other", [1] * 3, low)
    engine.add_request("wide", [1] * 3, dataclasses.replace(low, tensor_parallel_size=1))
    engine.scheduler.requests["wide"].min_width = 4
    for index in range(WAITING_SEEN + 50):
        engine.add_request(f"r{index}", [1] * 5, SamplingParams(max_tokens=4))
    load = load_of(engine.scheduler, (0.0, 0.0), 0.0, None)
    assert [each.min_width for each in load.waiting[WAITING_SEEN:]] == [1, 4]
