"""A recording of several streams at known times, replayed through the client: every figure of the result is that of
``vllm bench serve``, whose definitions are written out here from the recording alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from fly_jax.bench.client import StreamingClient, Target
from fly_jax.bench.load import LoadResult, PreparedRequest, send_all
from fly_jax.bench.requests import PlannedRequest
from fly_jax.bench.serving_result import RunFacts, build_result
from fly_jax.bench.timeline import LayoutTimeline
from tests.fly_jax.bench.scripted_sse import DONE, END, HEAD, chunk, piece, usage

# A connection a request, so that none is reused just as it closes.
ONE_ANSWER = HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
DURATION = 2.5
PERCENTILES = (50.0, 90.0, 99.0, 99.9)
# Something hangs if this passes; nothing here takes real time.
HANG_SECONDS = 120


@dataclass(frozen=True)
class Recorded:
    """One request of the recording. Times are seconds from the start of the run.

    Attributes:
        planned_at: when it should have left.
        token_times: when each piece of output came, which is not each token.
        prompt_tokens, output_tokens: as the server counts them.
        writes: what it sent, and when.
    """

    planned_at: float
    sent_at: float
    token_times: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    writes: tuple[tuple[float, bytes], ...]
    is_answered: bool = True


def answer(*events: tuple[float, bytes]) -> tuple[tuple[float, bytes], ...]:
    """Each event as it is sent, and the end of the body at the time of the last."""
    return (*((at, chunk(data)) for at, data in events), (events[-1][0], END))


LATE = Recorded(
    0.0, 0.013, (0.213, 0.251, 0.3405, 0.39), 11, 4,
    answer((0.213, piece("a")), (0.251, piece("b")), (0.3405, piece("c")), (0.39, piece("", "length")),
           (0.44, usage(11, 4)), (0.45, DONE)),
)  # fmt: skip
SEVERAL_TOKENS_A_PIECE = Recorded(
    0.1, 0.1, (0.2, 0.9, 1.3), 200, 7,
    answer((0.2, piece("one")), (0.9, piece("two three")), (1.3, piece("four", "stop")), (1.3, usage(200, 7) + DONE)),
)  # fmt: skip
ONE_TOKEN = Recorded(
    0.25, 0.2625, (1.0625,), 3, 1, answer((1.0625, piece("a", "length") + usage(3, 1) + DONE))
)  # fmt: skip
BROKEN = Recorded(
    0.3, 0.3, (0.35, 0.36), 5, 2, ((0.35, chunk(piece("a"))), (0.36, chunk(piece("b"))), (0.37, b"")), is_answered=False
)  # fmt: skip
WITHOUT_USAGE = Recorded(
    0.5, 0.5, (0.56, 0.61, 0.61, 0.73), 20, 4,
    answer((0.56, piece("a")), (0.61, piece("b") + piece("c")), (0.73, piece("d", "stop") + DONE)),
)  # fmt: skip
SLOW = Recorded(
    1.0, 1.03125, (1.5, 1.75, 2.25), 64, 3,
    answer((1.5, piece("a")), (1.75, piece("b")), (2.25, piece("c", "length")), (DURATION, usage(64, 3) + DONE)),
)  # fmt: skip
RECORDING = (LATE, SEVERAL_TOKENS_A_PIECE, ONE_TOKEN, BROKEN, WITHOUT_USAGE, SLOW)


class RecordedClock:
    """Stands still until the recording moves it, and lets requests leave when they left."""

    def __init__(self) -> None:
        self.time = 0.0
        self.was_read = asyncio.Event()
        self._may_leave = asyncio.Semaphore(0)

    def now(self) -> float:
        self.was_read.set()
        return self.time

    async def sleep_until(self, at: float) -> None:
        await self._may_leave.acquire()
        assert at <= self.time

    def let_one_leave(self) -> None:
        self._may_leave.release()


class Replay:
    """Replays a recording: at each of its moments one thing happens, and the next not before the client has seen it."""

    def __init__(self, recording: Sequence[Recorded], clock: RecordedClock) -> None:
        self._recording, self._clock = recording, clock
        self._arrivals: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        self._writers: dict[int, asyncio.StreamWriter] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Takes a request, and answers no more than that it will."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await reader.readexactly(int(head.partition("content-length: ")[2].split("\r\n")[0]))
        writer.write(ONE_ANSWER)
        await self._arrivals.put(writer)

    async def play(self) -> None:
        happenings: list[tuple[float, Callable[[], Coroutine[Any, Any, None]]]] = []
        for number, each in enumerate(self._recording):
            happenings.append((each.sent_at, partial(self._leave, number)))
            for at, data in each.writes:
                happenings.append((at, partial(self._write, number, data)))
        for at, happen in sorted(happenings, key=lambda each: each[0]):
            self._clock.time = at
            await happen()

    async def _leave(self, number: int) -> None:
        self._clock.let_one_leave()
        self._writers[number] = await self._arrivals.get()

    async def _write(self, number: int, data: bytes) -> None:
        """Nothing at all stands for a connection that breaks."""
        self._clock.was_read.clear()
        self._writers[number].write(data)
        if data in (b"", END):
            self._writers[number].close()
        await self._clock.was_read.wait()


async def replayed(recording: Sequence[Recorded]) -> LoadResult:
    clock = RecordedClock()
    replay = Replay(recording, clock)
    async with asyncio.timeout(HANG_SECONDS), await asyncio.start_server(replay.serve, "127.0.0.1", 0) as server:
        target = Target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "m")
        async with StreamingClient(target, clock.now) as client:
            planned = [PlannedRequest(each.planned_at, (1, 2), each.prompt_tokens, 9) for each in recording]
            prepared = [PreparedRequest(each, client.encode(each)) for each in planned]
            sending = asyncio.create_task(send_all(prepared, client, clock))
            await replay.play()
            sent = await sending
    return LoadResult(sent, LayoutTimeline(), duration=clock.now(), cpu_seconds=0.0, has_layouts=False)


def result_of(recording: Sequence[Recorded], limits: Mapping[str, float]) -> dict[str, Any]:
    """As a result file has it."""
    facts = RunFacts("openai", "m", "recorded", 0, goodput=limits, percentiles=PERCENTILES)
    result: dict[str, Any] = json.loads(json.dumps(build_result(asyncio.run(replayed(recording)), facts)))
    return result


def percentile(sample: Sequence[float], percent: float) -> float:
    """Between the two values around it in a straight line, as numpy does it."""
    values, place = sorted(sample), (len(sample) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def definitions_of_vllm(recording: Sequence[Recorded], limits: Mapping[str, float]) -> dict[str, float]:
    """``calculate_metrics`` of ``vllm bench serve``; limits in milliseconds."""
    answered = [each for each in recording if each.is_answered]
    ttft = [each.token_times[0] - each.sent_at for each in answered]
    e2el = [each.token_times[-1] - each.sent_at for each in answered]
    tokens = [each.output_tokens for each in answered]
    every_tpot = [
        (latency - first) / (count - 1) if count > 1 else 0.0
        for latency, first, count in zip(e2el, ttft, tokens, strict=True)
    ]
    tpot = [each for each, count in zip(every_tpot, tokens, strict=True) if count > 1]
    itl = [after - before for each in answered for before, after in itertools.pairwise(each.token_times)]
    kept = {"ttft": ttft, "tpot": every_tpot, "e2el": e2el}
    good = sum(
        all(1e3 * kept[name][number] <= limit for name, limit in limits.items()) for number in range(len(answered))
    )
    figures = {
        "completed": len(answered),
        "failed": len(recording) - len(answered),
        "duration": DURATION,
        "total_input_tokens": sum(each.prompt_tokens for each in answered),
        "total_output_tokens": sum(tokens),
        "request_throughput": len(answered) / DURATION,
        "request_goodput": good / DURATION,
        "output_throughput": sum(tokens) / DURATION,
        "total_token_throughput": sum(each.prompt_tokens + each.output_tokens for each in answered) / DURATION,
    }
    for name, sample in (("ttft", ttft), ("tpot", tpot), ("itl", itl), ("e2el", e2el)):
        figures[f"mean_{name}_ms"] = 1e3 * statistics.fmean(sample)
        figures[f"median_{name}_ms"] = 1e3 * statistics.median(sample)
        figures[f"std_{name}_ms"] = 1e3 * statistics.pstdev(sample)
        figures |= {f"p{each:g}_{name}_ms": 1e3 * percentile(sample, each) for each in PERCENTILES}
    return figures


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 500.0}, 4),
        ({"tpot": 150.0}, 3),
        ({"e2el": 1200.0}, 4),
        ({"ttft": 500.0, "tpot": 210.0, "e2el": 1000.0}, 2),
        ({"ttft": 1.0}, 0),
    ],
)
def test_every_figure_of_a_recorded_run_is_that_of_vllm_s_definitions(limits: dict[str, float], good: int) -> None:
    found, expected = result_of(RECORDING, limits), definitions_of_vllm(RECORDING, limits)
    assert expected["request_goodput"] == good / DURATION
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-9)


def test_each_request_s_own_times_are_those_of_the_recording() -> None:
    found = result_of(RECORDING, {})
    assert found["start_times"] == [each.sent_at for each in RECORDING]
    assert found["ttfts"] == [each.token_times[0] - each.sent_at for each in RECORDING]
    assert found["itls"] == [
        [after - before for before, after in itertools.pairwise(each.token_times)] for each in RECORDING
    ]
    assert found["input_lens"] == [each.prompt_tokens for each in RECORDING]
    assert found["output_lens"] == [each.output_tokens if each.is_answered else 0 for each in RECORDING]
    assert [bool(error) for error in found["errors"]] == [not each.is_answered for each in RECORDING]
    lags = [1e3 * (each.sent_at - each.planned_at) for each in RECORDING]
    assert found["schedule_lag_ms"]["max"] == pytest.approx(max(lags))


def test_figures_can_be_worked_out_by_hand() -> None:
    """One request alone, so that the definitions above are not only compared with themselves."""
    found = result_of([LATE], {"ttft": 200.0})
    assert found["mean_ttft_ms"] == pytest.approx(200)
    assert found["mean_tpot_ms"] == pytest.approx((377 - 200) / 3)
    assert found["p50_itl_ms"] == pytest.approx(49.5)
    assert found["mean_e2el_ms"] == pytest.approx(377)
