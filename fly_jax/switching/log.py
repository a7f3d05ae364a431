"""What each switch cost, timed from launches and delivered tokens. Pure Python, no JAX."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from fly_jax.errors import LayoutError
from fly_jax.kv.slabs import MigrationTotals
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.outputs import SwitchReport, SwitchStrategy
from fly_jax.scheduling.group import GroupScheduler
from fly_jax.scheduling.request import Request, RequestState
from fly_jax.switching.strategies import LayoutSwitch

HISTORY = 64


@dataclass(eq=False, slots=True)
class SwitchTicket:
    """A switch that has begun.

    Attributes:
        asked: when.
        hastened: when a drain became a migration.
        settled: the report is there and only paused requests may still change it, or the error is there.
        error: why the layout stayed as it was.
    """

    source: Layout
    target: Layout
    reason: str
    asked: float
    hastened: float | None = None
    report: SwitchReport | None = None
    error: LayoutError | None = None
    settled: bool = False


@dataclass(eq=False, slots=True)
class _Watch:
    """A switch whose consequences are being timed, from the moment it was asked for.

    Attributes:
        awaited: streams that have got no token from a step that was launched after the cutover.
        worst_gap: longest time between two tokens of one of these.
        last_launch: number of the last launch before the cutover; None while the old layout is in force.
        started: when the cutover began.
        new_groups: those whose first launch ends the cutover; emptied by it.
        logged: the report as it was when it was last handed out.
    """

    ticket: SwitchTicket
    awaited: set[Request]
    worst_gap: float = 0.0
    last_launch: int | None = None
    started: float = 0.0
    new_groups: dict[DeviceGroup, GroupScheduler] = field(default_factory=dict)
    logged: SwitchReport | None = None


class SwitchLog:
    """Keeps the reports of the latest switches.

    Args:
        clock: seconds, real or virtual.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.history: deque[SwitchReport] = deque(maxlen=HISTORY)
        self.count: Counter[SwitchStrategy] = Counter()
        self.tokens_recomputed = 0
        self.kv_bytes_moved = 0
        self.last_switch: float | None = None
        self._clock = clock
        self._launches = 0
        self._last_launch: dict[DeviceGroup, float] = {}
        self._last_token: dict[Request, float] = {}
        self._watches: list[_Watch] = []

    # -- what happens -----------------------------------------------------------------------------------------

    def begun(self, source: Layout, target: Layout, reason: str) -> SwitchTicket:
        """A switch has been asked for; all streams in flight are watched from here on."""
        ticket = SwitchTicket(source, target, reason, self._clock())
        self._watches.append(_Watch(ticket, set(self._last_token)))
        return ticket

    def given_up(self, ticket: SwitchTicket) -> None:
        """The layout stays as it was."""
        self._watches = [watch for watch in self._watches if watch.ticket is not ticket]

    def launched(self, group: DeviceGroup) -> int:
        """A step has been launched; returns its number, by which its tokens are known to be of the new layout."""
        self._launches += 1
        now = self._last_launch[group] = self._clock()
        for watch in self._watches:
            if group in watch.new_groups:
                watch.new_groups = {}
                self._revise(watch, cutover_seconds=now - watch.started)
        return self._launches

    def delivered(self, request: Request, launch: int) -> None:
        """A token has reached the host."""
        now = self._clock()
        gap = now - self._last_token.get(request, now)
        for watch in self._watches:
            if request in watch.awaited:
                watch.worst_gap = max(watch.worst_gap, gap)
                if watch.last_launch is not None and launch > watch.last_launch:
                    watch.awaited.remove(request)
        self._last_token[request] = now

    def ended(self, request: Request) -> None:
        """A request is finished or aborted."""
        self._last_token.pop(request, None)
        for watch in self._watches:
            watch.awaited.discard(request)

    def adopted(self, totals: MigrationTotals) -> None:
        """Paused requests were moved outside of any switch; that belongs to the one that paused them."""
        self.tokens_recomputed += totals.tokens_recomputed
        self.kv_bytes_moved += totals.bytes_moved
        pausing = [watch for watch in self._watches if watch.ticket.report and watch.ticket.report.requests_paused]
        if pausing:
            report = pausing[-1].ticket.report
            assert report is not None
            self._revise(
                pausing[-1],
                requests_adopted=report.requests_adopted + totals.requests,
                kv_bytes_adopted=report.kv_bytes_adopted + totals.bytes_moved,
                kv_bytes_moved=report.kv_bytes_moved + totals.bytes_moved,
                kv_blocks_moved=report.kv_blocks_moved + totals.blocks_moved,
                relayout_launches=report.relayout_launches + totals.launches,
                tokens_recomputed=report.tokens_recomputed + totals.tokens_recomputed,
            )

    def switched(
        self, ticket: SwitchTicket, switch: LayoutSwitch, started: float, old_in_flight: bool, waiting: int
    ) -> None:
        """The layout has changed.

        Args:
            started: when the step boundary at which it changed was reached.
            old_in_flight: steps of the old groups had been launched and not been read.
            waiting: requests in the queue.
        """
        now, groups = self._clock(), switch.state.groups
        watch = next(each for each in self._watches if each.ticket is ticket)
        watch.awaited.update(self._last_token)
        watch.last_launch, watch.started = self._launches, started
        if old_in_flight:
            watch.started = max(self._last_launch.get(group, started) for group in switch.dissolving)
        for each in self._watches:  # groups that never launched and are no more
            each.new_groups = {group: it for group, it in each.new_groups.items() if groups.get(group) is it}
        watch.new_groups = {group: each for group, each in groups.items() if group not in ticket.source.groups}
        self.count[switch.strategy] += 1
        self.tokens_recomputed += switch.totals.tokens_recomputed
        self.kv_bytes_moved += switch.totals.bytes_moved
        self.last_switch = now
        ticket.report = self._report(ticket, switch, started, now - watch.started, waiting)
        self.history.append(ticket.report)

    def _report(
        self, ticket: SwitchTicket, switch: LayoutSwitch, started: float, cutover: float, waiting: int
    ) -> SwitchReport:
        totals = switch.totals
        drained = switch.strategy in (SwitchStrategy.SEQUENTIAL, SwitchStrategy.SOFT_PREEMPT)
        drain_end = started if drained else ticket.asked if ticket.hastened is None else ticket.hastened
        return SwitchReport(
            number=self.count.total(),
            source=str(ticket.source),
            target=str(ticket.target),
            strategy=switch.strategy,
            reason=ticket.reason,
            drain_seconds=drain_end - ticket.asked,
            precopy_seconds=started - drain_end if totals.bytes_ahead else 0.0,
            cutover_seconds=cutover,
            requests_moved=totals.requests,
            requests_paused=totals.paused,
            kv_bytes_moved=totals.bytes_moved,
            kv_bytes_precopied=totals.bytes_ahead,
            kv_blocks_moved=totals.blocks_moved,
            relayout_launches=totals.launches,
            tokens_recomputed=totals.tokens_recomputed,
            requests_waiting=waiting,
        )

    def settle(self) -> list[SwitchReport]:
        """Completes reports; those that are now settled, and those that paused requests have changed since."""
        news = []
        for watch in [each for each in self._watches if each.ticket.report is not None]:
            if not watch.ticket.settled and self._is_settled(watch):
                watch.ticket.settled = True
            if not watch.ticket.settled:
                continue
            report = self._revise(watch, worst_gap_seconds=watch.worst_gap, settled=True)
            if watch.logged is None or not watch.awaited:
                if report != watch.logged:
                    news.append(report)
                watch.logged = report
            if not watch.awaited:
                self._watches.remove(watch)
        return news

    def _is_settled(self, watch: _Watch) -> bool:
        launches_to_come = any(group.running for group in watch.new_groups.values())
        return not launches_to_come and not any(each.state is RequestState.RUNNING for each in watch.awaited)

    def _revise(self, watch: _Watch, **changes: Any) -> SwitchReport:
        old = watch.ticket.report
        assert old is not None
        report = replace(old, **changes)
        if report != old:
            watch.ticket.report = report
            if old in self.history:
                self.history[self.history.index(old)] = report
        return report
