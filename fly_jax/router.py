"""Which group takes a waiting request, and who gives way to it. Pure Python, no JAX."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from fly_jax.group_scheduler import GroupScheduler
from fly_jax.layout import DeviceGroup
from fly_jax.request import Request

if TYPE_CHECKING:
    from fly_jax.scheduler import Scheduler

# Waiting requests looked at in one pass; those far back have no claim to a place that the first ones cannot use.
LOOK_AHEAD = 64


class Router:
    """Starts a scheduler's waiting requests in its groups."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def start_waiting(self, taken: Collection[DeviceGroup]) -> None:
        """Starts waiting requests, each in its turn.

        A request that finds no room keeps the group that has most of it: those behind it may only start elsewhere.

        Args:
            taken: groups whose places are kept for others.
        """
        switch, waiting = self.scheduler.switch, self.scheduler.waiting
        kept = set(taken)
        passed_over: set[Request] = set()
        turn_taken = False
        if switch is not None:
            # However many wait before them: nobody else may start where a drain waits for them.
            for returning in switch.returning():
                self._start_or_pass(returning, kept, passed_over)
            kept.intersection_update({*switch.dissolving, *taken})
        while len(kept) < len(self.scheduler.groups) and len(passed_over) < LOOK_AHEAD:
            if not turn_taken and waiting.turn_has_come:
                turn_taken = True
                self._start_oldest(kept)
            request = waiting.next(passed_over)
            if request is None:
                break
            self._start_or_pass(request, kept, passed_over)

    def _start_oldest(self, kept: set[DeviceGroup]) -> None:
        """The oldest that some group could take goes first; it keeps that only when it has waited too long."""
        waiting = self.scheduler.waiting
        oldest = next((each for each in waiting.oldest(LOOK_AHEAD) if self._choices(each)), None)
        if oldest is None or oldest.num_pending:
            return
        if self._start(oldest, kept if self.scheduler.impatient(oldest) else set(kept)):
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
                request.held_up_since = self.scheduler.passes
        return False

    def _admit(self, group: GroupScheduler, request: Request) -> bool:
        if not group.admit(request):
            return False
        self.scheduler.place(request)
        self.scheduler.waiting.start(request)
        return True

    def _displace(self, choices: Sequence[GroupScheduler], request: Request) -> bool:
        """Preempts requests of lower priority, in the group where that takes fewest.

        For a request that has been first in line for longer than anybody should, it preempts those of equal
        priority too: a wide one could otherwise wait until all the devices that it needs are free.
        """
        request.overdue = request.overdue or self.scheduler.impatient(request)
        found = [(victims, group) for group in choices if (victims := group.victims_for(request)) is not None]
        if not found:
            return False
        victims, group = min(found, key=lambda pair: len(pair[0]))
        for victim in victims:
            self.scheduler.preempt(victim)
        return self._admit(group, request)

    def _choices(self, request: Request) -> list[GroupScheduler]:
        """Groups that may take the request, the best one first.

        Without a policy that widens, only those that hold it to its end, or as long as any does.
        """
        scheduler, switch = self.scheduler, self.scheduler.switch
        open_groups = [
            each for group, each in scheduler.groups.items() if switch is None or switch.admits(group, request)
        ]
        widest = max((each.group.size for each in open_groups), default=1)
        width = request.min_width if scheduler.elastic else min(request.min_width, widest)
        end = len(request.prompt_ids) + request.limit
        furthest = max((scheduler.reach_tokens(each.group) for each in open_groups), default=0)
        fitting = [
            each
            for each in open_groups
            if each.group.size >= width
            and scheduler.reach_tokens(each.group) >= min(end, furthest) > request.num_known
            and each.capacity_tokens >= request.num_needed
        ]

        def preference(each: GroupScheduler) -> tuple[int, bool, float, int]:
            wide = each.group.size if request.prefers_width else 0
            ends_elsewhere = each.capacity_tokens < min(end, scheduler.kv.spec.capacity_tokens(widest))
            return -wide, ends_elsewhere, len(each.running) / each.group.size, -scheduler.kv.free_blocks(each.group)

        return sorted(fitting, key=preference)
