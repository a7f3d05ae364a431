"""Bodies that no client sends on purpose: whatever they hold, the answer is never a 5xx."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from serving.protocol import (
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationBody,
    LayoutRequest,
    TokenizeRequest,
)
from tests.serving.scripted_engine import ScriptedEngine

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    -float("inf"), "", "x", "\x00", "\ud800", "\udc00x", "🌍", "x" * 5000, "{}", "null", "%s{0}{reason}", [], [None],
    [[]], [[[]]], [1, "x"], [[1], "x"], [True], [0.5], ["\ud800"], [-1], [2**70], {}, {"": None}, {"\ud800": 1},
    {"type": "text", "text": 5}, [{"type": "text", "text": "\ud800"}], [{"role": "user", "content": {}}],
    [{"role": [], "content": "x"}], [{"role": "user", "content": [[]]}], {"include_usage": "x"}, list(range(300)),
]  # fmt: skip
GENERATING: dict[str, type[GenerationBody]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}
PATHS: dict[str, type[Body]] = {
    **GENERATING,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/layout": LayoutRequest,
}
BASES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [104]},
    "/layout": {"layout": "2+2"},
}


INTEGERS = (
    "n", "max_tokens", "top_k", "seed", "min_tokens", "priority", "tensor_parallel_size",
)  # fmt: skip
BOOLEANS = [
    *((path, {name: value}, name) for path in GENERATING for name in INTEGERS for value in (True, False)),
    ("/v1/completions", {"logprobs": True}, "logprobs"),
    ("/v1/completions", {"prompt_logprobs": False}, "prompt_logprobs"),
    ("/v1/completions", {"stop_token_ids": [1, True]}, "stop_token_ids.1"),
    ("/v1/chat/completions", {"max_completion_tokens": True}, "max_completion_tokens"),
    ("/v1/chat/completions", {"logprobs": True, "top_logprobs": True}, "top_logprobs"),
    ("/detokenize", {"tokens": [True]}, "tokens.0"),
]


def bodies(path: str) -> list[dict[str, Any]]:
    """Each field with each odd value, and random mixtures."""
    model = PATHS[path]
    unsupported = model.unsupported if issubclass(model, GenerationBody) else ()
    names = [*model.model_fields, *unsupported]
    single = [{**BASES[path], name: value} for name in names for value in ODD]
    chance = random.Random(0)
    mixed = [
        {**BASES[path], **{name: chance.choice(ODD) for name in chance.sample(names, min(5, len(names)))}}
        for _ in range(100)
    ]
    return [*single, *mixed]


@pytest.mark.slow
@pytest.mark.parametrize("path", list(PATHS))
def test_never_a_server_error(in_process: Callable[..., httpx.AsyncClient], path: str) -> None:
    async def check() -> None:
        headers = {"Content-Type": "application/json"}
        async with in_process(ScriptedEngine(max_num_queued_reqs=4)) as client:
            for body in bodies(path):
                answer = await client.post(path, content=json.dumps(body).encode(), headers=headers)
                assert answer.status_code in (200, 400, 404), f"{ascii(body)[:300]}: {answer.text[:300]}"
                if answer.status_code != 200:
                    assert answer.json()["error"]["message"]

    asyncio.run(check())


def test_a_boolean_is_no_integer(in_process: Callable[..., httpx.AsyncClient]) -> None:
    async def check() -> None:
        async with in_process() as client:
            for path, body, param in BOOLEANS:
                answer = await client.post(path, json={**BASES.get(path, {}), **body})
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (400, param), answer.text
                assert error["message"].startswith(f"{param}: must be an integer, got ")
            for prompt in ([1, True], [[5], [1, True]]):
                answer = await client.post("/v1/completions", json={"prompt": prompt})
                assert answer.status_code == 400
                assert answer.json()["error"]["message"].endswith("must hold integer token ids, got bool at 1")
            text = await client.post("/v1/completions", json={"prompt": "hi", "tensor_parallel_size": "2"})
            assert text.status_code == 200

    asyncio.run(check())
