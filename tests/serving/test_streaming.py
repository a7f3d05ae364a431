"""The bytes of a stream, read without a client library."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.serving.scripted_engine import REPLY

TRICKY = 'é\u2028\u0085🌍 \r\x00 "quoted" data: [DONE]'


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[str]:
    """The data of each event, after checking that every byte belongs to the framing."""
    answer = http.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.content.endswith(b"data: [DONE]\n\n")
    frames = answer.content.split(b"\n\n")
    assert frames.pop() == b""
    assert all(frame.startswith(b"data: ") and b"\n" not in frame and b"\r" not in frame for frame in frames)
    return [frame.removeprefix(b"data: ").decode("utf-8") for frame in frames]


def completions(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    data = events(http, "/v1/completions", {"prompt": "hi", "max_tokens": 100, **body})
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def test_chunks(http: httpx.Client) -> None:
    chunks = completions(http)
    assert text_of(chunks) == REPLY
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]
    assert all("usage" not in chunk for chunk in chunks)
    assert all("\ufffd" not in chunk["choices"][0]["text"] for chunk in chunks)


def test_text_that_looks_like_framing(http: httpx.Client) -> None:
    assert text_of(completions(http, prompt=f"@say {TRICKY}", max_tokens=200)) == TRICKY


def test_the_official_client_reads_the_same(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="scripted", prompt=f"@say {TRICKY}", max_tokens=200, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TRICKY


def test_usage_at_the_end(http: httpx.Client) -> None:
    *chunks, last = completions(http, stream_options={"include_usage": True})
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert last["choices"] == []
    count = len(REPLY.encode())
    assert (last["usage"]["completion_tokens"], last["usage"]["total_tokens"]) == (count, count + 3)


def test_usage_all_along(http: httpx.Client) -> None:
    chunks = completions(http, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert chunks[-1]["choices"] == []


def test_null_stream_options(http: httpx.Client) -> None:
    assert text_of(completions(http, stream_options={"include_usage": None})) == REPLY


def test_logprobs_offsets_go_on(http: httpx.Client) -> None:
    chunks = completions(http, prompt="@say abc", logprobs=1)
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [1], [2]]


def test_chat_opens_with_the_role(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "@say ab"}], "stream_options": {"include_usage": True}}
    data = events(http, "/v1/chat/completions", body)
    chunks = [json.loads(item) for item in data[:-1]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert "usage" in chunks[0]
    assert chunks[-1]["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("prompt", "code"),
    [("@fail", "request_failed"), ("@crash-midway", "internal_error"), ("@die-midway", "engine_dead")],
)
@pytest.mark.parametrize("n", [1, 3])
def test_an_error_after_the_start_travels_in_the_stream(http: httpx.Client, prompt: str, code: str, n: int) -> None:
    *chunks, last = completions(http, prompt=prompt, n=n)
    assert text_of(chunks)
    assert last["error"]["code"] == code
    assert last["error"]["type"] == "server_error"
    assert "secret" not in json.dumps(last)


def test_the_official_client_raises_an_error_of_the_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="scripted", prompt="@fail", stream=True)
    with pytest.raises(openai.APIError, match="KV cache"):
        list(stream)


@pytest.mark.parametrize(("prompt", "status"), [("@queue-full", 503), ("x" * 600, 400), ("@crash-at-start", 500)])
def test_an_error_before_the_start_is_a_status(http: httpx.Client, prompt: str, status: int) -> None:
    answer = http.post("/v1/completions", json={"prompt": prompt, "stream": True})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
