from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import openai
import pytest

from fly_jax.sampling_params import SamplingParams
from tests.serving.scripted_engine import REPLY, ScriptedEngine, token_logprob

MODEL = "scripted"
HI = [{"role": "user", "content": "hi"}]
ALL_NULL: dict[str, None] = dict.fromkeys(
    [
        "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop",
        "stop_token_ids", "ignore_eos", "min_tokens", "skip_special_tokens", "stream", "stream_options", "request_id",
        "user", "logprobs", "top_logprobs", "tools", "tool_choice", "response_format", "logit_bias", "functions",
        "function_call", "chat_template", "chat_template_kwargs", "modalities", "audio",
    ]
)  # fmt: skip


def test_message_and_usage(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
    assert completion.object == "chat.completion"
    assert completion.id.startswith("chatcmpl-")
    [choice] = completion.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", REPLY, "stop")
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len("[user] hi\n[assistant] ")


def test_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == REPLY
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-2:] == [None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(REPLY.encode())
    assert {chunk.usage for chunk in chunks[:-1]} == {None}
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_a_limit_the_context_is_the_limit(http: httpx.Client, engine: ScriptedEngine) -> None:
    http.post("/v1/chat/completions", json={"messages": HI, "request_id": "no-limit"})
    assert _params(engine, "no-limit").max_tokens is None


def test_placement_fields_reach_the_engine(http: httpx.Client, engine: ScriptedEngine) -> None:
    body = {"messages": HI, "request_id": "placed", "priority": 5, "tensor_parallel_size": 4}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert (_params(engine, "placed").priority, _params(engine, "placed").tensor_parallel_size) == (5, 4)
    nulls = {"messages": HI, "request_id": "unplaced", "priority": None, "tensor_parallel_size": None}
    assert http.post("/v1/chat/completions", json=nulls).status_code == 200
    assert (_params(engine, "unplaced").priority, _params(engine, "unplaced").tensor_parallel_size) == (0, None)


def test_the_newer_limit_wins(http: httpx.Client) -> None:
    body = {"messages": HI, "max_tokens": 5, "max_completion_tokens": 3}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == REPLY[:3]
    assert answer["choices"][0]["finish_reason"] == "length"


def test_explicit_nulls_mean_defaults(http: httpx.Client) -> None:
    message = {"role": "user", "content": "hi", "name": None, "tool_calls": None}
    answer = http.post("/v1/chat/completions", json={"model": None, "messages": [message], **ALL_NULL})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == REPLY


def test_neutral_tool_fields_are_accepted(http: httpx.Client) -> None:
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "parallel_tool_calls": True}
    assert http.post("/v1/chat/completions", json={"messages": HI, **neutral}).status_code == 200


def test_text_parts_are_joined(http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "@say b"}]
    answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]}).json()
    assert answer["choices"][0]["message"]["content"] == "b"
    assert answer["usage"]["prompt_tokens"] == len("[user] a\n@say b\n[assistant] ")


def test_roles(http: httpx.Client) -> None:
    roles = [("system", "s"), ("user", "a"), ("assistant", None), ("developer", "@say fine")]
    messages = [{"role": role, "content": content} for role, content in roles]
    answer = http.post("/v1/chat/completions", json={"messages": messages}).json()
    assert answer["choices"][0]["message"]["content"] == "fine"
    expected = "[system] s\n[user] a\n[assistant] \n[system] @say fine\n[assistant] "
    assert answer["usage"]["prompt_tokens"] == len(expected)


def test_template_switches(http: httpx.Client) -> None:
    body = {"messages": HI, "chat_template_kwargs": {"enable_thinking": False}, "add_generation_prompt": False}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer["usage"]["prompt_tokens"] == len("[enable_thinking=False]\n[user] hi\n")


@pytest.mark.parametrize("stream", [False, True])
def test_choices(client: openai.OpenAI, stream: bool) -> None:
    messages = [{"role": "user", "content": "@seed"}]
    texts = {0: "", 1: "", 2: ""}
    roles = []
    arguments = {"model": MODEL, "messages": messages, "n": 3, "seed": 1}
    if stream:
        for chunk in client.chat.completions.create(**arguments, stream=True):  # type: ignore[call-overload]
            [choice] = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.index] if choice.delta.role else []
        assert roles == [0, 1, 2]
    else:
        for choice in client.chat.completions.create(**arguments).choices:  # type: ignore[call-overload]
            texts[choice.index] = choice.message.content
    assert texts == {0: "seed=1", 1: "seed=2", 2: "seed=3"}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, stream: bool) -> None:
    arguments = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "@say ab"}],
        "logprobs": True,
        "top_logprobs": 2,
    }
    if stream:
        chunks = client.chat.completions.create(**arguments, stream=True)  # type: ignore[call-overload]
        found = [chunk.choices[0].logprobs for chunk in chunks]
        content = [entry for logprobs in found if logprobs for entry in logprobs.content]
    else:
        content = client.chat.completions.create(**arguments).choices[0].logprobs.content  # type: ignore[call-overload]
    assert [(entry.token, entry.logprob, entry.bytes) for entry in content] == [
        ("a", token_logprob(97), [97]),
        ("b", token_logprob(98), [98]),
    ]
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("a", token_logprob(97)), ("b", -9999.0)]


def test_bytes_of_a_part_of_a_character_are_the_tokens_own(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "@say ä"}], "logprobs": True, "top_logprobs": 1}
    content = http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA4]]
    assert [entry["top_logprobs"][0]["bytes"] for entry in content] == [[0xC3], [0xA4]]
    named = http.post("/v1/chat/completions", json=body | {"return_tokens_as_token_ids": True}).json()
    assert [entry["token"] for entry in named["choices"][0]["logprobs"]["content"]] == ["token_id:195", "token_id:164"]


def test_prompt_logprobs(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": HI, "prompt_logprobs": 1}).json()
    first, *later = answer["prompt_logprobs"]
    assert first is None
    assert len(later) == answer["usage"]["prompt_tokens"] - 1
    assert all(entry["33"] == {"logprob": -0.125, "rank": 1, "decoded_token": "!"} for entry in later)
    assert "prompt_logprobs" not in http.post("/v1/chat/completions", json={"messages": HI}).json()


def test_logprobs_without_alternatives(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": HI, "logprobs": True}).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == len(REPLY.encode())
    assert {len(entry["top_logprobs"]) for entry in content} == {0}


def test_no_template(in_process: Callable[..., httpx.AsyncClient]) -> None:
    engine = ScriptedEngine()
    engine.tokenizer.has_chat_template = False

    async def ask() -> httpx.Response:
        async with in_process(engine) as client:
            return await client.post("/v1/chat/completions", json={"messages": HI})

    answer = asyncio.run(ask())
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"


def _params(engine: ScriptedEngine, request_id: str) -> SamplingParams:
    [params] = [params for name, params in engine.params.items() if name.startswith(f"chatcmpl-{request_id}-")]
    return params
