"""Carries a change of layout through, and brings paused requests back. Pure Python, no JAX."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from fly_jax.errors import LayoutError
from fly_jax.kv.slabs import KVMover, MigrationTotals
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.outputs import SwitchStrategy
from fly_jax.scheduling.fit import check_all_fit, check_fits_near, check_waiting_fit
from fly_jax.scheduling.request import Request, RequestState
from fly_jax.scheduling.state import SchedulingState
from fly_jax.switching.migration import migration_of
from fly_jax.switching.strategies import STRATEGIES, LayoutSwitch


class Switcher:
    """Changes the layout of a scheduling state; is its :class:`fly_jax.scheduling.hooks.SwitchHooks`.

    Args:
        mover: moves KV between groups.

    Attributes:
        switch: the change under way, if any.
    """

    def __init__(self, state: SchedulingState, mover: KVMover) -> None:
        self.state, self.mover = state, mover
        self.switch: LayoutSwitch | None = None
        self._adopted: list[MigrationTotals] = []
        state.hooks = self

    # -- switches ---------------------------------------------------------------------------------------------

    @property
    def target(self) -> Layout | None:
        """The layout that a switch under way leads to."""
        return None if self.switch is None else self.switch.target

    def begin(self, target: Layout, strategy: SwitchStrategy, *, elastic: bool = False) -> None:
        """Starts a change of layout, which :meth:`advance` carries on.

        Args:
            elastic: whether the layout, once it is there, may widen again for requests that need it.

        Raises:
            LayoutError: another switch is under way, or an accepted request fits no group of ``target``.
        """
        if self.switch is not None:
            raise LayoutError(f"a switch to {self.target} is under way: ask for {target} when it has ended")
        self._check_may_switch(target, strategy, elastic=elastic)
        self.switch = STRATEGIES[strategy](self.state, self.mover, target, elastic=elastic)

    def prepare(self) -> None:
        """Plans ahead of :meth:`advance`, between scheduling and launching steps."""
        if self.switch is not None:
            self.switch.prepare()

    def advance(self) -> LayoutSwitch | None:
        """Carries a switch on at a step boundary; returns it when its target has become the layout.

        Raises:
            LayoutError: requests have grown beyond what the target holds; the layout stays as it is.
        """
        switch = self.switch
        if switch is None:
            return None
        if not switch.ready:
            switch.go_on()
            return None
        try:
            self._check_cutover(switch)
        except LayoutError:
            self.cancel()
            raise
        switch.cut_over()
        self.switch = None
        self.state.set_elastic(switch.elastic)
        return switch

    def hasten(self) -> None:
        """Turns a drain under way into a migration to the same layout.

        Raises:
            LayoutError: a request would not fit; the drain goes on.
        """
        assert self.switch is not None
        target, elastic = self.switch.target, self.switch.elastic
        self._check_may_switch(target, SwitchStrategy.MIGRATE, elastic=elastic)
        self.switch.cancel()
        self.switch = STRATEGIES[SwitchStrategy.MIGRATE](self.state, self.mover, target, elastic=elastic)

    def cancel(self) -> None:
        """Leaves the layout as it is; every request goes on."""
        if self.switch is not None:
            self.switch.cancel()
            self.switch = None

    # -- what would not fit -----------------------------------------------------------------------------------

    def check_pinned(self) -> None:
        """Refuses to stop widening while a request needs more than its group holds.

        Raises:
            LayoutError: naming the request.
        """
        check_waiting_fit(self.state.kv.spec, self.state.waiting, self.state.layout)
        self._check_staying(self.state.groups)

    def _check_cutover(self, switch: LayoutSwitch) -> None:
        """Refuses a layout that requests, running and preempted, have outgrown since the switch to it began."""
        if not switch.elastic:
            check_waiting_fit(self.state.kv.spec, self.state.waiting, switch.target)
            self._check_staying([group for group in self.state.groups if group not in switch.dissolving])
        check_fits_near(self.state.kv.spec, switch.moving(), switch.target)

    def _check_may_switch(self, target: Layout, strategy: SwitchStrategy, *, elastic: bool) -> None:
        """Refuses a layout that could never hold a request that has been accepted, before anything changes."""
        state, spec = self.state, self.state.kv.spec
        if not elastic:
            check_waiting_fit(spec, state.waiting, target)
        moves = strategy in (SwitchStrategy.MIGRATE, SwitchStrategy.HARD_PREEMPT)
        staying = [group for group in state.groups if group in target.groups or not moves]
        if state.elastic and not elastic:
            self._check_staying(staying)
        for group, each in state.groups.items():
            if group not in staying:
                check_fits_near(spec, each.running, target)
        check_fits_near(spec, state.paused, target)

    def _check_staying(self, groups: Iterable[DeviceGroup]) -> None:
        for group in groups:
            check_all_fit(self.state.kv.spec, self.state.groups[group].running, group.tp)

    # -- paused requests --------------------------------------------------------------------------------------

    def take_adopted(self) -> list[MigrationTotals]:
        """What was moved since the last call because paused requests went on in other groups."""
        adopted, self._adopted = self._adopted, []
        return adopted

    def resume_overdue(self) -> set[DeviceGroup]:
        """Paused requests go on where they have waited too long; returns the groups that those left are in line for."""
        kept: set[DeviceGroup] = set()
        for source, requests in self._resumable():
            if any(self.state.impatient(request) for request in requests):
                self._adopt(source, requests)
                if any(request.state is RequestState.PAUSED for request in requests):
                    kept.update(self._successors(source))
        return kept

    def resume_idle(self) -> None:
        """Paused requests go on where their group's successors have nothing to do."""
        resumable = self._resumable()
        idle = {group for group, each in self.state.groups.items() if not each.running}
        for source, requests in resumable:
            if idle.issuperset(self._successors(source)):
                self._adopt(source, requests)

    def _resumable(self) -> list[tuple[DeviceGroup, list[Request]]]:
        """Paused requests by the group of their KV; none while a switch that minds is under way."""
        if not self.state.paused or not (self.switch is None or self.switch.adopts):
            return []
        sources = sorted({request.held_table.group for request in self.state.paused})
        return [(group, [each for each in self.state.paused if each.held_table.group == group]) for group in sources]

    def _successors(self, source: DeviceGroup) -> list[DeviceGroup]:
        """The groups that are in the place of one that is no more."""
        return [group for group in self.state.groups if group.overlaps(source)]

    def _adopt(self, source: DeviceGroup, requests: Sequence[Request]) -> None:
        """Moves paused requests into the groups in the place of theirs, as far as there is room.

        Nothing can be placed beside them only when they hold all blocks themselves: then the last one gives way.
        """
        successors = [self.state.groups[group] for group in self._successors(source)]
        empty = not any(each.running for each in successors)  # those of another group may be there by now
        migration = migration_of(self.state, self.mover, successors, elastic=self.state.elastic)
        migration.cut_over(requests, self.state.give_up if empty else None)
        self.state.forget_resumed()
        if self.switch is not None:
            self.switch.adopted([request for request in requests if request.state is RequestState.RUNNING])
        self._adopted.append(migration.totals)

    # -- what the scheduler asks ------------------------------------------------------------------------------

    @property
    def destination(self) -> tuple[Layout, bool] | None:
        return None if self.switch is None else (self.switch.target, self.switch.elastic)

    @property
    def dissolving(self) -> Collection[DeviceGroup]:
        return () if self.switch is None else self.switch.dissolving

    def admits(self, group: DeviceGroup, request: Request) -> bool:
        return self.switch is None or self.switch.admits(group, request)

    def returning(self) -> Sequence[Request]:
        return () if self.switch is None else self.switch.returning()

    def forget(self, request: Request) -> None:
        if self.switch is not None:
            self.switch.forget(request)

    def reclaim(self, group: DeviceGroup) -> bool:
        return self.switch is not None and self.switch.reclaim(group)
