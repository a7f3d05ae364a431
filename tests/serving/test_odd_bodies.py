"""Bodies that no client sends on purpose: whatever they hold, the answer is never a 5xx."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from serving.protocol import ChatCompletionRequest, CompletionRequest, GenerationBody
from tests.serving.scripted_engine import ScriptedEngine

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    -float("inf"), "", "x", "\x00", "\ud800", "\udc00x", "🌍", "x" * 5000, "{}", "null", "%s{0}{reason}", [], [None],
    [[]], [[[]]], [1, "x"], [[1], "x"], [True], [0.5], ["\ud800"], [-1], [2**70], {}, {"": None}, {"\ud800": 1},
    {"type": "text", "text": 5}, [{"type": "text", "text": "\ud800"}], [{"role": "user", "content": {}}],
    [{"role": [], "content": "x"}], [{"role": "user", "content": [[]]}], {"include_usage": "x"}, list(range(300)),
]  # fmt: skip
PATHS: dict[str, type[GenerationBody]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}
BASES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}


def bodies(path: str) -> list[dict[str, Any]]:
    """Each field with each odd value, and random mixtures."""
    model = PATHS[path]
    names = [*model.model_fields, *model.unsupported]
    single = [{**BASES[path], name: value} for name in names for value in ODD]
    chance = random.Random(0)
    mixed = [{**BASES[path], **{name: chance.choice(ODD) for name in chance.sample(names, 5)}} for _ in range(100)]
    return [*single, *mixed]


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
