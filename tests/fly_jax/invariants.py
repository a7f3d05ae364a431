"""What must hold in an engine between any two steps, seen from outside."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from fly_jax.engine.engine import Engine
from fly_jax.kv.blocks import BlockTable
from fly_jax.layout import DeviceGroup
from fly_jax.outputs import SwitchReport
from fly_jax.scheduling.group import GroupScheduler
from fly_jax.scheduling.request import Request, RequestState
from fly_jax.scheduling.scheduler import Scheduler
from fly_jax.scheduling.step import StepPlan
from tests.fly_jax.simulated_runner import SimulatedRunner


@dataclass(frozen=True)
class Snapshot:
    """All that a refused switch must leave as it was; blocks taken ahead count as free."""

    layout: str
    running: dict[DeviceGroup, list[str]]
    waiting: list[str]
    paused: list[str]
    requests: dict[str, tuple[Any, ...]]
    free: list[int]
    num_preemptions: int
    last_switch: SwitchReport | None
    launches: int

    @classmethod
    def of(cls, engine: Engine) -> Snapshot:
        scheduler, runner = engine.scheduler, cast(SimulatedRunner, engine.runner)
        reserved = blocks_of(engine, reserved_tables(engine))
        return cls(
            layout=str(scheduler.layout),
            running={g: [r.request_id for r in local.running] for g, local in scheduler.groups.items()},
            waiting=[request.request_id for request in scheduler.waiting],
            paused=[request.request_id for request in scheduler.paused],
            requests={name: state_of(request) for name, request in scheduler.requests.items()},
            free=[each.num_free + reserved[device].total() for device, each in enumerate(engine.kv.allocators)],
            num_preemptions=scheduler.num_preemptions,
            last_switch=engine.last_switch,
            launches=len(runner.plans) + len(runner.relayouts),
        )


def state_of(request: Request) -> tuple[Any, ...]:
    table = request.table and (request.table.group, [list(row) for row in request.table.rows])
    return request.state, request.num_computed, request.num_pending, request.slot, request.max_tokens, table


def reserved_tables(engine: Engine) -> list[BlockTable]:
    """Blocks that a switch under way has taken ahead."""
    switch = engine.control.switcher.switch
    return [] if switch is None else switch.reserved_tables


def blocks_of(engine: Engine, tables: Iterable[BlockTable]) -> dict[int, Counter[int]]:
    """Device -> how often each block is in these tables."""
    held: dict[int, Counter[int]] = defaultdict(Counter)
    for table in tables:
        for device, row in zip(table.group.rank_order(engine.kv.base_tp), table.rows, strict=True):
            held[device].update(row)
    return held


def check_blocks(engine: Engine) -> None:
    """Every block is free, or in one table, or reserved once for a request that moves."""
    tables = [request.table for request in engine.scheduler.requests.values() if request.table is not None]
    held = blocks_of(engine, [*reserved_tables(engine), *tables])
    for device, allocator in enumerate(engine.kv.allocators):
        assert all(times == 1 for times in held[device].values()), f"device {device}: {held[device]}"
        assert allocator.num_free + len(held[device]) == engine.kv.spec.num_blocks


def check_running(scheduler: Scheduler) -> None:
    """Running requests are by rank and in their places; they have blocks of their group for what they have computed."""
    kv, spec = scheduler.kv, scheduler.kv.spec
    assert set(scheduler.groups) == set(scheduler.layout.groups)
    for group, local in scheduler.groups.items():
        assert len(local.running) <= local.max_running
        assert local.max_running <= scheduler.limits.max_num_seqs * group.tp // kv.base_tp
        assert_by_rank(local.running)
        for request in local.running:
            table = request.held_table
            assert request.state is RequestState.RUNNING
            assert table.group == group
            assert {len(row) for row in table.rows} == {table.num_blocks}
            assert spec.blocks_for(request.num_computed, group.tp) <= table.num_blocks
            assert table.num_blocks <= spec.blocks_for(request.num_tokens + 1, group.tp)
            assert request.num_computed <= request.num_tokens <= scheduler.max_model_len
            assert len(request.output_ids) + request.num_pending <= request.max_tokens <= request.limit
    slots = [request.slot for request in scheduler.requests.values() if request.table is not None]
    num_slots = scheduler.limits.slots(len(kv.allocators), kv.base_tp)
    assert len(set(slots)) == len(slots)
    assert set(slots) <= set(range(num_slots))
    assert scheduler.slots.num_free + len(slots) == num_slots


def check_plan(scheduler: Scheduler, plan: StepPlan) -> None:
    """A step keeps to the limits."""
    limits = scheduler.limits
    assert plan.rows
    assert len({id(row.request) for row in plan.rows}) == len({row.slot for row in plan.rows}) == len(plan.rows)
    assert len(plan.rows) <= limits.max_num_seqs * plan.group.tp // scheduler.kv.base_tp
    assert plan.num_tiled_tokens <= limits.tile_budget(plan.group.tp, scheduler.kv.base_tp)
    assert all(row.count == 1 for row in plan.decodes)
    assert all(row.count >= 1 for row in plan.prefills)


def assert_by_rank(requests: Sequence[Request]) -> None:
    assert all(one.rank < other.rank for one, other in pairwise(requests))


def could_hold(scheduler: Scheduler, request: Request) -> list[GroupScheduler]:
    """Open groups that are as wide as asked for and hold the request to its end, or as long as any does."""
    capacity = scheduler.kv.spec.capacity_tokens
    admitting = [local for group, local in scheduler.groups.items() if scheduler.hooks.admits(group, request)]
    widest = max((local.group.tp for local in admitting), default=1)
    needed = min(len(request.prompt_ids) + request.limit, capacity(widest))
    return [
        local
        for local in admitting
        if local.group.tp >= min(request.min_width, widest) and capacity(local.group.tp) >= needed > request.num_known
    ]


def check_cannot_start(scheduler: Scheduler, request: Request, local: GroupScheduler) -> None:
    """There is no slot, or no blocks beyond the reserve for decodes, even if all of lower priority went."""
    spec, group = scheduler.kv.spec, local.group
    victims = [each for each in local.running if each.priority > request.priority and not each.overdue]
    free = scheduler.kv.free_blocks(group) + sum(each.held_table.num_blocks for each in victims)
    left = len(local.running) - len(victims)
    reserve = min(left, max(1, spec.num_blocks // 100))
    slots = scheduler.slots.num_free + len(victims)
    short = spec.blocks_for(request.num_known + 1, group.tp) + reserve > free
    assert short or left == local.max_running or not slots, f"{request.request_id} could start in {group}"
