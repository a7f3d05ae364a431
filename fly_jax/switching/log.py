"""What each switch cost, timed from launches and delivered tokens. Pure Python, no JAX."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fly_jax.kv.slabs import MigrationTotals
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.outputs import SwitchReport, SwitchStrategy
from fly_jax.scheduling.request import Request, RequestState
from fly_jax.switching.strategies import LayoutSwitch
from fly_jax.switching.switch import Switch

HISTORY = 64


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
        self._live: list[Switch] = []

    # -- what happens -----------------------------------------------------------------------------------------

    def begun(self, source: Layout, target: Layout, reason: str, at_pass: int) -> Switch:
        """A switch has been asked for; all streams in flight are watched from here on."""
        switch = Switch(source, target, reason, self._clock(), at_pass, set(self._last_token))
        self._live.append(switch)
        return switch

    def given_up(self, switch: Switch) -> None:
        """The layout stays as it was."""
        self._live.remove(switch)

    def launched(self, group: DeviceGroup) -> int:
        """A step has been launched; returns its number, by which its tokens are known to be of the new layout."""
        self._launches += 1
        now = self._last_launch[group] = self._clock()
        for switch in self._live:
            if group in switch.new_groups:
                switch.new_groups = {}
                self._revise(switch, cutover_seconds=now - switch.started)
        return self._launches

    def delivered(self, request: Request, launch: int) -> None:
        """A token has reached the host."""
        now = self._clock()
        gap = now - self._last_token.get(request, now)
        for switch in self._live:
            if request in switch.awaited:
                switch.worst_gap = max(switch.worst_gap, gap)
                if switch.last_launch is not None and launch > switch.last_launch:
                    switch.awaited.remove(request)
        self._last_token[request] = now

    def ended(self, request: Request) -> None:
        """A request is finished or aborted."""
        self._last_token.pop(request, None)
        for switch in self._live:
            switch.awaited.discard(request)

    def adopted(self, totals: MigrationTotals) -> None:
        """Paused requests were moved outside of any switch; that belongs to the one that paused them."""
        self.tokens_recomputed += totals.tokens_recomputed
        self.kv_bytes_moved += totals.bytes_moved
        pausing = [switch for switch in self._live if switch.report and switch.report.requests_paused]
        if pausing:
            report = pausing[-1].report
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

    def switched(self, switch: Switch, way: LayoutSwitch, started: float, old_in_flight: bool, waiting: int) -> None:
        """The layout has changed.

        Args:
            way: the strategy that it has gone.
            started: when the step boundary at which it changed was reached.
            old_in_flight: steps of the old groups had been launched and not been read.
            waiting: requests in the queue.
        """
        now, groups = self._clock(), way.state.groups
        switch.awaited.update(self._last_token)
        switch.last_launch, switch.started = self._launches, started
        if old_in_flight:
            switch.started = max(self._last_launch.get(group, started) for group in way.dissolving)
        for each in self._live:  # groups that never launched and are no more
            each.new_groups = {group: it for group, it in each.new_groups.items() if groups.get(group) is it}
        switch.new_groups = {group: each for group, each in groups.items() if group not in switch.source.groups}
        self.count[way.strategy] += 1
        self.tokens_recomputed += way.totals.tokens_recomputed
        self.kv_bytes_moved += way.totals.bytes_moved
        self.last_switch = now
        switch.report = self._report(switch, way, started, now - switch.started, waiting)
        self.history.append(switch.report)

    def _report(self, switch: Switch, way: LayoutSwitch, started: float, cutover: float, waiting: int) -> SwitchReport:
        totals = way.totals
        drained = way.strategy in (SwitchStrategy.SEQUENTIAL, SwitchStrategy.SOFT_PREEMPT)
        drain_end = started if drained else switch.asked if switch.hastened is None else switch.hastened
        return SwitchReport(
            number=self.count.total(),
            source=str(switch.source),
            target=str(switch.target),
            strategy=way.strategy,
            reason=switch.reason,
            drain_seconds=drain_end - switch.asked,
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
        for switch in [each for each in self._live if each.report is not None]:
            if not switch.settled and self._is_settled(switch):
                switch.settled = True
            if not switch.settled:
                continue
            report = self._revise(switch, worst_gap_seconds=switch.worst_gap, settled=True)
            if switch.logged is None or not switch.awaited:
                if report != switch.logged:
                    news.append(report)
                switch.logged = report
            if not switch.awaited:
                self._live.remove(switch)
        return news

    def _is_settled(self, switch: Switch) -> bool:
        launches_to_come = any(group.running for group in switch.new_groups.values())
        return not launches_to_come and not any(each.state is RequestState.RUNNING for each in switch.awaited)

    def _revise(self, switch: Switch, **changes: Any) -> SwitchReport:
        old = switch.report
        assert old is not None
        report = replace(old, **changes)
        if report != old:
            switch.report = report
            if old in self.history:
                self.history[self.history.index(old)] = report
        return report
