"""Hard preempt: paused requests keep their KV in place, and go on there or elsewhere."""

from __future__ import annotations

from typing import Any

from fly_jax.scheduling.request import Request, RequestState
from tests.fly_jax.traffic import (
    HARD,
    MIGRATE,
    SEQUENTIAL,
    Traffic,
    bytes_moved,
    groups_of,
    run_until,
    send,
    switched,
)


def paused_engine(**options: Any) -> tuple[Traffic, list[Request]]:
    """Eight requests that were decoding on four devices, paused for one that runs on all four."""
    traffic = Traffic(layout="1+1+1+1", max_num_seqs=2, **options)
    requests = [send(traffic, [1 + i] * 9, max_tokens=60) for i in range(8)]
    traffic.step(5)
    busy = send(traffic, [9] * 5, max_tokens=150)
    report = switched(traffic, "4", HARD)
    assert (report.requests_paused, report.tokens_recomputed, report.kv_bytes_moved) == (8, 0, 0)
    assert set(traffic.scheduler.paused) == set(requests)
    assert busy.state is RequestState.RUNNING
    return traffic, requests


def test_paused_requests_go_on_in_the_very_same_blocks_when_their_group_is_back() -> None:
    traffic, requests = paused_engine()
    blocks = {request: [list(row) for row in request.held_table.rows] for request in requests}
    computed = {request: request.num_computed for request in requests}
    traffic.step(5)
    assert {request.state for request in requests} == {RequestState.PAUSED}
    ticket = traffic.switch("1+1+1+1", HARD)
    assert ticket is not None
    run_until(lambda: ticket.report is not None, traffic)
    for request in requests:
        assert request.state is RequestState.RUNNING
        assert request.held_table.rows[0][: len(blocks[request][0])] == blocks[request][0]
        assert request.num_computed >= computed[request]
    assert not traffic.runner.relayouts
    traffic.finish()
    assert traffic.seen["a request is resumed in place"] == 8
    assert traffic.scheduler.num_preemptions == 0


def test_paused_requests_go_on_elsewhere_when_their_successors_have_nothing_to_do() -> None:
    traffic = Traffic(layout="1+1+1+1")
    requests = [send(traffic, [1 + i] * 9, max_tokens=40) for i in range(4)]
    traffic.step(5)
    report = switched(traffic, "4", HARD)
    assert (report.requests_paused, report.requests_moved) == (4, 0)
    assert report.kv_bytes_moved == report.kv_bytes_adopted
    run_until(lambda: not traffic.scheduler.paused, traffic)
    assert {(request.state, request.held_table.group.tp) for request in requests} == {(RequestState.RUNNING, 4)}
    assert traffic.runner.relayouts
    traffic.finish()
    assert traffic.engine.control.log.kv_bytes_moved == bytes_moved(traffic.runner)
    assert traffic.scheduler.num_preemptions == 0


def test_paused_requests_go_on_elsewhere_after_patience() -> None:
    patience = 12
    traffic, requests = paused_engine(patience=patience)
    traffic.abort(requests[0].request_id)  # seven have places beside the one that runs
    steps = run_until(lambda: not traffic.scheduler.paused, traffic)
    assert patience <= steps + 1 <= patience + 4
    assert {request.state for request in requests[1:]} == {RequestState.RUNNING}
    traffic.finish()
    assert traffic.scheduler.num_preemptions == 0


def test_a_paused_request_may_be_aborted_and_everything_it_held_comes_back() -> None:
    traffic, requests = paused_engine()
    held = sum(request.held_table.num_blocks for request in requests)
    before = sum(allocator.num_free for allocator in traffic.kv.allocators)
    for request in requests:
        traffic.abort(request.request_id)
    assert sum(allocator.num_free for allocator in traffic.kv.allocators) == before + held
    assert not traffic.scheduler.paused
    traffic.finish()


def test_a_drain_ends_although_paused_requests_hold_the_blocks_that_it_needs() -> None:
    traffic = Traffic(layout="1+1+1+1", num_blocks=8, max_num_seqs=2)
    for i in range(4):
        send(traffic, [1 + i] * 20, max_tokens=10)
    traffic.step(2)
    send(traffic, [9] * 20, max_tokens=100)
    switched(traffic, "4", HARD)
    traffic.step(3)
    switched(traffic, "2+2", SEQUENTIAL)
    traffic.finish()


def paused_under_two_groups() -> tuple[Traffic, list[Request], list[Request]]:
    """Five requests paused on four devices, and one that runs on each half of them."""
    traffic = Traffic(layout="4", max_num_seqs=2)
    paused = [send(traffic, [1 + i] * 9, max_tokens=60) for i in range(8)]
    traffic.step(4)
    running = [send(traffic, [10 + i] * 3, max_tokens=90) for i in range(2)]
    switched(traffic, "2+2", HARD)
    for request in paused[5:]:
        traffic.abort(request.request_id)
    assert {request.state for request in paused[:5]} == {RequestState.PAUSED}
    assert {request.held_table.group for request in running} == set(groups_of("2+2"))
    return traffic, paused[:5], running


def test_a_migration_takes_paused_requests_along_even_into_groups_that_it_keeps() -> None:
    traffic, paused, _ = paused_under_two_groups()
    report = switched(traffic, "1+1+2", MIGRATE)  # the group on devices 2 and 3 stays
    assert (report.requests_moved, report.tokens_recomputed) == (len(paused) + 1, 0)
    assert {request.state for request in paused} == {RequestState.RUNNING}
    assert {request.held_table.group for request in paused} == set(groups_of("1+1+2"))
    assert traffic.scheduler.num_preemptions == 0
    traffic.finish()


def test_a_migration_to_the_layout_in_force_takes_paused_requests_in() -> None:
    traffic, paused, _ = paused_under_two_groups()
    report = switched(traffic, "2+2", MIGRATE)
    assert (report.requests_moved, report.tokens_recomputed) == (len(paused), 0)
    assert {request.state for request in paused} == {RequestState.RUNNING}
    traffic.finish()


def test_a_request_that_was_paused_once_is_no_more_overdue_than_others() -> None:
    traffic, requests = paused_engine()
    switched(traffic, "1+1+1+1", HARD)
    assert {request.held_up_since for request in requests} == {None}
    traffic.finish()


def test_paused_requests_go_on_although_others_never_stop_coming() -> None:
    traffic = Traffic(layout="1+1+1+1", max_num_seqs=2, num_blocks=512, patience=20)
    requests = [send(traffic, [1 + i] * 9, max_tokens=60) for i in range(8)]
    traffic.step(5)

    def saturate() -> None:
        while len(traffic.scheduler.waiting) < 4:
            send(traffic, [20 + len(traffic.accepted) % 30] * 6, max_tokens=30)

    saturate()
    traffic.switch("4", HARD)
    for _ in range(200):
        saturate()
        traffic.step()
        if all(request.finished for request in requests):
            break
    else:
        raise AssertionError(f"{len(traffic.scheduler.paused)} are still paused")
    traffic.finish()
