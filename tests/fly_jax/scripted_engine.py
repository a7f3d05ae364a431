"""An engine that tests hold still, and receivers of its requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

from fly_jax.engine.engine import Engine
from fly_jax.engine.thread import EngineThread
from fly_jax.engine.watchdog import Watchdog
from fly_jax.errors import ConfigError, ContextLengthError, EngineDeadError, LayoutError
from fly_jax.layout import Layout
from fly_jax.outputs import FinishReason, RequestDelta, SwitchReport, SwitchStrategy
from fly_jax.sampling_params import SamplingParams
from fly_jax.switching.switch import Switch

TIMEOUT = 120.0  # only ever reached by a thread that hangs
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)


class ScriptedEngine:
    """Holds still in each step until told to go on, so that tests decide what happens between steps."""

    def __init__(self, *, held: bool = False) -> None:
        self.entered, self.may_step = threading.Semaphore(0), threading.Semaphore(0)
        self.held = held
        self.failure: Exception | None = None
        self.live: dict[str, int] = {}
        self.ticket: Switch | None = None
        self.unsettled: list[Switch] = []
        self.strategy = SwitchStrategy.MIGRATE
        self.policy = "load_adaptive"
        self.switches = 0
        self.steps = 0
        self.stalled = False
        self.layout = Layout((1,))
        self.control = SimpleNamespace(parse=_parse)
        self.threads: set[str] = set()

    @property
    def has_work(self) -> bool:
        return bool(self.live) or self.switching or bool(self.unsettled)

    @property
    def switching(self) -> bool:
        return self.ticket is not None

    def add_request(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, bounded: bool, client: str | None
    ) -> None:
        assert bounded
        assert client is None
        if len(prompt_ids) > 100:
            raise ContextLengthError("too long", param="prompt")
        assert params.max_tokens is not None
        self.live[request_id] = params.max_tokens

    def abort(self, request_id: str) -> RequestDelta | None:
        if self.live.pop(request_id, None) is None:
            return None
        return RequestDelta(request_id, finish_reason=FinishReason.ABORT)

    def begin_switch(self, target: Layout, strategy: SwitchStrategy | None) -> Switch:
        """Switches happen in steps, as in the engine."""
        assert self.ticket is None
        if self.failure is not None:
            raise self.failure
        if target == self.layout:
            raise LayoutError(f"layout {target} is in force")
        self.ticket = Switch(self.layout, target, "asked for", 0.0)
        self.strategy = strategy or SwitchStrategy.MIGRATE
        self.policy = "static"
        return self.ticket

    def set_policy(self, name: str) -> str:
        assert self.ticket is None
        if name == "unfit":
            raise LayoutError("a request needs a wider group")
        if name == "unknown":
            raise ConfigError("there is no policy 'unknown'")
        self.policy = name
        return name

    def _end_switch(self, ticket: Switch) -> None:
        """The last step but one of a switch: it happens, or is refused because of what requests did meanwhile."""
        self.ticket = None
        if ticket.target.degrees == (3,):
            ticket.error, ticket.settled = LayoutError("a request has grown"), True
            return
        self.unsettled.append(ticket)
        self.switches += 1
        ticket.report = SwitchReport(self.switches, str(self.layout), str(ticket.target), self.strategy)
        self.layout = ticket.target

    @property
    def steps_finished(self) -> int:
        return 0 if self.stalled else self.steps

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(layout=str(self.layout), policy=self.policy, waiting=len(self.live), steps=self.steps)

    def step(self) -> list[RequestDelta]:
        self.threads.add(threading.current_thread().name)
        self.steps += 1
        if self.held:
            self.entered.release()
            assert self.may_step.acquire(timeout=TIMEOUT)
        if self.failure is not None:
            raise self.failure
        while self.unsettled:
            self.unsettled.pop().settled = True
        if self.ticket is not None and not self.stalled:
            self._end_switch(self.ticket)
        deltas = []
        for name in [] if self.stalled else list(self.live):
            self.live[name] -= 1
            reason = None if self.live[name] else FinishReason.LENGTH
            deltas.append(RequestDelta(name, token_ids=(self.live[name],), finish_reason=reason))
            if reason is not None:
                del self.live[name]
        return deltas

    def go_on(self) -> None:
        """Lets the step that has begun, and all that follow, run to their ends."""
        self.held = False
        self.may_step.release()

    def wait_for_step(self) -> None:
        assert self.entered.acquire(timeout=TIMEOUT)


def _parse(text: str) -> Layout:
    if not text.isdigit():
        raise LayoutError(f"layout {text!r} is not understood")
    return Layout((int(text),))


class Sink:
    """Collects what a request gets."""

    def __init__(self) -> None:
        self.items: list[RequestDelta | EngineDeadError] = []
        self.done = threading.Event()

    def __call__(self, item: RequestDelta | EngineDeadError) -> None:
        self.items.append(item)
        if isinstance(item, EngineDeadError) or item.finish_reason is not None:
            self.done.set()

    def wait(self) -> list[RequestDelta | EngineDeadError]:
        assert self.done.wait(TIMEOUT)
        return self.items

    def last_reason(self) -> FinishReason | None:
        last = self.wait()[-1]
        assert isinstance(last, RequestDelta)
        return last.finish_reason


@contextmanager
def running(engine: ScriptedEngine | Engine, watchdog: Watchdog | None = None) -> Iterator[EngineThread]:
    thread = EngineThread(cast(Engine, engine), watchdog)
    try:
        yield thread
    finally:
        if isinstance(engine, ScriptedEngine):
            engine.go_on()
        thread.shutdown()


def submit(thread: EngineThread, name: str, params: SamplingParams = PARAMS) -> Sink:
    sink = Sink()
    thread.submit(name, [1, 2], params, sink).result(TIMEOUT)
    return sink


def fail_during_a_step(engine: ScriptedEngine, meanwhile: Callable[[], Any], error: Exception) -> Any:
    """What ``meanwhile`` returns, called while the engine is in a step that then fails."""
    engine.wait_for_step()
    result = meanwhile()
    engine.failure = error
    engine.go_on()
    return result
