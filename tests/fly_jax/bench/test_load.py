"""Sending on schedule, under a clock that only tests move."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Sequence

import pytest

from fly_jax.bench.client import INTERRUPTED, Target
from fly_jax.bench.load import LoadOptions, PreparedRequest, SentRequests, run_load, run_load_async, send_all
from fly_jax.bench.requests import PlannedRequest, RequestRecord
from fly_jax.errors import ConfigError
from tests.fly_jax.bench.records import planned
from tests.fly_jax.bench.scripted_sse import DONE, HEAD, chunk, piece, scripted, stream, usage


class FakeClock:
    """Time passes by sleeping alone, each time by ``late`` more than was asked for."""

    def __init__(self, late: float = 0.0) -> None:
        self.time = 0.0
        self._late = late

    def now(self) -> float:
        return self.time

    async def sleep_until(self, at: float) -> None:
        await asyncio.sleep(0)  # what is due has left before time goes on
        if at > self.time:
            self.time = at + self._late


class FakeSender:
    """Requests last until ``ends`` lets them end; keeps who was in flight."""

    def __init__(self, clock: FakeClock, ends: Callable[[int], bool] = lambda _: True) -> None:
        self.started: list[float] = []
        self.most_in_flight = 0
        self._in_flight = 0
        self._clock = clock
        self._ends = ends

    async def send(self, planned: PlannedRequest, body: bytes) -> RequestRecord:
        assert body == str(planned.at).encode()
        self.started.append(planned.at)
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        sent_at, error = self._clock.now(), ""
        try:
            # Others get their turn, so that requests overlap wherever they may.
            for _ in range(10):
                await asyncio.sleep(0)
            while not self._ends(len(self.started)):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            error = INTERRUPTED
        self._in_flight -= 1
        return RequestRecord(planned, sent_at, (), self._clock.now(), 1, 0, error=error)


def prepared(times: Sequence[float]) -> list[PreparedRequest]:
    return [PreparedRequest(planned(at), str(at).encode()) for at in times]


def test_requests_leave_at_their_times_and_in_order() -> None:
    clock = FakeClock()
    sender = FakeSender(clock)
    sent = asyncio.run(send_all(prepared([0.0, 0.5, 0.5, 2.0]), sender, clock))
    assert sender.started == [0.0, 0.5, 0.5, 2.0]
    assert [record.sent_at for record in sent.records] == [0.0, 0.5, 0.5, 2.0]
    assert sent.lags == (0.0, 0.0, 0.0, 0.0)
    assert not sent.interrupted


def test_lateness_is_reported_and_does_not_add_up() -> None:
    clock = FakeClock(late=0.25)
    sent = asyncio.run(send_all(prepared([1.0, 2.0, 3.0]), FakeSender(clock), clock))
    assert [record.sent_at for record in sent.records] == [1.25, 2.25, 3.25]
    assert sent.lags == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("bound", [1, 3])
def test_no_more_are_in_flight_than_allowed_and_order_is_kept(bound: int) -> None:
    clock = FakeClock()
    sender = FakeSender(clock)
    times = [index / 10 for index in range(20)]
    sent = asyncio.run(send_all(prepared(times), sender, clock, max_concurrency=bound))
    assert sender.most_in_flight == bound
    assert sender.started == times
    assert len(sent.records) == 20


def test_waiting_for_a_slot_is_no_lateness() -> None:
    clock = FakeClock()

    class Slow(FakeSender):
        async def send(self, planned: PlannedRequest, body: bytes) -> RequestRecord:
            record = await super().send(planned, body)
            clock.time += 5.0
            return record

    sent = asyncio.run(send_all(prepared([0.0, 0.0, 1.0, 2.0, 17.0]), Slow(clock), clock, max_concurrency=1))
    assert [record.sent_at for record in sent.records] == [0.0, 5.0, 10.0, 15.0, 22.0]
    assert sent.lags == (0.0,) * 5


def test_a_bound_that_nothing_reaches_sends_all_together() -> None:
    clock = FakeClock()
    sender = FakeSender(clock, ends=lambda started: started == 8)
    asyncio.run(send_all(prepared([0.0] * 8), sender, clock))
    assert sender.most_in_flight == 8


def test_every_end_is_told() -> None:
    ended: list[None] = []
    clock = FakeClock()
    asyncio.run(send_all(prepared([0.0] * 5), FakeSender(clock), clock, None, lambda: ended.append(None)))
    assert len(ended) == 5


def test_a_cancelled_run_returns_what_has_come_so_far() -> None:
    """Four are in flight, two wait for a slot and never leave."""

    async def main() -> SentRequests:
        clock = FakeClock()
        sender = FakeSender(clock, ends=lambda _: False)
        run = asyncio.create_task(send_all(prepared([0.0] * 6), sender, clock, max_concurrency=4))
        while len(sender.started) < 4:
            await asyncio.sleep(0)
        run.cancel()
        return await run

    sent = asyncio.run(main())
    assert sent.interrupted
    assert [record.error for record in sent.records] == [INTERRUPTED] * 4
    assert len(sent.lags) == 4


def test_a_fault_of_the_client_s_own_is_raised() -> None:
    clock = FakeClock()
    [request] = prepared([0.0])
    with pytest.raises(AssertionError):
        asyncio.run(send_all([PreparedRequest(request.planned, b"another")], FakeSender(clock), clock))


def test_a_run_against_a_server_agrees_with_its_usage() -> None:
    async def main() -> None:
        async with scripted(stream(piece("a"), piece("b", "stop"), usage(7, 2), DONE)) as server:
            plan = [planned(0.02), planned(0.0), planned(0.01)]
            result = await run_load_async(plan, Target(server.url, "m"), LoadOptions(show_progress=False))
        records = result.sent.records
        assert [record.planned.at for record in records] == [0.0, 0.01, 0.02]
        assert [(record.error, record.prompt_tokens, record.output_tokens) for record in records] == [("", 7, 2)] * 3
        assert all(record.sent_at >= record.planned.at for record in records)
        assert result.duration >= max(record.token_times[-1] for record in records)
        assert result.cpu_seconds > 0
        # The scripted server answers even /layout with a stream, which is no layout.
        assert not result.has_layouts
        assert result.timeline.changes == ()

    asyncio.run(main())


@pytest.mark.usefixtures("python_s_sigint")
def test_ctrl_c_keeps_the_partial_result() -> None:
    """A real SIGINT: one request has its answer, one stalls in the middle of it, one is not due for an hour."""
    ready: list[str] = []
    is_up, is_over = threading.Event(), threading.Event()

    async def serve() -> None:
        async with scripted([HEAD, chunk(piece("a"))], hold=True) as server:
            ready.append(server.url)
            is_up.set()
            while len(server.bodies) < 2:
                await asyncio.sleep(0.005)
            os.kill(os.getpid(), signal.SIGINT)
            while not is_over.is_set():
                await asyncio.sleep(0.005)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert is_up.wait(120)
    try:
        plan = [planned(0.0), planned(0.0), planned(3600.0)]
        result = run_load(plan, Target(ready[0], "m"), LoadOptions(watch_layout=False, show_progress=False))
    finally:
        is_over.set()
        thread.join(120)
    assert result.sent.interrupted
    assert [record.error for record in result.sent.records] == [INTERRUPTED] * 2


def test_an_empty_plan_and_a_bound_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="no request to send"):
        run_load([], Target("http://127.0.0.1:9", "m"), LoadOptions())
    with pytest.raises(ConfigError, match="--max-concurrency must be at least 1, got 0"):
        LoadOptions(max_concurrency=0)
