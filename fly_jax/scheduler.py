"""Who waits, runs and is paused, and when a layout may change. Pure Python, no JAX.

The engine, the tests and simulations run this same object; it never looks at a clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from functools import partial

from fly_jax.errors import ClientQueueFullError, ContextLengthError, InvalidRequestError, LayoutError, QueueFullError
from fly_jax.group_scheduler import GroupScheduler, SchedulerLimits, SlotPool, StepPlan, release
from fly_jax.kv_cache import KVCacheManager
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.layout_switch import STRATEGIES, LayoutSwitch
from fly_jax.migration import KVMover, Migration, MigrationTotals
from fly_jax.outputs import FinishReason, SwitchStrategy
from fly_jax.request import Request, RequestState
from fly_jax.request_queue import RequestQueue
from fly_jax.router import Router


class Scheduler:
    """Keeps every request in its place, composes steps, and lets layouts give way to others.

    Args:
        mover: moves KV between groups.
        max_model_len: context limit in tokens, whatever the layout.
        max_queued: most requests waiting.
        max_queued_per_client: most requests of one client waiting; None: as many as of all.
        compiled: the groups that layouts may have.

    Attributes:
        switch: the change of layout under way, if any.
        waiting: requests without KV, by rank.
        paused: requests whose KV waits in place for its group.
        elastic: the layout widens for requests that need it, so they are limited by the widest that there could be.
        moved: what all migrations have moved.
    """

    def __init__(
        self,
        layout: Layout,
        limits: SchedulerLimits,
        kv: KVCacheManager,
        mover: KVMover,
        *,
        max_model_len: int,
        max_queued: int,
        max_queued_per_client: int | None = None,
        compiled: Collection[DeviceGroup],
        elastic: bool = False,
    ) -> None:
        self.layout = layout
        self.limits, self.kv, self.mover = limits, kv, mover
        self.max_model_len, self.max_queued = max_model_len, max_queued
        self.max_queued_per_client = max_queued if max_queued_per_client is None else max_queued_per_client
        self.widest = max(group.size for group in compiled)
        self._reach = {group: max(other.size for other in compiled if other.overlaps(group)) for group in compiled}
        self.elastic = elastic
        self.switch: LayoutSwitch | None = None
        self.waiting = RequestQueue()
        self.paused: list[Request] = []
        self.requests: dict[str, Request] = {}
        self.num_preemptions = 0
        self.passes = 0
        self.slots = SlotPool(limits.slots(len(kv.allocators), kv.base_tp))
        self.groups: dict[DeviceGroup, GroupScheduler] = {}
        self.groups = {each.group: each for each in self.new_groups(layout)}
        self._router = Router(self)
        self._order = itertools.count()
        self._adopted: list[MigrationTotals] = []

    # -- requests ---------------------------------------------------------------------------------------------

    def context_limit(self) -> int:
        """Most tokens one request may hold, prompt and output: the model's limit or the widest group's pool."""
        return min(self.max_model_len, self.kv.spec.capacity_tokens(self.width_limit()))

    def width_limit(self) -> int:
        """The largest TP degree that a request can get."""
        if self.switch is None:
            return self.widest if self.elastic else self.layout.widest
        return self.widest if self.switch.elastic else self.switch.target.widest

    def check(self, prompt_tokens: int, min_width: int = 1, *, bounded: bool = True, client: str | None = None) -> None:
        """Refuses a request that could never run, or one too many, in all or of its client.

        Raises:
            ContextLengthError, InvalidRequestError, QueueFullError, ClientQueueFullError: with both numbers.
        """
        limit = self.context_limit()
        if prompt_tokens >= limit:
            could_be = min(self.max_model_len, self.kv.spec.capacity_tokens(self.widest))
            hint = f" or switch to a wider layout (up to {could_be})" if could_be > limit else ""
            raise ContextLengthError.of_prompt(limit, str(prompt_tokens), hint=hint)
        if min_width > self.width_limit():
            raise InvalidRequestError(
                f"tensor_parallel_size {min_width} is wider than the {self.width_limit()} devices a group may have: "
                f"ask for less" + (" or switch to a wider layout" if min_width <= self.widest else ""),
                param="tensor_parallel_size",
            )
        if bounded and client is not None and self.waiting.count_of(client) >= self.max_queued_per_client:
            raise ClientQueueFullError(
                f"{self.waiting.count_of(client)} of your requests are waiting and at most "
                f"{self.max_queued_per_client} of one client may: try later"
            )
        if bounded and len(self.waiting) >= self.max_queued:
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting and at most {self.max_queued} may: try later"
            )

    def add(self, request: Request) -> None:
        """Queues a request that :meth:`check` has let through."""
        request.order = next(self._order)
        self.requests[request.request_id] = request
        self.waiting.add(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request in any state and frees all that it holds."""
        if request.state is RequestState.RUNNING:
            self._group_of(request).remove(request)
        elif request.state is RequestState.WAITING:
            self.waiting.remove(request)
        else:
            self.paused.remove(request)
            release(request, self.kv, self.slots)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        del self.requests[request.request_id]
        if self.switch is not None:
            self.switch.forget(request)

    def preempt(self, request: Request) -> None:
        """Takes a running request's KV away; it is recomputed when it runs again. Its pending tokens still count."""
        self._group_of(request).running.remove(request)
        self.give_up(request)

    def give_up(self, request: Request) -> None:
        """:meth:`preempt` for a request that is in no group (any more)."""
        if request.state is RequestState.PAUSED:
            self.paused.remove(request)
        release(request, self.kv, self.slots)
        request.state, request.preempted = RequestState.WAITING, True
        self.waiting.add(request)
        self.num_preemptions += 1
        if self.switch is not None:
            self.switch.forget(request)

    def pause(self, request: Request) -> None:
        """Keeps a request, which is in no group any more, and its KV for later."""
        request.state, request.held_up_since = RequestState.PAUSED, self.passes
        self.paused.append(request)

    def place(self, request: Request, *, elastic: bool | None = None) -> None:
        """Sets how long a request may become in its group.

        A request alone in its group can then always grow to its end: preemption never goes round in circles.
        """
        capacity = self.reach_tokens(request.held_table.group, elastic=elastic)
        request.max_tokens = min(request.limit, capacity - len(request.prompt_ids))

    def reach_tokens(self, group: DeviceGroup, *, elastic: bool | None = None) -> int:
        """Longest context of a request that starts in a group: the pools of the widest that it can be moved to.

        Args:
            elastic: None: as it is now.
        """
        widens = self.elastic if elastic is None else elastic
        return self.kv.spec.capacity_tokens(self._reach[group] if widens else group.size)

    # -- steps ------------------------------------------------------------------------------------------------

    def route(self) -> None:
        """Starts waiting requests, each in its turn, and paused ones whose groups' successors are idle.

        Paused ones that have waited too long go first: until they have their places, nobody else starts there.
        """
        self.passes += 1
        adopts = self.switch is None or self.switch.adopts
        kept = self._adopt_overdue() if self.paused and adopts else set()
        self._router.start_waiting(kept)
        if self.paused and adopts:
            self._adopt_idle()

    def schedule(self, group: DeviceGroup) -> StepPlan | None:
        """The group's next step, or None."""
        return self.groups[group].schedule(self.preempt, self._reclaim)

    @property
    def num_running(self) -> int:
        return sum(len(group.running) for group in self.groups.values())

    @property
    def has_work(self) -> bool:
        return bool(self.requests) or self.switch is not None

    # -- layout -----------------------------------------------------------------------------------------------

    @property
    def target(self) -> Layout | None:
        """The layout that a switch under way leads to."""
        return None if self.switch is None else self.switch.target

    def begin_switch(self, target: Layout, strategy: SwitchStrategy, *, elastic: bool = False) -> None:
        """Starts a change of layout, which :meth:`advance_switch` carries on.

        Args:
            elastic: whether the layout, once it is there, may widen again for requests that need it.

        Raises:
            LayoutError: another switch is under way, or an accepted request fits no group of ``target``.
        """
        if self.switch is not None:
            raise LayoutError(f"a switch to {self.target} is under way: ask for {target} when it has ended")
        self._check_may_switch(target, strategy, elastic=elastic)
        self.switch = STRATEGIES[strategy](self, target, elastic=elastic)

    def prepare_switch(self) -> None:
        """Plans ahead of :meth:`advance_switch`, between scheduling and launching steps."""
        if self.switch is not None:
            self.switch.prepare()

    def advance_switch(self) -> LayoutSwitch | None:
        """Carries a switch on at a step boundary; returns it when its target has become the layout.

        Raises:
            LayoutError: requests have grown beyond what the target holds; the layout stays as it is.
        """
        switch = self.switch
        if switch is None:
            return None
        try:
            done = switch.advance()
        except LayoutError:
            self.cancel_switch()
            raise
        if not done:
            return None
        self.switch = None
        self.set_elastic(switch.elastic)
        return switch

    def hasten_switch(self) -> None:
        """Turns a drain under way into a migration to the same layout.

        Raises:
            LayoutError: a request would not fit; the drain goes on.
        """
        assert self.switch is not None
        target, elastic = self.switch.target, self.switch.elastic
        self._check_may_switch(target, SwitchStrategy.MIGRATE, elastic=elastic)
        self.switch.cancel()
        self.switch = STRATEGIES[SwitchStrategy.MIGRATE](self, target, elastic=elastic)

    def cancel_switch(self) -> None:
        """Leaves the layout as it is; every request goes on."""
        if self.switch is not None:
            self.switch.cancel()
            self.switch = None

    def set_elastic(self, elastic: bool) -> None:
        """Lets the layout widen for requests that need it, or holds each to what its group can hold."""
        self.elastic = elastic
        for group in self.groups.values():
            for request in group.running:
                self.place(request)
        for request in self.paused:
            self.place(request)

    def check_pinned(self) -> None:
        """Refuses to stop widening while a request needs more than its group holds.

        Raises:
            LayoutError: naming the request.
        """
        self._check_waiting(self.layout)
        self._check_staying(self.groups)

    def check_cutover(self, switch: LayoutSwitch, moving: Iterable[Request]) -> None:
        """Refuses a layout that requests, running and preempted, have outgrown since the switch to it began.

        Raises:
            LayoutError: naming the request.
        """
        if not switch.elastic:
            self._check_waiting(switch.target)
            self._check_staying([group for group in self.groups if group not in switch.dissolving])
        self._check_fits(switch.target, moving)

    def _check_fits(self, target: Layout, requests: Iterable[Request]) -> None:
        """Refuses a layout whose groups on a request's devices are all too small for it.

        Raises:
            LayoutError: naming the request.
        """
        for request in requests:
            near = [group.size for group in target.groups if group.overlaps(request.held_table.group)]
            self._check_capacity([request], max(near))

    def install(self, target: Layout, groups: Sequence[GroupScheduler]) -> None:
        """Takes a layout; paused requests whose group is back go on in it."""
        self.layout = target
        self.groups = {each.group: each for each in groups}
        for request in [each for each in self.paused if each.held_table.group in self.groups]:
            self.paused.remove(request)
            self._group_of(request).add(request)
            self.place(request)

    def new_groups(self, layout: Layout) -> list[GroupScheduler]:
        """A layout's groups: those in force that it has too, and new ones."""
        return [
            self.groups.get(group) or GroupScheduler(group, self.limits, self.kv, self.slots) for group in layout.groups
        ]

    def migration(self, targets: Sequence[GroupScheduler], *, elastic: bool) -> Migration:
        """A way into these groups.

        Args:
            elastic: whether the layout may widen for requests once they are there.
        """
        place, reach = partial(self.place, elastic=elastic), partial(self.reach_tokens, elastic=elastic)
        return Migration(targets, self.kv, self.mover, place, reach)

    def forget_resumed(self) -> None:
        """Takes requests that a migration has put into groups off the paused ones."""
        self.paused = [request for request in self.paused if request.state is RequestState.PAUSED]

    def take_adopted(self) -> list[MigrationTotals]:
        """What was moved since the last call because paused requests went on in other groups."""
        adopted, self._adopted = self._adopted, []
        return adopted

    def _check_may_switch(self, target: Layout, strategy: SwitchStrategy, *, elastic: bool) -> None:
        """Refuses a layout that could never hold a request that has been accepted, before anything changes."""
        if not elastic:
            self._check_waiting(target)
        moves = strategy in (SwitchStrategy.MIGRATE, SwitchStrategy.HARD_PREEMPT)
        staying = [group for group in self.groups if group in target.groups or not moves]
        if self.elastic and not elastic:
            self._check_staying(staying)
        for group, each in self.groups.items():
            if group not in staying:
                self._check_fits(target, each.running)
        self._check_fits(target, self.paused)

    def _check_staying(self, groups: Iterable[DeviceGroup]) -> None:
        for group in groups:
            self._check_capacity(self.groups[group].running, group.size)

    def _check_waiting(self, layout: Layout) -> None:
        capacity = self.kv.spec.capacity_tokens(layout.widest)
        for request in self.waiting:
            if request.num_tokens >= capacity and not request.will_sample_no_more:
                raise LayoutError(
                    f"request {request.request_id} waits with {request.num_tokens} tokens but the widest group of "
                    f"{layout} holds {capacity}: wait for it to end or keep a wider group"
                )

    def _check_capacity(self, requests: Iterable[Request], tp: int) -> None:
        capacity = self.kv.spec.capacity_tokens(tp)
        for request in requests:
            if request.num_needed > capacity:
                raise LayoutError(
                    f"request {request.request_id} holds {request.num_tokens} tokens but the widest group on "
                    f"its devices would hold {capacity}: wait for it to end or keep a wider group there"
                )

    # -- paused requests --------------------------------------------------------------------------------------

    def _adopt_idle(self) -> None:
        """Paused requests go on where their group's successors have nothing to do."""
        idle = {group for group, each in self.groups.items() if not each.running}
        for source, requests in self._paused_by_group():
            if idle.issuperset(self._successors(source)):
                self._adopt(source, requests)

    def _adopt_overdue(self) -> set[DeviceGroup]:
        """Paused requests go on where they have waited too long; returns the groups that those left are in line for."""
        kept: set[DeviceGroup] = set()
        for source, requests in self._paused_by_group():
            if any(self.impatient(request) for request in requests):
                self._adopt(source, requests)
                if any(request.state is RequestState.PAUSED for request in requests):
                    kept.update(self._successors(source))
        return kept

    def _paused_by_group(self) -> list[tuple[DeviceGroup, list[Request]]]:
        sources = sorted({request.held_table.group for request in self.paused})
        return [(group, [each for each in self.paused if each.held_table.group == group]) for group in sources]

    def _successors(self, source: DeviceGroup) -> list[DeviceGroup]:
        """The groups that are in the place of one that is no more."""
        return [group for group in self.groups if group.overlaps(source)]

    def _adopt(self, source: DeviceGroup, requests: Sequence[Request]) -> None:
        """Moves paused requests into the groups in the place of theirs, as far as there is room.

        Nothing can be placed beside them only when they hold all blocks themselves: then the last one gives way.
        """
        successors = [self.groups[group] for group in self._successors(source)]
        empty = not any(each.running for each in successors)  # those of another group may be there by now
        migration = self.migration(successors, elastic=self.elastic)
        migration.cut_over(requests, self.give_up if empty else None)
        self.forget_resumed()
        if self.switch is not None:
            self.switch.adopted([request for request in requests if request.state is RequestState.RUNNING])
        self._adopted.append(migration.totals)

    def impatient(self, request: Request) -> bool:
        """It has been held up for longer than anybody should."""
        since = request.held_up_since
        return since is not None and self.passes - since > self.limits.patience

    def _reclaim(self, group: DeviceGroup) -> bool:
        return self.switch is not None and self.switch.reclaim(group)

    def _group_of(self, request: Request) -> GroupScheduler:
        return self.groups[request.held_table.group]
