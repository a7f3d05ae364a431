"""The queue, which group takes a request, and when a layout may change. Pure Python, no JAX.

The engine, the tests and simulations run this same object; it never looks at a clock.
"""

from __future__ import annotations

from collections import deque

from fly_jax.errors import ContextLengthError, LayoutError, QueueFullError
from fly_jax.group_scheduler import GroupScheduler, SchedulerLimits, SlotPool, StepPlan
from fly_jax.kv_cache import KVCacheManager
from fly_jax.layout import DeviceGroup, Layout, max_tp_degree
from fly_jax.migration import LaunchMoves, Migration, MigrationTotals
from fly_jax.outputs import FinishReason
from fly_jax.relayout_plan import Region, regions
from fly_jax.request import Request, RequestState


class Scheduler:
    """Routes requests to groups, composes steps, and drains groups that a switch dissolves.

    Args:
        max_model_len: context limit in tokens, whatever the layout.
        max_queued: most requests waiting.
    """

    def __init__(
        self, layout: Layout, limits: SchedulerLimits, kv: KVCacheManager, *, max_model_len: int, max_queued: int
    ) -> None:
        self.layout = layout
        self.target: Layout | None = None
        self.limits = limits
        self.kv = kv
        self.max_model_len = max_model_len
        self.max_queued = max_queued
        self.waiting: deque[Request] = deque()
        self.requests: dict[str, Request] = {}
        self.num_preemptions = 0
        self.slots = SlotPool(limits.max_num_seqs * (len(kv.allocators) // kv.base_tp))
        self.groups: dict[DeviceGroup, GroupScheduler] = {}
        self._set_groups(layout)

    # -- requests ---------------------------------------------------------------------------------------------

    def context_limit(self) -> int:
        """Most tokens one request may hold, prompt and output: the model's limit or the widest group's pool."""
        widest = (self.target or self.layout).widest
        return min(self.max_model_len, self.kv.spec.capacity_tokens(widest))

    def check(self, prompt_tokens: int, *, bounded: bool = True) -> None:
        """Refuses a prompt that could never run, or one too many.

        Raises:
            ContextLengthError, QueueFullError: with both numbers.
        """
        limit = self.context_limit()
        if prompt_tokens >= limit:
            widest = max_tp_degree(len(self.kv.allocators))
            could_be = min(self.max_model_len, self.kv.spec.capacity_tokens(widest))
            raise ContextLengthError(
                f"the prompt has {prompt_tokens} tokens but the context holds {limit} and needs room for one more: "
                f"shorten the prompt"
                + (f" or switch to a wider layout (up to {could_be})" if could_be > limit else ""),
                param="prompt",
            )
        if bounded and len(self.waiting) >= self.max_queued:
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting and at most {self.max_queued} may: try later"
            )

    def add(self, request: Request) -> None:
        """Queues a request that :meth:`check` has let through."""
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request in any state and frees all that it holds."""
        if request.state is RequestState.RUNNING:
            self._group_of(request).remove(request)
        elif request.state is RequestState.WAITING:
            self.waiting.remove(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        del self.requests[request.request_id]

    def preempt(self, request: Request) -> None:
        """Takes a running request's KV away; it is recomputed when it runs again. Its pending tokens still count."""
        self._group_of(request).remove(request)
        request.state, request.preempted = RequestState.WAITING, True
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    # -- steps ------------------------------------------------------------------------------------------------

    def route(self) -> None:
        """Starts waiting requests, first come first served, in the group with most room."""
        while self.waiting:
            request = self.waiting[0]
            # A request that was preempted with a token still on the device needs its id to be recomputed.
            if request.num_pending or not any(self._admit(group, request) for group in self._by_room(request)):
                return

    def schedule(self, group: DeviceGroup) -> StepPlan | None:
        """The group's next step, or None."""
        return self.groups[group].schedule(self.preempt)

    @property
    def num_running(self) -> int:
        return sum(len(group.running) for group in self.groups.values())

    @property
    def has_work(self) -> bool:
        return bool(self.requests) or self.target is not None

    # -- layout -----------------------------------------------------------------------------------------------

    def begin_switch(self, target: Layout) -> None:
        """Stops admitting to the groups that ``target`` dissolves; all others keep running.

        Raises:
            LayoutError: another switch is under way, or an accepted request fits no group of ``target``.
        """
        self._check_may_switch(target)
        self.target = target

    def migrate(self, target: Layout, launch: LaunchMoves) -> MigrationTotals:
        """Takes ``target`` as the layout at once, moving every running request of the groups that change.

        Raises:
            LayoutError: another switch is under way, or a request holds more than any of its new groups can;
                nothing has changed then.
        """
        self._check_may_switch(target)
        changing = regions(self.layout, target)
        for region in changing:
            self._check_fits(region)
        old = self.groups
        moving = {
            region: [request for group in region.sources for request in old[group].running] for region in changing
        }
        self.layout = target
        self._set_groups(target)
        totals, preempted = MigrationTotals(), []

        def preempt(request: Request) -> None:
            old[request.held_table.group].remove(request)
            request.state, request.preempted = RequestState.WAITING, True
            preempted.append(request)

        for region in changing:
            targets = [self.groups[group] for group in region.targets]
            totals += Migration(region, targets, self.kv, launch, preempt).run(moving[region])
        preempted.sort(key=lambda request: request.arrival)
        self.waiting.extendleft(reversed(preempted))
        self.num_preemptions += len(preempted)
        return totals

    def _check_fits(self, region: Region) -> None:
        capacity = self.kv.spec.capacity_tokens(max(group.size for group in region.targets))
        for group in region.sources:
            for request in self.groups[group].running:
                if request.num_tokens + (not request.will_sample_no_more) > capacity:
                    raise LayoutError(
                        f"request {request.request_id} holds {request.num_tokens} tokens but the widest new group on "
                        f"its devices holds {capacity}: wait for it to end or keep a wider group there"
                    )

    @property
    def dissolving(self) -> tuple[DeviceGroup, ...]:
        """Groups of the current layout that the target does not have."""
        if self.target is None:
            return ()
        return tuple(group for group in self.groups if group not in self.target.groups)

    @property
    def drained(self) -> bool:
        """A switch is under way, and no request runs in a group that it dissolves or was preempted there."""
        if self.target is None or any(request.preempted for request in self.waiting):
            return False
        return not any(self.groups[group].running for group in self.dissolving)

    def complete_switch(self) -> None:
        """Takes the target as the layout; the dissolving groups must be drained."""
        assert self.target is not None
        assert self.drained
        self.layout, self.target = self.target, None
        self._set_groups(self.layout)

    def _set_groups(self, layout: Layout) -> None:
        kept = self.groups
        self.groups = {
            group: kept.get(group) or GroupScheduler(group, self.limits, self.kv, self.slots) for group in layout.groups
        }

    def _group_of(self, request: Request) -> GroupScheduler:
        assert request.table is not None
        return self.groups[request.table.group]

    def _admit(self, group: GroupScheduler, request: Request) -> bool:
        if not group.admit(request):
            return False
        # A request alone in its group can then always grow to its end: preemption never goes round in circles.
        capacity = self.kv.spec.capacity_tokens(group.group.size)
        request.max_tokens = min(request.max_tokens, capacity - len(request.prompt_ids))
        self.waiting.popleft()
        return True

    def _by_room(self, request: Request) -> list[GroupScheduler]:
        """Groups that may take the request, the one with most room first.

        Groups that a switch dissolves take back what they preempted: it may fit no group of the new layout.
        """
        closed = () if request.preempted else self.dissolving
        spec = self.kv.spec
        open_groups = [scheduler for group, scheduler in self.groups.items() if group not in closed]
        capacity = max((spec.capacity_tokens(each.group.size) for each in open_groups), default=0)
        needed = min(len(request.prompt_ids) + request.max_tokens, capacity)
        fitting = [each for each in open_groups if spec.capacity_tokens(each.group.size) >= needed > request.num_known]
        return sorted(fitting, key=lambda each: (len(each.running) / each.group.size, -self.kv.free_blocks(each.group)))

    def _check_may_switch(self, target: Layout) -> None:
        """Refuses a second switch at a time, and a layout that could never hold a request that has been accepted."""
        if self.target is not None:
            raise LayoutError(f"a switch to {self.target} is under way: ask for {target} when it has ended")
        capacity = self.kv.spec.capacity_tokens(target.widest)
        for request in self.waiting:
            if request.num_tokens >= capacity:
                raise LayoutError(
                    f"request {request.request_id} waits with {request.num_tokens} tokens but the widest group of "
                    f"{target} holds {capacity}: wait for it to end or keep a wider group"
                )
