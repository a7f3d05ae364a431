"""The one thread that owns an engine: everything else talks to it through a queue."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fly_jax.engine.engine import Engine
from fly_jax.engine.watchdog import Watchdog
from fly_jax.errors import ConfigError, EngineDeadError, FlyJaxError, LayoutError
from fly_jax.layout import Layout
from fly_jax.outputs import EngineStats, RequestDelta, SwitchReport, SwitchStrategy
from fly_jax.policy.adaptive import Policy, name_of
from fly_jax.sampling_params import SamplingParams
from fly_jax.switching.switch import Switch

logger = logging.getLogger(__name__)

# How long a command is waited for when requests can only wait too: what they wait for may be a matter of time alone.
STALL_SECONDS = 0.001
# How often whoever waits for the thread's end asks whether it is stuck.
JOIN_SECONDS = 1.0

T = TypeVar("T")
Command = Callable[[Engine], None]
Sink = Callable[[RequestDelta | EngineDeadError], None]


@dataclass(eq=False, slots=True)
class _PendingPolicy:
    """A change of policy that waits for the switches asked for before it."""

    policy: str | Policy
    done: Future[str]

    def __str__(self) -> str:
        return f"policy {name_of(self.policy)}"


@dataclass(eq=False, slots=True)
class _PendingSwitch:
    """A switch that somebody asked for and waits for.

    Attributes:
        policy: takes over once it is through; None: the layout stays pinned.
        switch: None until it has begun.
    """

    layout: Layout
    strategy: SwitchStrategy | None
    policy: str | None
    done: Future[SwitchReport]
    switch: Switch | None = None

    def __str__(self) -> str:
        return f"switch to {self.layout} ({'queued' if self.switch is None else 'under way'})"


class EngineThread:
    """Runs the step loop while there is work and sleeps when there is none.

    Methods are thread-safe. A sink is called on the engine's thread with each of its request's deltas, or once
    with EngineDeadError; it must return at once and never raise.

    Args:
        watchdog: told of every step; None: one that never barks.

    Attributes:
        latest_stats: the engine's counters after its latest step or command, which nobody has to wait for.
    """

    def __init__(self, engine: Engine, watchdog: Watchdog | None = None) -> None:
        self.watchdog = watchdog or Watchdog(timeout=0)
        self.latest_stats = engine.stats()
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._switches: deque[_PendingSwitch | _PendingPolicy] = deque()  # in the order in which they were asked for
        self._stopping = False
        self._failure: BaseException | None = None
        self._on_failure: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        # The engine lives in the thread's arguments alone, so that its memory is freed when the thread ends.
        self._thread = threading.Thread(target=self._run, args=(engine,), name="fly-jax-engine", daemon=True)
        self._thread.start()
        self.watchdog.watch(self._thread)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._failure is None and not self._stopping

    @property
    def ident(self) -> int | None:
        """The thread's identifier, as in :mod:`threading`."""
        return self._thread.ident

    @property
    def has_failed(self) -> bool:
        """It ended by itself, and everybody who waited has been told."""
        return self._failure is not None

    def when_failed(self, callback: Callable[[], None]) -> None:
        """Calls back once if the engine fails by itself, after everybody who waits has been told; on its thread."""
        with self._lock:
            self._on_failure.append(callback)
            failed = self._failure is not None
        if failed:
            self._report_failure()

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        sink: Sink,
        *,
        bounded: bool = True,
        client: str | None = None,
    ) -> Future[None]:
        """Queues a request; arguments, and with what the future may fail, are those of :meth:`Engine.add_request`."""

        def add(engine: Engine) -> None:
            engine.add_request(request_id, prompt_ids, params, bounded=bounded, client=client)
            self._sinks[request_id] = sink

        return self.call(add)

    def abort(self, request_id: str) -> Future[None]:
        """Ends a request; its sink gets a last delta with finish reason ABORT."""

        def end(engine: Engine) -> None:
            if (delta := engine.abort(request_id)) is not None:
                self._deliver(delta)

        return self.call(end)

    def switch(
        self, layout: str, strategy: SwitchStrategy | None = None, policy: str | None = None
    ) -> Future[SwitchReport]:
        """Goes to another layout and keeps it; switches asked for while one is under way follow in order.

        Args:
            strategy: what becomes of requests in flight; None: the configured one.
            policy: takes over after this switch and before the next; None: the layout stays pinned. If it cannot, the
                switch has still been made and the future fails with ConfigError.
        """
        done: Future[SwitchReport] = Future()

        def begin(engine: Engine) -> None:
            if not done.set_running_or_notify_cancel():  # from here on the caller cannot cancel it
                return
            try:
                self._check_running()
                self._switches.append(_PendingSwitch(engine.control.parse(layout), strategy, policy, done))
            except Exception as error:
                done.set_exception(error)

        self._post(begin, done)
        return done

    def set_policy(self, policy: str | Policy) -> Future[str]:
        """Hands the layout to a policy once the switches asked for before are through; gives its canonical name."""
        done: Future[str] = Future()

        def queue_up(engine: Engine) -> None:  # noqa: ARG001  a command's shape
            if not done.set_running_or_notify_cancel():
                return
            try:
                self._check_running()
                self._switches.append(_PendingPolicy(policy, done))
            except Exception as error:
                done.set_exception(error)

        self._post(queue_up, done)
        return done

    def stats(self) -> Future[EngineStats]:
        return self.call(lambda engine: engine.stats())

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Runs a function on the engine's thread between two steps."""
        done: Future[T] = Future()

        def run(engine: Engine) -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                self._check_running()
                done.set_result(function(engine))
            except Exception as error:
                done.set_exception(error)

        self._post(run, done)
        return done

    def shutdown(self) -> None:
        """Aborts what is left and ends the thread; safe to call twice.

        Raises:
            EngineDeadError: the thread is stuck, so that it would be waited for for ever; it ends with the process.
        """
        with self._lock:
            if not self._stopping:
                self._stopping = True
                self._commands.put(None)
        self.watchdog.end()
        self._thread.join(JOIN_SECONDS)
        while self._thread.is_alive():
            if (seconds := self.watchdog.stuck_seconds()) is not None:
                raise EngineDeadError(f"the engine has finished no step for {seconds:.0f} s and is left as it is")
            self._thread.join(JOIN_SECONDS)

    # -- on the engine's thread -------------------------------------------------------------------------------

    def _run(self, engine: Engine) -> None:
        stalled = False
        try:
            while self._take_commands(engine, stalled):
                self._advance_switches(engine)
                if engine.has_work:
                    self.watchdog.working()
                    stalled = not self._step(engine)
                else:
                    self.watchdog.idle()
                    stalled = False
            self._fail_all(engine, EngineDeadError("the engine has been shut down"))
        except BaseException as error:
            logger.exception("the engine's loop has failed")
            self._failure = error
            self._fail_all(engine, self._dead())
            self._report_failure()

    def _step(self, engine: Engine) -> bool:
        """False if nothing came of it and nothing is under way."""
        finished = engine.steps_finished
        deltas = engine.step()
        self.latest_stats = engine.stats()
        if engine.steps_finished != finished or not engine.has_work:
            self.watchdog.finished_step()
        for delta in deltas:
            self._deliver(delta)
        return bool(deltas) or not engine.stalled

    def _take_commands(self, engine: Engine, stalled: bool) -> bool:
        """Runs queued commands, waiting for one if the engine is idle, a moment if stalled; False at shutdown."""
        idle, ran = not (engine.has_work or self._switches), False
        if idle:
            self.watchdog.idle()
        try:
            while True:
                command = self._commands.get(block=idle or stalled, timeout=None if idle else STALL_SECONDS)
                if command is None:
                    return False
                command(engine)
                idle = stalled = False
                ran = True
        except queue.Empty:
            return True
        finally:
            if ran:
                self.latest_stats = engine.stats()

    def _advance_switches(self, engine: Engine) -> None:
        """Answers for the switches that are through, and begins the next."""
        for asked in list(self._switches):
            if isinstance(asked, _PendingPolicy):
                if engine.switching:
                    return
                self._switches.remove(asked)
                self._answer(engine, asked.done, partial(engine.set_policy, asked.policy))
            elif asked.switch is None:
                if engine.switching:
                    return
                try:
                    asked.switch = engine.begin_switch(asked.layout, asked.strategy)
                except LayoutError as error:
                    self._switches.remove(asked)
                    asked.done.set_exception(error)
            elif asked.switch.settled:
                self._switches.remove(asked)
                self._answer(engine, asked.done, partial(_report_of, engine, asked.policy, asked.switch))
            elif asked.policy is not None:
                return  # the next would otherwise begin before this policy, and lose its pin to it

    def _answer(self, engine: Engine, done: Future[T], outcome: Callable[[], T]) -> None:
        """Who is answered finds the counters up to date."""
        try:
            result = outcome()
        except FlyJaxError as error:
            done.set_exception(error)
            return
        self.latest_stats = engine.stats()
        done.set_result(result)

    def _check_running(self) -> None:
        """Refuses a command that was queued while the engine failed: nothing would ever answer it."""
        if self._failure is not None:
            raise self._dead()

    def _deliver(self, delta: RequestDelta) -> None:
        sink = self._sinks.get(delta.request_id)
        if delta.finish_reason is not None:
            self._sinks.pop(delta.request_id, None)
        if sink is not None:
            self._give(sink, delta)

    def _give(self, sink: Sink, item: RequestDelta | EngineDeadError) -> None:
        try:
            sink(item)
        except Exception:  # a caller's failure is its own; the others' requests go on
            logger.exception("a request's receiver failed")

    def _fail_all(self, engine: Engine, error: EngineDeadError) -> None:
        """Answers everybody; from here on commands are refused where they are given."""
        with self._lock:
            self._stopping = True
        if self._switches:
            logger.warning("the engine ends, not carried through: %s", ", ".join(map(str, self._switches)))
        for switch in self._switches:
            switch.done.set_exception(error)
        self._switches.clear()
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            self._give(sink, error)
        while not self._commands.empty():
            if (command := self._commands.get()) is not None:
                command(engine)

    def _report_failure(self) -> None:
        with self._lock:
            callbacks, self._on_failure = self._on_failure, []
        for callback in callbacks:
            callback()

    # -- on the callers' threads ------------------------------------------------------------------------------

    def _post(self, command: Command, done: Future[Any]) -> None:
        with self._lock:
            if not self._stopping:
                self._commands.put(command)
                return
        done.set_exception(self._dead())

    def _dead(self) -> EngineDeadError:
        # What went wrong inside is for the log: the message goes to clients.
        why = "it was shut down" if self._failure is None else "it failed, and its log says why"
        error = EngineDeadError(f"the engine has stopped: {why}")
        error.__cause__ = self._failure
        return error


def _report_of(engine: Engine, policy: str | None, switch: Switch) -> SwitchReport:
    """What a switch that is through has come to; its policy takes over."""
    if switch.error is not None:
        raise switch.error
    assert switch.report is not None
    try:
        if policy is not None:
            engine.set_policy(policy)
    except ConfigError as error:
        # Not a LayoutError, whatever it was: that would say that the switch was not made.
        raise ConfigError(f"the layout is {switch.target} now and stays: {error}") from error
    return switch.report
