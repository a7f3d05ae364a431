"""What a change of layout asks of the scheduler while it is under way. Pure Python, no JAX."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from fly_jax.layout import DeviceGroup, Layout
from fly_jax.scheduling.request import Request


class SwitchHooks(Protocol):
    """Asked by the scheduler at the points where a change of layout has a say."""

    @property
    def destination(self) -> tuple[Layout, bool] | None:
        """The layout that a switch under way leads to, and whether it may widen once it is there."""
        ...

    @property
    def dissolving(self) -> Collection[DeviceGroup]:
        """Groups in force that the destination does not have."""
        ...

    def admits(self, group: DeviceGroup, request: Request, /) -> bool:
        """Whether a group may start a request meanwhile."""
        ...

    def returning(self) -> Sequence[Request]:
        """Waiting requests without which the switch cannot go on, by rank."""
        ...

    def forget(self, request: Request, /) -> None:
        """A request has ended or lost its KV."""

    def reclaim(self, group: DeviceGroup, /) -> bool:
        """Frees blocks that were taken ahead on a group's devices; False if there are none."""
        ...

    def resume_overdue(self) -> set[DeviceGroup]:
        """Paused requests go on where they have waited too long.

        Returns:
            The groups that those left are in line for: nobody else starts there.
        """
        ...

    def resume_idle(self) -> None:
        """Paused requests go on where nobody else wants to."""


class FixedLayout:
    """The layout never changes."""

    destination: tuple[Layout, bool] | None = None
    dissolving: Collection[DeviceGroup] = ()

    def admits(self, _group: DeviceGroup, _request: Request) -> bool:
        return True

    def returning(self) -> Sequence[Request]:
        return ()

    def forget(self, _request: Request) -> None:
        pass

    def reclaim(self, _group: DeviceGroup) -> bool:
        return False

    def resume_overdue(self) -> set[DeviceGroup]:
        return set()

    def resume_idle(self) -> None:
        pass
