"""How often requests may change the layout by what they ask for. Pure Python, no JAX, no clock of its own."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fly_jax.layout import DeviceGroup, Layout

# Any client can ask for a wide group. The first may come and go at once, as one such request now and then should; the
# second within this many seconds stays until they are over, and all that need one share it: four switches in the time.
WINDOW_SECONDS = 15.0
MOST_WIDENINGS = 2


@dataclass(frozen=True, slots=True)
class _Widening:
    """A switch that was made for requests.

    Attributes:
        at: seconds on the caller's clock.
        groups: those that it made.
    """

    at: float
    groups: frozenset[DeviceGroup]


class WideningLimit:
    """Remembers the groups made for requests, and how long they have to stay. Whatever policy decides, it holds."""

    def __init__(self) -> None:
        self._widenings: deque[_Widening] = deque(maxlen=MOST_WIDENINGS)

    def widened(self, source: Layout, target: Layout, now: float) -> None:
        """A switch was begun because requests need a group that the layout lacks; ``now`` in seconds."""
        self._widenings.append(_Widening(now, frozenset(target.groups).difference(source.groups)))

    def kept_until(self, target: Layout, now: float) -> float | None:
        """Until when a layout has to wait because it would split groups that must stay; None: it may come now."""
        if len(self._widenings) < MOST_WIDENINGS:
            return None
        until = self._widenings[0].at + WINDOW_SECONDS
        made = {group for widening in self._widenings for group in widening.groups if group.tp > 1}
        if now >= until or all(any(_covers(group, each) for group in target.groups) for each in made):
            return None
        return until


def _covers(group: DeviceGroup, other: DeviceGroup) -> bool:
    return group.num_devices >= other.num_devices and group.overlaps(other)
