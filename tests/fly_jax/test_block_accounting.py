"""Random traffic, preemption and switches through the real engine over a simulated runner."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import pytest
from hypothesis import event, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fly_jax.engine import Engine
from fly_jax.errors import ContextLengthError, LayoutError, QueueFullError
from fly_jax.group_scheduler import StepPlan, round_up_to_tile
from fly_jax.kv_cache import KVCacheSpec
from fly_jax.layout import DeviceGroup, Layout, all_groups
from fly_jax.outputs import FinishReason, RequestDelta, SwitchReport, SwitchStrategy
from fly_jax.relayout_plan import regions
from fly_jax.request import Request, RequestState
from fly_jax.sampling_params import SamplingParams
from tests.fly_jax.simulated_runner import (
    EOS,
    VOCABULARY,
    SimulatedRunner,
    expected_output,
    prompt_score,
    simulated_engine,
)

MIGRATE, SEQUENTIAL = SwitchStrategy.MIGRATE, SwitchStrategy.SEQUENTIAL


@st.composite
def _engines(draw: st.DrawFn) -> dict[str, Any]:
    base_tp = draw(st.sampled_from((1, 1, 2)))
    return {
        "base_tp": base_tp,
        "layout": draw(st.sampled_from(_layouts(base_tp))),
        "num_blocks": draw(st.integers(3, 10)),
        "block_size": draw(st.sampled_from((2, 4, 8))),
        "kv_heads": draw(st.sampled_from((1, 2, 4))),
        "max_num_seqs": draw(st.integers(1, 6)),
        "max_num_batched_tokens": draw(st.sampled_from((16, 32, 48))),
        "max_model_len": draw(st.sampled_from((24, 100, 250))),
        "max_queued": draw(st.sampled_from((2, 100))),
        "overlap": draw(st.booleans()),
        "instant": draw(st.booleans()),
    }


def _prompt(data: bytes) -> list[int]:
    return [1 + byte % (VOCABULARY - 1) for byte in data]


def _layouts(base_tp: int) -> list[str]:
    texts = ["1+1+1+1", "2+1+1", "1+1+2", "2+2", "4"]
    return [text for text in texts if all(int(degree) >= base_tp for degree in text.split("+"))]


@dataclass(frozen=True)
class Snapshot:
    """All that a refused switch must leave as it was."""

    layout: str
    target: str | None
    running: dict[DeviceGroup, list[str]]
    waiting: list[str]
    requests: dict[str, tuple[Any, ...]]
    free: list[int]
    num_preemptions: int
    last_switch: SwitchReport | None
    launches: int

    @classmethod
    def of(cls, engine: Engine) -> Snapshot:
        scheduler, runner = engine.scheduler, cast(SimulatedRunner, engine.runner)
        return cls(
            layout=str(scheduler.layout),
            target=None if scheduler.target is None else str(scheduler.target),
            running={g: [r.request_id for r in local.running] for g, local in scheduler.groups.items()},
            waiting=[request.request_id for request in scheduler.waiting],
            requests={name: _state(request) for name, request in scheduler.requests.items()},
            free=[allocator.num_free for allocator in engine.kv.allocators],
            num_preemptions=scheduler.num_preemptions,
            last_switch=engine.last_switch,
            launches=len(runner.plans) + len(runner.relayouts),
        )


def _state(request: Request) -> tuple[Any, ...]:
    table = request.table and (request.table.group, [list(row) for row in request.table.rows])
    return request.state, request.num_computed, request.num_pending, request.slot, request.max_tokens, table


@dataclass(frozen=True)
class Moving:
    """A request of a group that a switch dissolves, as it was before."""

    request: Request
    group: DeviceGroup
    num_computed: int
    slot: int
    max_tokens: int


def _moving(engine: Engine, target: str) -> list[Moving]:
    kept = _groups(target)
    return [
        Moving(request, group, request.num_computed, request.slot, request.max_tokens)
        for group, local in engine.scheduler.groups.items()
        if group not in kept
        for request in local.running
    ]


def _new_groups(group: DeviceGroup, target: str) -> list[DeviceGroup]:
    """Where requests of a group may go: the new groups in the smallest aligned run that both layouts fill."""
    wide = next((other for other in _groups(target) if other.overlaps(group) and other.size > group.size), group)
    return [other for other in _groups(target) if other.overlaps(wide)]


def _too_long(engine: Engine, target: str) -> list[Request]:
    """Running requests that need room for one more token than any new group of theirs holds."""
    capacity = engine.kv.spec.capacity_tokens
    return [
        each.request
        for each in _moving(engine, target)
        if each.request.num_tokens + (not each.request.will_sample_no_more)
        > max(capacity(group.size) for group in _new_groups(each.group, target))
    ]


def _waiting_too_long(engine: Engine, target: str) -> list[Request]:
    """Accepted requests that no group of the new layout could ever hold."""
    capacity = engine.kv.spec.capacity_tokens(max(group.size for group in _groups(target)))
    return [request for request in engine.scheduler.waiting if request.num_tokens >= capacity]


def _check_not_cut_short(spec: KVCacheSpec, each: Moving, target: str) -> None:
    """A request that some new group of its devices holds to its end still generates all that it may."""
    request = each.request
    prompt = len(request.prompt_ids)
    widest = max(spec.capacity_tokens(group.size) for group in _new_groups(each.group, target))
    assert request.max_tokens == min(each.max_tokens, widest - prompt)
    assert request.held_table.group in _new_groups(each.group, target)


def _has_room(spec: KVCacheSpec, before: Snapshot, moving: list[Moving], target: str) -> bool:
    """Every device has free blocks for all that moves there, wherever it goes, and so have the running lists."""
    for region in regions(Layout.parse(before.layout, 4), Layout.parse(target, 4)):
        there = [each.request for each in moving if each.group in region.sources]
        blocks = sum(
            max(spec.blocks_for(request.num_tokens, group.size) for group in region.targets) for request in there
        )
        if blocks > min(before.free[device] for device in region.group.device_indices):
            return False
        if len({group.size for group in region.targets}) > 1:
            return False  # a wide group may be full while narrow ones have places
    return True


def _groups(layout: str) -> tuple[DeviceGroup, ...]:
    return Layout.parse(layout, 4).groups


class EngineMachine(RuleBasedStateMachine):
    """Traffic in any order; everything that must always hold is an invariant."""

    engine: Engine
    runner: SimulatedRunner

    @initialize(options=_engines())
    def start(self, options: dict[str, Any]) -> None:
        self.options = options
        self.engine, self.runner = simulated_engine(**options)
        self.accepted: dict[str, Request] = {}
        self.deltas: dict[str, list[RequestDelta]] = defaultdict(list)
        self.plans_seen = self.aborts = 0
        route = self.engine.scheduler.route
        # Routing is watched from outside, since a step also preempts, which puts requests back into the queue.
        self.engine.scheduler.route = lambda: self._watched(route)  # type: ignore[method-assign]

    # -- what happens ---------------------------------------------------------------------------------------------

    @rule(
        prompt=st.integers(1, 60).flatmap(lambda n: st.binary(min_size=n, max_size=n)).map(_prompt),
        max_tokens=st.integers(1, 60) | st.none(),
        ignore_eos=st.booleans(),
        prompt_logprobs=st.booleans(),
    )
    def add(self, prompt: list[int], max_tokens: int | None, ignore_eos: bool, prompt_logprobs: bool) -> None:
        name = f"r{len(self.accepted)}"
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, prompt_logprobs=prompt_logprobs)
        scheduler = self.engine.scheduler
        try:
            self.engine.add_request(name, prompt, params)
        except ContextLengthError:
            assert len(prompt) >= scheduler.context_limit()
        except QueueFullError:
            assert len(scheduler.waiting) >= self.options["max_queued"]
        else:
            self.accepted[name] = scheduler.requests[name]

    @rule(count=st.integers(3, 8), prompt_tokens=st.integers(1, 6), max_tokens=st.integers(20, 60))
    def add_a_burst_that_outgrows_the_pools(self, count: int, prompt_tokens: int, max_tokens: int) -> None:
        for i in range(count):
            self.add([1 + i] * prompt_tokens, max_tokens, ignore_eos=True, prompt_logprobs=i == 0)

    @precondition(lambda self: self.engine.scheduler.requests and 4 * self.aborts < len(self.accepted))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.engine.scheduler.requests)))
        self.aborts += 1
        delta = self.engine.abort(name)
        assert delta is not None
        self._receive([delta])
        assert self.engine.abort(name) is None

    @precondition(lambda self: self.engine.has_work)
    @rule(times=st.integers(1, 12))
    def step(self, times: int) -> None:
        for _ in range(times):
            self._receive(self.engine.step())

    @precondition(lambda self: self.runner.unread)
    @rule(data=st.data())
    def finish_a_step_on_its_device(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.runner.unread)).ready = True

    @rule(data=st.data(), strategy=st.sampled_from((MIGRATE, MIGRATE, SEQUENTIAL)))
    def switch(self, data: st.DataObject, strategy: SwitchStrategy) -> None:
        target = data.draw(st.sampled_from(_layouts(self.options["base_tp"])))
        before = Snapshot.of(self.engine)
        moving = _moving(self.engine, target)
        too_long = _too_long(self.engine, target)
        if before.target is not None:
            self._check_refused(target, strategy, "under way")
        elif waiting := _waiting_too_long(self.engine, target):
            self._check_refused(target, strategy, f"request {waiting[0].request_id} waits")
        elif strategy is MIGRATE and too_long:
            self._check_refused(target, strategy, f"request ({'|'.join(r.request_id for r in too_long)}) holds")
        elif strategy is MIGRATE:
            self.engine.begin_switch(target)
            self._check_migrated(target, before, moving)
        else:
            self.engine.begin_switch(target, strategy)
            assert self.engine.switching
            assert str(self.engine.layout) == before.layout

    def _check_refused(self, target: str, strategy: SwitchStrategy, reason: str) -> None:
        before = Snapshot.of(self.engine)
        with pytest.raises(LayoutError, match=reason):
            self.engine.begin_switch(target, strategy)
        assert Snapshot.of(self.engine) == before
        event("a switch is refused: " + ("a request is too long" if "holds" in reason else reason))

    @rule(data=st.data())
    def switch_twice_at_once(self, data: st.DataObject) -> None:
        for _ in range(2):
            self.switch(data, MIGRATE)

    def _check_migrated(self, target: str, before: Snapshot, moving: list[Moving]) -> None:
        engine, report = self.engine, self.engine.last_switch
        assert report is not None
        assert (report.source, report.target, report.strategy) == (before.layout, target, MIGRATE)
        assert not engine.switching
        assert str(engine.layout) == target
        assert report.drain_seconds == 0.0
        preempted = [each for each in moving if each.request.state is RequestState.WAITING]
        assert report.requests_moved == len(moving) - len(preempted)
        assert report.tokens_recomputed == sum(each.num_computed for each in preempted)
        assert engine.scheduler.num_preemptions == before.num_preemptions + len(preempted)
        waiting = list(engine.scheduler.waiting)
        assert waiting[: len(preempted)] == sorted((each.request for each in preempted), key=lambda r: r.arrival)
        assert [request.request_id for request in waiting[len(preempted) :]] == before.waiting
        for local in (engine.scheduler.groups[group] for group in _groups(target) if group not in before.running):
            assert local.running == sorted(local.running, key=lambda request: request.arrival)
        for each in moving:
            if each.request not in waiting:
                assert each.request.num_computed == each.num_computed
                assert each.request.slot == each.slot
                _check_not_cut_short(engine.kv.spec, each, target)
        if _has_room(engine.kv.spec, before, moving, target):
            assert not preempted
        if preempted:
            event("a migration preempts")
        elif report.requests_moved:
            event("a migration moves requests")

    # -- what must always hold ------------------------------------------------------------------------------------

    @invariant()
    def every_block_is_free_or_held_once(self) -> None:
        kv = self.engine.kv
        held: dict[int, Counter[int]] = defaultdict(Counter)
        for request in self._live():
            if request.table is not None:
                ranks = request.table.group.rank_order(kv.base_tp)
                for device, row in zip(ranks, request.table.rows, strict=True):
                    held[device].update(row)
        for device, allocator in enumerate(kv.allocators):
            assert all(times == 1 for times in held[device].values()), f"device {device}: {held[device]}"
            assert allocator.num_free + len(held[device]) == kv.spec.num_blocks

    @invariant()
    def running_requests_have_a_slot_and_enough_blocks_on_their_group(self) -> None:
        scheduler, spec = self.engine.scheduler, self.engine.kv.spec
        assert set(scheduler.groups) == set(scheduler.layout.groups)
        base_tp = self.engine.kv.base_tp
        running, slots_in_use = [], []
        for group, local in scheduler.groups.items():
            slots = [request.slot for request in local.running]
            assert len(slots) <= local.max_running == scheduler.limits.max_num_seqs * group.size // base_tp
            slots_in_use += slots
            running += local.running
            for request in local.running:
                table = request.table
                assert request.state is RequestState.RUNNING
                assert table is not None
                assert table.group == group
                assert {len(row) for row in table.rows} == {table.num_blocks}
                assert spec.blocks_for(request.num_computed, group.size) <= table.num_blocks
                assert table.num_blocks <= spec.blocks_for(request.num_tokens + 1, group.size)
                assert request.num_computed <= request.num_tokens <= scheduler.max_model_len
                assert len(request.output_ids) + request.num_pending <= request.max_tokens
        num_slots = scheduler.limits.max_num_seqs * len(self.engine.kv.allocators) // base_tp
        assert len(set(slots_in_use)) == len(slots_in_use)
        assert set(slots_in_use) <= set(range(num_slots))
        waiting = list(scheduler.waiting)
        assert {id(r) for r in running} | {id(r) for r in waiting} == {id(r) for r in self._live()}
        assert len(running) + len(waiting) == len(scheduler.requests)
        for request in waiting:
            assert request.state is RequestState.WAITING
            assert (request.table, request.slot, request.num_computed) == (None, -1, 0)

    @invariant()
    def pending_tokens_are_those_in_flight(self) -> None:
        in_flight = Counter(
            id(result.row.request) for step in self.runner.unread for result in step.results if result.row.samples
        )
        for request in self._live():
            assert request.num_pending == in_flight[id(request)]

    @invariant()
    def plans_keep_to_the_limits(self) -> None:
        for plan in self.runner.plans[self.plans_seen :]:
            self._check_plan(plan)
        self.plans_seen = len(self.runner.plans)

    def _check_plan(self, plan: StepPlan) -> None:
        limits = self.engine.scheduler.limits
        assert plan.rows
        assert len({id(row.request) for row in plan.rows}) == len({row.slot for row in plan.rows}) == len(plan.rows)
        assert len(plan.rows) <= limits.max_num_seqs * plan.group.size // self.engine.kv.base_tp
        assert plan.num_tiled_tokens <= limits.tile_budget
        assert all(row.count == 1 for row in plan.decodes)
        assert all(row.count >= 1 for row in plan.prefills)

    def _watched(self, route: Callable[[], None]) -> None:
        """First come first served: who starts is the front of the queue, and the next one really cannot."""
        scheduler = self.engine.scheduler
        before = list(scheduler.waiting)
        route()
        after = list(scheduler.waiting)
        started = before[: len(before) - len(after)]
        assert after == before[len(started) :]
        assert all(request.state is RequestState.RUNNING for request in started)
        if after and not after[0].num_pending:
            self._check_cannot_start(after[0])

    def _check_cannot_start(self, request: Request) -> None:
        """No open group that is wide enough is idle, or has a slot and blocks beyond the reserve for decodes."""
        scheduler, kv = self.engine.scheduler, self.engine.kv
        needed = min(len(request.prompt_ids) + request.max_tokens, scheduler.context_limit())
        for group, local in scheduler.groups.items():
            if group in scheduler.dissolving or kv.spec.capacity_tokens(group.size) < needed:
                continue
            assert local.running, f"{request.request_id} waits although {group} is idle"
            reserve = min(len(local.running), max(1, kv.spec.num_blocks // 100))
            blocks = kv.spec.blocks_for(request.num_known + 1, group.size)
            assert len(local.running) == local.max_running or blocks + reserve > kv.free_blocks(group)

    # -- the end --------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self._run_to_completion()
        assert not self.runner.unread
        assert not self.engine.scheduler.waiting
        assert self.engine.kv.usage == 0.0
        for allocator in self.engine.kv.allocators:
            assert sorted(allocator.allocate(allocator.num_blocks)) == list(range(allocator.num_blocks))
        for name, request in self.accepted.items():
            self._check_result(request, self.deltas[name])

    def _run_to_completion(self) -> None:
        # Serially, a request takes a step a token and a few for its prompt. Preemption recomputes, at most once for
        # each step that others take.
        work = sum(len(request.prompt_ids) + request.max_tokens + 2 for request in self._live())
        for _ in range(20 + 8 * work):
            if not self.engine.has_work:
                return
            self._receive(self.engine.step())
            self.every_block_is_free_or_held_once()
            self.running_requests_have_a_slot_and_enough_blocks_on_their_group()
            self.plans_keep_to_the_limits()
        raise AssertionError(f"not finished: {[request.request_id for request in self._live()]}")

    def _check_result(self, request: Request, deltas: list[RequestDelta]) -> None:
        ignore_eos = request.params.ignore_eos
        expected = expected_output(request.prompt_ids, len(request.output_ids), ignore_eos=ignore_eos)
        note(f"{request.request_id} {request.finish_reason} after {len(request.output_ids)} of {request.max_tokens}")
        assert request.finished
        assert request.output_ids == expected
        assert [token for delta in deltas for token in delta.token_ids] == expected
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == request.finish_reason
        if request.finish_reason is FinishReason.STOP:
            assert request.output_ids[-1] == EOS
        elif request.finish_reason is FinishReason.LENGTH:
            assert len(request.output_ids) == request.max_tokens
        else:
            assert request.finish_reason is FinishReason.ABORT
        if request.params.prompt_logprobs and request.output_ids:
            prompt = request.prompt_ids
            scores = [prompt_score(prompt[:length]) for length in range(2, len(prompt) + 1)]
            assert request.prompt_logprobs == scores

    def _receive(self, deltas: list[RequestDelta]) -> None:
        for delta in deltas:
            self.deltas[delta.request_id].append(delta)

    def _live(self) -> list[Request]:
        return list(self.engine.scheduler.requests.values())


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=100, stateful_step_count=30)


class StressMachine(EngineMachine):
    """The same for longer."""


TestStressMachine = pytest.mark.stress(StressMachine.TestCase)
TestStressMachine.settings = settings(max_examples=1000, stateful_step_count=40)


SWITCHES = [(2, *pair) for pair in product(_layouts(2), repeat=2)] + [
    (1, *pair) for pair in product(_layouts(1), repeat=2)
]


class Load:
    """Requests through a simulated engine, and what each has received."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.prompts: dict[str, list[int]] = {}
        self.outputs: dict[str, list[int]] = defaultdict(list)

    def add(self, name: str, prompt: list[int], max_tokens: int = 20) -> Request:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.prompts[name] = prompt
        self.engine.add_request(name, prompt, params)
        return self.engine.scheduler.requests[name]

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            for delta in self.engine.step():
                assert delta.error is None
                self.outputs[delta.request_id].extend(delta.token_ids)

    def finish(self, max_tokens: int = 20) -> None:
        """Runs to the end; every request that is left gets its own tokens and every block comes back."""
        left = list(self.engine.scheduler.requests)
        _run_until(lambda: not self.engine.has_work, self.step)
        assert {name: self.outputs[name] for name in left} == {
            name: expected_output(self.prompts[name], max_tokens, ignore_eos=True) for name in left
        }
        assert self.engine.kv.usage == 0.0


def _different_prompts(count: int) -> dict[str, list[int]]:
    return {f"r{i}": [1 + (7 * i + j) % 50 for j in range(3 + 4 * i)] for i in range(count)}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("strategy", SwitchStrategy)
@pytest.mark.parametrize(("base_tp", "source", "target"), SWITCHES)
def test_every_switch_under_load_finishes_every_request_with_its_own_tokens(
    base_tp: int, source: str, target: str, strategy: SwitchStrategy, kv_heads: int
) -> None:
    engine, runner = simulated_engine(
        layout=source, base_tp=base_tp, num_blocks=128, max_num_seqs=2 * base_tp, kv_heads=kv_heads
    )
    load = Load(engine)
    for name, prompt in _different_prompts(20).items():
        load.add(name, prompt)
    load.step(8)
    gone = set(_groups(source)) - set(_groups(target))
    moving = [each.request for each in _moving(engine, target)]
    assert bool(moving) == bool(gone)
    engine.begin_switch(target, strategy)
    if strategy is SEQUENTIAL:
        assert set(engine.scheduler.dissolving) == gone
        assert not runner.relayouts
    else:
        report = engine.last_switch
        assert report is not None
        assert str(engine.layout) == target
        assert (report.drain_seconds, report.tokens_recomputed, engine.scheduler.num_preemptions) == (0.0, 0, 0)
        assert report.requests_moved == len(moving)
        assert {request.state for request in moving} <= {RequestState.RUNNING}
        assert report.kv_bytes_moved == sum(_bytes_of(runner, index) for index in range(len(runner.relayouts)))
    load.finish()
    assert engine.last_switch is not None
    assert engine.last_switch.strategy is strategy
    assert str(engine.layout) == target
    used = {plan.group for plan in runner.plans}
    assert used <= set(all_groups(4, base_tp))
    assert used >= set(_groups(target))


def _bytes_of(runner: SimulatedRunner, index: int) -> int:
    relayout = runner.relayouts[index]
    return len(relayout.moves) * runner.kv.slab_bytes(relayout.splits.source_tp, relayout.splits.target_tp)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("base_tp", "source", "target"), [switch for switch in SWITCHES if switch[1] != switch[2]])
def test_a_migration_takes_requests_in_every_state_along(base_tp: int, source: str, target: str, overlap: bool) -> None:
    """In mid-prefill, decoding with tokens that only the device knows, and aborted just before or just after."""
    engine, runner = simulated_engine(
        layout=source, base_tp=base_tp, num_blocks=64, max_num_seqs=8, max_num_batched_tokens=64, instant=False,
        overlap=overlap,
    )  # fmt: skip
    load = Load(engine)
    for i in range(8):
        load.add(f"decoding{i}", [1 + i] * (3 + i))
    before, after = load.add("before", [5] * 6), load.add("after", [6] * 6)
    load.step(6)
    long = [load.add(f"prefilling{i}", [20 + i] * 100) for i in range(4)]
    _run_until(lambda: any(0 < request.num_computed < 100 for request in long), load.step)
    live = engine.scheduler.requests.values()
    assert any(request.num_pending for request in live) == overlap
    engine.abort("before")
    engine.begin_switch(target)
    engine.abort("after")
    assert before.finished
    assert after.finished
    assert engine.scheduler.num_preemptions == 0
    load.step(1)
    engine.begin_switch(source)
    load.finish()
    assert engine.scheduler.num_preemptions == 0
    assert runner.relayouts


@pytest.mark.parametrize("seed", range(4))
def test_tokens_arrive_in_the_texts_order_after_switches_that_nothing_ran_between(seed: int) -> None:
    """A request may come from device 0 to device 1 through a group whose steps would have ordered the two."""
    engine, runner = simulated_engine(layout="1+1+1+1", instant=False)
    load = Load(engine)
    for i in range(6):
        load.add(f"r{i}", [10 * seed + i + 1] * 4)
    load.step(2)
    seen = set()
    for around in range(6):
        engine.begin_switch("2+2")
        engine.begin_switch("1+1+1+1")
        seen |= {(r.request_id, r.held_table.group) for r in engine.scheduler.requests.values()}
        # The newest steps reach the host first.
        for step in runner.unread[len(runner.unread) // 2 :]:
            step.ready = True
        load.step(1 + around % 2)
    assert len(seen) > 6, "nobody changed its device"
    load.finish()


def test_layouts_follow_each_other_with_no_step_between() -> None:
    engine, _ = simulated_engine(layout="1+1+1+1", num_blocks=64, instant=False)
    load = Load(engine)
    for name, prompt in _different_prompts(8).items():
        load.add(name, prompt)
    load.step(4)
    for layout in ("2+2", "4", "2+1+1", "1+1+2", "4", "1+1+1+1", "1+1+2", "2+2"):
        engine.begin_switch(layout)
        assert engine.last_switch is not None
        assert engine.last_switch.tokens_recomputed == 0
    load.finish()
    assert engine.scheduler.num_preemptions == 0


@pytest.mark.parametrize("tokens", [32, 35])
def test_a_migration_that_a_request_cannot_follow_is_refused_and_changes_nothing(tokens: int) -> None:
    engine, _ = simulated_engine(layout="4", num_blocks=8, overlap=False)  # 32 tokens at TP 1, 64 at TP 2
    load = Load(engine)
    long = load.add("long", [1] * 30)
    load.add("short", [2] * 3)
    _run_until(lambda: long.num_tokens == tokens, load.step)
    before = Snapshot.of(engine)
    with pytest.raises(LayoutError, match=rf"request long holds {tokens} tokens but the widest new group .* holds 32"):
        engine.begin_switch("1+1+1+1")
    assert Snapshot.of(engine) == before
    engine.begin_switch("2+1+1")  # a group of two holds it
    load.finish()


def test_a_request_whose_last_token_is_on_the_device_needs_no_more_room() -> None:
    engine, _ = simulated_engine(layout="1+1+1+1", num_blocks=8, kv_heads=1, instant=False)  # 32 tokens at each degree
    load = Load(engine)
    request = load.add("full", [1] * 8, max_tokens=500)
    _run_until(lambda: request.will_sample_no_more, load.step)
    assert request.num_tokens == 32
    engine.begin_switch("4")
    load.finish(max_tokens=24)


def test_a_long_request_goes_to_the_new_group_that_holds_it_to_its_end() -> None:
    engine, _ = simulated_engine(layout="4", num_blocks=16)  # 64 tokens at TP 1, 128 at TP 2
    load = Load(engine)
    requests = [load.add(f"r{i}", [1 + i] * 10, max_tokens=90) for i in range(3)]
    load.step(3)
    engine.begin_switch("2+1+1")
    assert {request.held_table.group.size for request in requests} == {2}
    load.finish(max_tokens=90)


def test_a_migration_without_room_recomputes_those_whose_blocks_help_and_says_so() -> None:
    """Device 0 is full of old requests, the others hold new ones: merging needs blocks on device 0."""
    engine, _ = simulated_engine(layout="1+1+1+1", num_blocks=12, max_num_seqs=8)
    load = Load(engine)
    for i in range(4):
        load.add(f"old{i}", [1 + i] * 44 if i == 0 else [1 + i] * 4, max_tokens=3)
    for i in range(4):
        load.add(f"new{i}", [5 + i] * 4, max_tokens=3)
    load.step()
    full = [r for r in engine.scheduler.requests.values() if r.held_table.group.start == 0]
    assert [request.request_id for request in full] == ["old0"]
    assert engine.kv.free_blocks(DeviceGroup(0, 1)) == 0
    engine.begin_switch("4")
    report = engine.last_switch
    assert report is not None
    assert [request.request_id for request in engine.scheduler.waiting] == ["old0"]
    assert report.requests_moved == 7
    assert report.tokens_recomputed == 32
    assert engine.scheduler.num_preemptions == 1
    load.finish(max_tokens=3)


def test_a_migration_moves_in_rounds_what_does_not_fit_at_once() -> None:
    engine, runner = simulated_engine(layout="4", num_blocks=13, max_num_seqs=8)
    load = Load(engine)
    for i in range(6):
        load.add(f"r{i}", [1 + i] * 16, max_tokens=8)
    load.step(2)
    assert engine.scheduler.num_running == 6
    engine.abort("r5")
    assert engine.kv.free_blocks(DeviceGroup(0, 4)) == 3  # what one request of the new layout takes
    engine.begin_switch("2+2")
    report = engine.last_switch
    assert report is not None
    assert (report.requests_moved, report.tokens_recomputed) == (5, 0)
    assert len(runner.relayouts) > 1
    for local in engine.scheduler.groups.values():
        assert local.running == sorted(local.running, key=lambda request: request.arrival)
    load.finish(max_tokens=8)


def test_requests_that_a_migration_preempts_wait_in_the_order_in_which_they_came() -> None:
    engine, _ = simulated_engine(layout="4", num_blocks=7, max_num_seqs=8)
    load = Load(engine)
    for i in range(5):
        load.add(f"r{i}", [1 + i] * 17, max_tokens=8)
    load.step(2)
    assert engine.scheduler.num_running == 3
    engine.begin_switch("1+1+1+1")
    assert engine.scheduler.num_preemptions == 2
    assert [request.request_id for request in engine.scheduler.waiting] == ["r1", "r2", "r3", "r4"]
    load.finish(max_tokens=8)


def test_groups_that_a_switch_keeps_go_on_while_others_drain() -> None:
    engine, runner = simulated_engine(layout="2+1+1", max_num_seqs=1)
    for i in range(3):
        engine.add_request(f"r{i}", [1 + i], SamplingParams(max_tokens=30 if i == 0 else 60, ignore_eos=True))
    engine.step()
    assert {plan.group.size for plan in runner.plans} == {1, 2}
    engine.begin_switch("1+1+1+1", SEQUENTIAL)
    launched = len(runner.plans)
    _run_until(lambda: not engine.switching, engine.step)
    busy = Counter(plan.group for plan in runner.plans[launched:])
    assert all(busy[group] > 5 for group in Layout.parse("1+1+1+1", 4).groups if group.start >= 2)
    assert engine.scheduler.num_running == 2


def test_a_switch_waits_for_steps_in_flight_even_of_requests_that_have_gone() -> None:
    engine, runner = simulated_engine(layout="4", instant=False)
    engine.add_request("r", [1, 2], SamplingParams(max_tokens=9, ignore_eos=True))
    engine.step()
    engine.step()
    assert len(runner.unread) == 2
    engine.abort("r")
    engine.begin_switch("2+2", SEQUENTIAL)
    assert engine.scheduler.drained
    engine.step()
    assert len(runner.unread) == 1
    assert engine.switching
    engine.step()
    assert not runner.unread
    assert str(engine.layout) == "2+2"


def test_the_budget_is_given_to_decodes_first_and_the_rest_to_prompt_chunks() -> None:
    engine, runner = simulated_engine(layout="4", max_num_batched_tokens=32, max_num_seqs=4)
    engine.add_request("short", [1, 2], SamplingParams(max_tokens=40, ignore_eos=True))
    engine.step()
    engine.add_request("long", [3] * 50, SamplingParams(max_tokens=2, ignore_eos=True))
    _run_until(lambda: not engine.has_work, engine.step)
    mixed = [plan for plan in runner.plans if plan.decodes and plan.prefills]
    assert [(row.start, row.count) for plan in mixed for row in plan.prefills] == [(0, 16), (16, 16), (32, 16), (48, 2)]
    assert all(round_up_to_tile(len(plan.decodes)) + 16 == 32 for plan in mixed)


def _run_until(done: Callable[[], bool], step: Callable[[], object]) -> None:
    for _ in range(2000):
        if done():
            return
        step()
    raise AssertionError("no end after 2000 steps")
