"""What generation_config.json recommends is what requests get that set nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from fly_jax.sampling_params import SamplingDefaults, SamplingParams
from tests.serving.scripted_engine import ScriptedEngine

COMPLETION = "/v1/completions", {"prompt": "hi"}
CHAT = "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}


def params_of(
    in_process: Callable[..., httpx.AsyncClient],
    where: tuple[str, dict[str, Any]],
    defaults: SamplingDefaults,
    **body: Any,
) -> SamplingParams:
    engine = ScriptedEngine()
    engine.sampling_defaults = defaults

    async def send() -> None:
        async with in_process(engine) as client:
            answer = await client.post(where[0], json=where[1] | body)
            assert answer.status_code == 200, answer.text

    asyncio.run(send())
    (params,) = engine.params.values()
    return params


@pytest.mark.parametrize("where", [COMPLETION, CHAT])
def test_a_request_that_sets_nothing_gets_the_defaults_and_one_that_does_keeps_its_own(
    in_process: Callable[..., httpx.AsyncClient], where: tuple[str, dict[str, Any]]
) -> None:
    defaults = SamplingDefaults(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05)
    silent = params_of(in_process, where, defaults, temperature=None)
    assert (silent.temperature, silent.top_k, silent.top_p, silent.min_p) == (0.7, 20, 0.8, 0.05)
    own = params_of(in_process, where, defaults, temperature=0, top_k=0, top_p=1.0, min_p=0)
    assert (own.temperature, own.top_k, own.top_p, own.min_p) == (0.0, 0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("where", "body", "granted"),
    [
        (COMPLETION, {}, 9),
        (COMPLETION, {"max_tokens": 5}, 5),
        (COMPLETION, {"max_tokens": 500}, 9),
        (COMPLETION, {"max_tokens": 0, "echo": True}, 1),
        (CHAT, {}, 9),
        (CHAT, {"max_completion_tokens": 500}, 9),
    ],
)
def test_the_most_new_tokens_bound_every_request(
    in_process: Callable[..., httpx.AsyncClient], where: tuple[str, dict[str, Any]], body: dict[str, Any], granted: int
) -> None:
    assert params_of(in_process, where, SamplingDefaults(max_tokens=9), **body).max_tokens == granted
