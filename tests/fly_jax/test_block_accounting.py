"""Random traffic, preemption and switches through the real engine over a simulated runner."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fly_jax.engine import Engine
from fly_jax.errors import ContextLengthError, LayoutError, QueueFullError
from fly_jax.group_scheduler import StepPlan, round_up_to_tile
from fly_jax.layout import Layout, all_groups
from fly_jax.outputs import FinishReason, RequestDelta
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

    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        target = data.draw(st.sampled_from(_layouts(self.options["base_tp"])))
        if self.engine.switching:
            with pytest.raises(LayoutError, match="under way"):
                self.engine.begin_switch(target)
        else:
            self.engine.begin_switch(target)

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
        assert all(step.plan.group in scheduler.groups for step in self.runner.unread)
        running = []
        for group, local in scheduler.groups.items():
            slots = [request.slot for request in local.running]
            assert len(set(slots)) == len(slots) <= scheduler.limits.max_num_seqs
            assert all(0 <= slot < scheduler.limits.max_num_seqs for slot in slots)
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
        assert len(plan.rows) <= limits.max_num_seqs
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
            assert not local.has_free_slot or blocks + reserve > kv.free_blocks(group)

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
TestEngineMachine.settings = settings(max_examples=60, stateful_step_count=30)


@pytest.mark.parametrize("source", _layouts(1))
@pytest.mark.parametrize("target", _layouts(1))
def test_every_switch_under_load_finishes_every_request_with_its_own_tokens(source: str, target: str) -> None:
    engine, runner = simulated_engine(layout=source, num_blocks=24, max_num_seqs=2)
    prompts = {f"r{i}": [1 + (7 * i + j) % 50 for j in range(3 + 4 * i)] for i in range(12)}
    outputs: dict[str, list[int]] = defaultdict(list)
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, SamplingParams(max_tokens=20, ignore_eos=True))
    for _ in range(8):
        _collect(engine, outputs)
    engine.begin_switch(target)
    kept = [group for group in Layout.parse(source, 4).groups if group in Layout.parse(target, 4).groups]
    assert set(engine.scheduler.dissolving) == set(Layout.parse(source, 4).groups) - set(kept)
    _run_until(lambda: not engine.has_work, lambda: _collect(engine, outputs))
    assert str(engine.layout) == target
    assert outputs == {n: expected_output(p, 20, ignore_eos=True) for n, p in prompts.items()}
    assert engine.kv.usage == 0.0
    used = {plan.group for plan in runner.plans}
    assert used <= set(all_groups(4, 1))
    assert used >= set(Layout.parse(target, 4).groups)


def test_groups_that_a_switch_keeps_go_on_while_others_drain() -> None:
    engine, runner = simulated_engine(layout="2+1+1", max_num_seqs=1)
    for i in range(3):
        engine.add_request(f"r{i}", [1 + i], SamplingParams(max_tokens=30 if i == 0 else 60, ignore_eos=True))
    engine.step()
    assert {plan.group.size for plan in runner.plans} == {1, 2}
    engine.begin_switch("1+1+1+1")
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
    engine.begin_switch("2+2")
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


def _collect(engine: Engine, outputs: dict[str, list[int]]) -> None:
    for delta in engine.step():
        assert delta.error is None
        outputs[delta.request_id].extend(delta.token_ids)


def _run_until(done: Callable[[], bool], step: Callable[[], object]) -> None:
    for _ in range(2000):
        if done():
            return
        step()
    raise AssertionError("no end after 2000 steps")
