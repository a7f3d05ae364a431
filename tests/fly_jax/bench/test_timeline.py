"""Layouts over time, from scripted answers of ``GET /layout``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fly_jax.bench.timeline import LayoutChange, LayoutTimeline, LayoutWatcher

State = dict[str, Any] | None


def state(layout: str, *switches: tuple[int, str, float]) -> State:
    history = [{"number": number, "target": target, "worst_gap_seconds": gap} for number, target, gap in switches]
    return {"layout": layout, "switch_history": history}


def watched(answers: Sequence[State]) -> tuple[bool, LayoutTimeline]:
    """The first answer at the start, each other one a second later."""

    async def main() -> tuple[bool, LayoutTimeline]:
        left = list(answers)

        async def fetch(_: float) -> State:
            return left.pop(0)

        watcher = LayoutWatcher(fetch, lambda: float(len(answers) - len(left) - 1))
        has_layouts = await watcher.start()
        while left:
            await watcher.poll()
        return has_layouts, watcher.timeline()

    return asyncio.run(main())


def test_a_layout_that_stays_is_one_entry() -> None:
    assert watched([state("2+2"), state("2+2")]) == (True, LayoutTimeline((LayoutChange(0.0, "2+2"),)))


def test_switches_from_before_the_run_do_not_count() -> None:
    before = (6, "4", 0.5)
    has_layouts, timeline = watched([state("4", before), state("4", before), state("2+2", before, (7, "2+2", 0.02))])
    assert has_layouts
    assert timeline.changes == (LayoutChange(0.0, "4"), LayoutChange(2.0, "2+2"))
    assert (timeline.switches, timeline.switch_stalls) == (1, (0.02,))


def test_two_switches_between_two_polls_are_both_seen() -> None:
    _, timeline = watched([state("4"), state("4", (1, "2+2", 0.1), (2, "4", 0.2))])
    assert timeline.changes == (LayoutChange(0.0, "4"), LayoutChange(1.0, "2+2"), LayoutChange(1.0, "4"))
    assert timeline.switch_stalls == (0.1, 0.2)


def test_a_stall_that_grew_is_the_later_figure_and_a_missed_poll_is_left_out() -> None:
    _, timeline = watched([state("4"), state("2+2", (1, "2+2", 0.1)), None, state("2+2", (1, "2+2", 0.3))])
    assert timeline.changes == (LayoutChange(0.0, "4"), LayoutChange(1.0, "2+2"))
    assert timeline.switch_stalls == (0.3,)


def test_reports_that_left_the_history_still_count() -> None:
    _, timeline = watched([state("4"), state("2+2", (1, "2+2", 0.1)), state("4", (2, "4", 0.2))])
    assert timeline.switch_stalls == (0.1, 0.2)


def test_other_servers_have_no_timeline() -> None:
    for answer in (None, {"detail": "Not Found"}, {"layout": "wide"}):
        assert watched([answer]) == (False, LayoutTimeline())


def test_the_first_answer_is_waited_for_and_a_late_poll_is_soon_left_out() -> None:
    waited: list[float] = []

    async def fetch(seconds: float) -> State:
        waited.append(seconds)
        return state("4")

    async def main() -> None:
        watcher = LayoutWatcher(fetch, lambda: 0.0)
        await watcher.start()
        await watcher.poll()

    asyncio.run(main())
    at_start, of_a_poll = waited
    assert at_start >= 60
    assert of_a_poll <= 1
