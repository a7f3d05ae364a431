"""A migration copies whole slabs ahead while the old groups go on, and only the rest moves at the cutover."""

from __future__ import annotations

from typing import Any

import pytest

from fly_jax.errors import LayoutError
from fly_jax.layout import DeviceGroup
from fly_jax.outputs import SwitchReport
from fly_jax.scheduling.request import Request, RequestState
from fly_jax.switching.strategies import CUTOVER_SLABS, LAUNCHES_AHEAD
from fly_jax.switching.switch import Switch
from tests.fly_jax.invariants import Snapshot, blocks_of, reserved_tables
from tests.fly_jax.traffic import MIGRATE, Traffic, run_until, send


def copying(layout: str = "1+1+1+1", target: str = "4", **options: Any) -> tuple[Traffic, Request, Switch]:
    """A long context that is being copied; so much that it takes many steps."""
    traffic = Traffic(layout=layout, max_num_batched_tokens=64, **options)
    long = send(traffic, [1 + i % 60 for i in range(100)], max_tokens=60)
    run_until(lambda: len(long.output_ids) > 2, traffic)
    ticket = traffic.switch(target, MIGRATE)
    assert ticket is not None
    traffic.step(2)
    assert ticket.report is None
    assert reserved_tables(traffic.engine)
    return traffic, long, ticket


def done(traffic: Traffic, ticket: Switch) -> SwitchReport:
    run_until(lambda: ticket.report is not None, traffic)
    assert ticket.report is not None
    return ticket.report


@pytest.mark.parametrize(("source", "target"), [("1+1+1+1", "4"), ("4", "1+1+1+1"), ("2+2", "4"), ("2+2", "1+1+2")])
@pytest.mark.parametrize("instant", [True, False])
def test_a_long_context_is_copied_over_several_steps_while_its_group_goes_on_and_then_only_the_tail_moves(
    source: str, target: str, instant: bool
) -> None:
    traffic = Traffic(layout=source, max_num_batched_tokens=64, instant=instant)
    long = send(traffic, [1 + i % 60 for i in range(100)], max_tokens=100)
    run_until(lambda: len(long.output_ids) > 2, traffic)
    tokens, group = long.num_tokens, long.held_table.group
    ticket = traffic.switch(target, MIGRATE)
    assert ticket is not None
    steps = run_until(lambda: ticket.report is not None, traffic)
    report = ticket.report
    assert report is not None
    slab_tokens = min(traffic.kv.spec.block_tokens(each) for each in (group.tp, long.held_table.group.tp))
    slabs = long.num_computed // slab_tokens
    assert steps >= slabs // (LAUNCHES_AHEAD * traffic.runner.chunk_slabs)
    assert steps > 3
    assert long.num_tokens >= tokens + (steps - 3 if instant else steps // 2), "its old group did not go on"
    wide = max(group.tp, long.held_table.group.tp)
    slab_bytes = traffic.kv.spec.slab_bytes(group.tp, long.held_table.group.tp)
    tail = report.kv_bytes_moved - report.kv_bytes_precopied
    assert 0 < tail <= (CUTOVER_SLABS + 1) * wide * slab_bytes
    assert report.kv_bytes_precopied > 5 * tail
    assert (report.requests_moved, report.tokens_recomputed) == (1, 0)
    assert report.precopy_seconds > 0
    traffic.finish()
    assert traffic.scheduler.num_preemptions == 0


def test_nothing_is_copied_ahead_of_short_contexts() -> None:
    traffic = Traffic(layout="1+1+1+1")
    for i in range(4):
        send(traffic, [1 + i] * 5)
    traffic.step(3)
    ticket = traffic.switch("4", MIGRATE)
    assert ticket is not None
    traffic.step()
    assert ticket.report is not None
    assert (ticket.report.kv_bytes_precopied, ticket.report.precopy_seconds) == (0, 0.0)
    assert ticket.report.kv_bytes_moved > 0
    traffic.finish()


def test_blocks_taken_ahead_are_given_back_when_running_requests_need_them() -> None:
    """Until the cutover the long context is there twice; that must not cost anybody a recompute meanwhile."""
    traffic, long, ticket = copying()
    device, before = long.held_table.group.start, long.held_table.num_blocks
    assert blocks_of(traffic.engine, reserved_tables(traffic.engine))[device]
    allocator = traffic.kv.allocators[device]
    taken = allocator.allocate(allocator.num_free)  # as if others had grown
    while long.held_table.group.tp == 1 and long.held_table.num_blocks == before:
        traffic.receive(traffic.engine.step())
    allocator.free(taken)
    report = done(traffic, ticket)
    assert report.tokens_recomputed == 0
    # What had been copied was given up, so all of the context moved at the cutover.
    slabs = -(-long.num_computed // traffic.kv.spec.block_tokens(1)) - 1
    moved = report.kv_bytes_moved - report.kv_bytes_precopied
    assert moved >= slabs * 4 * traffic.kv.spec.slab_bytes(1, 4)
    traffic.finish()
    assert traffic.scheduler.num_preemptions == 0


@pytest.mark.parametrize("how", ["abort", "end"])
def test_what_is_reserved_comes_back_when_its_request_goes_in_mid_copy(how: str) -> None:
    traffic, long, ticket = copying()
    others = [send(traffic, [50 + i] * 6, max_tokens=90) for i in range(3)]
    if how == "abort":
        traffic.abort(long.request_id)
    else:
        long.max_tokens = len(long.output_ids) + long.num_pending + 1
        run_until(lambda: long.finished, traffic)
    assert ticket.report is None
    assert not any(table.num_blocks > 10 for table in reserved_tables(traffic.engine))
    report = done(traffic, ticket)
    assert report.requests_moved <= len(others)
    assert report.tokens_recomputed == 0
    traffic.finish()


def test_a_preempted_request_gives_back_what_is_reserved_for_it() -> None:
    traffic, long, ticket = copying(num_blocks=64, max_num_seqs=1)
    for i in range(4):
        send(traffic, [40 + i] * 60, priority=-1, max_tokens=30)
    traffic.step()
    assert long.state is RequestState.WAITING
    assert long.table is None
    done(traffic, ticket)
    traffic.finish()


def test_a_cutover_that_a_grown_request_cannot_follow_leaves_everything_as_it_was() -> None:
    traffic = Traffic(layout="4", num_blocks=8, max_num_seqs=1, overlap=False)  # 32 tokens at TP 1
    traffic.runner.chunk_slabs = 1
    others = [send(traffic, [3 + i] * 24, max_tokens=5) for i in range(2)]
    long = send(traffic, [1] * 29, max_tokens=60)
    run_until(lambda: long.num_tokens == 31, traffic)
    ticket = traffic.switch("1+1+1+1", MIGRATE)
    assert ticket is not None
    run_until(lambda: ticket.settled, traffic)
    assert isinstance(ticket.error, LayoutError)
    assert "holds 3" in str(ticket.error)
    assert ticket.report is None
    assert traffic.seen["a switch is given up at the cutover"] == 1
    assert str(traffic.engine.layout) == "4"
    assert not traffic.engine.switching
    assert not reserved_tables(traffic.engine)
    assert traffic.engine.last_switch is None
    traffic.finish()
    assert len(long.output_ids) == 60
    assert all(len(request.output_ids) == 5 for request in others)


def test_a_preempted_request_that_has_outgrown_the_target_at_the_cutover_keeps_the_layout() -> None:
    """It could never run again."""
    traffic = Traffic(layout="4", num_blocks=32, block_size=1, overlap=False)  # 32 tokens at TP 1
    traffic.runner.chunk_slabs = 1
    send(traffic, [3] * 12, max_tokens=30)  # is copied ahead meanwhile
    long = send(traffic, [1] * 28, max_tokens=60)
    run_until(lambda: long.num_tokens == 31, traffic)
    ticket = traffic.switch("1+1+1+1", MIGRATE)
    assert ticket is not None
    traffic.step(3)
    assert long.num_tokens > 32
    assert ticket.report is None
    assert ticket.error is None
    traffic.scheduler.preempt(long)  # as if its blocks were needed
    run_until(lambda: ticket.settled, traffic)
    assert traffic.scheduler.num_preemptions == 1
    assert isinstance(ticket.error, LayoutError)
    assert "waits with" in str(ticket.error)
    traffic.finish()
    assert len(long.output_ids) == 60


def test_a_snapshot_sees_blocks_taken_ahead_as_free() -> None:
    """Otherwise the checks of refused switches would be blind."""
    traffic, _, _ = copying()
    held = sum(allocator.num_blocks - allocator.num_free for allocator in traffic.kv.allocators)
    assert sum(Snapshot.of(traffic.engine).free) > 4 * traffic.kv.spec.num_blocks - held
    assert DeviceGroup(0, 1) in traffic.scheduler.groups
    traffic.finish()
