from __future__ import annotations

import itertools
import logging
import threading
from concurrent.futures import Future
from typing import cast

import pytest

from fly_jax.engine import thread as engine_thread
from fly_jax.engine.engine import Engine
from fly_jax.errors import ConfigError, ContextLengthError, EngineDeadError, LayoutError
from fly_jax.outputs import FinishReason, RequestDelta, SwitchReport, SwitchStrategy
from fly_jax.sampling_params import SamplingParams
from tests.fly_jax.scripted_engine import PARAMS, TIMEOUT, ScriptedEngine, Sink, fail_during_a_step, running, submit
from tests.fly_jax.simulated_runner import expected_output, simulated_engine


def test_a_request_gets_its_deltas_in_order_and_one_end() -> None:
    with running(ScriptedEngine()) as thread:
        items = submit(thread, "a").wait()
    assert [cast(RequestDelta, item).token_ids for item in items] == [(4,), (3,), (2,), (1,), (0,)]
    assert [cast(RequestDelta, item).finish_reason for item in items] == [None] * 4 + [FinishReason.LENGTH]


def test_all_work_happens_on_one_thread() -> None:
    engine = ScriptedEngine()
    with running(engine) as thread:
        sinks = [submit(thread, f"r{i}") for i in range(5)]
        for sink in sinks:
            sink.wait()
        names = {thread.call(lambda _: threading.current_thread().name).result(TIMEOUT) for _ in range(3)}
    assert engine.threads == names
    assert threading.current_thread().name not in names


def test_a_refused_request_fails_its_own_future_alone() -> None:
    with running(ScriptedEngine()) as thread:
        refused, sink = Sink(), submit(thread, "good")
        with pytest.raises(ContextLengthError, match="too long"):
            thread.submit("bad", [0] * 101, PARAMS, refused).result(TIMEOUT)
        assert sink.last_reason() is FinishReason.LENGTH
        assert not refused.items
        assert thread.is_alive


def test_an_abort_ends_a_request_at_once_and_twice_is_once() -> None:
    engine = ScriptedEngine(held=True)
    with running(engine) as thread:
        sink = submit(thread, "a")
        engine.wait_for_step()
        aborts = [thread.abort("a"), thread.abort("a"), thread.abort("never seen")]
        engine.go_on()
        for abort in aborts:
            abort.result(TIMEOUT)
        assert sink.last_reason() is FinishReason.ABORT
        assert len(sink.items) == 2
        assert not engine.live


@pytest.mark.parametrize("strategies", list(itertools.product(SwitchStrategy, repeat=3)), ids=str)
def test_switches_follow_each_other_in_order(strategies: tuple[SwitchStrategy, ...]) -> None:
    engine = ScriptedEngine(held=True)
    with running(engine) as thread:
        submit(thread, "a")
        engine.wait_for_step()
        asked = zip(("2", "4", "1"), strategies, strict=True)
        switches = [thread.switch(layout, strategy) for layout, strategy in asked]
        engine.go_on()
        reports = [future.result(TIMEOUT) for future in switches]
    assert [(report.source, report.target) for report in reports] == [("1", "2"), ("2", "4"), ("4", "1")]
    assert tuple(report.strategy for report in reports) == strategies


def test_a_switch_that_fails_on_the_devices_ends_the_engine_and_is_answered() -> None:
    engine = ScriptedEngine(held=True)
    with running(engine) as thread:
        sink = submit(thread, "a")
        engine.wait_for_step()

        def fail(engine: Engine) -> None:
            cast(ScriptedEngine, engine).failure = RuntimeError("device lost")

        failing = thread.call(fail)
        switch = thread.switch("2")
        engine.go_on()
        failing.result(TIMEOUT)
        with pytest.raises(EngineDeadError, match=r"it failed, and its log says why$"):
            switch.result(TIMEOUT)
        assert isinstance(sink.wait()[-1], EngineDeadError)


def test_a_layout_that_is_not_understood_fails_its_own_future_alone() -> None:
    with running(ScriptedEngine()) as thread:
        with pytest.raises(LayoutError, match="not understood"):
            thread.switch("nonsense").result(TIMEOUT)
        assert thread.switch("2").result(TIMEOUT).target == "2"


def test_a_switch_that_is_refused_when_it_begins_or_later_fails_its_own_future_and_the_next_follows() -> None:
    engine = ScriptedEngine(held=True)
    with running(engine) as thread:
        submit(thread, "a")
        engine.wait_for_step()
        given_up, in_force, good = thread.switch("3"), thread.switch("1"), thread.switch("2")
        engine.go_on()
        with pytest.raises(LayoutError, match="has grown"):
            given_up.result(TIMEOUT)
        with pytest.raises(LayoutError, match="in force"):
            in_force.result(TIMEOUT)
        assert good.result(TIMEOUT).target == "2"
        assert thread.is_alive


@pytest.mark.parametrize("layout", ["2", "nonsense"])
def test_a_switch_whose_caller_has_gone_away_does_not_stop_the_engine(layout: str) -> None:
    engine = ScriptedEngine(held=True)
    with running(engine) as thread:
        sink = submit(thread, "a")
        engine.wait_for_step()
        thread.switch(layout).cancel()
        engine.go_on()
        assert sink.last_reason() is FinishReason.LENGTH
        assert thread.switch("4").result(TIMEOUT).target == "4"
        assert thread.is_alive


def test_a_caller_may_go_away_while_its_switch_is_under_way() -> None:
    engine = ScriptedEngine(held=True)
    with running(engine) as thread:
        abandoned = thread.switch("2", SwitchStrategy.SEQUENTIAL)
        engine.wait_for_step()
        abandoned.cancel()
        engine.go_on()
        assert thread.switch("4").result(TIMEOUT).source == "2"
        assert thread.is_alive


def test_a_switchs_policy_takes_over_before_the_next_switch_begins() -> None:
    engine = ScriptedEngine(held=True)
    with running(engine) as thread:
        submit(thread, "a")
        engine.wait_for_step()
        followed, pinned = thread.switch("2", policy="auto"), thread.switch("4")
        engine.go_on()
        assert (followed.result(TIMEOUT).target, pinned.result(TIMEOUT).target) == ("2", "4")
        assert engine.policy == "static"
        thread.switch("2", policy="auto").result(TIMEOUT)
        assert engine.policy == "auto"


@pytest.mark.parametrize(("layout", "message"), [("3", "has grown"), ("1", "in force")])
def test_a_switch_that_is_not_made_brings_no_policy(layout: str, message: str) -> None:
    engine = ScriptedEngine()
    engine.policy = "as before"
    with running(engine) as thread:
        with pytest.raises(LayoutError, match=message):
            thread.switch(layout, policy="auto").result(TIMEOUT)
        assert engine.policy != "auto"


@pytest.mark.parametrize(
    ("policy", "reason"), [("unfit", "a request needs a wider group"), ("unknown", "there is no policy 'unknown'")]
)
def test_a_policy_that_cannot_take_over_fails_as_one_and_the_switch_stays(policy: str, reason: str) -> None:
    engine = ScriptedEngine()
    with running(engine) as thread:
        error = thread.switch("2", policy=policy).exception(TIMEOUT)
        assert type(error) is ConfigError
        assert str(error) == f"the layout is 2 now and stays: {reason}"
        assert (engine.layout.degrees, engine.policy) == ((2,), "static")
        assert thread.switch("4").result(TIMEOUT).source == "2"


def test_a_real_switchs_policy_does_not_undo_the_pin_of_the_next() -> None:
    engine, _ = simulated_engine(layout="1+1+1+1")
    with running(engine) as thread:
        sinks = [Sink() for _ in range(4)]
        for i, sink in enumerate(sinks):
            thread.submit(f"r{i}", [i + 1], SamplingParams(max_tokens=60, ignore_eos=True), sink).result(TIMEOUT)
        asked = [thread.switch("4", policy="auto"), thread.switch("2+2")]
        assert [future.result(TIMEOUT).target for future in asked] == ["4", "2+2"]
        for sink in sinks:
            sink.wait()
        assert thread.call(_layout_and_policy).result(TIMEOUT) == ("2+2", "static")
        thread.switch("4", policy="auto").result(TIMEOUT)
        assert thread.call(_layout_and_policy).result(TIMEOUT)[1] == "load_adaptive"


def _layout_and_policy(engine: Engine) -> tuple[str, str]:
    return str(engine.layout), engine.control.policy


def test_an_engine_whose_requests_can_only_wait_looks_again_after_a_moment() -> None:
    """Nobody asks for anything: what they wait for may be a matter of time alone."""
    engine = ScriptedEngine(held=True)
    engine.stalled = True
    with running(engine) as thread:
        submit(thread, "a")
        for _ in range(3):
            engine.wait_for_step()
            engine.may_step.release()


def test_an_engine_whose_requests_can_only_wait_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment does not pass here, so each command brings one step at most; a loop that spins makes thousands."""
    monkeypatch.setattr(engine_thread, "STALL_SECONDS", TIMEOUT)
    engine = ScriptedEngine()
    engine.stalled = True
    with running(engine) as thread:
        sink = submit(thread, "a")
        for commands in range(2, 22):
            assert thread.call(lambda _: engine.steps).result(TIMEOUT) < commands
        assert not sink.items

        def go_on(engine: Engine) -> None:
            cast(ScriptedEngine, engine).stalled = False

        thread.call(go_on).result(TIMEOUT)
        assert sink.last_reason() is FinishReason.LENGTH


def test_a_call_that_was_cancelled_in_time_is_not_made() -> None:
    engine, calls = ScriptedEngine(held=True), []
    with running(engine) as thread:
        submit(thread, "a")
        engine.wait_for_step()
        assert thread.call(lambda _: calls.append("cancelled")).cancel()
        engine.go_on()
        thread.call(lambda _: calls.append("made")).result(TIMEOUT)
    assert calls == ["made"]


def test_a_call_that_raises_fails_its_own_future_alone() -> None:
    def fail(_: Engine) -> None:
        raise ZeroDivisionError("mine")

    with running(ScriptedEngine()) as thread:
        with pytest.raises(ZeroDivisionError, match="mine"):
            thread.call(fail).result(TIMEOUT)
        assert submit(thread, "a").last_reason() is FinishReason.LENGTH


def test_a_receiver_that_raises_takes_nobody_with_it() -> None:
    engine = ScriptedEngine()
    with running(engine) as thread:

        def broken(_: object) -> None:
            raise RuntimeError("receiver")

        thread.submit("broken", [1, 2], PARAMS, broken).result(TIMEOUT)
        assert submit(thread, "b").last_reason() is FinishReason.LENGTH
        assert thread.is_alive


def test_a_failed_step_answers_the_others_even_if_a_receiver_raises() -> None:
    engine = ScriptedEngine(held=True)
    with running(engine) as thread:

        def broken(_: object) -> None:
            raise RuntimeError("receiver")

        thread.submit("broken", [1, 2], PARAMS, broken).result(TIMEOUT)
        late = fail_during_a_step(engine, thread.stats, ValueError("step"))
        with pytest.raises(EngineDeadError):
            late.result(TIMEOUT)


def test_a_failed_step_ends_every_request_with_its_cause() -> None:
    engine = ScriptedEngine(held=True)
    with running(engine) as thread:
        sinks = [submit(thread, "a")]
        error = RuntimeError("device lost")
        switch = fail_during_a_step(engine, lambda: thread.switch("2"), error)
        for sink in sinks:
            last = sink.wait()[-1]
            assert isinstance(last, EngineDeadError)
            assert str(last) == "the engine has stopped: it failed, and its log says why"
            assert last.__cause__ is error
        with pytest.raises(EngineDeadError, match=r"it failed, and its log says why$"):
            switch.result(TIMEOUT)
        assert not thread.is_alive


def test_what_is_asked_for_while_the_engine_fails_is_answered_too() -> None:
    """A request that is accepted after the last step must still get an end; nobody may wait for ever."""
    engine = ScriptedEngine(held=True)
    with running(engine) as thread:
        submit(thread, "a")
        late = Sink()

        def ask() -> tuple[Future[None], Future[SwitchReport]]:
            return thread.submit("late", [1], PARAMS, late), thread.switch("2")

        submitted, switch = fail_during_a_step(engine, ask, RuntimeError("device lost"))
        with pytest.raises(EngineDeadError):
            switch.result(TIMEOUT)
        if submitted.exception(TIMEOUT) is None:
            assert isinstance(late.wait()[-1], EngineDeadError)
        else:
            assert isinstance(submitted.exception(), EngineDeadError)


def test_everything_fails_at_once_after_the_end() -> None:
    with running(ScriptedEngine()) as thread:
        pass
    assert not thread.is_alive
    for future in (thread.abort("a"), thread.switch("2"), thread.submit("a", [1], PARAMS, Sink()), thread.stats()):
        with pytest.raises(EngineDeadError, match="shut down"):
            future.result(TIMEOUT)


def test_shutdown_ends_live_requests_and_may_be_called_twice() -> None:
    engine = ScriptedEngine(held=True)
    with running(engine) as thread:
        sink = submit(thread, "a", SamplingParams(max_tokens=1000))
        engine.wait_for_step()
        stopper = threading.Thread(target=thread.shutdown)
        stopper.start()
        engine.go_on()
        stopper.join(TIMEOUT)
        thread.shutdown()
        assert isinstance(sink.wait()[-1], EngineDeadError)


def test_shutdown_answers_every_switch_that_was_asked_for() -> None:
    """One is under way and two wait for it; their callers must not wait for ever."""
    engine = ScriptedEngine(held=True)
    with running(engine) as thread:
        submit(thread, "a", SamplingParams(max_tokens=1000))
        engine.wait_for_step()
        switches = [thread.switch(layout) for layout in ("2", "4", "1")]
        stopper = threading.Thread(target=thread.shutdown)
        stopper.start()
        engine.go_on()
        stopper.join(TIMEOUT)
        assert all(future.done() for future in switches)
        for future in switches:
            if (error := future.exception(TIMEOUT)) is not None:
                assert isinstance(error, EngineDeadError)


def test_shutdown_says_in_one_line_what_it_did_not_carry_through(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine(held=True)
    engine.stalled = True  # no switch is ever through
    with caplog.at_level(logging.WARNING), running(engine) as thread:
        asked = [thread.switch("2")]
        engine.wait_for_step()
        asked.append(thread.switch("4"))
        policy = thread.set_policy("auto")
        engine.go_on()
        thread.shutdown()
        assert all(isinstance(future.exception(TIMEOUT), EngineDeadError) for future in (*asked, policy))
    [line] = [record.getMessage() for record in caplog.records]
    assert line == "the engine ends, not carried through: switch to 2 (under way), switch to 4 (queued), policy auto"


@pytest.mark.parametrize("strategy", SwitchStrategy)
def test_shutdown_in_the_middle_of_a_real_switch_answers_everybody(strategy: SwitchStrategy) -> None:
    engine, _ = simulated_engine(layout="1+1+1+1", num_blocks=64, max_model_len=250)
    reached, go_on = threading.Event(), threading.Event()

    def hold(engine: Engine) -> None:
        """Lets the queue fill: nothing happens between this and what is asked for meanwhile."""
        engine.step()
        reached.set()
        assert go_on.wait(TIMEOUT)

    with running(engine) as thread:
        sinks = {i: Sink() for i in range(1, 6)}
        for i, sink in sinks.items():
            params = SamplingParams(max_tokens=200, ignore_eos=True)
            thread.submit(f"r{i}", [i] * 20, params, sink).result(TIMEOUT)
        held = thread.call(hold)
        assert reached.wait(TIMEOUT)
        switches = [thread.switch(layout, strategy) for layout in ("4", "2+2", "dp4")]
        stopper = threading.Thread(target=thread.shutdown)
        stopper.start()
        go_on.set()
        stopper.join(TIMEOUT)
        held.result(TIMEOUT)
        for future in switches:
            assert future.done()
            error = future.exception(TIMEOUT)
            assert error is None or isinstance(error, EngineDeadError)
        assert all(isinstance(sink.wait()[-1], EngineDeadError) or sink.last_reason() for sink in sinks.values())


@pytest.mark.parametrize("strategies", list(itertools.product(SwitchStrategy, repeat=2)), ids=str)
def test_switches_asked_for_while_a_real_one_is_under_way_are_carried_out_in_order(
    strategies: tuple[SwitchStrategy, SwitchStrategy],
) -> None:
    engine, _ = simulated_engine(layout="1+1+1+1", num_blocks=64)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    with running(engine) as thread:
        sinks = {i: Sink() for i in range(1, 9)}
        for i, sink in sinks.items():
            thread.submit(f"r{i}", [i] * (5 * i), params, sink).result(TIMEOUT)
        layouts = ("4", "2+1+1", "1+1+2", "2+2")
        asked = zip(layouts, strategies * 2, strict=True)
        reports = [future.result(TIMEOUT) for future in [thread.switch(*each) for each in asked]]
        assert [report.target for report in reports] == list(layouts)
        assert [report.source for report in reports] == ["1+1+1+1", *layouts[:-1]]
        assert [report.number for report in reports] == [1, 2, 3, 4]
        for i, sink in sinks.items():
            tokens = [token for item in sink.wait() for token in cast(RequestDelta, item).token_ids]
            assert tokens == expected_output([i] * (5 * i), 60, ignore_eos=True)
        assert engine.kv.usage == 0.0


@pytest.mark.parametrize("strategy", SwitchStrategy)
def test_the_real_loop_serves_and_switches_under_load(strategy: SwitchStrategy) -> None:
    engine, _ = simulated_engine(layout="1+1+1+1")
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    with running(engine) as thread:
        sinks = {i: Sink() for i in range(1, 13)}
        for i, sink in sinks.items():
            thread.submit(f"r{i}", [i], params, sink).result(TIMEOUT)
        reports = [thread.switch(layout, strategy) for layout in ("2+2", "4", "dp4")]
        assert [future.result(TIMEOUT).target for future in reports] == ["2+2", "4", "1+1+1+1"]
        for i, sink in sinks.items():
            tokens = [token for item in sink.wait() for token in cast(RequestDelta, item).token_ids]
            assert tokens == expected_output([i], 20, ignore_eos=True)
        assert engine.kv.usage == 0.0
