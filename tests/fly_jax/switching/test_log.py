"""The numbers of a switch's report, with a clock that only the test moves."""

from __future__ import annotations

from typing import Any

import pytest

from fly_jax.kv.slabs import PackedRelayout
from fly_jax.outputs import SwitchReport, SwitchStrategy
from fly_jax.scheduling.launch import Launch
from fly_jax.scheduling.request import RequestState
from fly_jax.scheduling.runner import StepInFlight
from fly_jax.switching.log import HISTORY
from fly_jax.switching.switch import Switch
from tests.fly_jax.simulated_runner import SimulatedRunner
from tests.fly_jax.traffic import HARD, MIGRATE, SEQUENTIAL, Traffic, run_until, send, switched
from tests.fly_jax.virtual_time import VirtualClock


class TickingClock(VirtualClock):
    """A moment passes between any two looks at it, so that what comes first is earlier."""

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


def timed(layout: str, clock: VirtualClock | None = None, **options: Any) -> tuple[Traffic, VirtualClock]:
    clock = clock or VirtualClock()
    return Traffic(layout=layout, clock=clock, **options), clock


def steps_of(traffic: Traffic, clock: VirtualClock, seconds: float, times: int = 1) -> None:
    """Steps, each this long after the one before."""
    for _ in range(times):
        clock.now += seconds
        traffic.step()


def report_of(ticket: Switch | None) -> SwitchReport:
    assert ticket is not None
    assert ticket.report is not None
    return ticket.report


def test_an_idle_switch_costs_nothing() -> None:
    traffic, clock = timed("1+1+1+1")
    clock.now = 5.0
    for number, (target, strategy) in enumerate(zip(("4", "2+2", "1+1+2", "4"), SwitchStrategy, strict=True), start=1):
        report = switched(traffic, target, strategy)
        assert (report.number, report.strategy, report.reason) == (number, strategy, "asked for")
        assert report.drain_seconds == report.cutover_seconds == report.worst_gap_seconds == 0.0
    log = traffic.engine.control.log
    assert [report.number for report in log.history] == [1, 2, 3, 4]
    assert set(log.count.values()) == {1}
    assert log.last_switch == 5.0


def test_a_drain_lasts_from_asking_until_the_last_old_request_has_ended() -> None:
    traffic, clock = timed("1+1+1+1")
    request = send(traffic, [1], max_tokens=20)
    steps_of(traffic, clock, 1.0, times=3)
    ticket, asked = traffic.switch("4", SEQUENTIAL), clock.now
    while not request.finished:
        steps_of(traffic, clock, 1.0)
    steps_of(traffic, clock, 0.25)
    report = report_of(ticket)
    assert report.drain_seconds == clock.now - asked > 10
    assert report.precopy_seconds == 0.0
    assert report.worst_gap_seconds == 1.0  # a step of the layout that drains


@pytest.mark.parametrize("strategy", [MIGRATE, HARD])
def test_a_switch_that_drains_nothing_has_no_drain(strategy: SwitchStrategy) -> None:
    traffic, clock = timed("1+1+1+1")
    for i in range(4):
        send(traffic, [1 + i] * 3)
    steps_of(traffic, clock, 1.0, times=3)
    ticket = traffic.switch("4", strategy)
    steps_of(traffic, clock, 1.0)
    assert report_of(ticket).drain_seconds == 0.0
    traffic.finish()


class SlowRunner(SimulatedRunner):
    """Launches and relayouts take time, as on a host."""

    clock: VirtualClock

    def execute(self, launch: Launch) -> StepInFlight:
        self.clock.now += 0.010
        return super().execute(launch)

    def relayout(self, packed: PackedRelayout) -> None:
        self.clock.now += 0.100
        super().relayout(packed)


def test_a_cutover_lasts_from_the_last_old_launch_to_the_first_new_one() -> None:
    """The clock also moves during a launch and a relayout, as on a host."""
    traffic, clock = timed("1+1+1+1", instant=False, runner_type=SlowRunner)
    assert isinstance(traffic.runner, SlowRunner)
    runner, traffic.runner.clock = traffic.runner, clock
    for i in range(4):
        send(traffic, [1 + i] * 3)
    traffic.step(2)
    ready_all(traffic)
    traffic.step()
    ticket = traffic.switch("4", MIGRATE)
    ready_all(traffic)
    clock.now += 3.0
    traffic.step()
    run_until(lambda: ticket is not None and ticket.settled, traffic)
    # One program for each old group's split carries all of them; the new group's launch takes as long as any.
    assert report_of(ticket).cutover_seconds == pytest.approx(0.100 * len(runner.relayouts) + 0.010)
    traffic.finish()


def ready_all(traffic: Traffic) -> None:
    for step in traffic.runner.unread:
        step.ready = True


def test_the_worst_gap_is_the_longest_that_a_stream_in_flight_waited_across_the_switch() -> None:
    traffic, clock = timed("1+1+1+1", overlap=False)
    for i in range(4):
        send(traffic, [1 + i] * 3)
    steps_of(traffic, clock, 1.0, times=4)
    ticket = traffic.switch("4", MIGRATE)
    steps_of(traffic, clock, 7.0)  # the step in which it happens delivers the old tokens
    steps_of(traffic, clock, 2.5)
    steps_of(traffic, clock, 40.0, times=2)  # gaps that it is not to blame for
    assert report_of(ticket).worst_gap_seconds == 7.0
    assert ticket is not None
    assert ticket.settled
    traffic.finish()
    assert traffic.engine.last_switch == ticket.report


def test_a_paused_stream_counts_until_it_goes_on_although_the_switch_is_settled() -> None:
    traffic, clock = timed("1+1+1+1", TickingClock(), max_num_seqs=1, overlap=False)
    paused = [send(traffic, [1 + i] * 3, max_tokens=30) for i in range(4)]
    steps_of(traffic, clock, 1.0, times=3)
    send(traffic, [9] * 3, max_tokens=12)
    ticket = traffic.switch("4", HARD)
    steps_of(traffic, clock, 1.0)
    assert {request.state for request in paused} == {RequestState.PAUSED}
    assert ticket is not None
    assert ticket.settled
    steps_of(traffic, clock, 1.0, times=4)
    assert report_of(ticket).worst_gap_seconds == pytest.approx(1.0, abs=0.01)
    back = traffic.switch("1+1+1+1", HARD)
    steps_of(traffic, clock, 1.0, times=3)
    # From the switch's own step to the first new one: four others, that of coming back, and one more.
    assert report_of(ticket).worst_gap_seconds == pytest.approx(5.0, abs=0.01)
    assert report_of(back).requests_paused == 1
    assert report_of(back).worst_gap_seconds == pytest.approx(5.0, abs=0.01)  # it ended in the same wait
    assert traffic.engine.control.log.history[0] == ticket.report
    traffic.finish()


def test_the_time_of_copying_ahead_is_told_from_the_cutover() -> None:
    traffic, clock = timed("1+1+1+1", max_num_batched_tokens=64)
    long = send(traffic, [1 + i % 60 for i in range(100)], max_tokens=60)
    while len(long.output_ids) < 2:
        steps_of(traffic, clock, 1.0)
    ticket, asked = traffic.switch("4", MIGRATE), clock.now
    while ticket is not None and ticket.report is None:
        steps_of(traffic, clock, 1.0)
    report = report_of(ticket)
    assert report.precopy_seconds == clock.now - asked > 3
    assert report.drain_seconds == 0.0
    assert report.worst_gap_seconds <= 1.0
    traffic.finish()


def test_a_switch_is_settled_when_what_it_waits_for_is_aborted() -> None:
    """The engine has nothing to do any more; whoever asked for the switch still gets an answer."""
    traffic, _ = timed("1+1+1+1", block_size=16, max_num_batched_tokens=32, overlap=False)
    request = send(traffic, [2] * 200, max_tokens=50)
    run_until(lambda: len(request.output_ids) == 3, traffic)
    traffic.scheduler.preempt(request)
    traffic.step()
    ticket = switched_ticket(traffic)
    assert 0 < request.num_computed < 200  # it is being recomputed, and its stream waits
    assert not ticket.settled
    traffic.abort(request.request_id)
    run_until(lambda: not traffic.engine.has_work, traffic)
    assert ticket.settled


def switched_ticket(traffic: Traffic) -> Switch:
    ticket = traffic.switch("4", MIGRATE)
    assert ticket is not None
    run_until(lambda: ticket.report is not None, traffic)
    return ticket


def test_only_the_latest_reports_are_kept() -> None:
    traffic, _ = timed("1+1+1+1")
    for number in range(HISTORY + 3):
        switched(traffic, "4" if number % 2 == 0 else "1+1+1+1", MIGRATE)
    log = traffic.engine.control.log
    assert len(log.history) == HISTORY
    assert log.history[0].number == 4
    assert log.count.total() == HISTORY + 3
