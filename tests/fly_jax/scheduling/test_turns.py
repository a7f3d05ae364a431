"""Whose turn it is: priorities, fairness, widths, kept groups, and requests that the layout widens for."""

from __future__ import annotations

import pytest

from fly_jax.errors import InvalidRequestError, LayoutError
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.outputs import FinishReason, SwitchStrategy
from fly_jax.scheduling.request import Request, RequestState
from fly_jax.scheduling.scheduler import Scheduler
from fly_jax.scheduling.waiting import FAIR_TURN
from tests.fly_jax.schedulers import group_of, make_scheduler, names, send, switcher_of

SEQUENTIAL = SwitchStrategy.SEQUENTIAL


# -- priorities -----------------------------------------------------------------------------------------------


def test_the_lower_priority_number_starts_first_and_equals_in_the_order_of_their_arrival() -> None:
    scheduler = make_scheduler("4", max_num_seqs=1)
    priorities = {"normal": 0, "late": 5, "urgent": -5, "normal too": 0, "urgent too": -5}
    for name, priority in priorities.items():
        send(scheduler, name, priority=priority)
    scheduler.route()
    assert names(list(scheduler.waiting)) == ["late"]
    assert names(scheduler.groups[DeviceGroup(0, 4)].running) == ["urgent", "urgent too", "normal", "normal too"]


def test_an_urgent_request_goes_to_the_widest_group() -> None:
    scheduler = make_scheduler("1+1+2")
    running = [send(scheduler, str(i)) for i in range(6)]
    scheduler.route()
    urgent = send(scheduler, "urgent", priority=-1)
    scheduler.route()
    assert group_of(urgent).tp == 2
    assert {request.state for request in running} == {RequestState.RUNNING}


def test_only_requests_of_lower_priority_are_displaced() -> None:
    scheduler = make_scheduler("4", max_num_seqs=1)
    running = [send(scheduler, str(priority), priority=priority) for priority in (-1, 0, 0, 1)]
    scheduler.route()
    same = send(scheduler, "same", priority=1)
    scheduler.route()
    assert same.state is RequestState.WAITING
    urgent = send(scheduler, "urgent", priority=-1)
    scheduler.route()
    assert urgent.state is RequestState.RUNNING
    assert names([request for request in running if request.state is RequestState.WAITING]) == ["1"]
    assert scheduler.num_preemptions == 1
    assert running[3].preempted


def test_requests_are_displaced_where_that_takes_fewest_of_them() -> None:
    scheduler = make_scheduler("2+2", num_blocks=17, max_num_seqs=2)  # 136 tokens a group
    many = [send(scheduler, f"many{i}", 30, max_tokens=1) for i in range(4)]
    few = send(scheduler, "few", 90, max_tokens=1)
    for request in (*many, few):
        place = DeviceGroup(2, 2) if request is few else DeviceGroup(0, 2)
        assert scheduler.groups[place].admit(request)
        scheduler.waiting.start(request)
    urgent = send(scheduler, "urgent", 100, priority=-1, max_tokens=1)
    scheduler.route()
    assert group_of(urgent) == DeviceGroup(2, 2)
    assert few.state is RequestState.WAITING
    assert {request.state for request in many} == {RequestState.RUNNING}


def test_nobody_is_displaced_in_vain() -> None:
    scheduler = make_scheduler("4", num_blocks=5, max_num_seqs=2)  # 80 tokens
    kept, low = send(scheduler, "kept", 40, priority=-2), send(scheduler, "low", 4, priority=1)
    scheduler.route()
    urgent = send(scheduler, "urgent", 40, priority=-1)
    scheduler.route()
    assert (kept.state, low.state, urgent.state) == (RequestState.RUNNING, RequestState.RUNNING, RequestState.WAITING)


def urgent_before(scheduler: Scheduler, low: Request) -> int:
    """Starts urgent requests, of which more come all the time, until one of low priority has its turn; how many."""
    started = 0
    running: list[Request] = []
    while low.state is RequestState.WAITING:
        for request in running:
            scheduler.finish(request, FinishReason.STOP)
        running = [send(scheduler, f"urgent{started + i}", priority=-1) for i in range(4)]
        scheduler.route()
        running = [request for request in running if request.state is RequestState.RUNNING]
        started += len(running)
        assert started <= FAIR_TURN
    return started


def test_the_oldest_has_one_turn_in_eight_whatever_its_priority() -> None:
    scheduler = make_scheduler("1+1+1+1", max_num_seqs=1)
    low = send(scheduler, "low", priority=9)
    assert urgent_before(scheduler, low) == FAIR_TURN - 1


def test_a_request_that_started_because_of_its_age_is_not_displaced_by_the_stream_it_waited_behind() -> None:
    scheduler = make_scheduler("4", num_blocks=4, max_num_seqs=1)
    low = send(scheduler, "low", priority=1)
    for turn in range(4 * FAIR_TURN):
        urgent = send(scheduler, f"urgent{turn}", 50, priority=-1)  # two do not fit
        for _ in range(3):
            scheduler.route()
        if low.state is RequestState.RUNNING:
            break
        scheduler.finish(urgent, FinishReason.STOP)
    else:
        raise AssertionError("it starves")
    for turn in range(4):
        send(scheduler, f"late{turn}", 50, priority=-1)
        scheduler.route()
        assert low.state is RequestState.RUNNING


# -- widths and kept groups -----------------------------------------------------------------------------------


def test_a_request_goes_to_no_group_that_is_narrower_than_it_asks_for() -> None:
    scheduler = make_scheduler("2+1+1", max_num_seqs=1)
    wide = [send(scheduler, str(i), min_width=2) for i in range(3)]
    scheduler.route()
    assert [request.state for request in wide] == [RequestState.RUNNING] * 2 + [RequestState.WAITING]
    assert {group_of(request).tp for request in wide[:2]} == {2}


def test_a_width_that_no_group_has_is_refused_with_both_numbers() -> None:
    scheduler = make_scheduler("2+1+1")
    with pytest.raises(InvalidRequestError, match=r"tensor_parallel_size 4 is wider than the 2 .* wider layout$"):
        scheduler.check(1, 4)
    with pytest.raises(InvalidRequestError, match=r"tensor_parallel_size 8 is wider than the 2 .* ask for less$"):
        scheduler.check(1, 8)
    elastic = make_scheduler("1+1+1+1", elastic=True)
    elastic.check(1, 4)
    with pytest.raises(InvalidRequestError, match="wider than the 4"):
        elastic.check(1, 8)


def test_a_request_whose_width_the_layout_has_lost_takes_the_widest_there_is() -> None:
    scheduler = make_scheduler("4", max_num_seqs=2)
    for i in range(4):
        send(scheduler, str(i))
    scheduler.route()
    wide = send(scheduler, "wide", min_width=4)
    switcher_of(scheduler).begin(Layout.parse("2+1+1", 4), SwitchStrategy.HARD_PREEMPT)
    assert switcher_of(scheduler).advance() is not None
    scheduler.route()
    assert group_of(wide).tp == 2


def test_short_requests_go_on_starting_elsewhere_while_a_wide_one_waits_for_its_group() -> None:
    scheduler = make_scheduler("2+1+1", max_num_seqs=2)
    first = [send(scheduler, f"first{i}", min_width=2) for i in range(4)]
    scheduler.route()
    assert {group_of(request).tp for request in first} == {2}
    wide = send(scheduler, "wide", min_width=2)
    short = [send(scheduler, f"short{i}") for i in range(5)]
    scheduler.route()
    assert {group_of(request).tp for request in short[:4]} == {1}
    assert (wide.state, short[4].state) == (RequestState.WAITING, RequestState.WAITING)
    scheduler.finish(first[0], FinishReason.STOP)
    scheduler.route()
    assert group_of(wide).tp == 2
    assert short[4].state is RequestState.WAITING


def test_an_overdue_wide_request_gets_its_devices_within_patience() -> None:
    patience = 10
    scheduler = make_scheduler("2+2", num_blocks=8, patience=patience)  # 64 tokens a group
    for i in range(4):
        send(scheduler, f"short{i}", 20)
    scheduler.route()
    wide, passes = send(scheduler, "long", 50), 0
    while wide.state is RequestState.WAITING:
        scheduler.route()
        passes += 1
        assert passes <= patience + 2
        send(scheduler, f"new{passes}", 20)
    assert passes > patience
    assert wide.overdue
    assert scheduler.num_preemptions > 0


def test_an_overdue_request_is_not_displaced_by_the_next_one() -> None:
    scheduler = make_scheduler("4", num_blocks=4, patience=3)
    one, other = send(scheduler, "one", 40), send(scheduler, "other", 40)
    for _ in range(6):
        scheduler.route()
    assert (one.state, other.state) == (RequestState.WAITING, RequestState.RUNNING)
    urgent = send(scheduler, "urgent", 40, priority=-1)
    for _ in range(6):
        scheduler.route()
    assert (urgent.state, other.state) == (RequestState.WAITING, RequestState.RUNNING)


# -- elastic --------------------------------------------------------------------------------------------------


def test_a_request_may_become_as_long_as_the_widest_group_holds_when_the_layout_widens_for_it() -> None:
    pinned, elastic = (make_scheduler("1+1+1+1", num_blocks=8, elastic=elastic) for elastic in (False, True))
    assert (pinned.context_limit(), elastic.context_limit()) == (32, 128)
    for scheduler, most in ((pinned, 22), (elastic, 118)):
        request = send(scheduler, "r", 10, max_tokens=500)
        scheduler.route()
        assert request.max_tokens == most
        assert request.limit == 500


def test_a_layout_cannot_be_pinned_while_a_request_needs_a_wider_one() -> None:
    scheduler = make_scheduler("1+1+1+1", num_blocks=8, elastic=True)
    request = send(scheduler, "long", 40)  # more than one device holds
    scheduler.route()
    assert request.state is RequestState.WAITING
    with pytest.raises(LayoutError, match="request long waits with 40 tokens"):
        switcher_of(scheduler).check_pinned()
    with pytest.raises(LayoutError, match="request long waits with 40 tokens"):
        switcher_of(scheduler).begin(Layout.parse("dp4", 4), SEQUENTIAL)
    switcher_of(scheduler).begin(Layout.parse("2+2", 4), SEQUENTIAL, elastic=True)
    assert switcher_of(scheduler).advance() is not None
    scheduler.route()
    assert group_of(request).tp == 2
    switcher_of(scheduler).check_pinned()


def test_a_request_that_no_group_can_take_leaves_its_turn_to_the_next_oldest() -> None:
    scheduler = make_scheduler("1+1+1+1", max_num_seqs=1, elastic=True)
    wide, low = send(scheduler, "wide", priority=9, min_width=4), send(scheduler, "low", priority=9)
    urgent_before(scheduler, low)
    assert wide.state is RequestState.WAITING
