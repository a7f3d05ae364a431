"""All requests and groups, and the moves between waiting, running and paused. Pure Python, no JAX."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fly_jax.kv.blocks import KVCacheManager
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.scheduling.group import GroupScheduler, release
from fly_jax.scheduling.hooks import FixedLayout, SwitchHooks
from fly_jax.scheduling.request import Request, RequestState
from fly_jax.scheduling.step import SchedulerLimits, SlotPool
from fly_jax.scheduling.waiting import RequestQueue


class SchedulingState:
    """Keeps every request in its place; others decide which that is.

    Args:
        compiled: the groups that layouts may have.

    Attributes:
        elastic: the layout widens for requests that need it, so they are limited by the widest that there could be.
        waiting: requests without KV, by rank.
        paused: requests whose KV waits in place for its group.
        passes: of the step loop, so far.
        hooks: what has a say when the layout changes.
    """

    def __init__(
        self,
        layout: Layout,
        limits: SchedulerLimits,
        kv: KVCacheManager,
        *,
        compiled: Collection[DeviceGroup],
        elastic: bool,
    ) -> None:
        self.layout, self.limits, self.kv, self.elastic = layout, limits, kv, elastic
        self.widest = max(group.tp for group in compiled)
        self._reach = {group: max(other.tp for other in compiled if other.overlaps(group)) for group in compiled}
        self.waiting = RequestQueue()
        self.paused: list[Request] = []
        self.requests: dict[str, Request] = {}
        self.num_preemptions = 0
        self.passes = 0
        self.slots = SlotPool(limits.slots(len(kv.allocators), kv.base_tp))
        self.hooks: SwitchHooks = FixedLayout()
        self.groups: dict[DeviceGroup, GroupScheduler] = {}
        self.groups = {each.group: each for each in self.new_groups(layout)}

    # -- requests ---------------------------------------------------------------------------------------------

    def preempt(self, request: Request) -> None:
        """Takes a running request's KV away; it is recomputed when it runs again. Its pending tokens still count."""
        self.group_of(request).running.remove(request)
        self.give_up(request)

    def give_up(self, request: Request) -> None:
        """:meth:`preempt` for a request that is in no group (any more)."""
        if request.state is RequestState.PAUSED:
            self.paused.remove(request)
        release(request, self.kv, self.slots)
        request.state, request.preempted = RequestState.WAITING, True
        self.waiting.add(request)
        self.num_preemptions += 1
        self.hooks.forget(request)

    def pause(self, request: Request) -> None:
        """Keeps a request, which is in no group any more, and its KV for later."""
        request.state, request.held_up_since = RequestState.PAUSED, self.passes
        self.paused.append(request)

    def forget_resumed(self) -> None:
        """Takes requests that a migration has put into groups off the paused ones."""
        self.paused = [request for request in self.paused if request.state is RequestState.PAUSED]

    def bound_output(self, request: Request, *, elastic: bool | None = None) -> None:
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
        return self.kv.spec.capacity_tokens(self._reach[group] if widens else group.tp)

    def impatient(self, request: Request) -> bool:
        """It has been held up for longer than anybody should."""
        since = request.held_up_since
        return since is not None and self.passes - since > self.limits.patience

    def group_of(self, request: Request) -> GroupScheduler:
        return self.groups[request.held_table.group]

    @property
    def num_running(self) -> int:
        return sum(len(group.running) for group in self.groups.values())

    # -- layout -----------------------------------------------------------------------------------------------

    def install(self, target: Layout, groups: Sequence[GroupScheduler]) -> None:
        """Takes a layout; paused requests whose group is back go on in it."""
        self.layout = target
        self.groups = {each.group: each for each in groups}
        for request in [each for each in self.paused if each.held_table.group in self.groups]:
            self.paused.remove(request)
            self.group_of(request).add(request)
            self.bound_output(request)

    def new_groups(self, layout: Layout) -> list[GroupScheduler]:
        """A layout's groups: those in force that it has too, and new ones."""
        return [
            self.groups.get(group) or GroupScheduler(group, self.limits, self.kv, self.slots) for group in layout.groups
        ]

    def set_elastic(self, elastic: bool) -> None:
        """Lets the layout widen for requests that need it, or holds each to what its group can hold."""
        self.elastic = elastic
        for group in self.groups.values():
            for request in group.running:
                self.bound_output(request)
        for request in self.paused:
            self.bound_output(request)
