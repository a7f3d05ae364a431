"""Which group takes a waiting request, and who gives way to it. Pure Python, no JAX."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fly_jax.layout import DeviceGroup
from fly_jax.scheduling.fit import end, fitting
from fly_jax.scheduling.group import GroupScheduler
from fly_jax.scheduling.request import Request
from fly_jax.scheduling.state import SchedulingState

# Waiting requests looked at in one pass; those far back have no claim to a place that the first ones cannot use.
LOOK_AHEAD = 64


class Admission:
    """Starts waiting requests in groups."""

    def __init__(self, state: SchedulingState) -> None:
        self.state = state

    def start_waiting(self, taken: Collection[DeviceGroup]) -> None:
        """Starts waiting requests, each in its turn.

        A request that finds no room keeps the group that has most of it: those behind it may only start elsewhere.

        Args:
            taken: groups whose places are kept for others.
        """
        hooks, waiting = self.state.hooks, self.state.waiting
        kept = set(taken)
        passed_over: set[Request] = set()
        turn_taken = False
        # However many wait before them: nobody else may start where a drain waits for them.
        for returning in hooks.returning():
            self._start_or_pass(returning, kept, passed_over)
        kept.intersection_update({*hooks.dissolving, *taken})
        while len(kept) < len(self.state.groups) and len(passed_over) < LOOK_AHEAD:
            if not turn_taken and waiting.turn_has_come:
                turn_taken = True
                self._start_oldest(kept)
            request = waiting.next(passed_over)
            if request is None:
                break
            self._start_or_pass(request, kept, passed_over)

    def _start_oldest(self, kept: set[DeviceGroup]) -> None:
        """The oldest that some group could take goes first; it keeps that only when it has waited too long."""
        waiting = self.state.waiting
        oldest = next((each for each in waiting.oldest(LOOK_AHEAD) if self._choices(each)), None)
        if oldest is None or oldest.num_pending:
            return
        if self._start(oldest, kept if self.state.impatient(oldest) else set(kept)):
            waiting.took_turn(oldest)

    def _start_or_pass(self, request: Request, kept: set[DeviceGroup], passed_over: set[Request]) -> None:
        # A request that was preempted with a token still on the device needs its id to be recomputed.
        if request.num_pending or not self._start(request, kept):
            passed_over.add(request)

    def _start(self, request: Request, kept: set[DeviceGroup]) -> bool:
        choices = self._choices(request)
        free = [group for group in choices if group.group not in kept]
        if any(self._admit(group, request) for group in free) or self._displace(free, request):
            return True
        if free:
            kept.add(free[0].group)
            if request.held_up_since is None:
                request.held_up_since = self.state.passes
        return False

    def _admit(self, group: GroupScheduler, request: Request) -> bool:
        if not group.admit(request):
            return False
        self.state.bound_output(request)
        self.state.waiting.start(request)
        return True

    def _displace(self, choices: Sequence[GroupScheduler], request: Request) -> bool:
        """Preempts requests of lower priority, in the group where that takes fewest.

        For a request that has been first in line for longer than anybody should, it preempts those of equal
        priority too: a wide one could otherwise wait until all the devices that it needs are free.
        """
        request.overdue = request.overdue or self.state.impatient(request)
        found = [(victims, group) for group in choices if (victims := group.victims_for(request)) is not None]
        if not found:
            return False
        victims, group = min(found, key=lambda pair: len(pair[0]))
        for victim in victims:
            self.state.preempt(victim)
        return self._admit(group, request)

    def _choices(self, request: Request) -> list[GroupScheduler]:
        """Groups that may take the request, the best one first.

        Without a policy that widens, only those that hold it to its end, or as long as any does.
        """
        state = self.state
        open_groups = [each for group, each in state.groups.items() if state.hooks.admits(group, request)]
        widest = max((each.group.tp for each in open_groups), default=1)
        width = request.min_width if state.elastic else min(request.min_width, widest)
        whole = min(end(request), state.kv.spec.capacity_tokens(widest))

        def preference(each: GroupScheduler) -> tuple[int, bool, float, int]:
            wide = each.group.tp if request.prefers_width else 0
            ends_elsewhere = each.capacity_tokens < whole
            return -wide, ends_elsewhere, len(each.running) / each.group.num_devices, -state.kv.free_blocks(each.group)

        return sorted(fitting(request, open_groups, state.reach_tokens, width), key=preference)
