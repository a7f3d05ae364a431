"""One change of layout while it lives. Pure Python, no JAX."""

from __future__ import annotations

from dataclasses import dataclass, field

from fly_jax.errors import LayoutError
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.outputs import SwitchReport
from fly_jax.scheduling.group import GroupScheduler
from fly_jax.scheduling.request import Request


@dataclass(eq=False, slots=True)
class Switch:
    """A change of layout, from when it begins until no stream waits for a token across it.

    Times are seconds of the engine's clock.

    Attributes:
        asked: when it began.
        begun_at_pass: pass of the step loop since which the strategy in force has been trying.
        awaited: streams that have got no token from a step that was launched after the cutover.
        hastened: when a drain became a migration.
        worst_gap: longest time between two tokens of one of the awaited streams.
        last_launch: number of the last launch before the cutover; None while the old layout is in force.
        started: when the cutover began.
        new_groups: those whose first launch ends the cutover; emptied by it.
        report: what it has cost so far, from the cutover on.
        error: why the layout stayed as it was.
        settled: the report is there and only paused requests may still change it, or the error is there.
        logged: the report as it was when it was last handed out.
    """

    source: Layout
    target: Layout
    reason: str
    asked: float
    begun_at_pass: int = 0
    awaited: set[Request] = field(default_factory=set)
    hastened: float | None = None
    worst_gap: float = 0.0
    last_launch: int | None = None
    started: float = 0.0
    new_groups: dict[DeviceGroup, GroupScheduler] = field(default_factory=dict)
    report: SwitchReport | None = None
    error: LayoutError | None = None
    settled: bool = False
    logged: SwitchReport | None = None
