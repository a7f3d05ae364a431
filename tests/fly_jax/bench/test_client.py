"""The streaming client against a server that is scripted byte by byte."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from fly_jax.bench.client import CHAT_COMPLETIONS, INTERRUPTED, StreamedAnswer, StreamingClient, Target
from fly_jax.bench.requests import PlannedRequest, RequestRecord
from fly_jax.errors import ConfigError
from tests.fly_jax.bench.scripted_sse import (
    DONE,
    HEAD,
    Scripted,
    chat_piece,
    chunk,
    event,
    piece,
    plain,
    scripted,
    stream,
    usage,
)

PLANNED = PlannedRequest(at=0.0, prompt=(11, 12, 13), prompt_tokens=3, max_tokens=4)


def ask(writes: Sequence[bytes], planned: PlannedRequest = PLANNED, **options: Any) -> tuple[RequestRecord, Scripted]:
    """One request to a server that answers with these writes."""

    async def main() -> tuple[RequestRecord, Scripted]:
        ticks = itertools.count()
        async with scripted(writes) as server:
            target = Target(server.url, "some-model", **options)
            async with StreamingClient(target, lambda: float(next(ticks))) as client:
                return await client.send(planned, client.encode(planned)), server

    return asyncio.run(main())


def test_an_answer_becomes_times_text_and_the_server_s_own_counts() -> None:
    record, server = ask(stream(piece("He"), piece("llo"), piece("", "length"), usage(7, 5), DONE))
    assert record.error == ""
    assert record.text == "Hello"
    assert (record.prompt_tokens, record.output_tokens) == (7, 5)
    assert len(record.token_times) == 3
    assert record.sent_at < record.token_times[0] <= record.token_times[-1] < record.ended_at
    assert server.paths == ["/v1/completions"]
    assert server.bodies == [
        {
            "model": "some-model",
            "prompt": [11, 12, 13],
            "max_tokens": 4,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_without_usage_the_plan_and_the_pieces_are_counted() -> None:
    record, _ = ask(stream(piece("a"), piece("b", "stop"), DONE))
    assert (record.prompt_tokens, record.output_tokens, record.has_usage) == (3, 2, False)
    record, _ = ask(stream(piece("a"), piece("b"), piece("", "stop"), DONE))
    assert (record.output_tokens, len(record.token_times)) == (2, 3)
    record, _ = ask(stream(piece("a"), piece("b", "stop"), usage(9, 2), DONE))
    assert (record.prompt_tokens, record.output_tokens, record.has_usage) == (9, 2, True)


def test_what_a_request_asks_for_is_sent_only_where_it_says_something() -> None:
    planned = PlannedRequest(0.0, "text", 1, 2, priority=-3, tensor_parallel_size=2)
    _, server = ask(stream(piece("a", "stop"), DONE), planned, api_key="secret", ignore_eos=True)
    assert {"prompt": "text", "priority": -3, "tensor_parallel_size": 2, "ignore_eos": True}.items() <= server.bodies[
        0
    ].items()
    assert server.headers[0]["authorization"] == "Bearer secret"


def test_fields_and_headers_of_the_user_s_go_before_the_client_s() -> None:
    extra = {"extra_body": {"top_p": 0.5, "temperature": 1}, "extra_headers": {"X-Tenant": "a", "Authorization": "b"}}
    _, server = ask(stream(piece("a", "stop"), DONE), api_key="secret", **extra)
    assert {"top_p": 0.5, "temperature": 1, "stream": True}.items() <= server.bodies[0].items()
    assert (server.headers[0]["x-tenant"], server.headers[0]["authorization"]) == ("a", "b")


def test_a_path_of_the_server_goes_before_that_of_the_endpoint() -> None:
    assert Target("http://localhost/api/", "m").url("/v1/completions") == "http://localhost/api/v1/completions"


def test_a_chat_sends_a_message_and_its_opening_is_no_output() -> None:
    opening = chat_piece({"role": "assistant", "content": ""})
    answer = stream(opening, chat_piece({"content": "Hi"}), chat_piece({}, "stop"), usage(9, 2), DONE)
    planned = PlannedRequest(0.0, "Say hi", 2, 4)
    record, server = ask(answer, planned, endpoint=CHAT_COMPLETIONS)
    assert record.error == ""
    assert (record.text, record.prompt_tokens, record.output_tokens, len(record.token_times)) == ("Hi", 9, 2, 2)
    assert server.paths == ["/v1/chat/completions"]
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "Say hi"}]
    assert server.bodies[0]["max_completion_tokens"] == 4


def test_a_chat_of_token_ids_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes text, not token ids"):
        ask(stream(DONE), endpoint=CHAT_COMPLETIONS)


def test_bytes_may_be_cut_anywhere_and_lines_may_end_like_windows_lines() -> None:
    whole = b": comment\r\n\r\n" + (piece("wör") + piece("ld", "stop") + usage(1, 2) + DONE).replace(b"\n", b"\r\n")
    for size in (1, 2, 7, len(whole)):
        answer = StreamedAnswer()
        for number, start in enumerate(range(0, len(whole), size)):
            answer.feed(whole[start : start + size], float(number))
        assert "".join(answer.pieces) == "wörld"
        assert (answer.usage["completion_tokens"], answer.complete, len(answer.token_times)) == (2, True, 2)


@pytest.mark.parametrize(
    ("writes", "message", "outputs"),
    [
        (plain("503 Service Unavailable", b'{"error": "queue is\nfull"}'), 'HTTP 503: {"error": "queue is full"}', 0),
        (stream(piece("a"), event({"error": {"message": "lost it", "code": 500}}), DONE), "lost it", 1),
        (stream(event({"error": {"message": ""}}), DONE), "{'message': ''}", 0),
        (stream(event({"error": "line\none" + "x" * 900}), DONE), "line one" + "x" * 400, 0),
        (stream(event({"choices": [{"index": 0, "text": ["a"]}]})), "not a chunk of a completion", 0),
        (stream(piece("a"), event({"choices": [], "usage": 7}), DONE), "not a chunk of a completion", 1),
        (stream(piece("a"), b"data: {nonsense\n\n"), "not a chunk of a completion: {nonsense", 1),
        (stream(event([1])), "not a chunk of a completion: [1]", 0),
        (stream(piece("a"), piece("b")), "the stream ended before the answer did", 2),
        (stream(DONE), "the answer held no output", 0),
        ([HEAD, chunk(piece("a"))], "ClientPayloadError", 1),
        ([HEAD, chunk(piece("a") + piece("b"))[:40]], "ClientPayloadError", 0),
        ([], "ServerDisconnectedError", 0),
    ],
)
def test_what_goes_wrong_is_that_request_s_error_and_keeps_what_came(
    writes: Sequence[bytes], message: str, outputs: int
) -> None:
    record, _ = ask(writes)
    assert message in record.error
    assert len(record.token_times) == record.output_tokens == outputs


def test_a_server_that_is_not_there() -> None:
    record = asyncio.run(_send_to_nobody())
    assert "ClientConnectorError" in record.error
    assert record.token_times == ()


def test_a_cancelled_request_keeps_what_had_come() -> None:
    async def main() -> RequestRecord:
        has_come = asyncio.Event()
        readings = iter([0.0, 1.0, 2.0])

        def clock() -> float:
            now = next(readings)
            if now == 1.0:  # asked for when the request leaves, when something comes, and at the end
                has_come.set()
            return now

        async with (
            scripted([HEAD, chunk(piece("a"))], hold=True) as server,
            StreamingClient(Target(server.url, "m"), clock) as client,
        ):
            task = asyncio.create_task(client.send(PLANNED, b"{}"))
            await has_come.wait()
            task.cancel()
            return await task

    record = asyncio.run(main())
    assert (record.error, record.text) == (INTERRUPTED, "a")
    assert (record.sent_at, record.token_times, record.ended_at) == (0.0, (1.0,), 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_url": "localhost:8000"}, "--base-url must start with http://"),
        ({"endpoint": "v1/completions"}, "--endpoint must be /v1/completions or"),
        ({"endpoint": "/v1/embeddings"}, "--endpoint must be"),
    ],
)
def test_targets_that_cannot_be_are_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Target(**{"base_url": "http://localhost", "model": "m", **arguments})


def test_the_key_is_sent_and_shown_nowhere_else() -> None:
    """Neither where a target is printed or refused, nor in what becomes of a request: a record and its error."""
    key = "sk-very-secret"
    writes = plain("401 Unauthorized", b"no such key")
    record, server = ask(writes, api_key=key)
    assert server.headers[0]["authorization"] == f"Bearer {key}"
    assert record.error == "HTTP 401: no such key"
    broken, _ = ask([HEAD, chunk(piece("a"))], api_key=key)
    unreachable = asyncio.run(_send_to_nobody(key))
    with pytest.raises(ConfigError) as no_chat:
        ask(stream(DONE), endpoint=CHAT_COMPLETIONS, api_key=key)
    with pytest.raises(ConfigError) as no_target:
        Target("localhost", "m", api_key=key)
    target = Target("http://localhost", "m", api_key=key)
    for shown in (target, record, broken, unreachable, no_chat.value, no_target.value):
        assert key not in f"{shown} {shown!r}"


async def _send_to_nobody(api_key: str | None = None) -> RequestRecord:
    async with StreamingClient(Target("http://127.0.0.1:9", "m", api_key=api_key), lambda: 0.0) as client:
        return await client.send(PLANNED, b"{}")
