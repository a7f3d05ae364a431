"""Requests that ask for width, again and again, cannot make the layout flap; whoever chooses it."""

from __future__ import annotations

import itertools

import pytest

from fly_jax.layout import Layout
from fly_jax.outputs import SwitchStrategy
from fly_jax.policy.adaptive import Decision, DecisionKind
from fly_jax.policy.observation import Load, Machine
from fly_jax.switching.widening_limit import WINDOW_SECONDS, WideningLimit
from tests.fly_jax.policy.test_policy_in_engine import finished, steady
from tests.fly_jax.virtual_time import Arrival, Simulation

FLOOD_START, FLOOD_SECONDS, FLOOD_RATE = 4.0, 14.0, 4
MOST_SWITCHES, MOST_SECONDS_TO_START = 4, 2.0


def layout(text: str) -> Layout:
    return Layout.parse(text, 4)


def flooded(rate: float) -> list[Arrival]:
    """Ordinary requests, and in their midst four a second that ask for all devices."""
    count = int(FLOOD_SECONDS * FLOOD_RATE)
    wide = [Arrival(FLOOD_START + index / FLOOD_RATE, 64, 16, width=4) for index in range(count)]
    return sorted([*steady(rate=rate, seconds=FLOOD_START + FLOOD_SECONDS), *wide], key=lambda each: each.at)


def switches_in_flood(simulation: Simulation) -> int:
    changes = [b.time for a, b in itertools.pairwise(simulation.samples) if a.layout != b.layout]
    return sum(FLOOD_START <= time < FLOOD_START + FLOOD_SECONDS for time in changes)


def seconds_to_start(simulation: Simulation, arrivals: list[Arrival]) -> list[float]:
    """Of every request that asks for width, until its first token."""
    first: dict[str, float] = {}
    for time, delta in simulation.deltas:
        first.setdefault(delta.request_id, time)
    return [first[f"r{index}"] - each.at for index, each in enumerate(arrivals) if each.width is not None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "strategy"), [(80.0, SwitchStrategy.SEQUENTIAL), *((100.0, s) for s in SwitchStrategy)]
)
def test_a_flood_of_wide_requests_shares_one_group_and_each_starts_soon(rate: float, strategy: SwitchStrategy) -> None:
    """Without the limit, 100 ordinary requests a second see 19 switches by migrate, 33 by hard_preempt."""
    arrivals = flooded(rate)
    simulation = Simulation(arrivals, strategy=strategy)
    simulation.run()
    assert finished(simulation) == len(arrivals)
    assert switches_in_flood(simulation) <= MOST_SWITCHES
    assert max(seconds_to_start(simulation, arrivals)) < MOST_SECONDS_TO_START


def wide_only_while_needed(load: Load, machine: Machine) -> Decision:
    """A policy of somebody's own that would switch twice for every wide request."""
    wanted = max((request.min_width for request, _ in load.requests()), default=1)
    target = Layout.parse("4" if wanted > 1 else "1+1+1+1", machine.num_devices)
    return Decision(target, DecisionKind.WIDEN if wanted > 1 else DecisionKind.NARROW, f"{wanted} wanted")


@pytest.mark.slow
def test_a_policy_that_knows_nothing_of_the_limit_keeps_it() -> None:
    arrivals = flooded(20.0)
    simulation = Simulation(arrivals)
    simulation.engine.set_policy(wide_only_while_needed)
    simulation.run()
    assert finished(simulation) == len(arrivals)
    assert 3 <= switches_in_flood(simulation) <= MOST_SWITCHES
    assert max(seconds_to_start(simulation, arrivals)) < MOST_SECONDS_TO_START


def test_one_wide_request_now_and_then_is_let_go_at_once() -> None:
    limit = WideningLimit()
    for now in (0.0, 20.0, 40.0):
        limit.widened(layout("1+1+1+1"), layout("4"), now)
        assert limit.kept_until(layout("1+1+1+1"), now + 0.1) is None


def test_what_the_second_request_widened_stays_until_the_first_is_long_ago() -> None:
    limit = WideningLimit()
    for now in (1.0, 2.0):
        limit.widened(layout("1+1+1+1"), layout("2+1+1"), now)
    assert limit.kept_until(layout("1+1+1+1"), 2.5) == 1.0 + WINDOW_SECONDS
    assert limit.kept_until(layout("1+1+2"), 2.5) == 1.0 + WINDOW_SECONDS
    for serves_as_well in ("2+1+1", "2+2", "4"):
        assert limit.kept_until(layout(serves_as_well), 2.5) is None
    assert limit.kept_until(layout("1+1+1+1"), 1.0 + WINDOW_SECONDS) is None
