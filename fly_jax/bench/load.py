"""Sends planned requests on schedule and gathers what became of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import resource
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from fly_jax.bench.client import StreamingClient, Target
from fly_jax.bench.requests import PlannedRequest, RequestRecord
from fly_jax.bench.run_progress import RunProgress
from fly_jax.bench.timeline import LayoutTimeline, LayoutWatcher
from fly_jax.errors import ConfigError

SPARE_FILES = 64


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a plan is carried out.

    Attributes:
        max_concurrency: requests in flight at most; those that are due meanwhile wait, in order. None: no bound.
        warmups: the first so many requests are sent before the run as well, and not counted.
        watch_layout: ask the server for its layout while the run lasts.
        show_progress: on standard error.
    """

    max_concurrency: int | None = None
    warmups: int = 0
    watch_layout: bool = True
    show_progress: bool = True

    def __post_init__(self) -> None:
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"--max-concurrency must be at least 1, got {self.max_concurrency}")
        if self.warmups < 0:
            raise ConfigError(f"--num-warmups must be at least 0, got {self.warmups}")


@dataclass(frozen=True, slots=True)
class SentRequests:
    """What became of a plan.

    Attributes:
        records: of the requests that were sent, in the order of their times.
        lags: seconds by which each left later than planned, without the time that it waited for ``max_concurrency``.
        interrupted: the run was cancelled; requests in flight have partial records, later ones none.
    """

    records: tuple[RequestRecord, ...]
    lags: tuple[float, ...]
    interrupted: bool


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A whole run.

    Attributes:
        duration: seconds from its start until the last request ended.
        cpu_seconds: CPU time that the client's process took for it.
        has_layouts: the server told its layout.
    """

    sent: SentRequests
    timeline: LayoutTimeline
    duration: float
    cpu_seconds: float
    has_layouts: bool


class Clock(Protocol):
    """Time since the start of a run."""

    def now(self) -> float:
        """Seconds."""

    async def sleep_until(self, at: float) -> None:
        """Lets others run at least once, even if it is late already."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """Encoded before the run: that takes longer than sending, and requests behind it would leave late."""

    planned: PlannedRequest
    body: bytes


class Sender(Protocol):
    """What carries requests to a server: a ``StreamingClient``."""

    async def send(self, planned: PlannedRequest, body: bytes) -> RequestRecord:
        """Returns when the request has ended; a cancellation ends it and is not raised."""


class RunClock:
    """Real time, from when it was made or last started."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._started = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._started

    async def sleep_until(self, at: float) -> None:
        await asyncio.sleep(max(0.0, at - self.now()))


async def send_all(
    prepared: Sequence[PreparedRequest],
    sender: Sender,
    clock: Clock,
    max_concurrency: int | None = None,
    on_ended: Callable[[], None] = lambda: None,
) -> SentRequests:
    """Sends each request at its time, however late the one before it was, and waits for all.

    Args:
        prepared: in the order of their times.
        on_ended: called as each request ends.

    A cancellation ends the run and is not raised: what has come so far is returned.
    """
    # Held by the loop over the plan, so requests leave in order even if they have to wait.
    slots = None if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    tasks: list[asyncio.Task[RequestRecord]] = []
    waits: list[float] = []

    def ended(_: object) -> None:
        on_ended()
        if slots is not None:
            slots.release()

    interrupted = False
    blocked_until = 0.0
    try:
        for request in prepared:
            await clock.sleep_until(request.planned.at)
            # Requests behind one that waits for a slot wait as well.
            blocked = max(0.0, blocked_until - request.planned.at)
            if slots is not None:
                waiting_since = clock.now()
                await slots.acquire()
                blocked_until = clock.now()
                blocked += blocked_until - waiting_since
            waits.append(blocked)
            task = asyncio.create_task(sender.send(request.planned, request.body))
            task.add_done_callback(ended)
            tasks.append(task)
        if tasks:
            await asyncio.wait(tasks)
    except asyncio.CancelledError:
        interrupted = True
        _forget_cancellation()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    # One that was cancelled before it had begun was never sent.
    sent = [(task.result(), wait) for task, wait in zip(tasks, waits, strict=True) if not task.cancelled()]
    lags = tuple(record.sent_at - record.planned.at - wait for record, wait in sent)
    return SentRequests(tuple(record for record, _ in sent), lags, interrupted)


def _forget_cancellation() -> None:
    """It has been answered: what this task awaits from here on is to be awaited as usual."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()


async def run_load_async(planned: Sequence[PlannedRequest], target: Target, options: LoadOptions) -> LoadResult:
    """Carries out a plan against a server; cancelled, it returns what has come so far.

    Raises:
        ConfigError: the plan holds nothing, or what the endpoint cannot take; a warm-up was not answered.
    """
    if not planned:
        raise ConfigError("there is no request to send: check --num-prompts and the workload")
    _allow_open_files(min(len(planned), options.max_concurrency or len(planned)) + SPARE_FILES)
    clock = RunClock()
    async with StreamingClient(target, clock.now) as client:
        ordered = sorted(planned, key=lambda request: request.at)
        prepared = [PreparedRequest(request, client.encode(request)) for request in ordered]
        watcher = LayoutWatcher(partial(client.get_json, "/layout"), clock.now)
        await _warm_up(prepared[: options.warmups], client, options.max_concurrency)
        has_layouts = options.watch_layout and await watcher.start()
        with RunProgress(len(planned), options.show_progress) as progress:
            cpu_before = time.process_time()
            clock.start()
            async with _watching(watcher if has_layouts else None):
                sent = await send_all(prepared, client, clock, options.max_concurrency, progress.request_ended)
                duration = clock.now()
            cpu_seconds = time.process_time() - cpu_before
    return LoadResult(sent, watcher.timeline(), duration, cpu_seconds, has_layouts)


def run_load(planned: Sequence[PlannedRequest], target: Target, options: LoadOptions) -> LoadResult:
    """``run_load_async`` for callers without an event loop; Ctrl-C ends the run and keeps what has come so far."""
    return asyncio.run(run_load_async(planned, target, options))


async def _warm_up(prepared: Sequence[PreparedRequest], client: StreamingClient, max_concurrency: int | None) -> None:
    """Sends these at once and waits for them: a server may compile, or fill its caches, when it is first asked."""
    at_once = [PreparedRequest(dataclasses.replace(each.planned, at=0.0), each.body) for each in prepared]
    sent = await send_all(at_once, client, RunClock(), max_concurrency)
    if sent.interrupted:
        raise asyncio.CancelledError
    errors = [record.error for record in sent.records if record.error]
    if errors:
        raise ConfigError(f"{len(errors)} of {len(at_once)} warm-up requests failed: {errors[0]}")


@contextlib.asynccontextmanager
async def _watching(watcher: LayoutWatcher | None) -> AsyncIterator[None]:
    if watcher is None:
        yield
        return
    task = asyncio.create_task(watcher.watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
    await watcher.poll()


def _allow_open_files(count: int) -> None:
    """Every request in flight has a connection; many systems allow 1024 files unless they are asked for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
