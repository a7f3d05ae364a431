"""The policy and the scheduler at work together, under a virtual clock."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from fly_jax.errors import ConfigError
from fly_jax.layout import Layout
from fly_jax.outputs import FinishReason, SwitchStrategy
from fly_jax.policy.adaptive import Decision, DecisionKind
from fly_jax.policy.observation import Load, Machine
from fly_jax.scheduling.launch import Launch
from fly_jax.scheduling.step import StepPlan
from tests.fly_jax.virtual_time import Arrival, Simulation

QUIET = [Arrival(0.5 * index, 200, 40) for index in range(12)]


def steady(rate: float, seconds: float, *, start: float = 0.0, seed: int = 0, output: int = 64) -> list[Arrival]:
    """Poisson arrivals of short requests."""
    source, now, arrivals = random.Random(seed), start, []
    while (now := now + source.expovariate(rate)) < start + seconds:
        arrivals.append(Arrival(now, source.randint(50, 400), source.randint(output // 2, output)))
    return arrivals


def widest(layout: str) -> int:
    return max(int(degree) for degree in layout.split("+"))


def switches(simulation: Simulation) -> int:
    return simulation.engine.control.log.count.total()


def finished(simulation: Simulation) -> int:
    return sum(delta.finish_reason is FinishReason.LENGTH for _, delta in simulation.deltas)


def test_a_quiet_engine_runs_one_wide_group() -> None:
    simulation = Simulation(QUIET)
    simulation.run()
    assert simulation.engine_layout == "4"
    assert switches(simulation) == 1
    assert finished(simulation) == len(QUIET)


def test_a_burst_goes_narrow_at_once_and_its_end_goes_wide_again() -> None:
    burst = [Arrival(6.5, 400, 64) for _ in range(120)]
    calm = [Arrival(16.0 + index, 200, 40) for index in range(10)]
    simulation = Simulation([*QUIET, *burst, *calm])
    simulation.run(until=6.49)
    assert simulation.engine_layout == "4"
    before = len(simulation.samples)
    simulation.run(until=7.5)
    narrow = next(index for index, each in enumerate(simulation.samples[before:]) if widest(each.layout) == 1)
    assert narrow <= 30  # passes of the loop, arrivals and copying ahead included
    simulation.run()
    assert simulation.engine_layout == "4"
    assert switches(simulation) <= 6
    assert finished(simulation) == len(QUIET) + len(burst) + len(calm)


@pytest.mark.slow
def test_a_long_context_gets_a_wide_group_beside_narrow_ones_under_load() -> None:
    load = steady(rate=140.0, seconds=6.0)
    # One device holds 512 blocks of 16 tokens.
    simulation = Simulation([*load, Arrival(3.0, 9000, 40)], max_model_len=16_384)
    simulation.run(until=2.99)
    assert simulation.engine_layout == "1+1+1+1"
    simulation.run(until=3.5)
    layouts = {each.layout for each in simulation.samples if each.time > 3.1}
    assert layouts & {"2+1+1", "1+1+2"}
    simulation.run()
    assert finished(simulation) == len(load) + 1


@pytest.mark.slow
def test_a_request_that_outgrows_its_group_is_widened_live_and_nothing_is_recomputed() -> None:
    load = steady(rate=140.0, seconds=8.0, output=16)
    grower = Arrival(2.0, 7800, 1200)
    simulation = Simulation([*load, grower], max_model_len=16_384)
    simulation.run()
    assert finished(simulation) == len(load) + 1
    assert simulation.engine.control.decisions["make_room"] >= 1
    (widening,) = (each for each in simulation.engine.control.log.history if "needs a group of 2" in each.reason)
    assert widening.tokens_recomputed == 0
    assert widening.requests_moved >= 1


@pytest.mark.slow
def test_a_minimum_width_is_granted_under_load_within_a_few_passes() -> None:
    load = steady(rate=140.0, seconds=4.0)
    simulation = Simulation([*load, Arrival(2.0, 300, 20, width=2)])
    simulation.run(until=2.0)
    started = len(simulation.samples)
    wide = f"r{sum(arrival.at < 2.0 for arrival in load)}"
    groups: set[int] = set()

    def watch(each: Simulation) -> None:
        request = each.engine.scheduler.requests.get(wide)
        if request is not None and request.min_width == 2 and request.table is not None:
            groups.add(request.table.group.tp)

    simulation = Simulation([*load, Arrival(2.0, 300, 20, width=2)], on_step=watch)
    simulation.run()
    assert groups
    assert min(groups) >= 2
    first = next(index for index, each in enumerate(simulation.samples[started:]) if widest(each.layout) >= 2)
    assert first <= 60


@pytest.mark.parametrize("strategy", [SwitchStrategy.SEQUENTIAL, SwitchStrategy.SOFT_PREEMPT])
def test_a_wide_request_waits_no_longer_than_patience_for_devices_that_drain(strategy: SwitchStrategy) -> None:
    load = [Arrival(0.0, 100, 600) for _ in range(48)]
    simulation = Simulation([*load, Arrival(1.0, 300, 20, width=4)], strategy=strategy, patience=100)
    simulation.run(until=1.0)
    began = len(simulation.samples)
    simulation.run()
    granted = next(index for index, each in enumerate(simulation.samples[began:]) if widest(each.layout) == 4)
    assert granted <= 100 + 50
    assert finished(simulation) == len(load) + 1


@pytest.mark.slow
@pytest.mark.parametrize("rate", [20.0, 40.0, 60.0, 80.0, 100.0, 120.0])
def test_a_load_that_hovers_anywhere_does_not_make_the_layout_flap(rate: float) -> None:
    simulation = Simulation(steady(rate=rate, seconds=12.0, seed=int(rate)))
    simulation.run()
    assert switches(simulation) <= 6
    changes = [b.time for a, b in itertools.pairwise(simulation.samples) if a.layout != b.layout]
    assert len(changes) == switches(simulation)


def test_every_decision_has_a_reason_and_is_counted() -> None:
    simulation = Simulation(QUIET)
    simulation.run()
    control = simulation.engine.control
    assert control.decisions.total() == switches(simulation) == 1
    assert control.last_decision is not None
    assert control.last_decision.startswith("1+1+1+1 -> 4: widen, ")
    assert control.log.history[0].reason in control.last_decision


def test_a_static_policy_never_switches() -> None:
    simulation = Simulation([*QUIET, *steady(rate=100.0, seconds=2.0)], policy="static", layout="2+2")
    simulation.run()
    assert {each.layout for each in simulation.samples} == {"2+2"}


@pytest.mark.slow
def test_the_layout_of_eight_devices_is_always_one_that_fits_them() -> None:
    load = [*steady(rate=150.0, seconds=5.0), Arrival(2.0, 500, 30, priority=-1), Arrival(3.0, 500, 30, width=4)]
    simulation = Simulation(load, num_devices=8)
    simulation.run()
    for text in {each.layout for each in simulation.samples}:
        Layout.parse(text, 8)
    assert finished(simulation) == len(load)


def steps_of(simulation: Simulation, name: str) -> tuple[int, int]:
    """Serves to the end; steps of the groups that a request was in, until its first token and from there to its last.

    Those without a row of it count too: while it waits for its turn, for a switch or for its devices.
    """
    plans: list[StepPlan] = []

    def watch(plan: StepPlan, _: Launch) -> None:
        request = simulation.engine.scheduler.requests.get(name)
        if request is not None and (request.table is None or request.table.group == plan.group):
            plans.append(plan)

    simulation.runner.on_pack = watch
    simulation.run()
    own = [
        (index, row) for index, plan in enumerate(plans, start=1) for row in plan.rows if row.request.request_id == name
    ]
    samples = [index for index, row in own if row.samples]
    return samples[0], samples[-1] - samples[0]


@pytest.mark.slow
def test_an_urgent_request_in_a_saturated_engine_takes_as_few_steps_as_alone_on_all_devices() -> None:
    urgent = Arrival(3.0, 600, 60, priority=-1)
    idle = Simulation([urgent], policy="static", layout="4")
    first, others = steps_of(idle, "r0")
    load = steady(rate=300.0, seconds=5.0)  # more than any layout keeps up with
    busy = Simulation([*load, urgent])
    arrived = sum(arrival.at < urgent.at for arrival in load)
    got_first, got_others = steps_of(busy, f"r{arrived}")
    assert got_first <= 1.2 * first
    assert got_others <= 1.2 * others
    assert finished(busy) == len(load) + 1
    at_arrival = [each for each in busy.samples if 2.5 < each.time < 3.0]
    assert min(each.waiting for each in at_arrival) > 100, "the engine was not saturated"
    assert {each.layout for each in busy.samples if 3.1 < each.time < 3.3} & {"2+1+1", "1+1+2"}


def by_number_of_requests(load: Load, machine: Machine) -> Decision:
    """A policy of one's own: pairs of devices beside a queue or eight requests, else all as one."""
    count = sum(1 for _ in load.requests())
    layout = Layout.parse("2+2" if count >= 8 else "4", machine.num_devices, machine.base_tp)
    return Decision(layout, DecisionKind.NARROW if count >= 8 else DecisionKind.WIDEN, f"{count} requests")


def test_a_policy_of_ones_own_chooses_the_layout() -> None:
    load = [*QUIET, *(Arrival(6.5, 400, 64) for _ in range(40))]
    simulation = Simulation(load, policy="static")
    assert simulation.engine.set_policy(by_number_of_requests) == "by_number_of_requests"
    simulation.run(until=6.49)
    assert simulation.engine_layout == "4"
    simulation.run()
    assert {each.layout for each in simulation.samples} == {"1+1+1+1", "2+2", "4"}
    control = simulation.engine.control
    assert control.policy == "by_number_of_requests"
    assert control.log.history[1].reason in [f"{count} requests" for count in range(8, 41)]
    assert finished(simulation) == len(load)


def raising(load: Load, machine: Machine) -> Decision:
    raise ZeroDivisionError(f"{load.layout} of {machine.num_devices}")


def returning_text(load: Load, machine: Machine) -> Decision:  # noqa: ARG001  the shape of a policy
    return "4"  # type: ignore[return-value]


def without_such_groups(load: Load, machine: Machine) -> Decision:  # noqa: ARG001
    return Decision(Layout((3, 1)), DecisionKind.NARROW, "three and one")


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (raising, "ZeroDivisionError"),
        (returning_text, "TypeError"),
        (without_such_groups, "LayoutError"),
    ],
)
def test_a_policy_that_fails_gives_way_and_nobodys_request_suffers(policy: Any, why: str) -> None:
    decisions: list[str] = []
    simulation = Simulation(
        QUIET, policy="static", on_step=lambda each: decisions.append(each.engine.control.last_decision or "")
    )
    name = simulation.engine.set_policy(policy)
    simulation.run()
    first = next(each for each in decisions if each)
    assert first == f"{name} failed ({why}): load_adaptive takes over"
    assert simulation.engine.control.policy == "load_adaptive"
    assert finished(simulation) == len(QUIET)
    assert simulation.engine_layout == "4"


def test_a_function_may_not_pass_for_a_built_in_policy() -> None:
    def static(load: Load, machine: Machine) -> Decision:
        return by_number_of_requests(load, machine)

    simulation = Simulation(QUIET)
    with pytest.raises(ConfigError, match=r"^policy 'static' is built in: give the function another name$"):
        simulation.engine.set_policy(static)
    assert simulation.engine.control.policy == "load_adaptive"
