"""Layouts worth considering: wide groups for the requests that need them, one degree elsewhere. Pure Python, no JAX."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fly_jax.kv.blocks import KVCacheSpec
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.policy.observation import Load, Machine, RequestLoad

# A running request is widened this long before it fills its group. Two blocks are enough steps for the switch itself;
# copying a long context ahead takes some 2 * 16 slabs a step, so a 64th of the pool covers that; a quarter of a
# tiny pool is enough, or no request would fit it.
LOOKAHEAD_BLOCKS = 2
LOOKAHEAD_SHARE = 1 / 64
LOOKAHEAD_MOST = 1 / 4


@dataclass(frozen=True, slots=True)
class Needs:
    """What requests need beyond the narrowest groups.

    Attributes:
        anchored: (devices that hold a request's KV, TP degree that it needs there), widest first. KV moves only
            between groups that overlap, so these are met there or nowhere.
        tokens: (TP degree, tokens of all requests that need this or more), widest first. At least one group has to be
            as wide; as many as hold the tokens should be.
        served: TP degree -> the requests that may run only on groups this wide.
        held: group -> tokens of the longest of these requests whose KV is in it.
        favoured: group -> tokens of priority requests that run in it; they would like to be in the wide group.
    """

    anchored: tuple[tuple[DeviceGroup, int], ...] = ()
    tokens: tuple[tuple[int, int], ...] = ()
    served: Mapping[int, tuple[RequestLoad, ...]] = field(default_factory=dict)
    held: Mapping[DeviceGroup, int] = field(default_factory=dict)
    favoured: Mapping[DeviceGroup, int] = field(default_factory=dict)

    def fit(self, layout: Layout, machine: Machine) -> bool:
        """Every request's KV has a group that holds it, and its next token, among those it can move to."""
        return all(
            machine.kv.capacity_tokens(max(group.tp for group in layout.groups if group.overlaps(holder))) > tokens
            for holder, tokens in self.held.items()
        )

    def unmet(self, layout: Layout, machine: Machine, slack: float = 1.0) -> int:
        """How many groups are missing or too narrow.

        Args:
            slack: how many times the tokens should fit.
        """
        groups = layout.groups
        missing = sum(
            not any(group.tp >= width and group.overlaps(holder) for group in groups) for holder, width in self.anchored
        )
        for width, tokens in self.tokens:
            missing += _groups_short(machine, width, slack * tokens, groups)
        return missing


def needs_of(load: Load, machine: Machine) -> Needs:
    """Collects the requests that need a wide group.

    A request needs the degree that it asks for, and one whose pool holds it for some more steps. Requests of high
    priority would like half the devices while others are served too.
    """
    rooms = _rooms(machine)
    narrowest, widest = rooms[0], rooms[-1].degree
    served: dict[int, list[RequestLoad]] = defaultdict(list)
    wanted: set[tuple[DeviceGroup, int]] = set()
    held: dict[DeviceGroup, int] = {}
    urgent: list[tuple[RequestLoad, DeviceGroup | None]] = []
    count = 0
    for request, holder in load.requests():
        count += 1
        if request.priority < 0:
            urgent.append((request, holder))
        if narrowest.takes(request):
            continue
        width = next((room.degree for room in rooms if room.takes(request)), widest)
        served[width].append(request)
        if holder is not None:
            wanted.add((holder, width))
            held[holder] = max(request.tokens, held.get(holder, 0))
    favoured = urgent if len(urgent) < count else []
    half = _half_of_devices(rooms, machine) if favoured else None
    anchored = {(holder, min(width, _widest_around(machine, holder))) for holder, width in wanted}
    return Needs(
        anchored=tuple(sorted(anchored, key=lambda need: (-need[1], need[0]))),
        tokens=tuple(_cumulative_tokens(served, half)),
        served={width: tuple(requests) for width, requests in served.items()},
        held=held,
        favoured=_tokens_by_holder(favoured) if half is not None else {},
    )


@dataclass(frozen=True, slots=True)
class _Room:
    """How much one group of a degree holds.

    Attributes:
        capacity: tokens of one context.
        room: tokens from which on it would soon be full.
    """

    degree: int
    capacity: int
    room: int

    def takes(self, request: RequestLoad) -> bool:
        fits = request.tokens <= self.room or request.limit <= self.capacity
        return fits and request.min_width <= self.degree


def _rooms(machine: Machine) -> list[_Room]:
    """Narrow degrees first."""
    return [_room(degree, machine.kv) for degree in degrees_of(machine)]


def _room(degree: int, kv: KVCacheSpec) -> _Room:
    capacity = kv.capacity_tokens(degree)
    ahead = max(LOOKAHEAD_BLOCKS * kv.block_tokens(degree), int(LOOKAHEAD_SHARE * capacity))
    return _Room(degree, capacity, capacity - max(1, min(ahead, int(LOOKAHEAD_MOST * capacity))))


def degrees_of(machine: Machine) -> list[int]:
    """The TP degrees that are compiled somewhere, narrow ones first."""
    return sorted({group.tp for group in machine.groups})


def _widest_around(machine: Machine, holder: DeviceGroup) -> int:
    return max((group.tp for group in machine.groups if group.overlaps(holder)), default=holder.tp)


def _half_of_devices(rooms: Sequence[_Room], machine: Machine) -> int | None:
    """The widest degree that leaves half the devices to others; None if that is no wider than the narrowest."""
    fitting = [room.degree for room in rooms[1:] if 2 * room.degree <= machine.num_devices]
    return fitting[-1] if fitting else None


def _cumulative_tokens(served: Mapping[int, Sequence[RequestLoad]], half: int | None) -> Iterator[tuple[int, int]]:
    total = 0
    for width in sorted({*served, *(() if half is None else (half,))}, reverse=True):
        total += sum(request.tokens for request in served.get(width, ()))
        yield width, total


def _tokens_by_holder(requests: Iterable[tuple[RequestLoad, DeviceGroup | None]]) -> dict[DeviceGroup, int]:
    tokens: Counter[DeviceGroup] = Counter()
    for request, holder in requests:
        if holder is not None:
            tokens[holder] += request.tokens
    return dict(tokens)


def _groups_short(machine: Machine, width: int, tokens: float, groups: Iterable[DeviceGroup]) -> int:
    """Groups of a degree that so many tokens need besides those there are; no more than the devices allow."""
    capacity = machine.kv.capacity_tokens
    present = sum(capacity(group.tp) for group in groups if group.tp >= width)
    missing = 0 if present else 1
    short = min(tokens, machine.num_devices // width * capacity(width)) - (present or capacity(width))
    return missing + max(0, math.ceil(short / capacity(width)))


def candidates(load: Load, machine: Machine, needs: Needs) -> list[Layout]:
    """Layouts of compiled groups: the current one, the current one with groups merged for the needs, and for each
    degree the one that has this degree wherever the needs leave it.
    """
    builder = _Builder(load, machine, needs)
    kept = builder.place(load.layout.groups, above=0)
    found = [load.layout, builder.fill(kept, 0)]
    for degree in degrees_of(machine):
        found.append(builder.fill(builder.place((), above=degree), degree))
    return list(dict.fromkeys(layout for layout in found if layout is not None))


class _Builder:
    """Puts layouts together from compiled groups."""

    def __init__(self, load: Load, machine: Machine, needs: Needs) -> None:
        self.load, self.machine, self.needs = load, machine, needs
        self.by_size = sorted(machine.groups, key=lambda group: (group.num_devices, group.start))
        self.running = {each.group: sum(request.tokens for request in each.running) for each in load.groups}

    def place(self, kept: Iterable[DeviceGroup], above: int) -> list[DeviceGroup]:
        """Adds wide groups for the needs, as few as serve them.

        Args:
            kept: groups that stay, unless a wider one takes their devices.
            above: needs of this degree or less are served by the other groups.

        Returns:
            All groups that are certain, none overlapping another.
        """
        groups = list(kept)
        tokens, anchored = dict(self.needs.tokens), self.needs.anchored
        widths = {*tokens, *(width for _, width in anchored)}
        for width in sorted((each for each in widths if each > above), reverse=True):
            for holder, needed in anchored:
                if needed == width and not any(g.tp >= width and g.overlaps(holder) for g in groups):
                    self._add(groups, width, holder)
            while width in tokens and _groups_short(self.machine, width, tokens[width], groups):
                if not self._add(groups, width):
                    break
        return groups

    def _add(self, groups: list[DeviceGroup], width: int, holder: DeviceGroup | None = None) -> bool:
        """Merges devices to a group of a degree where that disturbs least; False if they are all taken."""
        wide = [group for group in groups if group.tp >= width]
        runs = [
            run
            for run in self.by_size
            if run.tp >= width
            and (holder is None or run.overlaps(holder))
            and not any(run.overlaps(group) for group in wide)
        ]
        if not runs:
            return False
        best = min(runs, key=self._disturbance)
        groups[:] = [group for group in groups if not group.overlaps(best)] + [best]
        return True

    def _disturbance(self, run: DeviceGroup) -> tuple[int, bool, int, int, int]:
        """Smallest first, then a group that is there, then where priority requests run, then fewest running tokens."""
        favoured = sum(tokens for group, tokens in self.needs.favoured.items() if group.overlaps(run))
        disturbed = sum(tokens for group, tokens in self.running.items() if group.overlaps(run))
        return run.num_devices, run not in self.running, -favoured, disturbed, run.start

    def fill(self, groups: Iterable[DeviceGroup], degree: int) -> Layout | None:
        """The layout with these groups and, elsewhere, groups of one degree, narrower ones where that does not fit.

        Where nothing so narrow is compiled, the narrowest that is; None if there is nothing at all.
        """
        taken = {group.start: group for group in groups}
        starts = sorted(taken)
        sizes: dict[int, list[int]] = defaultdict(list)
        for group in self.by_size:
            sizes[group.start].append(group.num_devices)
        degrees: list[int] = []
        position = 0
        while position < self.machine.num_devices:
            if position in taken:
                size: int | None = taken[position].num_devices
            else:
                room = next((start for start in starts if start > position), self.machine.num_devices) - position
                size = _best_size([size for size in sizes[position] if size <= room], degree)
            if size is None:
                return None
            degrees.append(size)
            position += size
        return Layout(tuple(degrees))


def _best_size(sizes: Sequence[int], degree: int) -> int | None:
    """The widest up to a degree, else the narrowest."""
    fitting = [size for size in sizes if size <= degree]
    return max(fitting) if fitting else min(sizes, default=None)
