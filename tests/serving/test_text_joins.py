"""Prompt and answer of a tokenizer with prefix space and byte fallback, whichever way the answer is given."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence

import httpx
import pytest

from fly_jax.logprobs import TokenLogprob
from fly_jax.outputs import RequestDelta
from fly_jax.sampling_params import SamplingParams
from fly_jax.text.output_processor import OutputProcessor
from tests.fly_jax.builders import make_request
from tests.fly_jax.tokenizer_families import family
from tests.serving.live import LiveServer, live_server
from tests.serving.scripted_engine import ScriptedEngine

LLAMA = family("llama_2")
TIME = LLAMA._tokenizer.token_to_id("▁time")


class NextTokens(ScriptedEngine):
    """Answers what ``reply`` holds, through the product's own output processing."""

    vocab_size = 400
    reply: Sequence[int] = ()

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = LLAMA  # type: ignore[assignment]

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        client: str | None = None,  # noqa: ARG002
    ) -> AsyncIterator[RequestDelta]:
        request = make_request(prompt_token_ids, name=request_id or "r")
        request.params, request.max_tokens = params, len(self.reply)
        processor = OutputProcessor(LLAMA, frozenset())
        processor.add(request)
        for token in self.reply:
            request.output_ids.append(token)
            delta = processor.push(request, TokenLogprob(token, -0.5))
            yield delta
            if delta.finish_reason is not None:
                return


@pytest.fixture(scope="module")
def engine() -> NextTokens:
    return NextTokens()


@pytest.fixture(scope="module")
def server(engine: NextTokens) -> Iterator[LiveServer]:
    with live_server(engine) as server:
        yield server


def answer(http: httpx.Client, stream: bool, **body: object) -> tuple[str, dict[str, object]]:
    """The text and the last choice."""
    reply = http.post("/v1/completions", json={**body, "stream": stream}).raise_for_status()
    if not stream:
        choice = reply.json()["choices"][0]
        return choice["text"], choice
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line][:-1]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return "".join(choice["text"] for choice in choices), choices[-1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_a_first_word_keeps_its_space(server: LiveServer, engine: NextTokens, stream: bool, as_ids: bool) -> None:
    engine.reply = [TIME]
    prompt = LLAMA.encode("Once upon a") if as_ids else "Once upon a"
    assert answer(server.http, stream, prompt=prompt)[0] == " time"
    assert answer(server.http, stream, prompt=prompt, echo=True)[0] == "Once upon a time"
    text, last = answer(server.http, stream, prompt=prompt, stop=[" time"])
    assert (text, last["finish_reason"], last["stop_reason"]) == ("", "stop", " time")


@pytest.mark.parametrize("stream", [False, True])
def test_a_character_may_begin_in_the_prompt(server: LiveServer, engine: NextTokens, stream: bool) -> None:
    tokens = LLAMA.encode("the 😀")
    prompt, engine.reply = tokens[:-2], [*tokens[-2:], TIME]
    assert answer(server.http, stream, prompt=prompt)[0] == "😀 time"
    assert answer(server.http, stream, prompt=prompt, echo=True)[0] == "the 😀 time"
