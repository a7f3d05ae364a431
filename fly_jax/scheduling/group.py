"""What one group computes in its next step. Pure Python, no JAX."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable

from fly_jax.kv.blocks import KVCacheManager
from fly_jax.layout import DeviceGroup
from fly_jax.scheduling.request import Request, RequestState
from fly_jax.scheduling.step import ScheduledRow, SchedulerLimits, SlotPool, StepPlan, round_up_to_tile


class GroupScheduler:
    """Continuous batching with chunked prefill for one group.

    Decodes go first, each one token; what is left of the token budget goes to prompt chunks in order of rank.
    Blocks of a whole prompt are taken at admission, so only decodes can run short; then the request of lowest rank
    is preempted and later recomputed.

    Attributes:
        running: by rank.
    """

    def __init__(self, group: DeviceGroup, limits: SchedulerLimits, kv: KVCacheManager, slots: SlotPool) -> None:
        self.group = group
        self.limits = limits
        self.kv = kv
        self.slots = slots
        self.max_running = limits.max_running(group.tp, kv.base_tp)
        self.tile_budget = limits.tile_budget(group.tp, kv.base_tp)
        self.running: list[Request] = []

    @property
    def capacity_tokens(self) -> int:
        """Longest context that the group holds when nothing else is in its pools."""
        return self.kv.spec.capacity_tokens(self.group.tp)

    def admit(self, request: Request) -> bool:
        """Starts a request here if a slot and the blocks of all its known tokens are free."""
        if len(self.running) >= self.max_running or not self.slots.num_free:
            return False
        if self._blocks_short(request, self._decode_reserve(len(self.running))) > 0:
            return False
        table = self.kv.new_table(self.group)
        self.kv.grow(table, request.num_known + 1)
        request.table, request.slot = table, self.slots.take()
        request.preempted = False
        self.add(request)
        return True

    def add(self, request: Request) -> None:
        """Takes in a request that has a block table of this group and a slot."""
        request.state, request.held_up_since = RequestState.RUNNING, None
        insort(self.running, request, key=lambda each: each.rank)

    def victims_for(self, request: Request) -> list[Request] | None:
        """Whom to preempt for a request to be admitted, lowest rank first; None if that would not help.

        Those are of lower priority. A request that is overdue also displaces its equals, but nobody who was.
        """
        victims: list[Request] = []
        for candidate in reversed(self.running):
            equal = request.overdue and candidate.priority == request.priority
            if candidate.overdue or not (candidate.priority > request.priority or equal):
                continue
            victims.append(candidate)
            blocks = sum(victim.held_table.num_blocks for victim in victims)
            left = len(self.running) - len(victims)
            if left < self.max_running and self._blocks_short(request, self._decode_reserve(left)) <= blocks:
                return victims
        return None

    def remove(self, request: Request) -> None:
        """Takes a request out and frees its slot and blocks; its KV is gone."""
        self.running.remove(request)
        release(request, self.kv, self.slots)

    def schedule(self, preempt: Callable[[Request], None], reclaim: Callable[[DeviceGroup], bool]) -> StepPlan | None:
        """Composes the next step and advances the requests' launch clocks; None if there is nothing to do.

        Args:
            preempt: called with each request that loses its KV here; it must take the request out of ``running``.
            reclaim: frees blocks of the group that nobody uses yet; False if there are none.
        """
        decodes = self._schedule_decodes(preempt, reclaim)
        budget = self.tile_budget - round_up_to_tile(len(decodes))
        prefills = self._schedule_prefills(budget)
        if not decodes and not prefills:
            return None
        return StepPlan(self.group, tuple(decodes), tuple(prefills))

    def _schedule_decodes(
        self, preempt: Callable[[Request], None], reclaim: Callable[[DeviceGroup], bool]
    ) -> list[ScheduledRow]:
        rows: list[ScheduledRow] = []
        for request in list(self.running):
            if request.state is not RequestState.RUNNING or not _decodes(request):
                continue
            if request.num_tokens > self.capacity_tokens:
                continue  # it has outgrown the group and goes on in a wider one
            if self._make_room(request, preempt, reclaim):
                rows.append(_launch(request, 1))
        return rows

    def _make_room(
        self, request: Request, preempt: Callable[[Request], None], reclaim: Callable[[DeviceGroup], bool]
    ) -> bool:
        """Blocks for the request's next token; False if it was itself preempted for want of them."""
        while not self.kv.grow(request.held_table, request.num_tokens):
            if reclaim(self.group):
                continue
            victim = self.running[-1]
            preempt(victim)
            if victim is request:
                return False
        return True

    def _schedule_prefills(self, budget: int) -> list[ScheduledRow]:
        rows: list[ScheduledRow] = []
        for request in self.running:
            if budget <= 0:
                break
            if request.will_sample_no_more or _decodes(request) or request.num_uncomputed == 0:
                continue
            count = min(request.num_uncomputed, budget)
            rows.append(_launch(request, count))
            budget -= round_up_to_tile(count)
        return rows

    def _blocks_short(self, request: Request, reserve: int) -> int:
        """Blocks that each device lacks for a request that would start here; 0 or less if it could."""
        needed = self.kv.spec.blocks_for(request.num_known + 1, self.group.tp)
        return needed + reserve - self.kv.free_blocks(self.group)

    def _decode_reserve(self, running: int) -> int:
        """Free blocks a device kept back at admission, so that running requests are not preempted at once."""
        return min(running, max(1, self.kv.spec.num_blocks // 100))


def release(request: Request, kv: KVCacheManager, slots: SlotPool) -> None:
    """Frees a request's slot and blocks.

    A step in flight may still write to the freed blocks. That is harmless: whoever gets them next writes
    in a later launch, and each device runs its launches in order.
    """
    slots.give_back(request.slot)
    request.slot = -1
    if request.table is not None:
        kv.release(request.table)
        request.table = None
    request.num_computed = 0


def _decodes(request: Request) -> bool:
    """The next step of this request is a single token that needs no prompt scores."""
    return request.num_uncomputed == 1 and not request.will_sample_no_more and not _scores(request)


def _scores(request: Request) -> bool:
    return request.params.prompt_logprobs is not None and request.num_computed < len(request.prompt_ids)


def _launch(request: Request, count: int) -> ScheduledRow:
    """Advances the launch clock by ``count`` positions."""
    start, scores = request.num_computed, _scores(request)
    request.num_computed += count
    samples = request.num_uncomputed == 0
    if samples:
        request.num_pending += 1
    return ScheduledRow(request, start, count, samples, scores, request.slot)
