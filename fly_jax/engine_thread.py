"""The one thread that owns an engine: everything else talks to it through a queue."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from fly_jax.engine import Engine
from fly_jax.errors import ConfigError, EngineDeadError, FlyJaxError, LayoutError
from fly_jax.outputs import EngineStats, RequestDelta, SwitchReport, SwitchStrategy
from fly_jax.policy import Policy, name_of
from fly_jax.sampling_params import SamplingParams
from fly_jax.switch_log import SwitchTicket

logger = logging.getLogger(__name__)

# How long a command is waited for when requests can only wait too: what they wait for may be a matter of time alone.
STALL_SECONDS = 0.001

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
        ticket: None until it has begun.
    """

    layout: str
    strategy: SwitchStrategy | None
    policy: str | None
    done: Future[SwitchReport]
    ticket: SwitchTicket | None = None

    def __str__(self) -> str:
        return f"switch to {self.layout} ({'queued' if self.ticket is None else 'under way'})"


class EngineThread:
    """Runs the step loop while there is work and sleeps when there is none.

    Methods are thread-safe. A sink is called on the engine's thread with each of its request's deltas, or once
    with EngineDeadError; it must return at once and never raise.
    """

    def __init__(self, engine: Engine) -> None:
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._switches: deque[_PendingSwitch | _PendingPolicy] = deque()  # in the order in which they were asked for
        self._stopping = False
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        # The engine lives in the thread's arguments alone, so that its memory is freed when the thread ends.
        self._thread = threading.Thread(target=self._run, args=(engine,), name="fly-jax-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._failure is None and not self._stopping

    def submit(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, sink: Sink, *, bounded: bool = True
    ) -> Future[None]:
        """Queues a request; the future fails with what :meth:`Engine.add_request` raises."""

        def add(engine: Engine) -> None:
            engine.add_request(request_id, prompt_ids, params, bounded=bounded)
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
                engine.control.parse(layout)
                self._switches.append(_PendingSwitch(layout, strategy, policy, done))
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
        """Aborts what is left and ends the thread; safe to call twice."""
        with self._lock:
            if not self._stopping:
                self._stopping = True
                self._commands.put(None)
        self._thread.join()

    # -- on the engine's thread -------------------------------------------------------------------------------

    def _run(self, engine: Engine) -> None:
        stalled = False
        try:
            while self._take_commands(engine, stalled):
                self._advance_switches(engine)
                stalled = engine.has_work and not self._step(engine)
            self._fail_all(engine, EngineDeadError("the engine has been shut down"))
        except BaseException as error:
            logger.exception("the engine's loop has failed")
            self._failure = error
            self._fail_all(engine, self._dead())

    def _step(self, engine: Engine) -> bool:
        """False if nothing came of it and nothing is under way."""
        deltas = engine.step()
        for delta in deltas:
            self._deliver(delta)
        return bool(deltas) or not engine.stalled

    def _take_commands(self, engine: Engine, stalled: bool) -> bool:
        """Runs queued commands, waiting for one if the engine is idle, a moment if stalled; False at shutdown."""
        idle = not (engine.has_work or self._switches)
        try:
            while True:
                command = self._commands.get(block=idle or stalled, timeout=None if idle else STALL_SECONDS)
                if command is None:
                    return False
                command(engine)
                idle = stalled = False
        except queue.Empty:
            return True

    def _advance_switches(self, engine: Engine) -> None:
        """Answers for the switches that are through, and begins the next."""
        for switch in list(self._switches):
            if isinstance(switch, _PendingPolicy):
                if engine.switching:
                    return
                self._switches.remove(switch)
                _set_policy(engine, switch)
            elif switch.ticket is None:
                if engine.switching:
                    return
                try:
                    switch.ticket = engine.begin_switch(switch.layout, switch.strategy)
                except LayoutError as error:
                    self._switches.remove(switch)
                    switch.done.set_exception(error)
            elif switch.ticket.settled:
                self._switches.remove(switch)
                _answer(engine, switch, switch.ticket)
            elif switch.policy is not None:
                return  # the next would otherwise begin before this policy, and lose its pin to it

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

    # -- on the callers' threads ------------------------------------------------------------------------------

    def _post(self, command: Command, done: Future[Any]) -> None:
        with self._lock:
            if not self._stopping:
                self._commands.put(command)
                return
        done.set_exception(self._dead())

    def _dead(self) -> EngineDeadError:
        error = EngineDeadError(f"the engine has stopped: {self._failure or 'it was shut down'}")
        error.__cause__ = self._failure
        return error


def _answer(engine: Engine, switch: _PendingSwitch, ticket: SwitchTicket) -> None:
    if ticket.error is not None:
        switch.done.set_exception(ticket.error)
        return
    assert ticket.report is not None
    try:
        if switch.policy is not None:
            engine.set_policy(switch.policy)
        switch.done.set_result(ticket.report)
    except ConfigError as error:
        # Not a LayoutError, whatever it was: that would say that the switch was not made.
        switch.done.set_exception(ConfigError(f"the layout is {ticket.target} now and stays: {error}"))


def _set_policy(engine: Engine, change: _PendingPolicy) -> None:
    try:
        change.done.set_result(engine.set_policy(change.policy))
    except FlyJaxError as error:
        change.done.set_exception(error)
