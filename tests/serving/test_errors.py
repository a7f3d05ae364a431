from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from serving import ServerOptions
from tests.serving.live import LiveServer
from tests.serving.scripted_engine import ScriptedEngine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
NAN = float("nan")


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", []), ("prompt", [[]]), ("prompt", ["a", 1]),
        ("prompt", 5), ("prompt", None), ("prompt", {}), ("prompt", True), ("prompt", [True]), ("prompt", [1.5]),
        ("prompt", [-1]), ("prompt", [258]), ("prompt", [[1], [10**30]]), ("prompt", "\ud800"),
        ("prompt", ["a"] * 1025),
        ("prompt", ["a"] * 65), ("n", 0), ("n", 129), ("n", -1), ("n", "many"), ("n", 128), ("max_tokens", 0),
        ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", 10**30), ("temperature", -1), ("temperature", NAN),
        ("temperature", float("inf")), ("temperature", 10**400), ("temperature", "hot"), ("temperature", 1e9),
        ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("top_k", 2**40), ("min_p", 2), ("min_p", -NAN), ("seed", -2),
        ("seed", 2**63), ("stop", 5), ("stop", [""]), ("stop", ""), ("stop", ["a"] * 65), ("stop", "x" * 2000),
        ("stop", ["\udfff"]), ("stop", [None]), ("stop_token_ids", [258]), ("stop_token_ids", [-1]),
        ("stop_token_ids", "x"), ("stop_token_ids", [1] * 2000), ("min_tokens", -1), ("min_tokens", 17),
        ("logprobs", 21), ("logprobs", -1), ("prompt_logprobs", 21), ("prompt_logprobs", -1), ("stream", "perhaps"),
        ("stream_options", {"include_usage": True}), ("stop", ["x" * 1024] * 17),
        ("temperature", True), ("top_p", True), ("min_p", False),
        ("frequency_penalty", False), ("presence_penalty", False), ("best_of", True), ("length_penalty", True),
        ("repetition_penalty", True), ("request_id", "x" * 300), ("request_id", "a\nb"),
        ("request_id", ""), ("request_id", "\ud800"),
        ("user", 5), ("presence_penalty", 0.5), ("frequency_penalty", -1), ("repetition_penalty", 1.2),
        ("logit_bias", {"5": 1}), ("best_of", 2), ("suffix", "end"), ("cache_salt", "s"),
        ("priority", "high"), ("priority", 1.5), ("priority", 2**31), ("priority", -(2**31)), ("priority", 2**70),
        ("tensor_parallel_size", 0), ("tensor_parallel_size", -2), ("tensor_parallel_size", 3),
        ("tensor_parallel_size", 8), ("tensor_parallel_size", "wide"), ("tensor_parallel_size", 2**70),
        ("response_format", {"type": "json_object"}), ("guided_json", {}), ("use_beam_search", True),
        ("echo", "perhaps"), ("prompt_embeds", "abc"),
    ],
)  # fmt: skip
def test_a_bad_completion_field_is_named(http: httpx.Client, field: str, value: Any) -> None:
    content = json_bytes({"prompt": "hi", field: value})
    answer = http.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    error = error_of(answer)
    assert answer.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == field
    assert field in error["message"]


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("messages", [], "messages"),
        ("messages", None, "messages"),
        ("messages", "hi", "messages"),
        ("messages", ["hi"], "messages.0"),
        ("messages", [{"role": "user"}], "messages.0.content"),
        ("messages", [{"role": "user", "content": None}], "messages.0.content"),
        ("messages", [{"content": "hi"}], "messages.0.role"),
        ("messages", [*HI, {"role": "tool", "content": "x"}], "messages.1.role"),
        ("messages", [{"role": "user", "content": "\ud83d"}], "messages.0.content"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content"),
        ("messages", [{"role": "user", "content": ["hi"]}], "messages.0.content"),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages.0.content"),
        ("messages", [{"role": "assistant", "content": None, "tool_calls": [{}]}], "messages.0"),
        ("messages", [{"role": "user", "content": "@refuse"}], "messages"),
        ("tools", [{"type": "function"}], "tools"),
        ("tool_choice", "required", "tool_choice"),
        ("top_logprobs", 3, "top_logprobs"),
        ("chat_template", "{{ x }}", "chat_template"),
        ("chat_template_kwargs", {"messages": []}, "chat_template_kwargs"),
        ("chat_template_kwargs", {"a": [1]}, "chat_template_kwargs"),
        ("chat_template_kwargs", {"\ud800": 1}, "chat_template_kwargs"),
        ("chat_template_kwargs", {"a": NAN}, "chat_template_kwargs"),
        ("chat_template_kwargs", [], "chat_template_kwargs"),
        ("max_completion_tokens", 0, "max_tokens"),
        ("echo", True, "echo"),
        ("reasoning_effort", "high", "reasoning_effort"),
        ("priority", [], "priority"),
        ("priority", 10**12, "priority"),
        ("tensor_parallel_size", 6, "tensor_parallel_size"),
        ("tensor_parallel_size", 2.5, "tensor_parallel_size"),
    ],
)
def test_a_bad_chat_field_is_named(http: httpx.Client, field: str, value: Any, param: str) -> None:
    content = json_bytes({"messages": HI, field: value})
    answer = http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param


def test_an_unsupported_part_is_refused_by_its_type(http: httpx.Client) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://example.com/{reason}.png"}}
    answer = http.post(CHAT, json={"messages": [{"role": "user", "content": [part]}]})
    assert "'image_url'" in error_of(answer)["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize"])
def test_unknown_model(http: httpx.Client, path: str) -> None:
    answer = http.post(
        path, json={"model": "gpt-\u263a", "prompt": "hi", "messages": [] if path == "/tokenize" else HI}
    )
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "gpt-\u263a" in error["message"]
    assert "scripted" in error["message"]


def test_the_official_client_sees_its_own_error_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="hi")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="scripted", prompt="hi", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="scripted", prompt="@queue-full")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "field", "tokens"), [(COMPLETIONS, "prompt", 601), (CHAT, "messages", 620)])
def test_too_long_a_prompt_names_both_numbers(
    http: httpx.Client, path: str, field: str, tokens: int, stream: bool
) -> None:
    text = "x" * 600
    body = {"prompt": text, "messages": [{"role": "user", "content": text}], "stream": stream}
    answer = http.post(path, json=body)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", field)
    # litellm and others know the error by these words of OpenAI's API.
    assert error["message"].startswith("This model's maximum context length is 512 tokens")
    assert str(tokens) in error["message"]


def test_queue_full(http: httpx.Client) -> None:
    answer = http.post(COMPLETIONS, json={"prompt": ["hi", "@queue-full"]})
    assert (answer.status_code, error_of(answer)["code"]) == (503, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_its_share_of_the_queue_is_told_as_of_a_rate_limit(server: LiveServer, stream: bool) -> None:
    answer = server.http.post(COMPLETIONS, json={"prompt": "@client-full", "stream": stream})
    error = error_of(answer)
    assert (answer.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert error["message"] == "32 of your requests are waiting and at most 32 of one client may: try later"
    assert int(answer.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        server.openai.completions.create(model="scripted", prompt="@client-full", stream=stream)


@pytest.mark.parametrize("prompt", ["@crash-at-start", "@crash-midway", ["hi", "@crash-midway"]])
def test_the_unexpected_leaks_nothing(http: httpx.Client, prompt: Any) -> None:
    answer = http.post(COMPLETIONS, json={"prompt": prompt})
    assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"]


def test_a_request_that_fails_in_the_engine(http: httpx.Client) -> None:
    answer = http.post(COMPLETIONS, json={"prompt": "@fail"})
    assert (answer.status_code, error_of(answer)["code"]) == (500, "request_failed")
    assert "KV cache" in error_of(answer)["message"]


def test_a_failed_choice_aborts_the_others(http: httpx.Client, engine: ScriptedEngine) -> None:
    answer = http.post(COMPLETIONS, json={"prompt": ["@endless", "@fail"], "request_id": "failing-pair"})
    assert answer.status_code == 500
    assert any(name.startswith("cmpl-failing-pair-") and name.endswith("-0") for name in engine.aborted)


def test_dead_engine(in_process: Callable[..., httpx.AsyncClient]) -> None:
    engine = ScriptedEngine()
    engine.is_alive = False

    async def ask() -> tuple[httpx.Response, httpx.Response]:
        async with in_process(engine) as client:
            return await client.post(COMPLETIONS, json={"prompt": "hi"}), await client.get("/health")

    answer, health = asyncio.run(ask())
    assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_dead")
    assert (health.status_code, error_of(health)["code"]) == (503, "engine_dead")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", COMPLETIONS, 405)])
def test_errors_of_the_framework_have_the_same_shape(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert error_of(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b"5", b'"text"', b"\xff\xfe{}", b'{"prompt": "\xff"}', b"{\"prompt\": 'hi'}",
        b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": ' + b"9" * 10_000 + b"}", b"\x00" * 100,
        b'{"x": Infinity}', b'{"prompt": 5, "\\ud800": 1, "n": 0}', b'{"prompt": "hi"} x',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize", "/layout"])
def test_a_broken_body_is_the_clients_fault(http: httpx.Client, path: str, content: bytes) -> None:
    answer = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["message"]


def test_a_form_says_what_to_send(http: httpx.Client) -> None:
    answer = http.post(COMPLETIONS, data={"prompt": "hi"})
    assert answer.status_code == 400
    assert "application/json" in error_of(answer)["message"]


def test_too_large_a_body(in_process: Callable[..., httpx.AsyncClient]) -> None:
    async def ask(content: Any) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        async with in_process(options=ServerOptions(max_body_bytes=1000)) as client:
            return await client.post(COMPLETIONS, content=content, headers=headers)

    async def chunks() -> Any:
        for _ in range(3):
            yield b" " * 600

    for content in (b" " * 1001, chunks()):
        answer = asyncio.run(ask(content))
        assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")
    assert asyncio.run(ask(b'{"prompt": "hi"}' + b" " * 900)).status_code == 200


def test_too_large_a_body_over_a_socket(http: httpx.Client) -> None:
    """The client has sent all of it before it reads: the answer must still arrive."""
    answer = http.post(COMPLETIONS, content=b" " * (17 * 1024 * 1024), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def json_bytes(value: Any) -> bytes:
    """What httpx refuses to write: NaN, infinities, half surrogate pairs."""
    return json.dumps(value).encode()
