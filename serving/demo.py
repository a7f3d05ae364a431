"""A burst of requests at a server whose layout changes under them, and what became of each request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import httpx
from rich import box
from rich.console import Console
from rich.table import Table

from checkpoints.demo import MODEL
from checkpoints.demo.text import recall_prompt, story_prompt
from fly_jax.errors import ConfigError, FlyJaxError
from serving.server import bind

LAYOUTS = ("1+1+1+1", "2+2", "4", "1+1+1+1")
SECONDS_A_LAYOUT = 5.0
FACTS = 60
# The bundled model errs now and then by itself; lost or swapped KV would make most answers wrong.
MODEL_RECALL = 0.9
HEADINGS = (
    "layout", "drain", "cutover", "stall", "done", "recall", "TTFT", "gap", "worst", "tok/s",
)  # fmt: skip
START_TIMEOUT_SECONDS = 600
RESTORE_TIMEOUT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Finished:
    """One request, seen from the client.

    Attributes:
        first_token: seconds from sending to the first token.
        gaps: seconds between successive chunks.
        correct: whether a recall question was answered rightly; None for a story.
        layouts: layouts in force when it was sent and when it ended.
    """

    started: float
    ended: float
    first_token: float
    gaps: tuple[float, ...]
    tokens: int
    correct: bool | None
    text: str
    layouts: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Phase:
    """One layout's share of the demo; ``switch`` is the server's report of the switch that began it."""

    layout: str
    started: float
    ended: float
    switch: dict[str, Any]


class DemoClient:
    """Keeps a number of requests in flight and remembers how each went."""

    def __init__(self, http: httpx.AsyncClient, model: str, admin_key: str | None, strategy: str | None = None) -> None:
        self._http, self._model, self._strategy = http, model, strategy
        self._headers = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}
        self.layout = ""
        self.finished: list[Finished] = []

    async def switch(self, layout: str) -> dict[str, Any]:
        """Changes the layout while requests run; returns the server's report.

        Raises:
            ConfigError: the server refuses.
        """
        report = await self._set_layout({"layout": layout, "strategy": self._strategy})
        self.layout = layout
        return report

    async def settled(self, report: dict[str, Any]) -> dict[str, Any]:
        """The same report as the server has it by now: the worst gap is known once every stream has gone on."""
        history = (await self._state())["switch_history"]
        return next((later for later in history if later["number"] == report["number"]), report)

    @contextlib.asynccontextmanager
    async def policy_kept(self) -> AsyncIterator[None]:
        """Hands the layout back, in the end, to the policy that chose it before: each switch pins it.

        Raises:
            ConfigError: the server refuses.
        """
        back = {"policy": (await self._state())["policy"]}
        try:
            yield
        except BaseException:
            # What went wrong first is what the user is told, even if handing back goes wrong too.
            with contextlib.suppress(ConfigError, httpx.HTTPError):
                await self._set_layout(back, RESTORE_TIMEOUT_SECONDS)
            raise
        await self._set_layout(back, RESTORE_TIMEOUT_SECONDS)

    async def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = (await self._http.get("/layout", timeout=None)).raise_for_status().json()
        return state

    async def _set_layout(self, body: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
        answer = await self._http.post("/layout", json=body, headers=self._headers, timeout=timeout)
        if answer.status_code != httpx.codes.OK:
            asked = " ".join(f"{name} {value}" for name, value in body.items() if value is not None)
            raise ConfigError(f"the server refused {asked}: {answer.text}")
        report: dict[str, Any] = answer.json()
        return report

    async def keep_busy(self, numbers: Iterator[int]) -> None:
        """One client: sends a request, reads its stream, sends the next."""
        for number in numbers:
            await self._one(number)

    async def _one(self, number: int) -> None:
        task = recall_prompt(f"demo-{number}", FACTS) if number % 2 == 0 else None
        prompt = story_prompt(f"demo-{number}") if task is None else task.prompt
        body = {"model": self._model, "prompt": prompt, "max_tokens": 100, "temperature": 0, "stream": True}
        layout, started = self.layout, time.perf_counter()
        times, text = [], []
        async for piece in self._stream(body):
            times.append(time.perf_counter())
            text.append(piece)
        answer = "".join(text)
        gaps = tuple(after - before for before, after in itertools.pairwise(times))
        first = (times[0] if times else time.perf_counter()) - started
        correct = None if task is None else answer.strip() == task.answer
        self.finished.append(
            Finished(started, time.perf_counter(), first, gaps, len(times), correct, answer, (layout, self.layout))
        )

    async def _stream(self, body: dict[str, object]) -> AsyncIterator[str]:
        async with self._http.stream("POST", "/v1/completions", json=body, timeout=None) as response:
            if response.status_code != httpx.codes.OK:
                raise FlyJaxError(f"a request failed: {(await response.aread()).decode(errors='replace')}")
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if not line.startswith("data: ") or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise FlyJaxError(f"a request failed: {chunk['error']['message']}")
                for choice in chunk["choices"]:
                    yield choice["text"]


def run_demo(url: str | None, concurrency: int, admin_key: str | None, strategy: str | None = None) -> int:
    """Runs the demo and prints what happened; the server's layout policy is left as it was found.

    Args:
        strategy: of the switches; None: the server's own.

    Returns:
        0 if every request ended and the recall answers were as good as the model is, else 1.

    Raises:
        ConfigError: nothing would be sent, or the server cannot be reached or refuses to switch.
        FlyJaxError: a request failed.
    """
    if concurrency < 1:
        raise ConfigError(f"--requests must be at least 1, got {concurrency}")
    console = Console()
    with contextlib.ExitStack() as stack:
        if url is None:
            url = stack.enter_context(_own_server(console))
        try:
            phases, finished = asyncio.run(_burst(url, concurrency, admin_key, strategy, console))
        except httpx.HTTPError as error:
            raise ConfigError(f"{url} does not answer as a fly-jax server: {error!r}; check --url") from error
    _print_results(console, phases, finished)
    recalls = [request.correct for request in finished if request.correct is not None]
    return 0 if recalls and sum(recalls) >= MODEL_RECALL * len(recalls) else 1


async def _burst(
    url: str, concurrency: int, admin_key: str | None, strategy: str | None, console: Console
) -> tuple[list[Phase], list[Finished]]:
    limits = httpx.Limits(max_connections=concurrency + 2)
    async with httpx.AsyncClient(base_url=url, limits=limits) as http:
        models = (await http.get("/v1/models")).raise_for_status().json()
        client = DemoClient(http, models["data"][0]["id"], admin_key, strategy)
        async with client.policy_kept():
            await client.switch(LAYOUTS[0])
            return await _phases(client, concurrency, console), client.finished


async def _phases(client: DemoClient, concurrency: int, console: Console) -> list[Phase]:
    stop = asyncio.Event()
    numbers = itertools.takewhile(lambda _: not stop.is_set(), itertools.count())
    workers = [asyncio.create_task(client.keep_busy(numbers)) for _ in range(concurrency)]
    phases = []
    for layout in LAYOUTS:
        console.print(f"{concurrency} requests in flight; layout -> [bold]{layout}[/]")
        report = await client.switch(layout)
        started = time.perf_counter()
        await _hold(workers)
        phases.append(Phase(layout, started, time.perf_counter(), await client.settled(report)))
    stop.set()
    await asyncio.gather(*workers)
    return phases


async def _hold(workers: list[asyncio.Task[None]]) -> None:
    """Lets the burst go on for a while; a worker that fails ends the demo at once."""
    done, _ = await asyncio.wait(workers, timeout=SECONDS_A_LAYOUT, return_when=asyncio.FIRST_EXCEPTION)
    for worker in done:
        worker.result()


@contextlib.contextmanager
def _own_server(console: Console) -> Iterator[str]:
    with bind("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    console.print(f"starting a server with the bundled model on port {port}")
    command = [sys.executable, "-m", "fly_jax", "serve", str(MODEL), "--port", str(port), "--devices", "4"]
    process = subprocess.Popen([*command, "--served-model-name", "demo"])
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(process, url)
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ConfigError(f"the server ended with code {process.returncode} before it was ready")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").is_success:
                return
        time.sleep(0.2)
    raise ConfigError(f"the server was not ready after {START_TIMEOUT_SECONDS} s")


def _print_results(console: Console, phases: list[Phase], finished: list[Finished]) -> None:
    table = Table(
        title="What happened (milliseconds; TTFT and gap between tokens are medians)",
        caption="stall: the longest that a stream stood still across the switch, as the server saw it; "
        "worst: the longest gap between tokens in the phase, as clients saw it",
        # Fits a terminal of 80 columns.
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "layout" else "right")
    for index, phase in enumerate(phases):
        last = index == len(phases) - 1
        inside = [r for r in finished if r.ended >= phase.started and (last or r.ended < phases[index + 1].started)]
        table.add_row(*_phase_row(phase, inside))
    console.print(table)
    recalls = [request.correct for request in finished if request.correct is not None]
    crossed = sum(request.layouts[0] != request.layouts[1] for request in finished)
    console.print(
        f"{len(finished)} requests finished, none lost; {crossed} were in flight while the layout changed; "
        f"recall answers: {sum(recalls)} of {len(recalls)} right"
    )
    stories = [request.text for request in finished if request.correct is None]
    if stories:
        console.print(f"a story:{stories[-1]}", style="italic", highlight=False)


def _phase_row(phase: Phase, inside: list[Finished]) -> list[str]:
    recalls = [request.correct for request in inside if request.correct is not None]
    gaps = [gap for request in inside for gap in request.gaps]
    elapsed = max([request.ended for request in inside], default=phase.ended) - phase.started
    return [
        phase.layout,
        f"{1e3 * phase.switch['drain_seconds']:.1f}",
        f"{1e3 * phase.switch['cutover_seconds']:.2f}",
        f"{1e3 * phase.switch['worst_gap_seconds']:.0f}",
        str(len(inside)),
        f"{sum(recalls)}/{len(recalls)}",
        f"{1e3 * median(r.first_token for r in inside):.0f}" if inside else "-",
        f"{1e3 * median(gaps):.1f}" if gaps else "-",
        f"{1e3 * max(gaps):.0f}" if gaps else "-",
        f"{sum(request.tokens for request in inside) / elapsed:.0f}",
    ]
