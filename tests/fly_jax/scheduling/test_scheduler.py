"""Which groups requests start in, what is refused, and when a layout may change."""

from __future__ import annotations

import pytest

from fly_jax.errors import ContextLengthError, LayoutError, QueueFullError
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.outputs import FinishReason, SwitchStrategy
from fly_jax.scheduling.request import RequestState
from tests.fly_jax.builders import make_request
from tests.fly_jax.schedulers import add, group_of, make_scheduler, send, switcher_of

SEQUENTIAL = SwitchStrategy.SEQUENTIAL


def test_requests_are_spread_over_equal_groups() -> None:
    scheduler = make_scheduler("1+1+1+1")
    requests = [make_request(name=str(i)) for i in range(4)]
    add(scheduler, *requests)
    scheduler.route()
    assert {group_of(request).start for request in requests} == {0, 1, 2, 3}


def test_a_wide_group_takes_as_many_requests_as_its_devices_would() -> None:
    scheduler = make_scheduler("2+1+1", max_num_seqs=8)
    requests = [make_request(name=str(i)) for i in range(8)]
    add(scheduler, *requests)
    scheduler.route()
    sizes = [group_of(request).tp for request in requests]
    assert sizes.count(2) == 4
    assert sizes.count(1) == 4


def test_a_long_request_goes_to_the_group_that_holds_it_to_its_end() -> None:
    scheduler = make_scheduler("2+1+1", num_blocks=8)  # 32 tokens at TP 1, 64 at TP 2
    request = make_request(8, max_tokens=40)
    others = [make_request(name=str(i)) for i in range(1)]
    add(scheduler, request, *others)
    scheduler.route()
    assert group_of(request).tp == 2
    assert group_of(others[0]).tp == 1


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    scheduler = make_scheduler("4", num_blocks=4)  # 64 tokens
    running, head, small = make_request(18, name="running"), make_request(20, name="head"), make_request(2, name="s")
    add(scheduler, running, head, small)
    scheduler.route()
    assert list(scheduler.waiting) == [head, small]
    scheduler.finish(running, FinishReason.STOP)
    scheduler.route()
    assert not scheduler.waiting
    assert head.state is small.state is RequestState.RUNNING


def test_preempted_requests_go_back_to_their_rank_and_wait_for_tokens_that_are_still_on_the_device() -> None:
    scheduler = make_scheduler("4", num_blocks=1)
    first, second = make_request(name="first"), make_request(name="second")
    add(scheduler, first, second)
    scheduler.route()
    (group,) = scheduler.groups
    assert scheduler.schedule(group) is not None
    assert first.num_pending == 1
    scheduler.preempt(first)
    assert list(scheduler.waiting) == [first, second]
    assert scheduler.num_preemptions == 1
    scheduler.route()
    assert (first.state, second.state) == (RequestState.WAITING, RequestState.RUNNING)
    first.num_pending, first.output_ids = 0, [7]
    scheduler.finish(second, FinishReason.STOP)
    scheduler.route()
    assert first.state is RequestState.RUNNING


@pytest.mark.parametrize("state", ["waiting", "running", "preempted"])
def test_a_request_can_end_in_any_state(state: str) -> None:
    scheduler = make_scheduler("2+2")
    request = make_request()
    add(scheduler, request)
    if state != "waiting":
        scheduler.route()
        scheduler.schedule(group_of(request))
    if state == "preempted":
        scheduler.preempt(request)
    scheduler.finish(request, FinishReason.ABORT)
    assert request.finished
    assert request.finish_reason is FinishReason.ABORT
    assert not scheduler.has_work
    assert not scheduler.waiting
    assert scheduler.num_running == 0
    assert scheduler.kv.usage == 0.0


def test_a_prompt_that_could_never_run_is_refused_with_both_numbers() -> None:
    scheduler = make_scheduler("4", max_model_len=100)
    scheduler.check(99)
    with pytest.raises(
        ContextLengthError,
        match=r"context length is 100 tokens, but the prompt has 100 .*the prompt is too long: shorten the prompt$",
    ):
        scheduler.check(100)


def test_a_prompt_that_only_a_wider_layout_holds_is_refused_with_that_advice() -> None:
    scheduler = make_scheduler("2+1+1", num_blocks=8)
    assert scheduler.context_limit() == 64
    with pytest.raises(
        ContextLengthError,
        match=r"maximum context length is 64 tokens, but the prompt has 70 and.*wider layout \(up to 128\)$",
    ):
        scheduler.check(70)


def test_a_full_queue_is_refused_with_both_numbers() -> None:
    scheduler = make_scheduler("4", max_queued=2)
    add(scheduler, make_request(name="a"), make_request(name="b"))
    with pytest.raises(QueueFullError, match="2 requests are waiting and at most 2 may"):
        scheduler.check(1)
    scheduler.route()
    scheduler.check(1)


def test_a_request_generates_no_more_than_its_group_can_hold() -> None:
    scheduler = make_scheduler("1+1+1+1", num_blocks=8)  # 32 tokens
    request = make_request(10, max_tokens=500)
    add(scheduler, request)
    scheduler.route()
    assert request.max_tokens == 22


def test_a_layout_that_could_never_hold_an_accepted_request_is_refused() -> None:
    scheduler = make_scheduler("4", num_blocks=8, max_num_seqs=1)
    running, waiting = [make_request(name=f"running-{index}") for index in range(4)], make_request(60, name="waiting")
    add(scheduler, *running, waiting)
    scheduler.route()
    with pytest.raises(LayoutError, match=r"waiting waits with 60 tokens .* 1\+1\+1\+1 holds 32"):
        switcher_of(scheduler).begin(Layout.parse("dp4", 4), SEQUENTIAL)
    assert switcher_of(scheduler).target is None
    scheduler.finish(waiting, FinishReason.ABORT)
    switcher_of(scheduler).begin(Layout.parse("dp4", 4), SEQUENTIAL)


def test_a_switch_admits_nothing_to_groups_it_dissolves_and_drains_only_those() -> None:
    scheduler = make_scheduler("2+1+1")
    requests = [send(scheduler, str(i)) for i in range(4)]
    scheduler.route()
    switcher_of(scheduler).begin(Layout.parse("1+1+1+1", 4), SEQUENTIAL)
    assert [str(group) for group in scheduler.hooks.dissolving] == ["tp2@0-1"]
    assert switcher_of(scheduler).advance() is None
    late = [send(scheduler, f"late{i}") for i in range(4)]
    scheduler.route()
    assert {group_of(request).start for request in late if request.table} == {2, 3}
    kept = {group: scheduler.groups[group] for group in scheduler.groups if group.tp == 1}
    for request in requests:
        if group_of(request).tp == 2:
            scheduler.finish(request, FinishReason.STOP)
    assert switcher_of(scheduler).advance() is not None
    assert str(scheduler.layout) == "1+1+1+1"
    assert switcher_of(scheduler).target is None
    assert all(scheduler.groups[group] is same for group, same in kept.items())
    assert len(scheduler.groups) == 4


def test_a_second_switch_is_refused_while_one_is_under_way() -> None:
    scheduler = make_scheduler("4")
    switcher_of(scheduler).begin(Layout.parse("2+2", 4), SEQUENTIAL)
    with pytest.raises(LayoutError, match=r"switch to 2\+2 is under way: ask for 1\+1\+1\+1"):
        switcher_of(scheduler).begin(Layout.parse("dp4", 4), SEQUENTIAL)
    assert switcher_of(scheduler).advance() is not None
    switcher_of(scheduler).begin(Layout.parse("dp4", 4), SEQUENTIAL)


@pytest.mark.parametrize("strategy", SwitchStrategy)
def test_a_switch_to_the_layout_in_force_has_nothing_to_wait_for(strategy: SwitchStrategy) -> None:
    scheduler = make_scheduler("2+2")
    request = send(scheduler, "r")
    scheduler.route()
    switcher_of(scheduler).begin(Layout.parse("2+2", 4), strategy)
    switcher_of(scheduler).prepare()
    assert switcher_of(scheduler).advance() is not None
    assert request.state is RequestState.RUNNING
    assert scheduler.num_running == 1


def test_a_waiting_request_whose_last_token_is_on_the_device_does_not_keep_the_layout() -> None:
    scheduler = make_scheduler("4", num_blocks=8)
    request = send(scheduler, "ending", 31, max_tokens=1)  # 32 tokens are what a narrow group holds
    scheduler.route()
    assert scheduler.schedule(DeviceGroup(0, 4)) is not None
    scheduler.preempt(request)
    assert request.will_sample_no_more
    switcher_of(scheduler).begin(Layout.parse("dp4", 4), SEQUENTIAL)
