"""Which layout should serve a load: pure functions of the load and the machine. No JAX, no clock.

``load_adaptive`` takes the widest layout that keeps up. Wide groups answer soonest, narrow ones compute most; a
request that needs more than a narrow group gets a wide one beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from fly_jax.kv.slabs import CHUNK_SLABS
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.policy.candidates import Needs, candidates, needs_of
from fly_jax.policy.observation import GroupLoad, Load, Machine
from fly_jax.policy.utilisation import Capacity, demands

# A layout is left above HIGH, since queues grow long near 1, and another one entered, wider or narrower, below LOW: a
# load that keeps growing should not need a second switch soon, and one that varies by a quarter none at all.
HIGH = 0.85
LOW = 0.5
# When no layout is below LOW, another must be this much less utilised than the current one.
CLEARLY_BETTER = 0.9
# The layout is not widened sooner after a switch: about the time in which the estimated rates follow a change.
MIN_DWELL = 2.0
# Nor is it changed at all within so many times what the switch costs: switching takes 5 % of the time at most.
COST_FACTOR = 20.0
# A wide group is given up when the requests that need one leave this much room in the others: requests grow.
NEEDS_SLACK = 1.25


class DecisionKind(StrEnum):
    HOLD = "hold"
    WIDEN = "widen"
    NARROW = "narrow"
    MAKE_ROOM = "make_room"


@dataclass(frozen=True, slots=True)
class Decision:
    """What a policy wants.

    Attributes:
        target: None keeps the layout.
        reason: one line for people, with the numbers.
    """

    target: Layout | None
    kind: DecisionKind
    reason: str


Policy = Callable[[Load, Machine], Decision]


def static(load: Load, machine: Machine) -> Decision:  # noqa: ARG001  the shape of a policy
    """Keeps the layout until somebody asks for another."""
    return _hold("the layout is pinned")


def load_adaptive(load: Load, machine: Machine) -> Decision:
    """The widest layout that keeps up, with wide groups for the requests that need them."""
    return _Choice(load, machine).decide()


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {"static": static, "load_adaptive": load_adaptive, "auto": load_adaptive}
)


def name_of(policy: str | Policy) -> str:
    """What a policy is called in statistics and logs: a function by its own name, an object by its type's."""
    return policy if isinstance(policy, str) else getattr(policy, "__name__", type(policy).__name__)


def _hold(reason: str) -> Decision:
    return Decision(None, DecisionKind.HOLD, reason)


class _Choice:
    """One decision of ``load_adaptive``."""

    def __init__(self, load: Load, machine: Machine) -> None:
        self.load, self.machine, self.current = load, machine, load.layout
        self.needs: Needs = needs_of(load, machine)
        found = candidates(load, machine, self.needs)
        self.candidates = [each for each in found if each == self.current or self.needs.fit(each, machine)]
        self.utilisation = Capacity(machine).utilisations(self.candidates, demands(load, self.needs))

    def decide(self) -> Decision:
        if (decision := self._make_room()) is not None:
            return decision
        if self.utilisation[self.current] > HIGH:
            return self._relieve()
        return self._widen()

    def _make_room(self) -> Decision | None:
        """Requests need wide groups that are not there: at once, on the devices concerned only, if that keeps up."""
        unmet = {each: self.needs.unmet(each, self.machine) for each in self.candidates}
        fewest = min(unmet.values())
        if fewest == unmet[self.current]:
            return None
        options = [each for each in self.candidates if unmet[each] == fewest]
        keeping = [each for each in options if self.utilisation[each] <= HIGH]
        if keeping:
            target = min(keeping, key=lambda each: (self._changed_devices(each), len(each.degrees), each.degrees))
        else:
            target = self._least_utilised(options)
        width = max((width for width, _ in self.needs.tokens), default=1)
        count = sum(len(requests) for requests in self.needs.served.values())
        who = {0: "priority requests need", 1: "a request needs"}.get(count, f"{count} requests need")
        reason = f"{who} a group of {width}: {target} has it ({self._busy(target)})"
        return Decision(target, DecisionKind.MAKE_ROOM, reason)

    def _relieve(self) -> Decision:
        """The current layout does not keep up: the widest that easily does, or else the least utilised."""
        current, options = self.current, self._voluntary()
        better = [each for each in options if self.utilisation[each] < CLEARLY_BETTER * self.utilisation[current]]
        if not better:
            return _hold(f"{current} does not keep up ({self._busy(current)}) but nothing does clearly better")
        easily = [each for each in better if self.utilisation[each] <= LOW]
        target = self._widest(easily) if easily else self._least_utilised(better)
        narrower = len(target.degrees) > len(current.degrees)
        # A wide group beside groups as narrow as they get can wait: requests that need one come and go.
        urgent = min(target.degrees) < min(current.degrees)
        dwell = 0.0 if urgent else MIN_DWELL
        does = "keeps up" if self.utilisation[target] <= HIGH else "comes closest"
        reason = f"{target} {does} ({self._busy(target)}), {current} does not ({self._busy(current)})"
        return self._after(dwell, target, DecisionKind.NARROW if narrower else DecisionKind.WIDEN, reason)

    def _widen(self) -> Decision:
        """The current layout keeps up: does a wider one too?"""
        current = self.current
        wider = [
            each
            for each in self._voluntary()
            if len(each.degrees) < len(current.degrees) and self.utilisation[each] <= LOW
        ]
        if not wider:
            return _hold(f"{current} keeps up ({self._busy(current)}) and nothing wider would easily")
        target = self._widest(wider)
        reason = f"{target} keeps up ({self._busy(target)}), it is wider than {current} ({self._busy(current)})"
        return self._after(MIN_DWELL, target, DecisionKind.WIDEN, reason)

    def _after(self, dwell: float, target: Layout, kind: DecisionKind, reason: str) -> Decision:
        """The switch, unless the last one is too recent."""
        if self.load.last_switch is None:
            return Decision(target, kind, reason)
        needed = max(dwell, COST_FACTOR * switch_seconds(self.load, self.machine, target))
        since = self.load.now - self.load.last_switch
        if since < needed:
            return _hold(f"the last switch was {since:.2f} s ago, {needed:.2f} s are to pass: then {reason}")
        return Decision(target, kind, reason)

    # -- choosing ---------------------------------------------------------------------------------------------

    def _voluntary(self) -> list[Layout]:
        """Other layouts that serve every need as well as the current one, with blocks for all that runs."""
        unmet = self.needs.unmet(self.current, self.machine, NEEDS_SLACK)
        return [
            each
            for each in self.candidates
            if each != self.current
            and self.needs.unmet(each, self.machine, NEEDS_SLACK) <= unmet
            and self._blocks_suffice(each)
        ]

    def _widest(self, layouts: Sequence[Layout]) -> Layout:
        """The fewest groups; of these, the fewest devices that change, then the least utilised."""
        return min(
            layouts,
            key=lambda each: (len(each.degrees), self._changed_devices(each), self.utilisation[each], each.degrees),
        )

    def _least_utilised(self, layouts: Sequence[Layout]) -> Layout:
        """Of those that are not clearly worse than the best: the fewest devices that change, then the fewest groups."""
        least = min(self.utilisation[each] for each in layouts)
        close = [each for each in layouts if CLEARLY_BETTER * self.utilisation[each] <= least]
        return min(close, key=lambda each: (self._changed_devices(each), len(each.degrees), each.degrees))

    def _changed_devices(self, layout: Layout) -> int:
        return sum(group.num_devices for group in self.current.groups if group not in layout.groups)

    def _blocks_suffice(self, layout: Layout) -> bool:
        """A merged group has blocks for what runs in its parts: a wide group's blocks are longer and fill less well."""
        kv = self.machine.kv
        for group in layout.groups:
            inside = _parts(group, self.load)
            tokens, count = sum(_tokens(each) for each in inside), sum(len(each.running) for each in inside)
            if tokens // kv.block_tokens(group.tp) + count > kv.num_blocks:
                return False
        return True

    def _busy(self, layout: Layout) -> str:
        return f"{100 * self.utilisation[layout]:.0f}% busy"


def switch_seconds(load: Load, machine: Machine, target: Layout) -> float:
    """Roughly how long the devices move KV to go to another layout.

    Every two devices of a merged or split group exchange the slabs of the contexts that run there, in launches of
    :data:`CHUNK_SLABS` each; groups that share no device do so side by side.
    """
    longest = 0.0
    for group in {*load.layout.groups, *target.groups}:
        narrow = [each for each in (*load.layout.groups, *target.groups) if each.tp < group.tp]
        narrow = [each for each in narrow if each.overlaps(group)]
        if not narrow:
            continue
        tokens = sum(_tokens(each) for each in load.groups if each.group.overlaps(group))
        degree = min(each.tp for each in narrow)
        slabs = tokens * degree / group.tp / machine.kv.block_tokens(degree)
        launches = max(1, math.ceil(slabs / CHUNK_SLABS))
        longest = max(longest, launches * machine.step_times.relayout.get(group.tp, 0.0))
    return longest


def _parts(group: DeviceGroup, load: Load) -> list[GroupLoad]:
    """The narrower groups in force on a group's devices."""
    return [each for each in load.groups if each.group.tp < group.tp and each.group.overlaps(group)]


def _tokens(group: GroupLoad) -> int:
    return sum(request.tokens for request in group.running)
