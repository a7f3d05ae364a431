"""An engine that finishes no step is noticed without asking it, under a virtual clock."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from fly_jax.config import EngineConfig
from fly_jax.engine.watchdog import SLOWEST_STEPS, Watchdog
from fly_jax.errors import ConfigError, EngineDeadError
from fly_jax.outputs import FinishReason
from tests.fly_jax.scripted_engine import TIMEOUT, ScriptedEngine, fail_during_a_step, running, submit
from tests.fly_jax.virtual_time import VirtualClock

LIMIT = 60.0


def make(timeout: float = LIMIT, slowest_step: float = 0.0) -> tuple[Watchdog, VirtualClock]:
    clock = VirtualClock()
    return Watchdog(timeout, slowest_step, clock), clock


def test_only_work_that_gets_no_further_counts() -> None:
    watchdog, clock = make()
    clock.now = 1000.0
    assert watchdog.stuck_seconds() is None, "nothing to do"
    watchdog.working()
    clock.now += LIMIT
    watchdog.working()
    assert watchdog.stuck_seconds() is None
    clock.now += 1
    assert watchdog.stuck_seconds() == LIMIT + 1
    watchdog.finished_step()
    assert watchdog.stuck_seconds() is None
    clock.now += LIMIT + 1
    assert watchdog.stuck_seconds() == LIMIT + 1
    watchdog.idle()
    assert watchdog.stuck_seconds() is None


@pytest.mark.parametrize(
    ("timeout", "slowest_step", "limit"), [(60.0, 0.5, 60.0), (60.0, 20.0, SLOWEST_STEPS * 20.0), (5.0, 0.01, 5.0)]
)
def test_steps_that_are_slow_by_nature_get_longer(timeout: float, slowest_step: float, limit: float) -> None:
    watchdog, clock = make(timeout, slowest_step)
    watchdog.working()
    clock.now = limit
    assert watchdog.stuck_seconds() is None
    clock.now = limit + 1
    assert watchdog.stuck_seconds() == limit + 1


def test_without_a_timeout_nothing_is_ever_stuck() -> None:
    watchdog, clock = make(0.0, 1.0)
    watchdog.working()
    clock.now = 1e9
    assert watchdog.stuck_seconds() is None


def test_a_blocked_step_is_seen_its_place_is_logged_once_and_it_recovers(caplog: pytest.LogCaptureFixture) -> None:
    watchdog, clock = make()
    engine = ScriptedEngine(held=True)
    with caplog.at_level(logging.WARNING, "fly_jax"), running(engine, watchdog) as thread:
        sink = submit(thread, "a")
        engine.wait_for_step()
        asked = thread.stats()
        clock.now = 30.0
        watchdog.check(thread.ident)
        assert not caplog.records
        clock.now = 61.0
        for _ in range(3):
            watchdog.check(thread.ident)
        assert watchdog.stuck_seconds() is not None
        assert not asked.done(), "the engine's thread answers nobody"
        assert thread.latest_stats.waiting == 1
        engine.go_on()
        assert sink.last_reason() is FinishReason.LENGTH
        asked.result(TIMEOUT)
        assert watchdog.stuck_seconds() is None
        watchdog.check(thread.ident)
        watchdog.check(thread.ident)
    stuck, again = [record.getMessage() for record in caplog.records]
    assert stuck.startswith("the engine has finished no step for 61 s although there is work (--engine-timeout)")
    assert "scripted_engine.py" in stuck
    assert "in step" in stuck
    assert again == "the engine finishes steps again"


def test_a_stuck_engine_is_not_waited_for_at_shutdown() -> None:
    watchdog, clock = make()
    engine = ScriptedEngine(held=True)
    with running(engine, watchdog) as thread:
        sink = submit(thread, "a")
        engine.wait_for_step()
        clock.now = 61.0
        with pytest.raises(EngineDeadError, match="has finished no step for 61 s and is left as it is"):
            thread.shutdown()
        clock.now = 0.0
        engine.go_on()
        thread.shutdown()
        assert isinstance(sink.items[-1], EngineDeadError), "once it goes on, it ends as asked"


def test_passes_that_finish_no_step_count_as_none() -> None:
    """Requests that wait for ever, in a loop that turns, are as stuck as those of a blocked step."""
    watchdog, clock = make()
    engine = ScriptedEngine()
    engine.stalled = True
    with running(engine, watchdog) as thread:
        submit(thread, "a")
        thread.call(lambda _: None).result(TIMEOUT)
        clock.now = 61.0
        turns = engine.steps
        while engine.steps < turns + 3:
            thread.call(lambda _: None).result(TIMEOUT)
        assert watchdog.stuck_seconds() is not None
        clock.now = 0.0


def test_a_thread_of_its_own_watches_and_ends_with_the_engine() -> None:
    watchdog = Watchdog(timeout=600.0)
    with running(ScriptedEngine(), watchdog):
        assert "fly-jax-watchdog" in {thread.name for thread in threading.enumerate()}
    assert watchdog.ended


def test_whoever_watches_for_the_end_is_told_after_those_who_waited() -> None:
    engine = ScriptedEngine(held=True)
    with running(engine) as thread:
        sink, told = submit(thread, "a"), threading.Event()
        seen: list[bool] = []

        def tell() -> None:
            seen.append(sink.done.is_set())
            told.set()

        thread.when_failed(tell)
        fail_during_a_step(engine, lambda: None, RuntimeError("device lost"))
        assert told.wait(TIMEOUT)
        assert seen == [True]
        assert thread.has_failed
        assert isinstance(sink.items[-1], EngineDeadError)
        late = threading.Event()
        thread.when_failed(late.set)
        assert late.is_set(), "it is told at once that it is too late"


def test_an_engine_that_was_shut_down_has_not_failed() -> None:
    called: list[None] = []
    with running(ScriptedEngine()) as thread:
        thread.when_failed(lambda: called.append(None))
    assert not thread.has_failed
    assert not called


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan")])
def test_a_timeout_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"^engine_timeout must be at least 0 seconds, got"):
        EngineConfig(Path("model"), engine_timeout=seconds)
