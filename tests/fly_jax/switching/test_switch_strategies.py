"""What each strategy does to requests in flight, by its own definition, on the simulated engine."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from fly_jax.errors import LayoutError
from fly_jax.layout import DeviceGroup, all_groups
from fly_jax.outputs import SwitchStrategy
from fly_jax.scheduling.admission import LOOK_AHEAD
from fly_jax.scheduling.request import RequestState
from fly_jax.scheduling.step import round_up_to_tile
from tests.fly_jax.invariants import Snapshot
from tests.fly_jax.traffic import (
    HARD,
    MIGRATE,
    SEQUENTIAL,
    SOFT,
    Traffic,
    bytes_moved,
    groups_of,
    layouts,
    run_until,
    send,
    switched,
)

SWITCHES = [(base_tp, *pair) for base_tp in (1, 2) for pair in product(layouts(base_tp), repeat=2)]
STRATEGIES_AND_HEADS = [(MIGRATE, 4), (MIGRATE, 2), (MIGRATE, 1), (SEQUENTIAL, 4), (SOFT, 4), (HARD, 4)]


@pytest.mark.parametrize(("strategy", "kv_heads"), STRATEGIES_AND_HEADS)
@pytest.mark.parametrize(("base_tp", "source", "target"), SWITCHES)
def test_every_switch_under_load_finishes_every_request_with_its_own_tokens(
    base_tp: int, source: str, target: str, strategy: SwitchStrategy, kv_heads: int
) -> None:
    traffic = Traffic(layout=source, base_tp=base_tp, num_blocks=128, max_num_seqs=2 * base_tp, kv_heads=kv_heads)
    for i in range(20):
        send(traffic, [1 + (7 * i + j) % 50 for j in range(3 + 4 * i)])
    traffic.step(8)
    gone = set(groups_of(source)) - set(groups_of(target))
    in_flight = sum(len(traffic.scheduler.groups[group].running) for group in gone)
    assert bool(in_flight) == bool(gone)
    report = switched(traffic, target, strategy)
    assert (report.source, report.target, report.strategy) == (source, target, strategy)
    if strategy is MIGRATE:
        assert report.requests_moved == in_flight
        assert (report.tokens_recomputed, report.drain_seconds) == (0, 0.0)
        assert traffic.scheduler.num_preemptions == 0
        assert report.kv_bytes_moved == bytes_moved(traffic.runner)
        assert report.relayout_launches == sum(len(each.uploads) for each in traffic.runner.relayouts)
    else:
        assert (report.requests_moved, report.kv_bytes_moved, report.kv_blocks_moved) == (0, 0, 0)
        assert not traffic.runner.relayouts
    assert report.requests_paused == (in_flight if strategy is HARD else 0)
    if strategy is not SOFT:
        assert report.tokens_recomputed == 0
    traffic.finish()
    used = {plan.group for plan in traffic.runner.plans}
    assert used <= set(all_groups(4, base_tp))
    assert used >= set(groups_of(target))


# -- sequential and soft preempt ------------------------------------------------------------------------------


def test_a_drain_starts_nobody_in_the_groups_that_go_and_guests_are_only_let_in_by_soft_preempt() -> None:
    for strategy in (SEQUENTIAL, SOFT):
        traffic = Traffic(layout="1+1+1+1", num_blocks=32)
        long = send(traffic, [1], max_tokens=40)
        traffic.step()
        ticket = traffic.switch("4", strategy)
        assert ticket is not None
        guests = [send(traffic, [2 + i] * 6, max_tokens=60) for i in range(3)]
        traffic.step(10)
        busy = {request.state for request in guests}
        assert busy == {RequestState.RUNNING if strategy is SOFT else RequestState.WAITING}
        if strategy is SOFT:
            assert all(request.held_table.group != long.held_table.group for request in guests)
        run_until(lambda: long.finished, traffic)  # noqa: B023
        computed = sum(request.num_computed for request in guests)
        run_until(lambda: ticket.report is not None, traffic)  # noqa: B023
        assert ticket.report is not None
        assert ticket.report.drain_seconds > 0
        assert (ticket.report.tokens_recomputed > 0) == (strategy is SOFT)
        assert computed <= ticket.report.tokens_recomputed <= computed + 2 * len(guests)
        assert ticket.report.requests_waiting == len(guests)
        traffic.finish()


def test_a_drain_ends_however_many_wait_before_a_request_that_it_waits_for() -> None:
    traffic = Traffic(layout="4", max_num_seqs=1)
    low = send(traffic, [1] * 5, max_tokens=40, priority=1)
    traffic.step(3)
    ticket = traffic.switch("2+2", SEQUENTIAL)
    assert ticket is not None
    traffic.scheduler.preempt(low)  # as if its blocks were needed
    for i in range(2 * LOOK_AHEAD):
        send(traffic, [1 + i % 50] * 3, max_tokens=3)
    run_until(lambda: ticket.report is not None, traffic)
    assert low.finished
    traffic.finish()


def test_a_guest_starts_only_where_the_target_could_hold_it_too() -> None:
    traffic = Traffic(layout="2+2", num_blocks=8, overlap=False)  # 32 tokens at TP 1, 64 at TP 2
    awaited = send(traffic, [1], max_tokens=40)
    traffic.step()
    ticket = traffic.switch("1+1+1+1", SOFT)
    assert ticket is not None
    fits, too_long = send(traffic, [2] * 10, max_tokens=22), send(traffic, [3] * 10, max_tokens=50)
    traffic.step(3)
    assert fits.state is RequestState.RUNNING
    assert fits.held_table.group != awaited.held_table.group
    assert too_long.state is RequestState.WAITING
    run_until(lambda: ticket.settled, traffic)
    assert awaited.finished
    assert ticket.error is None
    traffic.finish()
    assert len(too_long.output_ids) == 22  # what a group of the target holds


def test_groups_that_a_switch_keeps_go_on_while_others_drain() -> None:
    traffic = Traffic(layout="2+1+1", max_num_seqs=1)
    for i in range(3):
        send(traffic, [1 + i], max_tokens=30 if i == 0 else 60)
    traffic.step()
    assert {plan.group.tp for plan in traffic.runner.plans} == {1, 2}
    launched = len(traffic.runner.plans)
    switched(traffic, "1+1+1+1", SEQUENTIAL)
    busy = Counter(plan.group for plan in traffic.runner.plans[launched:])
    assert all(busy[group] > 5 for group in groups_of("1+1+1+1") if group.start >= 2)
    assert traffic.scheduler.num_running == 2


def test_a_request_that_is_preempted_while_its_group_drains_goes_back_into_it() -> None:
    traffic = Traffic(layout="2+2", num_blocks=6, max_num_seqs=4)
    requests = [send(traffic, [1 + i] * 8, max_tokens=30) for i in range(4)]
    traffic.step(2)
    ticket = traffic.switch("4", SEQUENTIAL)
    assert ticket is not None
    run_until(lambda: any(request.preempted for request in requests), traffic)
    run_until(lambda: ticket.report is not None, traffic)
    assert all(request.finished for request in requests)
    traffic.finish()


# -- migrate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("base_tp", "source", "target"), [switch for switch in SWITCHES if switch[1] != switch[2]])
def test_a_migration_takes_requests_in_every_state_along(base_tp: int, source: str, target: str, overlap: bool) -> None:
    """In mid-prefill, decoding with tokens that only the device knows, and aborted just before or in mid-switch."""
    traffic = Traffic(
        layout=source, base_tp=base_tp, num_blocks=64, max_num_seqs=8, max_num_batched_tokens=64, instant=False,
        overlap=overlap,
    )  # fmt: skip
    for i in range(8):
        send(traffic, [1 + i] * (3 + i))
    before, after = send(traffic, [5] * 6), send(traffic, [6] * 6)
    traffic.step(6)
    long = [send(traffic, [20 + i] * 100) for i in range(4)]
    run_until(lambda: any(0 < request.num_computed < 100 for request in long), traffic)
    assert any(request.num_pending for request in traffic.live) == overlap
    traffic.abort(before.request_id)
    ticket = traffic.switch(target, MIGRATE)
    assert ticket is not None
    traffic.abort(after.request_id)
    run_until(lambda: ticket.report is not None, traffic)
    switched(traffic, source, MIGRATE)
    assert traffic.runner.relayouts
    traffic.finish()
    assert traffic.scheduler.num_preemptions == 0


@pytest.mark.parametrize("seed", range(4))
def test_tokens_arrive_in_the_texts_order_after_switches_right_behind_each_other(seed: int) -> None:
    """A request may come from device 0 to device 1 through a group whose steps would have ordered the two."""
    traffic = Traffic(layout="1+1+1+1", instant=False)
    for i in range(6):
        send(traffic, [10 * seed + i + 1] * 4, max_tokens=40)
    traffic.step(2)
    seen = set()
    for around in range(6):
        for target in ("2+2", "1+1+1+1"):
            ticket = traffic.switch(target, MIGRATE)
            assert ticket is not None
            while ticket.report is None:
                # The newest steps reach the host first.
                for step in traffic.runner.unread[len(traffic.runner.unread) // 2 :]:
                    step.ready = True
                traffic.step()
        traffic.step(around % 2)
        send(traffic, [60 - around] * (20 + around), max_tokens=40)  # the longest takes the first place
        seen |= {(request.request_id, request.held_table.group) for request in traffic.live if request.table}
    assert len(seen) > len(traffic.accepted), "nobody changed its device"
    traffic.finish()


def test_layouts_follow_each_other_step_by_step() -> None:
    traffic = Traffic(layout="1+1+1+1", num_blocks=64, instant=False)
    for i in range(8):
        send(traffic, [1 + (7 * i + j) % 50 for j in range(3 + 4 * i)], max_tokens=40)
    traffic.step(4)
    for layout in ("2+2", "4", "2+1+1", "1+1+2", "4", "1+1+1+1", "1+1+2", "2+2"):
        assert switched(traffic, layout, MIGRATE).tokens_recomputed == 0
    traffic.finish()
    assert traffic.scheduler.num_preemptions == 0


@pytest.mark.parametrize("tokens", [32, 35])
@pytest.mark.parametrize("strategy", [MIGRATE, HARD])
def test_a_switch_that_a_running_request_cannot_follow_is_refused_and_changes_nothing(
    tokens: int, strategy: SwitchStrategy
) -> None:
    traffic = Traffic(layout="4", num_blocks=8, overlap=False)  # 32 tokens at TP 1, 64 at TP 2
    long, _ = send(traffic, [1] * 30), send(traffic, [2] * 3)
    run_until(lambda: long.num_tokens == tokens, traffic)
    before = Snapshot.of(traffic.engine)
    with pytest.raises(LayoutError, match=rf"request r0 holds {tokens} tokens but the widest group .* hold 32"):
        traffic.engine.begin_switch("1+1+1+1", strategy)
    assert Snapshot.of(traffic.engine) == before
    switched(traffic, "2+1+1", MIGRATE)  # a group of two holds it
    traffic.finish()


def test_a_request_whose_last_token_is_on_the_device_needs_no_more_room() -> None:
    traffic = Traffic(layout="1+1+1+1", num_blocks=8, kv_heads=1, instant=False)  # 32 tokens at each degree
    request = send(traffic, [1] * 8, max_tokens=500)
    run_until(lambda: request.will_sample_no_more, traffic)
    assert request.num_tokens == 32
    switched(traffic, "4", MIGRATE)
    traffic.finish()
    assert len(request.output_ids) == 24


def test_a_long_request_goes_to_the_new_group_that_holds_it_to_its_end() -> None:
    traffic = Traffic(layout="4", num_blocks=16)  # 64 tokens at TP 1, 128 at TP 2
    requests = [send(traffic, [1 + i] * 10, max_tokens=90) for i in range(3)]
    traffic.step(3)
    switched(traffic, "2+1+1", MIGRATE)
    assert {request.held_table.group.tp for request in requests} == {2}
    traffic.finish()
    assert {len(request.output_ids) for request in requests} == {90}


def test_a_request_keeps_the_width_that_it_asked_for() -> None:
    traffic = Traffic(layout="4", num_blocks=64)
    wide = send(traffic, [1] * 10, tensor_parallel_size=2)
    narrow = [send(traffic, [2 + i] * 10) for i in range(4)]
    traffic.step(3)
    switched(traffic, "1+1+2", MIGRATE)
    assert wide.held_table.group.tp == 2
    assert {request.held_table.group.tp for request in narrow} == {1, 2}
    traffic.finish()


def test_a_migration_without_room_recomputes_those_whose_blocks_help_and_says_so() -> None:
    """Device 0 is full of an old request, the others hold new ones: merging needs blocks on device 0."""
    traffic = Traffic(layout="1+1+1+1", num_blocks=12, max_num_seqs=8)
    old = [send(traffic, [1 + i] * (44 if i == 0 else 4), max_tokens=12 if i else 3) for i in range(4)]
    new = [send(traffic, [5 + i] * 4, max_tokens=12) for i in range(4)]
    traffic.step()
    full = [request for request in traffic.live if request.held_table.group.start == 0]
    assert full == [old[0]]
    assert traffic.kv.free_blocks(DeviceGroup(0, 1)) == 0
    report = switched(traffic, "4", MIGRATE)
    assert all(request.state is RequestState.RUNNING for request in (*old[1:], *new))
    assert report.requests_moved + len(traffic.scheduler.waiting) == 8
    traffic.finish()


def test_a_migration_moves_in_rounds_what_does_not_fit_at_once() -> None:
    traffic = Traffic(layout="4", num_blocks=13, max_num_seqs=8)
    requests = [send(traffic, [1 + i] * 16, max_tokens=8) for i in range(6)]
    traffic.step(2)
    assert traffic.scheduler.num_running == 6
    traffic.abort(requests[5].request_id)
    assert traffic.kv.free_blocks(DeviceGroup(0, 4)) == 3  # what one request of the new layout takes
    report = switched(traffic, "2+2", MIGRATE)
    assert (report.requests_moved, report.tokens_recomputed) == (5, 0)
    assert len(traffic.runner.relayouts) > 1
    traffic.finish()


def test_requests_that_a_migration_preempts_wait_by_rank() -> None:
    traffic = Traffic(layout="4", num_blocks=7, max_num_seqs=8)
    requests = [send(traffic, [1 + i] * 24, max_tokens=8, priority=i % 2) for i in range(5)]
    traffic.step(2)
    switched(traffic, "1+1+1+1", MIGRATE)
    waiting = list(traffic.scheduler.waiting)
    assert waiting == sorted(waiting, key=lambda request: request.rank)
    assert set(waiting) <= set(requests)
    traffic.finish()


def test_the_budget_is_given_to_decodes_first_and_the_rest_to_prompt_chunks() -> None:
    traffic = Traffic(layout="4", max_num_batched_tokens=32, max_num_seqs=4)
    send(traffic, [1, 2], max_tokens=40)
    traffic.step()
    send(traffic, [3] * 50, max_tokens=2)
    traffic.finish()
    mixed = [plan for plan in traffic.runner.plans if plan.decodes and plan.prefills]
    assert [(row.start, row.count) for plan in mixed for row in plan.prefills] == [(0, 16), (16, 16), (32, 16), (48, 2)]
    assert all(round_up_to_tile(len(plan.decodes)) + 16 == 32 for plan in mixed)


def test_all_have_places_when_groups_merge_however_few_tokens_a_step_computes() -> None:
    traffic = Traffic(layout="1+1+1+1", max_num_seqs=32, max_num_batched_tokens=64, num_blocks=512)
    for i in range(100):
        send(traffic, [1 + i % 50] * 4, max_tokens=40)
    traffic.step(20)
    report = switched(traffic, "4", MIGRATE)
    assert (report.requests_moved, report.tokens_recomputed) == (100, 0)
    traffic.finish()


def test_a_drain_does_not_wait_for_a_preempted_request_that_others_will_take() -> None:
    traffic = Traffic(layout="2+1+1", max_num_seqs=1)
    kept = [send(traffic, [1 + i], max_tokens=100) for i in range(4)]
    traffic.step(2)
    preempted = next(each for each in kept if each.held_table.group.tp == 1)
    for request in kept:
        if request.held_table.group.tp == 2:
            traffic.abort(request.request_id)
    traffic.scheduler.preempt(preempted)  # as if its blocks were needed
    ticket = traffic.switch("1+1+1+1", SEQUENTIAL)
    assert ticket is not None
    assert run_until(lambda: ticket.report is not None, traffic) <= 2
    traffic.finish()
