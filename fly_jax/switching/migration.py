"""Moves requests with their KV into the groups of another layout. Pure Python, no JAX.

Nothing waits and nothing is recomputed: moves are launched behind the last old step and before the first new one,
and each device runs its launches in order. KV is append-only, so whole slabs may be copied before that, while the
old groups go on; only what was written since then moves at the cutover.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from fly_jax.kv.blocks import BlockTable, KVCacheManager
from fly_jax.kv.slabs import HeadSplits, KVMover, MigrationTotals, PackedRelayout, SlabMove, slab_moves, slab_tokens
from fly_jax.layout import DeviceGroup
from fly_jax.scheduling.fit import Reach
from fly_jax.scheduling.group import GroupScheduler
from fly_jax.scheduling.placement import Placement
from fly_jax.scheduling.request import Request, RequestState
from fly_jax.scheduling.state import SchedulingState


@dataclass(slots=True)
class _Copy:
    """Blocks that a request will have in its new group.

    Attributes:
        copied: tokens whose KV is there already; whole slabs.
    """

    request: Request
    table: BlockTable
    copied: int = 0


@dataclass(slots=True)
class _Launches:
    """Moves collected by the program that carries them."""

    moves: dict[tuple[DeviceGroup, HeadSplits], list[SlabMove]] = field(default_factory=lambda: defaultdict(list))
    token_devices: dict[tuple[DeviceGroup, HeadSplits], dict[int, int]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def pack(self, mover: KVMover) -> list[PackedRelayout]:
        programs = sorted({*self.moves, *self.token_devices})
        return [mover.pack_relayout(*each, self.moves[each], self.token_devices[each]) for each in programs]


class Migration:
    """Takes requests into new groups.

    Args:
        targets: the groups' schedulers afterwards, those that stay included. A request goes to one whose devices
            overlap its own: groups are aligned powers of two, so one of the two holds the other, and its mesh carries
            the exchange.
        place: called with each request that is in its new group, to set how long it may become there.
        reach_tokens: the longest context that a request in a group may come to have, there or in wider ones.

    Attributes:
        resuming: paused requests of each target that go on there without moving, until they do.
    """

    def __init__(
        self,
        targets: Sequence[GroupScheduler],
        kv: KVCacheManager,
        mover: KVMover,
        place: Callable[[Request], None],
        reach_tokens: Reach,
    ) -> None:
        self.targets, self.kv, self.mover, self.place = targets, kv, mover, place
        self.placement = Placement(targets, kv, reach_tokens)
        self.totals = MigrationTotals()
        self.resuming: Counter[DeviceGroup] = Counter()
        self._moved: set[Request] = set()
        self._copies: dict[Request, _Copy] = {}
        self._reserved: Counter[DeviceGroup] = Counter()
        self._planned: list[PackedRelayout] | None = None

    # -- while the old groups go on ---------------------------------------------------------------------------

    def reserve(self, requests: Iterable[Request], *, overtake: bool = False) -> None:
        """Takes blocks for the requests that there is room for, those of higher rank first.

        Args:
            overtake: also take blocks where a request of higher rank finds too few; it may need them to move at all.
        """
        requests = sorted(requests, key=lambda each: each.rank)
        self.placement.choose(requests, {copy.request: copy.table for copy in self._copies.values()})
        held_back: set[DeviceGroup] = set()
        for request in requests:
            home = self.placement.home(request)
            if request in self._copies:
                self.kv.grow(self._copies[request].table, request.num_held)
            elif home in held_back and not overtake:
                continue
            elif (table := self._find_room(request, anywhere=overtake)) is not None:
                self._planned = None
                self._copies[request] = _Copy(request, table)
                self._reserved[table.group] += 1
            else:
                held_back.add(home)

    def copy_ahead(self, max_launches: int) -> None:
        """Copies whole slabs that no step writes any more, as many as fit this many launches of a program."""
        launches = _Launches()
        lanes: Counter[tuple[int, int]] = Counter()
        for copy in self._copies.values():
            slab = self._slab_tokens(copy)
            while copy.copied + slab <= self._copyable(copy):
                moves = self._moves(copy, range(copy.copied, copy.copied + slab))
                pairs = Counter((move.source.device, move.target.device) for move in moves)
                if any(lanes[pair] + count > max_launches * self.mover.chunk_slabs for pair, count in pairs.items()):
                    break
                lanes += pairs
                launches.moves[_program(copy)].extend(moves)
                copy.copied += slab
        self.totals.bytes_ahead += self._launch(launches.pack(self.mover))

    @property
    def slabs_ahead(self) -> int:
        """Whole slabs that could still be copied between the two devices that have most."""
        slabs: Counter[tuple[DeviceGroup, DeviceGroup]] = Counter()
        for copy in self._copies.values():
            left = self._copyable(copy) - copy.copied
            slabs[copy.request.held_table.group, copy.table.group] += left // self._slab_tokens(copy)
        return max(slabs.values(), default=0)

    def plan(self, requests: Sequence[Request]) -> None:
        """Gives the requests their places and packs what is left to move, for a cutover at this step boundary.

        Called before the last old step is launched: the devices compute, and the cutover has only to launch.
        """
        moving = set(requests)
        for copy in list(self._copies.values()):
            grown = copy.request in moving and self.kv.grow(copy.table, copy.request.num_held)
            if not grown or self._places(self._target_of(copy)) < 0:
                self.forget(copy.request)
        self.reserve(requests)
        self._planned = self._moves_left()

    def forget(self, request: Request) -> None:
        """Gives back what is reserved for a request that has ended or lost its KV."""
        self._planned = None
        self.placement.forget(request)
        if (copy := self._copies.pop(request, None)) is not None:
            self._reserved[copy.table.group] -= 1
            self.kv.release(copy.table)

    @property
    def reserved_tables(self) -> list[BlockTable]:
        """Blocks taken ahead."""
        return [copy.table for copy in self._copies.values()]

    def give_back(self, group: DeviceGroup) -> bool:
        """Frees the latest reservation on a group's devices; False if there is none."""
        for copy in reversed(list(self._copies.values())):
            if copy.table.group.overlaps(group):
                self.forget(copy.request)
                return True
        return False

    def cancel(self) -> None:
        for request in list(self._copies):
            self.forget(request)

    # -- the cutover ------------------------------------------------------------------------------------------

    def cut_over(self, requests: Sequence[Request], preempt: Callable[[Request], None] | None) -> list[Request]:
        """Moves the requests in rounds: a round uses only blocks that were free before it, and frees its sources.

        So no launch writes a block that another of the same round still reads. A request for which all that is free
        is too little moves in pieces, each of which frees its own source.

        Args:
            preempt: takes a request's KV away for good, when not even one can be placed; None: the rest stays.

        Returns:
            The requests that stay.
        """
        self.resuming.clear()
        if self._planned is None:
            self.plan(requests)
        left = sorted(requests, key=lambda request: request.rank)
        while left:
            if self._copies:
                moved = self._move()
                left = [request for request in left if request not in moved]
            elif (request := next((each for each in left if self._move_in_pieces(each)), None)) is not None:
                left.remove(request)
            elif not self._overtakes(left):
                if preempt is None:
                    break
                victim = self._victim(left)
                if victim in left:
                    left.remove(victim)
                else:
                    next(each for each in self.targets if victim in each.running).running.remove(victim)
                    self.totals.requests -= 1
                self.totals.tokens_recomputed += victim.num_computed
                preempt(victim)
            self.reserve(left)
        return left

    def _overtakes(self, left: Sequence[Request]) -> bool:
        """Lets requests of lower rank go first, where those before them find no room."""
        self.reserve(left, overtake=True)
        return bool(self._copies)

    def _victim(self, left: Sequence[Request]) -> Request:
        """The lowest rank on the device that is shortest of blocks where the first in line would go.

        Those of requests elsewhere would not help; requests that have moved already may be in the way.
        """
        devices = self.placement.home(left[0]).device_indices
        short = min(devices, key=lambda device: self.kv.allocators[device].num_free)
        moved = [request for request in self._moved if request.state is RequestState.RUNNING]
        there = [each for each in (*left, *moved) if short in each.held_table.group.device_indices]
        return max(there, key=lambda request: request.rank, default=left[-1])

    def _find_room(self, request: Request, *, anywhere: bool) -> BlockTable | None:
        """Blocks in the request's new home, or in the target group with most room; None if there are none."""
        for target in self._by_room(request):
            if target.group != self.placement.home(request) and not anywhere:
                continue
            if self._places(target) > 0:
                table = self.kv.new_table(target.group)
                if self.kv.grow(table, request.num_held):
                    return table
        return None

    def _places(self, target: GroupScheduler) -> int:
        """Requests that a group still has places for; a group that stays may have started others since a promise."""
        promised = self._reserved[target.group] + self.resuming[target.group]
        return target.max_running - len(target.running) - promised

    def _target_of(self, copy: _Copy) -> GroupScheduler:
        return next(each for each in self.targets if each.group == copy.table.group)

    def _by_room(self, request: Request) -> list[GroupScheduler]:
        """Groups that may take the request: its home first, then those with most room."""
        home = self.placement.home(request)
        return sorted(
            self.placement.eligible(request),
            key=lambda target: (target.group != home, -self.kv.free_blocks(target.group)),
        )

    def _moves_left(self) -> list[PackedRelayout]:
        """What is left to move of all that have a place."""
        launches = _Launches()
        for copy in self._copies.values():
            source, program = copy.request.held_table, _program(copy)
            launches.moves[program].extend(self._moves(copy, range(copy.copied, copy.request.num_computed)))
            launches.token_devices[program][copy.request.slot] = source.group.start
        return launches.pack(self.mover)

    def _launch(self, packed: Iterable[PackedRelayout]) -> int:
        """Starts moves; returns their bytes."""
        moved = 0
        for each in packed:
            self.mover.relayout(each)
            moved += each.num_bytes
            self.totals.launches += len(each.uploads)
        self.totals.bytes_moved += moved
        return moved

    def _move(self) -> set[Request]:
        """Launches what is left to move of all that have a place, and hands them to their new groups."""
        packed = self._moves_left() if self._planned is None else self._planned
        copies, self._planned = list(self._copies.values()), None
        self._launch(packed)
        for copy in copies:
            self.totals.blocks_moved += copy.request.held_table.num_blocks * copy.request.held_table.group.num_devices
            self.kv.release(copy.request.held_table)
            self._hand_over(copy)
        self._copies.clear()
        self._reserved.clear()
        return {copy.request for copy in copies}

    def _hand_over(self, copy: _Copy) -> None:
        """Puts a request into its new group."""
        self.totals.requests += 1
        copy.request.table = copy.table
        self._target_of(copy).add(copy.request)
        self._moved.add(copy.request)
        self.place(copy.request)

    def _move_in_pieces(self, request: Request) -> bool:
        """Moves one request although not all of its new blocks are free yet; False, nothing changed, if it is stuck."""
        for target in self._by_room(request):
            ends = self._piece_ends(request, target.group) if len(target.running) < target.max_running else None
            if ends is not None:
                break
        else:
            return False
        source, copy, freed = request.held_table, _Copy(request, self.kv.new_table(target.group)), 0
        for end, free_to in ends:
            self.kv.grow(copy.table, end if free_to < source.num_blocks else request.num_held)
            launches, program = _Launches(), _program(copy)
            launches.moves[program] = self._moves(copy, range(copy.copied, end))
            launches.token_devices[program][request.slot] = source.group.start
            self._launch(launches.pack(self.mover))
            self.kv.release_part(source, freed, free_to)
            copy.copied, freed = end, free_to
        self.totals.blocks_moved += source.num_blocks * source.group.num_devices
        self._hand_over(copy)
        return True

    def _piece_ends(self, request: Request, group: DeviceGroup) -> list[tuple[int, int]] | None:
        """For each piece, the tokens moved and the source blocks free after it; None if it would get stuck."""
        spec, source = self.kv.spec, request.held_table
        free = {device: allocator.num_free for device, allocator in enumerate(self.kv.allocators)}
        needed = spec.blocks_for(request.num_held, group.tp)
        pieces, have, freed = [], 0, 0
        while have < needed:
            step = min(needed - have, *(free[device] for device in group.device_indices))
            if step == 0:
                return None
            have += step
            last = have == needed
            end = request.num_computed if last else min(have * spec.block_tokens(group.tp), request.num_computed)
            free_to = (
                source.num_blocks if last else min(end // spec.block_tokens(source.group.tp), source.num_blocks - 1)
            )
            for device in group.device_indices:
                free[device] -= step
            for device in source.group.device_indices:
                free[device] += free_to - freed
            freed = free_to
            pieces.append((end, freed))
        return pieces

    def _moves(self, copy: _Copy, tokens: range) -> list[SlabMove]:
        source = copy.request.held_table
        return list(slab_moves(self.kv.spec, self.kv.base_tp, source, copy.table, tokens))

    def _copyable(self, copy: _Copy) -> int:
        """Tokens that are computed and that the new blocks have room for."""
        room = copy.table.num_blocks * self.kv.spec.block_tokens(copy.table.group.tp)
        return min(copy.request.num_computed, room)

    def _slab_tokens(self, copy: _Copy) -> int:
        return slab_tokens(self.kv.spec, copy.request.held_table.group, copy.table.group)


def _program(copy: _Copy) -> tuple[DeviceGroup, HeadSplits]:
    """The mesh that carries a copy, and the degrees between which it moves."""
    source, target = copy.request.held_table.group, copy.table.group
    return max(source, target, key=lambda group: group.num_devices), HeadSplits(source.tp, target.tp)


def migration_of(
    state: SchedulingState, mover: KVMover, targets: Sequence[GroupScheduler], *, elastic: bool
) -> Migration:
    """A way into groups for the requests of a scheduling state.

    Args:
        elastic: whether the layout may widen for requests once they are there.
    """
    place, reach = partial(state.bound_output, elastic=elastic), partial(state.reach_tokens, elastic=elastic)
    return Migration(targets, state.kv, mover, place, reach)
