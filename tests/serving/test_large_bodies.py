from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from fastapi.exceptions import RequestValidationError

from fly_jax.errors import ClientQueueFullError, InvalidRequestError, QueueFullError, RequestFailedError
from serving import create_app
from serving.large_bodies import LARGE_BYTES, Job, LargeBodies, ReadingProcess
from serving.protocol import CompletionRequest
from serving.reading import EncodedPrompt, Reader, Reading
from tests.serving.live import HANG_SECONDS, eventually
from tests.serving.scripted_engine import VOCAB_SIZE, ByteTokenizer, ScriptedEngine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
PADDING = {"an_unknown_field": "x" * LARGE_BYTES}


class Counting(ByteTokenizer):
    """Counts what is asked of it in this process."""

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.calls += 1
        return super().encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.calls += 1
        return super().decode(token_ids, skip_special_tokens)


class Application:
    """Is asked on one event loop, without sockets."""

    def __init__(self, engine: ScriptedEngine, large_bodies: LargeBodies | None = None) -> None:
        self.app = create_app(engine)
        if large_bodies is not None:
            self.app.state.server = dataclasses.replace(self.app.state.server, large_bodies=large_bodies)
        self.large_bodies: LargeBodies = self.app.state.server.large_bodies

    async def post(self, path: str, body: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=HANG_SECONDS) as client:
            return await client.post(path, content=content, headers=JSON)

    def ask(self, path: str, *bodies: Any) -> list[httpx.Response]:
        async def ask_all() -> list[httpx.Response]:
            return [await self.post(path, body) for body in bodies]

        return asyncio.run(ask_all())


@pytest.fixture(scope="module")
def application() -> Iterator[Application]:
    engine = ScriptedEngine(max_model_len=10**6)
    engine.tokenizer = Counting()
    application = Application(engine)
    yield application
    application.large_bodies.close()


def comparable(answer: httpx.Response) -> tuple[int, Any]:
    content = answer.json()
    for name in ("id", "created"):
        content.pop(name, None)
    return answer.status_code, content


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": ["@say one", [104, 105]], "n": 2, "max_tokens": 9}),
        (COMPLETIONS, {"prompt": "@say héllo", "echo": True, "logprobs": 1, "max_tokens": 3}),
        (CHAT, {"messages": [{"role": "developer", "content": "@say yes"}], "max_completion_tokens": 4, "seed": 5}),
        ("/tokenize", {"prompt": "héllo", "add_special_tokens": False}),
        ("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/detokenize", {"tokens": [104, 105, 256]}),
        (COMPLETIONS, {"prompt": "hi", "model": "another"}),
        (COMPLETIONS, {"prompt": ""} | {"add_special_tokens": False}),
        (COMPLETIONS, {"prompt": [5, 258]}),
        (COMPLETIONS, {"prompt": [5, True]}),
        (COMPLETIONS, {"prompt": "hi", "top_p": "much"}),
        (COMPLETIONS, {"prompt": "hi", "top_p": 7}),
        (COMPLETIONS, {"prompt": "hi", "logit_bias": {"5": 1}}),
        (COMPLETIONS, {"prompt": "hi", "stream_options": {"include_usage": True}}),
        (CHAT, {"messages": [{"role": "user", "content": "@refuse"}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        (CHAT, {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"a": "\ud800"}}),
        (CHAT, {"messages": [{}] * 200}),
        ("/tokenize", {"prompt": "a\ud800"}),
        ("/tokenize", {}),
        ("/detokenize", {"tokens": [104, -1]}),
    ],
)
def test_a_large_body_is_answered_as_a_small_one(application: Application, path: str, body: dict[str, Any]) -> None:
    small, large = application.ask(path, body, body | PADDING)
    assert comparable(large) == comparable(small)


@pytest.mark.parametrize("body", [b"[1, 2]", b'{"prompt": "hi",}', b'{"prompt": "\xff"}', b'{"n": 1' + b"0" * 5000])
def test_a_large_body_that_is_no_object_is_refused_as_a_small_one(application: Application, body: bytes) -> None:
    small, large = application.ask(COMPLETIONS, body, b" " * LARGE_BYTES + body)
    assert small.status_code == 400
    assert comparable(large) == comparable(small)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "x" * LARGE_BYTES, "max_tokens": 1}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}] * 5000, "max_tokens": 1}),
        ("/tokenize", {"prompt": "x" * LARGE_BYTES}),
        ("/detokenize", {"tokens": [104] * LARGE_BYTES}),
    ],
)
def test_what_is_large_is_never_tokenized_in_the_servers_own_process(
    application: Application, path: str, body: dict[str, Any]
) -> None:
    tokenizer = cast(Counting, application.app.state.server.engine.tokenizer)
    before = tokenizer.calls
    [answer] = application.ask(path, body)
    assert answer.status_code == 200
    # The scripted engine itself decodes the prompt that it is given, once.
    assert tokenizer.calls - before == (path in (COMPLETIONS, CHAT))
    assert application.large_bodies.waiting_bytes == 0


def test_work_for_a_body_of_some_size_leaves_the_event_loop() -> None:
    class Named(ByteTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            threads.append(threading.current_thread())
            return super().encode(text, add_special_tokens)

    threads: list[threading.Thread] = []
    engine = ScriptedEngine(max_model_len=10**6)
    engine.tokenizer = Named()
    Application(engine).ask(COMPLETIONS, {"prompt": "x" * 9, "max_tokens": 1}, {"prompt": "x" * 9000, "max_tokens": 1})
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


class HeldProcess:
    """Reads nothing until it is let go.

    Args:
        reading: what comes of it then; None: an error.
    """

    def __init__(self, reading: Reading | None = None) -> None:
        self._reading = reading
        self.go_on = threading.Event()
        self.jobs: list[bytes] = []
        self.is_running = False

    def read(self, job: Job) -> Reading:
        self.jobs.append(job.data)
        assert self.go_on.wait(HANG_SECONDS)
        if self._reading is None:
            raise InvalidRequestError("read at last")
        return self._reading

    def end(self) -> None:
        pass

    kill = end


@pytest.fixture
def held() -> Iterator[HeldProcess]:
    process = HeldProcess()
    yield process
    process.go_on.set()


def lane_of(held: HeldProcess, max_waiting_bytes: int = 10**7) -> LargeBodies:
    return LargeBodies(cast(ReadingProcess, held), max_waiting_bytes=max_waiting_bytes)


def test_waiting_bodies_are_bounded_and_one_that_is_given_up_gives_its_place_back(held: HeldProcess) -> None:
    async def work() -> None:
        lane = lane_of(held, max_waiting_bytes=100)
        first, second = (
            asyncio.create_task(lane.read(CompletionRequest, data, client))
            for data, client in ((b"1" * 40, "one"), (b"2" * 40, "two"))
        )
        assert await asyncio.to_thread(eventually, lambda: held.jobs == [b"1" * 40])
        with pytest.raises(QueueFullError, match=r"80 bytes .* 40 more .* over 100: try later"):
            await lane.read(CompletionRequest, b"3" * 40)
        second.cancel()
        await asyncio.wait([second])
        assert lane.waiting_bytes == 40
        third = asyncio.create_task(lane.read(CompletionRequest, b"4" * 60))
        await asyncio.sleep(0)
        held.go_on.set()
        for task in (first, third):
            with pytest.raises(InvalidRequestError, match="read at last"):
                await task
        assert held.jobs == [b"1" * 40, b"4" * 60]
        assert lane.waiting_bytes == 0
        lane.close()

    asyncio.run(work())


def test_a_short_request_passes_by_large_ones(held: HeldProcess) -> None:
    async def work() -> None:
        application = Application(ScriptedEngine(), lane_of(held))
        large = [asyncio.create_task(application.post(COMPLETIONS, {"prompt": "hi"} | PADDING)) for _ in range(8)]
        assert await asyncio.to_thread(eventually, lambda: len(held.jobs) == 1)
        assert (await application.post(COMPLETIONS, {"prompt": "@say hi"})).json()["choices"][0]["text"] == "hi"
        assert not any(task.done() for task in large)
        held.go_on.set()
        assert [(await task).status_code for task in large] == [400] * 8

    asyncio.run(work())


def test_a_client_that_leaves_while_its_body_waits_frees_its_place(held: HeldProcess) -> None:
    async def work() -> int:
        application = Application(ScriptedEngine(), lane_of(held))
        ahead = asyncio.create_task(application.post(COMPLETIONS, {"prompt": "hi"} | PADDING))
        assert await asyncio.to_thread(eventually, lambda: len(held.jobs) == 1)
        body = json.dumps({"prompt": "hi"} | PADDING).encode()
        messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": body}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return messages.pop() if len(messages) > 1 else messages[0]

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers, "query_string": b""}
        await application.app(scope, receive, send)  # type: ignore[arg-type]
        assert application.large_bodies.waiting_bytes == len(body)  # of the one ahead
        held.go_on.set()
        await ahead
        assert len(held.jobs) == 1
        return int(sent[0]["status"])

    assert asyncio.run(work()) == 499


def test_the_time_to_the_first_token_begins_before_a_large_body_is_read() -> None:
    reading = Reading(CompletionRequest(prompt="hi", max_tokens=1), [EncodedPrompt([104, 105])])
    held = HeldProcess(reading)

    async def work() -> None:
        application = Application(ScriptedEngine(), lane_of(held))
        answer = asyncio.create_task(application.post(COMPLETIONS, {"prompt": "hi"} | PADDING))
        assert await asyncio.to_thread(eventually, lambda: len(held.jobs) == 1)
        began = time.monotonic()
        await asyncio.sleep(0.05)
        waited = time.monotonic() - began
        held.go_on.set()
        assert (await answer).status_code == 200
        text = application.app.state.server.metrics.render(None).decode()
        [seconds] = re.findall(r"time_to_first_token_seconds_sum\S+ (\S+)", text)
        assert float(seconds) >= waited

    asyncio.run(work())


@pytest.fixture
def reader() -> Reader:
    return Reader(ByteTokenizer(), max_model_len=512, vocab_size=VOCAB_SIZE)


def job_of(**body: Any) -> Job:
    return Job(CompletionRequest, json.dumps(body).encode())


@pytest.mark.slow
def test_a_process_that_was_killed_between_two_bodies_is_started_again(reader: Reader) -> None:
    process = ReadingProcess(reader)
    try:
        assert process.read(job_of(prompt=[1, 2])).result[0].token_ids == [1, 2]
        first = process.pid
        assert first is not None
        process.kill()
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        assert process.read(job_of(prompt=[3])).result[0].token_ids == [3]
        assert process.pid != first
    finally:
        process.end()
    assert not process.is_running


class Endless(ByteTokenizer):
    """Never comes to the end of a text that says so."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if text == "endless":
            threading.Event().wait()
        return super().encode(text, add_special_tokens)


def test_a_body_that_takes_too_long_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    process = ReadingProcess(Reader(Endless(), max_model_len=512, vocab_size=VOCAB_SIZE), reading_seconds=0.5)
    with pytest.raises(RequestFailedError, match="could not be read: send less at once"):
        process.read(job_of(prompt="endless"))
    assert not process.is_running
    assert "a large body took more than 0.5 s to read and is given up" in caplog.text


class Broken(ByteTokenizer):
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if text == "broken":
            raise ValueError("a fault of the tokenizer's")
        return super().encode(text, add_special_tokens)


@pytest.mark.slow
def test_a_fault_that_is_not_the_bodys_is_logged_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    process = ReadingProcess(Reader(Broken(), max_model_len=512, vocab_size=VOCAB_SIZE))
    try:
        with pytest.raises(RequestFailedError, match="the server's log says why"):
            process.read(job_of(prompt="broken"))
        first = process.pid
        assert process.read(job_of(prompt="hi")).result[0].text == "hi"
        assert process.pid == first
    finally:
        process.end()
    assert "ValueError: a fault of the tokenizer's" in caplog.text


def test_a_body_that_its_client_has_left_holds_nobody_up() -> None:
    process = ReadingProcess(Reader(Endless(), max_model_len=512, vocab_size=VOCAB_SIZE))
    lane = LargeBodies(process)

    async def work() -> Reading:
        left = asyncio.create_task(lane.read(CompletionRequest, job_of(prompt="endless").data))
        assert await asyncio.to_thread(eventually, lambda: process.is_running)
        left.cancel()
        await asyncio.wait([left])
        return await lane.read(CompletionRequest, job_of(prompt="hi").data)

    assert asyncio.run(work()).result[0].text == "hi"
    lane.close()


@pytest.mark.slow
def test_no_file_beside_which_the_server_was_started_takes_the_place_of_a_module(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json.py", "serving.py", "tokenizers.py"):
        (tmp_path / name).write_text("raise SystemExit('not mine')")
    monkeypatch.chdir(tmp_path)
    process = ReadingProcess(reader)
    try:
        assert process.read(job_of(prompt="hi")).result[0].text == "hi"
    finally:
        process.end()


def test_one_client_cannot_take_all_the_room(held: HeldProcess) -> None:
    async def work() -> None:
        lane = lane_of(held, max_waiting_bytes=100)
        mine = [asyncio.create_task(lane.read(CompletionRequest, b"1" * 25, "me")) for _ in range(2)]
        assert await asyncio.to_thread(eventually, lambda: len(held.jobs) == 1)
        with pytest.raises(ClientQueueFullError, match=r"50 bytes of your .* with 1 more .* over 50: try later"):
            await lane.read(CompletionRequest, b"1", "me")
        other = asyncio.create_task(lane.read(CompletionRequest, b"2" * 50, "you"))
        await asyncio.sleep(0)
        assert lane.waiting_bytes == 100
        held.go_on.set()
        for task in (*mine, other):
            with pytest.raises(InvalidRequestError, match="read at last"):
                await task
        assert lane.waiting_bytes == 0
        lane.close()

    asyncio.run(work())


def test_bodies_that_wait_when_the_server_ends_are_given_up(held: HeldProcess) -> None:
    async def work() -> None:
        lane = lane_of(held)
        first, second = (asyncio.create_task(lane.read(CompletionRequest, data)) for data in (b"1", b"2"))
        assert await asyncio.to_thread(eventually, lambda: held.jobs == [b"1"])
        lane.close()
        held.go_on.set()
        with pytest.raises(InvalidRequestError, match="read at last"):
            await first
        with pytest.raises(RequestFailedError, match="shutting down"):
            await second
        assert held.jobs == [b"1"]

    asyncio.run(work())


@pytest.mark.slow
def test_the_process_ends_when_nothing_is_to_be_read(reader: Reader) -> None:
    process = ReadingProcess(reader)
    lane = LargeBodies(process, idle_seconds=0.01)
    for _ in range(2):
        asyncio.run(lane.read(CompletionRequest, job_of(prompt="hi").data))
        assert eventually(lambda: not process.is_running)
    lane.close()


def test_the_process_ends_with_the_server(reader: Reader) -> None:
    command = [sys.executable, "-m", "serving.reading_process"]
    done = subprocess.run(command, input=pickle.dumps(reader), capture_output=True, timeout=HANG_SECONDS, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_what_is_wrong_with_a_body_takes_no_part_of_it_along(reader: Reader) -> None:
    process = ReadingProcess(reader)
    try:
        with pytest.raises(RequestValidationError) as caught:
            process.read(Job(CompletionRequest, json.dumps({"prompt": "hi", "stop_token_ids": ["x"] * 99}).encode()))
        assert len(pickle.dumps(caught.value)) < 1000
        reading = process.read(job_of(prompt="hello"))
        assert cast(CompletionRequest, reading.body).prompts == ()
    finally:
        process.end()
