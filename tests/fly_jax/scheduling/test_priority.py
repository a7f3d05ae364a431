"""Urgent requests under saturating load, and requests that outgrow their group, through the whole engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from fly_jax.layout import DeviceGroup, Layout
from fly_jax.outputs import SwitchStrategy
from fly_jax.policy.adaptive import Decision, DecisionKind
from fly_jax.policy.observation import Load, Machine
from fly_jax.sampling_params import SamplingParams
from fly_jax.scheduling.request import Request, RequestState
from fly_jax.switching import control as layout_control
from tests.fly_jax.simulated_runner import simulated_engine
from tests.fly_jax.traffic import Traffic, groups_of, run_until, send

PROMPT, OUTPUT = 600, 40
ACCEPTED = 1.2


@dataclass(frozen=True)
class Latency:
    """In steps of the group that runs a request: machines differ, these do not."""

    to_first_token: int
    to_each_other: float


def latency_of(traffic: Traffic, request: Request, load: Any = lambda: None) -> Latency:
    """Serves until the request has ended."""

    def steps_of_its_group() -> int:
        group = request.table.group if request.table is not None else DeviceGroup(0, 0)
        return sum(plan.group == group for plan in traffic.runner.plans[first_plan:])

    first_plan, first_token, group = len(traffic.runner.plans), 0, None
    while not request.finished:
        load()
        before = steps_of_its_group()
        traffic.step()
        if request.output_ids and not first_token:
            first_token, group = before + 1, request.held_table.group
    launched = [plan for plan in traffic.runner.plans[first_plan:] if plan.group == group]
    own = [index for index, plan in enumerate(launched, start=1) if request in [row.request for row in plan.rows]]
    return Latency(first_token, (own[-1] - first_token) / (OUTPUT - 1))


def engine(layout: str) -> Traffic:
    return Traffic(
        layout=layout, num_blocks=512, block_size=8, max_num_seqs=8, max_num_batched_tokens=256, max_model_len=2000
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_an_urgent_request_under_saturation_is_nearly_as_fast_as_alone_on_all_devices(seed: int) -> None:
    idle = engine("4")
    alone = latency_of(idle, send(idle, [7] * PROMPT, max_tokens=OUTPUT))

    busy = engine("2+1+1")

    def saturate() -> None:
        while len(busy.scheduler.waiting) < 8:
            number = len(busy.accepted) + 13 * seed
            send(busy, [1 + number % 50] * (20 + 37 * number % 200), max_tokens=20 + 17 * number % 40)

    for _ in range(80 + 7 * seed):
        saturate()
        busy.step()
    assert busy.scheduler.num_running > 28  # of 32 places
    finished = sum(request.finished for request in busy.accepted.values())
    urgent = send(busy, [7] * PROMPT, max_tokens=OUTPUT, priority=-1)
    got = latency_of(busy, urgent, saturate)
    assert got.to_first_token <= ACCEPTED * alone.to_first_token
    assert got.to_each_other <= ACCEPTED * alone.to_each_other
    assert urgent.output_ids == idle.accepted["r0"].output_ids
    assert sum(request.finished for request in busy.accepted.values()) - finished > 10, "normal requests starve"


def test_urgent_requests_one_after_the_other_do_not_starve_the_others() -> None:
    traffic = engine("2+1+1")
    normal = [send(traffic, [1 + i % 50] * 50, max_tokens=40) for i in range(40)]
    urgent: list[Request] = []
    while not all(request.finished for request in normal):
        if sum(not request.finished for request in urgent) < 4:
            urgent.append(send(traffic, [60] * 50, max_tokens=40, priority=-1))
        traffic.step()
        assert len(traffic.runner.plans) < 5000, "normal requests starve"
    assert len(urgent) >= 8
    traffic.finish()


# -- elastic --------------------------------------------------------------------------------------------------


class Script:
    """A policy that wants the layouts it is told."""

    def __init__(self) -> None:
        self.target: Layout | None = None

    def __call__(self, load: Load, machine: Machine) -> Decision:  # noqa: ARG002  a policy's shape
        return Decision(self.target, DecisionKind.MAKE_ROOM, "a request needs it")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()
    monkeypatch.setattr(layout_control, "POLICIES", {"auto": script, "load_adaptive": script})
    return script


def widen(traffic: Traffic, script: Script) -> None:
    """The policy wants all devices in one group until it has them."""
    script.target = Layout.parse("4", 4)
    run_until(lambda: str(traffic.engine.layout) == "4", traffic)
    script.target = None


def test_a_request_that_outgrows_its_group_waits_without_hurting_others_and_goes_on_in_a_wider_one(
    script: Script,
) -> None:
    traffic = Traffic(layout="1+1+1+1", num_blocks=8, max_num_seqs=2, policy="load_adaptive")  # 32 tokens a device
    traffic.static = False
    long = send(traffic, [1] * 20, max_tokens=80)
    others = [send(traffic, [2 + i] * 4, max_tokens=20) for i in range(3)]
    run_until(lambda: long.num_tokens > 32 and not long.num_pending, traffic)
    assert long.num_tokens == 33
    assert long.state is RequestState.RUNNING
    assert (long.limit, long.max_tokens) == (80, 80)
    traffic.step(4)
    assert long.num_tokens == 33
    late = send(traffic, [50] * 3, max_tokens=8)
    run_until(lambda: late.finished and all(request.finished for request in others), traffic)
    assert traffic.scheduler.num_preemptions == 0
    widen(traffic, script)
    traffic.finish()
    assert len(long.output_ids) == 80


def test_a_request_that_is_about_to_outgrow_its_group_goes_on_without_recompute(script: Script) -> None:
    traffic = Traffic(layout="1+1+1+1", num_blocks=8, policy="load_adaptive", max_num_batched_tokens=32)
    traffic.static = False
    long = send(traffic, [1] * 20, max_tokens=80)
    run_until(lambda: long.num_tokens > 24, traffic)
    widen(traffic, script)
    assert long.held_table.group == groups_of("4")[0]
    traffic.finish()
    assert len(long.output_ids) == 80
    assert traffic.scheduler.num_preemptions == 0


def test_a_policy_that_widens_gives_requests_back_the_length_that_a_pinned_layout_had_taken() -> None:
    traffic = Traffic(layout="1+1+1+1", num_blocks=8)
    request = send(traffic, [1] * 20, max_tokens=80)
    traffic.step()
    assert (request.limit, request.max_tokens) == (80, 12)
    assert traffic.engine.set_policy("auto") == "load_adaptive"
    assert request.max_tokens == 80
    traffic.engine.set_policy("static")
    assert request.max_tokens == 12
    traffic.finish()


def test_a_request_that_is_too_wide_for_the_layout_waits_for_one_that_has_its_width(script: Script) -> None:
    traffic = Traffic(layout="1+1+1+1", policy="load_adaptive")
    traffic.static = False
    wide = send(traffic, [1] * 5, tensor_parallel_size=4)
    narrow = send(traffic, [2] * 5)
    run_until(lambda: narrow.finished, traffic)
    assert wide.state is RequestState.WAITING
    script.target = Layout.parse("4", 4)
    run_until(lambda: wide.state is RequestState.RUNNING, traffic)
    assert wide.held_table.group.tp == 4
    traffic.finish()


# -- a layout that somebody asks for while a policy may widen -----------------------------------------------------


def test_a_request_is_not_cut_short_before_the_layout_that_was_asked_for_is_there(script: Script) -> None:
    assert script.target is None
    traffic = Traffic(layout="1+1+1+1", num_blocks=8, policy="load_adaptive", max_model_len=256)  # 32 tokens a device
    traffic.static = False
    long = send(traffic, [1] * 20, max_tokens=80)
    run_until(lambda: long.num_tokens == 31, traffic)
    ticket = traffic.engine.begin_switch("4", SwitchStrategy.MIGRATE)
    assert traffic.engine.control.policy == "load_adaptive"
    while traffic.engine.has_work:
        traffic.receive(traffic.engine.step())
    assert ticket.report is not None
    assert traffic.engine.control.policy == "static"
    assert len(long.output_ids) == 80


def test_a_refused_layout_leaves_the_policy_and_every_request_as_they_were(script: Script) -> None:
    """Requests outgrow the layout while they are copied; one on other devices has outgrown its own group before."""
    assert script.target is None
    engine, runner = simulated_engine(
        layout="4+1+1+1+1", num_devices=8, num_blocks=8, policy="load_adaptive", overlap=False, max_num_seqs=1
    )
    runner.chunk_slabs = 1

    def add(name: str, tokens: int, max_tokens: int, width: int | None = None) -> Request:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, tensor_parallel_size=width)
        engine.add_request(name, [1 + len(engine.scheduler.requests)] * tokens, params)
        return engine.scheduler.requests[name]

    filling = [add(f"f{i}", 3, 12, 4) for i in range(4)]
    engine.step()
    outgrown = add("outgrown", 24, 80)
    while outgrown.num_tokens < 33 or not all(each.finished for each in filling):
        engine.step()
    for i in range(2):
        add(f"o{i}", 24, 5, 4)
    growing = add("growing", 29, 60, 4)
    while growing.num_tokens < 31:
        engine.step()
    ticket = engine.begin_switch("1+1+1+1+2+1+1", SwitchStrategy.MIGRATE)
    while not ticket.settled:
        engine.step()
    assert ticket.error is not None
    assert (str(engine.layout), engine.control.policy, engine.scheduler.elastic) == ("4+1+1+1+1", "load_adaptive", True)
    assert outgrown.max_tokens == outgrown.limit == 80
    script.target = Layout.parse("4+2+1+1", 8)
    while engine.has_work:
        engine.step()
    assert len(outgrown.output_ids) == 80


def test_a_request_that_outgrows_its_group_is_moved_whatever_the_strategy(script: Script) -> None:
    traffic = Traffic(layout="1+1+1+1", num_blocks=8, policy="load_adaptive", strategy=SwitchStrategy.HARD_PREEMPT)
    traffic.static = False
    long = send(traffic, [1] * 20, max_tokens=80)
    run_until(lambda: long.num_tokens > 24, traffic)
    widen(traffic, script)
    assert long.state is RequestState.RUNNING
    assert traffic.engine.last_switch is not None
    assert traffic.engine.last_switch.strategy is SwitchStrategy.MIGRATE
    traffic.finish()
    assert len(long.output_ids) == 80
