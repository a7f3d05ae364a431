from __future__ import annotations

import pytest

from fly_jax.kv.blocks import KVCacheManager
from fly_jax.layout import DeviceGroup
from fly_jax.scheduling.group import GroupScheduler
from fly_jax.scheduling.launch import Work
from fly_jax.scheduling.request import Request, RequestState
from fly_jax.scheduling.step import TILE_TOKENS, ScheduledRow, SchedulerLimits, SlotPool, StepPlan
from tests.fly_jax.builders import make_kv, make_request, nothing_to_reclaim


class Group:
    """One group's scheduler, and the host's side of a step."""

    def __init__(self, kv: KVCacheManager, *, seqs: int = 4, tokens: int = 32, size: int = 1) -> None:
        self.scheduler = GroupScheduler(DeviceGroup(0, size), SchedulerLimits(seqs, tokens), kv, SlotPool(8))
        self.preempted: list[Request] = []

    def admit(self, *requests: Request) -> None:
        for request in requests:
            assert self.scheduler.admit(request)

    def launch(self) -> StepPlan | None:
        return self.scheduler.schedule(self._preempt, nothing_to_reclaim)

    def harvest(self, plan: StepPlan, token: int = 9) -> None:
        for row in plan.rows:
            if row.samples:
                row.request.num_pending -= 1
                row.request.output_ids.append(token)

    def run(self) -> StepPlan:
        plan = self.launch()
        assert plan is not None
        self.harvest(plan)
        return plan

    def run_until_preemption(self) -> StepPlan:
        """The step in which it happens."""
        for _ in range(100):
            plan = self.run()
            if self.preempted:
                return plan
        raise AssertionError("nobody was preempted in 100 steps")

    def _preempt(self, request: Request) -> None:
        self.scheduler.remove(request)
        request.state = RequestState.WAITING
        self.preempted.append(request)


def spans(rows: tuple[ScheduledRow, ...]) -> list[tuple[str, int, int, bool]]:
    return [(row.request.request_id, row.start, row.count, row.samples) for row in rows]


def test_a_prompt_goes_on_in_chunks_where_it_stopped_and_samples_after_its_last_token() -> None:
    group = Group(make_kv(), tokens=32)
    group.admit(make_request(70, name="a"))
    assert [spans(group.run().prefills) for _ in range(3)] == [
        [("a", 0, 32, False)],
        [("a", 32, 32, False)],
        [("a", 64, 6, True)],
    ]
    plan = group.run()
    assert spans(plan.decodes) == [("a", 70, 1, True)]
    assert not plan.prefills


def test_one_token_that_is_left_of_a_prompt_is_a_decode_row() -> None:
    group = Group(make_kv(), tokens=32)
    group.admit(make_request(33, name="a"))
    assert spans(group.run().prefills) == [("a", 0, 32, False)]
    assert spans(group.run().decodes) == [("a", 32, 1, True)]


def test_prompts_share_a_step_in_order_of_admission_within_the_tile_budget() -> None:
    group = Group(make_kv(), tokens=40)  # two whole tiles
    group.admit(make_request(5, name="a"), make_request(30, name="b"), make_request(3, name="c"))
    plan = group.run()
    assert spans(plan.prefills) == [("a", 0, 5, True), ("b", 0, 16, False)]
    assert plan.num_tiled_tokens == 2 * TILE_TOKENS
    assert Work.of(plan).tokens == 21
    plan = group.run()
    assert spans(plan.decodes) == [("a", 5, 1, True)]
    assert spans(plan.prefills) == [("b", 16, 14, True)]


def test_decodes_come_before_prompts_that_were_admitted_earlier() -> None:
    group = Group(make_kv(), tokens=32)
    group.admit(make_request(100, name="long"), make_request(1, name="short"))
    plan = group.run()
    assert spans(plan.decodes) == [("short", 0, 1, True)]
    assert spans(plan.prefills) == [("long", 0, 16, False)]
    assert [row.request.request_id for row in plan.rows] == ["short", "long"]


def test_a_second_step_is_launched_before_the_first_ones_token_is_known() -> None:
    group = Group(make_kv())
    request = make_request(3, name="a", max_tokens=3)
    group.admit(request)
    first, second, third = group.launch(), group.launch(), group.launch()
    assert first is not None
    assert second is not None
    assert third is not None
    assert spans(second.decodes) == [("a", 3, 1, True)]
    assert spans(third.decodes) == [("a", 4, 1, True)]
    assert request.num_pending == 3
    assert group.launch() is None  # all that it may generate is on the device
    for plan in (first, second, third):
        group.harvest(plan)
    assert request.output_ids == [9, 9, 9]
    assert group.launch() is None


def test_a_prompt_to_be_scored_goes_through_prefill_rows_to_its_last_token() -> None:
    group = Group(make_kv(), tokens=32)
    group.admit(make_request(17, name="a", prompt_logprobs=0), make_request(1, name="b"))
    plans = [group.run() for _ in range(2)]
    assert [spans(plan.decodes) for plan in plans] == [[("b", 0, 1, True)], [("b", 1, 1, True)]]
    assert [spans(plan.prefills) for plan in plans] == [[("a", 0, 16, False)], [("a", 16, 1, True)]]
    assert all(row.scores for plan in plans for row in plan.prefills)
    plan = group.run()
    assert spans(plan.decodes) == [("a", 17, 1, True), ("b", 2, 1, True)]
    assert not any(row.scores for row in plan.rows)


def test_a_request_without_scores_never_asks_for_them() -> None:
    group = Group(make_kv())
    group.admit(make_request(20))
    assert not any(row.scores for row in (*group.run().rows, *group.run().rows))


def test_no_more_requests_run_than_there_are_slots_and_slots_come_back() -> None:
    group = Group(make_kv(), seqs=2)
    first, second, third = (make_request(name=name) for name in "abc")
    group.admit(first, second)
    assert first.slot != second.slot
    assert not group.scheduler.admit(third)
    assert (third.table, third.slot, third.state) == (None, -1, RequestState.WAITING)
    freed = first.slot
    group.scheduler.remove(first)
    group.admit(third)
    assert third.slot == freed


@pytest.mark.parametrize(("base_tp", "size", "most"), [(1, 1, 2), (1, 4, 8), (2, 2, 2), (2, 4, 4)])
def test_a_group_runs_as_many_requests_as_its_base_groups_would(base_tp: int, size: int, most: int) -> None:
    group = Group(make_kv(num_devices=4, base_tp=base_tp), seqs=2, size=size)
    group.admit(*(make_request(name=str(index)) for index in range(most)))
    assert not group.scheduler.admit(make_request(name="one too many"))


def test_admission_takes_blocks_for_the_whole_prompt_and_its_first_token() -> None:
    group = Group(make_kv(num_blocks=4), seqs=2)
    request = make_request(7)
    group.admit(request)
    assert request.table is not None
    assert request.table.num_blocks == 2
    refused = make_request(8)  # needs three blocks with its first token
    assert not group.scheduler.admit(refused)
    assert refused.table is None
    assert group.scheduler.kv.free_blocks(DeviceGroup(0, 1)) == 2


def test_admission_keeps_a_block_back_for_each_running_request() -> None:
    group = Group(make_kv(num_blocks=300), seqs=8)
    group.admit(*(make_request(3, name=str(i)) for i in range(2)))
    free = group.scheduler.kv.free_blocks(DeviceGroup(0, 1))
    assert not group.scheduler.admit(make_request(4 * (free - 1) - 1))
    group.admit(make_request(4 * (free - 2) - 1))


def test_a_request_alone_may_take_every_block() -> None:
    group = Group(make_kv(num_blocks=4))
    group.admit(make_request(15))
    assert group.scheduler.kv.free_blocks(DeviceGroup(0, 1)) == 0


def test_decodes_that_run_out_of_blocks_preempt_the_latest_admitted() -> None:
    group = Group(make_kv(num_blocks=6), seqs=3)
    requests = [make_request(3, name=name, max_tokens=20) for name in "abc"]
    group.admit(*requests)
    group.run_until_preemption()
    assert [request.request_id for request in group.preempted] == ["c"]
    assert [request.request_id for request in group.scheduler.running] == ["a", "b"]
    victim = requests[2]
    assert (victim.table, victim.slot, victim.num_computed) == (None, -1, 0)
    assert victim.output_ids


def test_the_request_that_needs_the_block_is_its_own_victim_if_it_is_the_latest() -> None:
    group = Group(make_kv(num_blocks=3), seqs=2)
    old, new = make_request(3, name="old", max_tokens=9), make_request(3, name="new", max_tokens=9)
    group.admit(old, new)
    plan = group.run_until_preemption()
    assert group.preempted == [new]
    assert [row.request for row in plan.rows] == [old]


def test_a_preempted_request_is_recomputed_from_all_its_tokens() -> None:
    group = Group(make_kv(num_blocks=6), seqs=3)
    requests = [make_request(3, name=name, max_tokens=20) for name in "abc"]
    group.admit(*requests)
    group.run_until_preemption()
    victim, known = group.preempted[0], 3 + len(group.preempted[0].output_ids)
    for request in requests[:2]:
        group.scheduler.remove(request)
    group.admit(victim)
    plan = group.run()
    assert spans(plan.prefills) == [("c", 0, known, True)]
    assert [victim.token_at(position) for position in range(known)] == [1, 2, 3, *[9] * (known - 3)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_of_a_table_are_freed_on_every_device_of_the_group(size: int) -> None:
    kv = make_kv(num_devices=4)
    group = Group(kv, size=size)
    request = make_request(30)
    group.admit(request)
    used = [kv.spec.num_blocks - allocator.num_free for allocator in kv.allocators]
    assert used == [kv.spec.blocks_for(31, size)] * size + [0] * (4 - size)
    group.scheduler.remove(request)
    assert kv.usage == 0.0
