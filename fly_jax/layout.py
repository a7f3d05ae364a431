"""Layouts: partitions of the device list into tensor-parallel groups. Pure Python, no JAX.

A layout's canonical text is its TP degrees in device order joined by ``+`` (``2+1+1``); ``dp4``, ``tp4`` and
``dp2xtp2`` are aliases. Groups are aligned, contiguous, power-of-two runs of the device list, the only shapes
that the communicator pool of Flying Serving (arXiv 2602.22593) holds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from fly_jax.errors import LayoutError

_ALIAS = re.compile(r"dp(?P<dp>[0-9]{1,4})(?:xtp(?P<tp>[0-9]{1,4}))?|tp(?P<tp_only>[0-9]{1,4})")
_MAX_TEXT = 1024


@dataclass(frozen=True, order=True)
class DeviceGroup:
    """Devices ``start .. start + num_devices - 1`` that run each step together."""

    start: int
    num_devices: int

    @property
    def tp(self) -> int:
        """Into how many ranks each layer is split: all devices of the group, as long as it has no other axis."""
        return self.num_devices

    @property
    def device_indices(self) -> range:
        """Indices into the engine's device list, in device order (not rank order)."""
        return range(self.start, self.start + self.num_devices)

    def overlaps(self, other: DeviceGroup) -> bool:
        return self.start < other.start + other.num_devices and other.start < self.start + self.num_devices

    def rank_order(self, base_tp: int) -> tuple[int, ...]:
        """Device index of each TP rank.

        With base TP m, device i holds shard ``i % m`` of a base group; rank r of degree t needs bytes
        ``[r/t, (r+1)/t)`` of the weights, which must lie inside that shard. So ranks
        ``s*t/m .. (s+1)*t/m - 1`` go to the devices that hold shard s, and nothing moves.
        """
        return tuple(sorted(self.device_indices, key=lambda i: (i % base_tp, i)))

    def __str__(self) -> str:
        last = self.start + self.num_devices - 1
        return f"tp{self.tp}@{self.start}" if self.tp == 1 else f"tp{self.tp}@{self.start}-{last}"


@dataclass(frozen=True)
class Layout:
    """A partition of all devices into groups, by their TP degrees in device order."""

    degrees: tuple[int, ...]

    @cached_property
    def groups(self) -> tuple[DeviceGroup, ...]:
        groups, start = [], 0
        for degree in self.degrees:
            groups.append(DeviceGroup(start, degree))
            start += degree
        return tuple(groups)

    @property
    def num_devices(self) -> int:
        return sum(self.degrees)

    @property
    def widest(self) -> int:
        return max(self.degrees)

    def __str__(self) -> str:
        return "+".join(str(d) for d in self.degrees)

    @classmethod
    def parse(cls, text: str, num_devices: int, base_tp: int = 1) -> Layout:
        """Reads canonical text or an alias and checks it against the devices.

        Raises:
            LayoutError: malformed, or does not partition ``num_devices`` into aligned power-of-two groups of
                multiples of ``base_tp``.
        """
        layout = cls(_degrees(text, num_devices))
        layout.check(num_devices, base_tp)
        return layout

    def check(self, num_devices: int, base_tp: int) -> None:
        if self.num_devices != num_devices:
            raise LayoutError(
                f"layout {_shorten(str(self))} uses {self.num_devices} devices but the engine has {num_devices}: "
                f"its degrees must add up to {num_devices}"
            )
        for group in self.groups:
            if group.num_devices & (group.num_devices - 1) or group.start % group.num_devices:
                raise LayoutError(
                    f"layout {self}: group of {group.num_devices} at device {group.start} is not an aligned power of "
                    f"two; use degrees 1, 2, 4, ... that start at a multiple of themselves"
                )
            if group.tp % base_tp:
                raise LayoutError(
                    f"layout {self}: degree {group.tp} is below the base TP {base_tp} that this model needs; "
                    f"use multiples of {base_tp}"
                )


def _degrees(text: str, num_devices: int) -> tuple[int, ...]:
    text = text.strip().lower()
    parts = [part.strip() for part in text.split("+")]
    if len(text) <= _MAX_TEXT and all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        degrees = tuple(int(part) for part in parts)
        if all(degrees):
            return degrees
    elif match := _ALIAS.fullmatch(text):
        dp, tp = (int(n) if n is not None else None for n in (match["dp"], match["tp"] or match["tp_only"]))
        if dp != 0 and tp != 0:
            tp = tp or max(1, num_devices // (dp or 1))
            return (tp,) * (dp or max(1, num_devices // tp))
    raise LayoutError(
        f"layout {_shorten(text)!r} is not understood: write TP degrees joined by + such as 2+1+1, or dp4, tp4, dp2xtp2"
    )


def _shorten(text: str) -> str:
    return text if len(text) <= 64 else text[:64] + "..."


def all_groups(num_devices: int, base_tp: int) -> tuple[DeviceGroup, ...]:
    """Every group that some layout of these devices can hold, narrow ones first."""
    groups, size = [], base_tp
    while size <= num_devices:
        groups += [DeviceGroup(start, size) for start in range(0, num_devices - size + 1, size)]
        size *= 2
    return tuple(groups)


def max_tp_degree(num_devices: int) -> int:
    """The widest power-of-two group that the devices hold."""
    return 1 << (num_devices.bit_length() - 1)
