"""Requests and switches through a simulated engine, with all that must hold checked from outside, step by step."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from fly_jax.errors import ContextLengthError, InvalidRequestError, LayoutError, QueueFullError
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.outputs import FinishReason, RequestDelta, SwitchReport, SwitchStrategy
from fly_jax.sampling_params import SamplingParams
from fly_jax.scheduling.request import Request, RequestState
from fly_jax.switching.strategies import LayoutSwitch
from fly_jax.switching.switch import Switch
from tests.fly_jax.invariants import (
    Snapshot,
    assert_by_rank,
    check_blocks,
    check_cannot_start,
    check_plan,
    check_running,
    could_hold,
    reserved_tables,
)
from tests.fly_jax.simulated_runner import EOS, SimulatedRunner, expected_output, prompt_score, simulated_engine

MIGRATE, SEQUENTIAL = SwitchStrategy.MIGRATE, SwitchStrategy.SEQUENTIAL
SOFT, HARD = SwitchStrategy.SOFT_PREEMPT, SwitchStrategy.HARD_PREEMPT
MOVES_KV = (MIGRATE, HARD)


def layouts(base_tp: int = 1) -> list[str]:
    """Every layout of four devices."""
    texts = ["1+1+1+1", "2+1+1", "1+1+2", "2+2", "4"]
    return [text for text in texts if all(int(degree) >= base_tp for degree in text.split("+"))]


def groups_of(layout: str) -> tuple[DeviceGroup, ...]:
    return Layout.parse(layout, 4).groups


@dataclass(frozen=True)
class Moving:
    """A request that a switch concerns, as it was before the cutover."""

    request: Request
    group: DeviceGroup
    num_computed: int
    slot: int
    blocks: list[list[int]]


class Traffic:
    """A simulated engine; every operation may come at any time, and :meth:`check` holds after each.

    Attributes:
        accepted: every request that was let in, by name.
        deltas: what each has received.
        tickets: switches that have begun.
        seen: how often what happened, for a test that wants to know that it did.
        static: nobody widens the layout for requests, so each must be able to run in it.
    """

    def __init__(self, **options: Any) -> None:
        self.options, self.static = options, True
        self.engine, self.runner = simulated_engine(**options)
        self.scheduler, self.kv = self.engine.scheduler, self.engine.kv
        self.switcher = self.engine.control.switcher
        self.accepted: dict[str, Request] = {}
        self.deltas: dict[str, list[RequestDelta]] = defaultdict(list)
        self.tickets: list[Switch] = []
        self.seen: Counter[str] = Counter()
        self._plans_checked = self._idle_steps = 0
        self._paused: dict[Request, tuple[Any, ...]] = {}
        self._started: list[tuple[Request, DeviceGroup]] = []
        self._displaced: list[tuple[Request, DeviceGroup, bool]] = []
        # Watched from outside, since one step routes, launches and switches.
        self._route, self.scheduler.route = self.scheduler.route, self._watched_route  # type: ignore[method-assign]
        self._preempt, self.scheduler.preempt = (  # type: ignore[method-assign]
            self.scheduler.preempt,
            self._watched_preempt,
        )
        self._advance, self.switcher.advance = (  # type: ignore[method-assign]
            self.switcher.advance,
            self._watched_advance,
        )
        self._start, self.scheduler.waiting.start = (  # type: ignore[method-assign]
            self.scheduler.waiting.start,
            self._watched_start,
        )

    # -- operations -------------------------------------------------------------------------------------------

    def add(self, prompt: Sequence[int], **params: Any) -> Request | None:
        """Sends a request; None if it is refused, which must be for a reason."""
        name, scheduler = f"r{len(self.accepted)}", self.scheduler
        width = params.get("tensor_parallel_size") or 1
        try:
            self.engine.add_request(name, prompt, SamplingParams(**params))
        except ContextLengthError:
            assert len(prompt) >= scheduler.context_limit()
        except InvalidRequestError:
            assert width > (self.switcher.target or scheduler.layout).widest
        except QueueFullError:
            assert len(scheduler.waiting) >= scheduler.max_queued
        else:
            self.accepted[name] = scheduler.requests[name]
            return self.accepted[name]
        self._saw("a request is refused")
        return None

    def abort(self, name: str) -> None:
        self._saw(f"a {self.accepted[name].state.name.lower()} request is aborted")
        delta = self.engine.abort(name)
        assert delta is not None
        self.receive([delta])
        assert self.engine.abort(name) is None

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            before = self._progress()
            self.receive(self.engine.step())
            self._idle_steps = 0 if self._progress() != before else self._idle_steps + 1
            assert not self.static or self._idle_steps < self._patience(), (
                f"no progress in {self._idle_steps} steps: {self._where()}"
            )
            self.check()

    def switch(self, target: str, strategy: SwitchStrategy) -> Switch | None:
        """Asks for a layout; None if it is refused, which must be for a reason and change nothing."""
        before, reason = Snapshot.of(self.engine), self._refusal(target, strategy)
        if reason is None:
            ticket = self.engine.begin_switch(target, strategy)
            self.tickets.append(ticket)
            assert self.engine.switching
        else:
            with pytest.raises(LayoutError, match=reason):
                self.engine.begin_switch(target, strategy)
            self._saw("a switch is refused")
            ticket = None
        assert Snapshot.of(self.engine) == before
        return ticket

    def finish(self) -> None:
        """Runs to the end; everybody gets what is theirs and everything comes back."""
        while self.engine.has_work:
            self.step()
        assert not self.runner.unread
        assert not self.scheduler.waiting
        assert not self.scheduler.paused
        assert self.kv.usage == 0.0
        for allocator in self.kv.allocators:
            assert sorted(allocator.allocate(allocator.num_blocks)) == list(range(allocator.num_blocks))
        assert all(ticket.settled for ticket in self.tickets)
        for name, request in self.accepted.items():
            self._check_result(request, self.deltas[name])

    @property
    def live(self) -> list[Request]:
        return list(self.scheduler.requests.values())

    # -- what must always hold --------------------------------------------------------------------------------

    def check(self) -> None:
        check_blocks(self.engine)
        check_running(self.scheduler)
        self._saw("steps with blocks taken ahead", reserved_tables(self.engine))
        self._check_waiting()
        self._check_paused()
        in_flight = Counter(id(row.request) for step in self.runner.unread for row in step.plan.sampled)
        for request in self.live:
            assert request.num_pending == in_flight[id(request)]
        for plan in self.runner.plans[self._plans_checked :]:
            check_plan(self.scheduler, plan)
        self._plans_checked = len(self.runner.plans)

    def _check_waiting(self) -> None:
        scheduler = self.scheduler
        waiting = list(scheduler.waiting)
        assert_by_rank(waiting)
        running = [request for local in scheduler.groups.values() for request in local.running]
        assert Counter(map(id, [*running, *waiting, *scheduler.paused])) == Counter(map(id, self.live))
        for request in waiting:
            assert request.state is RequestState.WAITING
            assert (request.table, request.slot, request.num_computed) == (None, -1, 0)
            widest = max(layout.widest for layout in (scheduler.layout, self.switcher.target) if layout is not None)
            fits = not self.static or request.num_tokens < self.kv.spec.capacity_tokens(widest)
            assert fits or request.will_sample_no_more, f"{request.request_id} can never run again: {self._where()}"

    def _check_paused(self) -> None:
        """KV of paused requests is where it was, and goes on from there if its group comes back."""
        for request, before in list(self._paused.items()):
            if request.state is RequestState.PAUSED:
                assert _kept(request) == before
            elif request.state is RequestState.RUNNING and request.held_table.group == before[0]:
                assert [row[: len(old)] for row, old in zip(request.held_table.rows, before[1], strict=True)] == list(
                    before[1]
                )
                self._saw("a request is resumed in place")
                del self._paused[request]
            else:
                del self._paused[request]
        for request in self.scheduler.paused:
            assert request.state is RequestState.PAUSED
            assert request.held_table.group not in self.scheduler.groups
            self._paused.setdefault(request, _kept(request))

    # -- who starts -------------------------------------------------------------------------------------------

    def _watched_route(self) -> None:
        if not self.static:
            self._route()
            return
        head = self.scheduler.waiting.next(())
        candidates = [] if head is None else could_hold(self.scheduler, head)
        returning = [] if self.switcher.switch is None else self.switcher.switch.returning()
        paused, self._started, self._displaced = list(self.scheduler.paused), [], []
        self._route()
        for victim, group, was_overdue in self._displaced:
            assert not was_overdue
            assert any(
                place == group
                and (each.priority < victim.priority or (each.overdue and each.priority == victim.priority))
                for each, place in self._started
            ), f"{victim.request_id} was displaced for nobody"
            self._saw("a request is displaced")
        if head is None or head.state is RequestState.RUNNING or head.num_pending or self._displaced:
            return
        if paused != self.scheduler.paused or returning:
            return  # those that went on elsewhere have left blocks behind since; a drain keeps groups for its own
        if self.scheduler.waiting.turn_has_come:
            return  # the oldest may keep a group when it has waited too long
        overdue = [request.held_table.group for request in paused if self.scheduler.impatient(request)]
        candidates = [local for local in candidates if not any(local.group.overlaps(group) for group in overdue)]
        for local in candidates:
            check_cannot_start(self.scheduler, head, local)
        if candidates:
            taken = {group for each, group in self._started if each.order > head.order}  # older ones had their turn
            assert not {local.group for local in candidates} <= taken, f"nobody kept a group for {head.request_id}"

    def _watched_start(self, request: Request) -> None:
        """Nobody starts in a group that is narrower than asked for, or that cuts it short, without need."""
        assert not self.static or request.held_table.group in {
            local.group for local in could_hold(self.scheduler, request)
        }
        self._start(request)
        self._started.append((request, request.held_table.group))

    def _watched_preempt(self, request: Request) -> None:
        self._displaced.append((request, request.held_table.group, request.overdue))
        self._preempt(request)

    # -- switches ---------------------------------------------------------------------------------------------

    def _refusal(self, target: str, strategy: SwitchStrategy) -> str | None:
        """What a switch must be refused for."""
        if self.switcher.target is not None:
            return "under way"
        widest = max(group.tp for group in groups_of(target))
        for request in self.scheduler.waiting:
            if request.num_tokens >= self.kv.spec.capacity_tokens(widest) and not request.will_sample_no_more:
                return f"request {request.request_id} waits"
        running = self._leaving(target) if strategy in MOVES_KV else []
        too_long = [request for request in (*running, *self.scheduler.paused) if self._too_long(request, target)]
        return f"request ({'|'.join(each.request_id for each in too_long)}) holds" if too_long else None

    def _leaving(self, target: str) -> list[Request]:
        """Those that run in groups which the target does not have."""
        groups = groups_of(target)
        return [r for group, local in self.scheduler.groups.items() if group not in groups for r in local.running]

    def _too_long(self, request: Request, target: str) -> bool:
        return request.num_tokens + (not request.will_sample_no_more) > self._capacity_near(request, target)

    def _capacity_near(self, request: Request, target: str) -> int:
        near = [group.tp for group in groups_of(target) if group.overlaps(request.held_table.group)]
        return self.kv.spec.capacity_tokens(max(near))

    def _watched_advance(self) -> LayoutSwitch | None:
        switch = self.switcher.switch
        if switch is None:
            return self._advance()
        target, before = str(switch.target), Snapshot.of(self.engine)
        paused = [each for each in self.scheduler.paused if each.held_table.group not in groups_of(target)]
        concerned = self._leaving(target) + (paused if switch.strategy is MIGRATE else [])
        moving = [
            Moving(
                each,
                each.held_table.group,
                each.num_computed,
                each.slot,
                [list(row) for row in each.held_table.rows],
            )
            for each in concerned
        ]
        try:
            done = self._advance()
        except LayoutError:
            assert Snapshot.of(self.engine) == before
            assert self.switcher.switch is None
            waiting = [request for request in self.scheduler.waiting if request.preempted]
            widest = self.kv.spec.capacity_tokens(switch.target.widest)
            too_long = [each for each in concerned if self._too_long(each, target)]
            assert too_long or any(request.num_tokens >= widest for request in waiting)
            self._saw("a switch is given up at the cutover")
            raise
        if done is not None:
            assert done is switch
            assert str(self.scheduler.layout) == target
            self._check_switched(done, before, moving)
        return done

    def _check_switched(self, switch: LayoutSwitch, before: Snapshot, moving: list[Moving]) -> None:
        """What each strategy promises about the requests in flight."""
        totals, strategy = switch.totals, switch.strategy
        self._saw(f"a {strategy} switch")
        self._saw(f"a {strategy} switch with requests in flight", moving)
        preempted = [each for each in moving if each.request.state is RequestState.WAITING]
        assert totals.tokens_recomputed == sum(each.num_computed for each in preempted)
        assert self.scheduler.num_preemptions == before.num_preemptions + len(preempted)
        if strategy is SEQUENTIAL:
            assert not moving
        elif strategy is SOFT:
            assert len(preempted) == len(moving)
        elif strategy is HARD:
            assert {each.request.state for each in moving} <= {RequestState.PAUSED}
            assert totals.paused == len(moving)
            assert all(each.request.held_table.rows == each.blocks for each in moving)
        else:
            self._check_migrated(switch, before, moving, preempted)
        if strategy is not MIGRATE:
            assert totals.requests == totals.bytes_moved == totals.blocks_moved == totals.bytes_ahead == 0

    def _check_migrated(
        self, switch: LayoutSwitch, before: Snapshot, moving: list[Moving], preempted: list[Moving]
    ) -> None:
        target = str(switch.target)
        assert switch.totals.requests == len(moving) - len(preempted)
        for each in moving:
            if each in preempted:
                continue
            request, group = each.request, each.request.held_table.group
            assert request.state is RequestState.RUNNING
            assert (request.num_computed, request.slot) == (each.num_computed, each.slot)
            near = [other for other in groups_of(target) if other.overlaps(each.group)]
            capacity = self.kv.spec.capacity_tokens(max(other.tp for other in near))
            assert request.max_tokens == min(request.limit, capacity - len(request.prompt_ids))
            assert group in near
            assert group.tp >= min(request.min_width, max(other.tp for other in near))
        self._saw("a migration preempts", preempted)
        self._saw("a migration copies ahead", switch.totals.bytes_ahead)
        if self._has_room(before, moving, target):
            assert not preempted

    def _has_room(self, before: Snapshot, moving: list[Moving], target: str) -> bool:
        """Every device has free blocks for all that could move there, and every group has places for them."""
        spec, limits = self.kv.spec, self.scheduler.limits
        for group in groups_of(target):
            there = [each for each in moving if each.group.overlaps(group)]
            blocks = sum(spec.blocks_for(each.request.num_tokens, group.tp) for each in there)
            resumed = [name for name in before.paused if before.requests[name][-1][0] == group]
            others = len(before.running.get(group, ())) + len(resumed)
            places = limits.max_running(group.tp, self.kv.base_tp) - others
            if blocks > min(before.free[device] for device in group.device_indices) or len(there) > places:
                return False
        return True

    def _saw(self, what: str, happened: object = True) -> None:
        if happened:
            self.seen[what] += 1

    # -- progress and results ---------------------------------------------------------------------------------

    def _progress(self) -> tuple[int, int, int]:
        outputs = sum(len(request.output_ids) for request in self.accepted.values())
        return outputs, len(self.scheduler.requests), sum(ticket.settled for ticket in self.tickets)

    def _patience(self) -> int:
        """Steps in which somebody must get a token: all prompts could be computed once in them, one by one."""
        tiles = sum(request.num_known // 16 + 1 for request in self.live)
        return 100 + 4 * tiles

    def _where(self) -> str:
        scheduler = self.scheduler
        running = {str(group): [r.request_id for r in local.running] for group, local in scheduler.groups.items()}
        waiting = [f"{r.request_id}({r.num_tokens}+{r.num_pending})" for r in scheduler.waiting]
        paused = [f"{r.request_id}@{r.held_table.group}" for r in scheduler.paused]
        switch = self.switcher.switch and f"{self.switcher.switch.strategy} to {self.switcher.target}"
        free = [allocator.num_free for allocator in self.kv.allocators]
        return f"{switch}, running {running}, waiting {waiting}, paused {paused}, free {free}"

    def receive(self, deltas: list[RequestDelta]) -> None:
        for delta in deltas:
            self.deltas[delta.request_id].append(delta)

    def _check_result(self, request: Request, deltas: list[RequestDelta]) -> None:
        outputs, ignore_eos = request.output_ids, request.params.ignore_eos
        where = f"{request.request_id} {request.finish_reason} after {len(outputs)} of {request.max_tokens}"
        assert request.finished, where
        assert outputs == expected_output(request.prompt_ids, len(outputs), ignore_eos=ignore_eos), where
        assert [token for delta in deltas for token in delta.token_ids] == outputs, where
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == request.finish_reason
        if request.finish_reason is FinishReason.STOP:
            assert outputs[-1] == EOS
        elif request.finish_reason is FinishReason.LENGTH:
            assert len(outputs) == request.max_tokens
        else:
            assert request.finish_reason is FinishReason.ABORT
        if request.params.prompt_logprobs is not None and outputs:
            prompt = request.prompt_ids
            scores = [value for part in request.prompt_logprobs for value in part.logprobs]
            assert scores == [prompt_score(prompt[:end]) for end in range(2, len(prompt) + 1)]


def _kept(request: Request) -> tuple[Any, ...]:
    """What a pause must not touch."""
    table = request.held_table
    return table.group, tuple(list(row) for row in table.rows), request.num_computed, request.slot


def send(traffic: Traffic, prompt: list[int], max_tokens: int = 20, **params: Any) -> Request:
    request = traffic.add(prompt, max_tokens=max_tokens, ignore_eos=True, **params)
    assert request is not None
    return request


def run_until(done: Callable[[], bool], traffic: Traffic) -> int:
    """Steps until something is so; how many it took."""
    for steps in range(2000):
        if done():
            return steps
        traffic.step()
    raise AssertionError("no end after 2000 steps")


def switched(traffic: Traffic, target: str, strategy: SwitchStrategy) -> SwitchReport:
    """Asks for a layout and steps until it is there."""
    ticket = traffic.switch(target, strategy)
    assert ticket is not None
    run_until(lambda: ticket.report is not None, traffic)
    assert ticket.report is not None
    return ticket.report


def bytes_moved(runner: SimulatedRunner) -> int:
    return sum(
        len(launch.moves) * runner.kv.slab_bytes(each.splits.source_tp, each.splits.target_tp)
        for each in runner.relayouts
        for launch in each.uploads
    )
