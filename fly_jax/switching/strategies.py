"""How a layout gives way to another: the four strategies. Pure Python, no JAX.

At every step boundary, right behind the launches, a switch goes on or, when it is ready, cuts over: from there on the
groups are those of the new layout. Groups that both layouts have never notice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from fly_jax.kv.blocks import BlockTable
from fly_jax.kv.slabs import KVMover, MigrationTotals
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.outputs import SwitchStrategy
from fly_jax.scheduling.fit import end
from fly_jax.scheduling.group import GroupScheduler
from fly_jax.scheduling.request import Request, RequestState
from fly_jax.scheduling.state import SchedulingState
from fly_jax.switching.migration import migration_of

# Whole slabs that a cutover may move between two devices; what is more is copied ahead, so many launches a step.
CUTOVER_SLABS = 2
LAUNCHES_AHEAD = 2
# Prompts may be computed faster than they are copied: what there is at the beginning bounds the steps that copy.
SPARE_STEPS_AHEAD = 2


class LayoutSwitch(ABC):
    """One change of layout under way.

    Args:
        elastic: whether the target may widen again for requests that need it.

    Attributes:
        dissolving: groups that the target does not have.
        totals: what has happened to requests so far.
    """

    strategy: ClassVar[SwitchStrategy]
    # Whether paused requests may go on in other groups meanwhile: they may hold blocks that a drain needs to end.
    adopts: ClassVar[bool] = False

    def __init__(self, state: SchedulingState, mover: KVMover, target: Layout, *, elastic: bool) -> None:
        self.state, self.mover, self.target, self.elastic = state, mover, target, elastic
        self.dissolving = tuple(group for group in state.groups if group not in target.groups)
        self.totals = MigrationTotals()

    def prepare(self) -> None:  # noqa: B027  most strategies have nothing to do
        """Plans what can be planned when the next steps are scheduled and before they are launched."""

    @property
    def ready(self) -> bool:
        """Nothing is left to do before the cutover."""
        return True

    def go_on(self) -> None:  # noqa: B027  most strategies only wait
        """Does, at a step boundary, what there is to do before the cutover."""

    @abstractmethod
    def cut_over(self) -> None:
        """Makes the target the layout. Every request that moves fits it: that has been checked."""

    def moving(self) -> list[Request]:
        """Requests with KV that leave their groups at the cutover, and keep it."""
        return []

    def admits(self, group: DeviceGroup, request: Request) -> bool:  # noqa: ARG002  strategies look at it
        """Whether a group may start a request meanwhile."""
        return True

    def forget(self, request: Request) -> None:  # noqa: B027  most strategies have nothing to do
        """A request has ended or lost its KV."""

    def adopted(self, requests: Sequence[Request]) -> None:  # noqa: B027  most strategies have nothing to do
        """Paused requests go on in groups of the layout that is still in force."""

    def returning(self) -> list[Request]:
        """Waiting requests without which the switch cannot go on, by rank."""
        return []

    @property
    def stuck(self) -> bool:
        """Going on like this would never end."""
        return False

    @property
    def reserved_tables(self) -> list[BlockTable]:
        """Blocks that this switch has taken ahead."""
        return []

    def reclaim(self, group: DeviceGroup) -> bool:  # noqa: ARG002  strategies look at it
        """Frees blocks that this switch has taken ahead on a group's devices; False if it has none."""
        return False

    def cancel(self) -> None:  # noqa: B027  most strategies have nothing to do
        """Leaves the layout as it is."""

    def running(self) -> list[Request]:
        """Requests that run in the dissolving groups."""
        return [request for group in self.dissolving for request in self.state.groups[group].running]


class Drain(LayoutSwitch):
    """``sequential``: the requests of the dissolving groups end there first; those groups start no others."""

    strategy = SwitchStrategy.SEQUENTIAL
    adopts = True

    def __init__(self, state: SchedulingState, mover: KVMover, target: Layout, *, elastic: bool) -> None:
        super().__init__(state, mover, target, elastic=elastic)
        self._awaited = set(self.running())

    @property
    def ready(self) -> bool:
        return not self._awaited

    @property
    def stuck(self) -> bool:
        """A request that is waited for has outgrown its group, so it will not end there."""
        groups = self.state.groups
        return any(
            request.state is RequestState.RUNNING
            and request.num_tokens > groups[request.held_table.group].capacity_tokens
            for request in self._awaited
        )

    def cut_over(self) -> None:
        self._give_up_guests()
        self.state.install(self.target, self.state.new_groups(self.target))

    def admits(self, group: DeviceGroup, request: Request) -> bool:
        """Dissolving groups take back what they preempted: it may fit no group of the new layout."""
        return group not in self.dissolving or request in self._awaited

    def forget(self, request: Request) -> None:
        if request.finished:
            self._awaited.discard(request)

    def returning(self) -> list[Request]:
        waiting = (request for request in self._awaited if request.state is RequestState.WAITING)
        return sorted(waiting, key=lambda request: request.rank)

    def adopted(self, requests: Sequence[Request]) -> None:
        self._awaited.update(request for request in requests if request.held_table.group in self.dissolving)

    def _give_up_guests(self) -> None:
        assert not self.running()


class DrainWithGuests(Drain):
    """``soft_preempt``: dissolving groups that are idle run waiting requests meanwhile; the switch recomputes them."""

    strategy = SwitchStrategy.SOFT_PREEMPT

    def admits(self, group: DeviceGroup, request: Request) -> bool:
        if super().admits(group, request):
            return True
        idle = self._awaited.isdisjoint(self.state.groups[group].running)
        return idle and self._fits_target(request)

    def _fits_target(self, request: Request) -> bool:
        """A guest must not grow here beyond what it can be recomputed in."""
        capacity = self.state.kv.spec.capacity_tokens(self.target.widest)
        return self.elastic or end(request) <= capacity

    def _give_up_guests(self) -> None:
        for request in self.running():
            self.totals.tokens_recomputed += request.num_computed
            self.state.preempt(request)


class Pause(LayoutSwitch):
    """``hard_preempt``: the requests of the dissolving groups pause; their KV stays where it is."""

    strategy = SwitchStrategy.HARD_PREEMPT

    def moving(self) -> list[Request]:
        return self.running()

    def cut_over(self) -> None:
        requests = self.moving()
        self.totals.paused = len(requests)
        self.state.install(self.target, self.state.new_groups(self.target))
        for request in requests:
            self.state.pause(request)


class Migrate(LayoutSwitch):
    """``migrate``: every request goes on in a new group with its KV, paused ones of dissolved groups included."""

    strategy = SwitchStrategy.MIGRATE

    def __init__(self, state: SchedulingState, mover: KVMover, target: Layout, *, elastic: bool) -> None:
        super().__init__(state, mover, target, elastic=elastic)
        self._targets: Sequence[GroupScheduler] = state.new_groups(target)
        # Kept groups too: paused requests may lie on their devices.
        self._migration = migration_of(state, mover, self._targets, elastic=elastic)
        self._steps_left: int | None = None
        self._blocks_short = False  # running requests needed blocks that copies would take
        self._planned = False
        self.totals = self._migration.totals

    def prepare(self) -> None:
        moving = self.moving()
        paused = (request.held_table.group for request in self.state.paused)
        self._migration.resuming = Counter(group for group in paused if group in self.target.groups)
        if not self._blocks_short and self._steps_left != 0:
            self._migration.reserve(moving)
            slabs = self._migration.slabs_ahead
            if self._steps_left is None:
                a_step = LAUNCHES_AHEAD * self.mover.chunk_slabs
                self._steps_left = -(-slabs // a_step) + SPARE_STEPS_AHEAD
            if slabs > CUTOVER_SLABS:
                self._planned = False
                return
        self._migration.plan(moving)
        self._planned = True

    @property
    def ready(self) -> bool:
        return self._planned

    def go_on(self) -> None:
        assert self._steps_left is not None
        self._steps_left -= 1
        self._migration.copy_ahead(LAUNCHES_AHEAD)

    def cut_over(self) -> None:
        moving = self.moving()
        self.state.install(self.target, self._targets)
        self._migration.cut_over(moving, self.state.give_up)
        self.state.forget_resumed()

    def forget(self, request: Request) -> None:
        self._migration.forget(request)

    @property
    def reserved_tables(self) -> list[BlockTable]:
        return self._migration.reserved_tables

    def reclaim(self, group: DeviceGroup) -> bool:
        self._blocks_short = True
        return self._migration.give_back(group)

    def cancel(self) -> None:
        self._migration.cancel()

    def moving(self) -> list[Request]:
        paused = [request for request in self.state.paused if request.held_table.group not in self.target.groups]
        return self.running() + paused


STRATEGIES: dict[SwitchStrategy, type[LayoutSwitch]] = {
    each.strategy: each for each in (Migrate, Drain, DrainWithGuests, Pause)
}
