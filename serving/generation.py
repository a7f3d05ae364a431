"""One HTTP request as several engine requests, and their deltas as one stream."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from fly_jax.errors import InvalidRequestError, RequestFailedError
from fly_jax.logprobs import PromptLogprobs, TokenLogprob
from fly_jax.outputs import FinishReason, RequestDelta
from fly_jax.sampling_params import MAX_SEED, SamplingParams
from serving.engine_client import EngineClient
from serving.metrics import ServerMetrics
from serving.protocol import GenerationBody
from serving.reading import EncodedPrompt, check_token_ids
from serving.responses import PromptTokensDetails, Usage

Indexed = tuple[int, RequestDelta]
MERGE_BUFFER = 64


@dataclass(frozen=True, slots=True)
class SubRequest:
    """One choice of the answer.

    Attributes:
        index: of the choice; prompt-major, so that choice ``p * n + i`` is the i-th of prompt p.
        is_first_of_prompt: its prompt's tokens are counted with this one.
        discard_output: only the prompt was asked for.
    """

    index: int
    prompt: EncodedPrompt
    params: SamplingParams
    request_id: str
    is_first_of_prompt: bool
    discard_output: bool


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request, ready to run; ``arrival`` is on the monotonic clock, ``created`` since the epoch.

    Attributes:
        client: whose share of the waiting places it takes.
    """

    id: str
    client: str
    created: int
    arrival: float
    model: str
    body: GenerationBody
    subs: tuple[SubRequest, ...]


@dataclass(slots=True)
class Outcome:
    """All deltas of one choice, joined."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, delta: RequestDelta) -> None:
        self.text += delta.text
        self.logprobs.extend(delta.logprobs)
        self.prompt_logprobs = delta.prompt_logprobs if self.prompt_logprobs is None else self.prompt_logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_reason = self.stop_reason if delta.stop_reason is None else delta.stop_reason


class UsageTally:
    """Token counts of a whole HTTP request: each prompt once, however many choices it has."""

    def __init__(self, subs: Sequence[SubRequest]) -> None:
        self._firsts = {sub.index for sub in subs if sub.is_first_of_prompt}
        self._prompt_tokens = sum(len(sub.prompt.token_ids) for sub in subs if sub.is_first_of_prompt)
        self._output: dict[int, int] = {}
        self._cached: dict[int, int] = {}

    def add(self, index: int, delta: RequestDelta) -> None:
        self._output[index] = delta.num_output_tokens
        if index in self._firsts:
            self._cached[index] = delta.num_cached_tokens

    def usage(self) -> Usage:
        output = sum(self._output.values())
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=output,
            total_tokens=self._prompt_tokens + output,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached.values())),
        )


def plan(
    engine: EngineClient,
    prompts: Sequence[EncodedPrompt],
    params: SamplingParams,
    *,
    choices_per_prompt: int,
    request_id: str,
    discard_output: bool = False,
) -> tuple[SubRequest, ...]:
    """A sub-request for each choice.

    Engine ids end in a random part: two clients may send the same request id.

    Raises:
        InvalidRequestError: more choices than the engine would ever queue, or a stop token id out of range.
    """
    total = len(prompts) * choices_per_prompt
    limit = engine.max_queued_per_client
    if total > limit:
        message = (
            f"{len(prompts)} prompts with n={choices_per_prompt} are more than the {limit} requests that one client "
            "can queue: split the request"
        )
        raise InvalidRequestError(message, param="n" if choices_per_prompt > 1 else "prompt")
    check_token_ids(params.stop_token_ids, engine.vocab_size, "stop_token_ids")
    unique = uuid.uuid4().hex[:8]
    return tuple(
        SubRequest(
            index=prompt_index * choices_per_prompt + choice,
            prompt=prompt,
            params=_reseeded(params, choice),
            request_id=f"{request_id}-{unique}-{prompt_index * choices_per_prompt + choice}",
            is_first_of_prompt=choice == 0,
            discard_output=discard_output,
        )
        for prompt_index, prompt in enumerate(prompts)
        for choice in range(choices_per_prompt)
    )


def _reseeded(params: SamplingParams, choice: int) -> SamplingParams:
    """The same seed for all choices would give the same text n times."""
    if params.seed is None or choice == 0:
        return params
    return dataclasses.replace(params, seed=(params.seed + choice) % (MAX_SEED + 1))


def run(engine: EngineClient, metrics: ServerMetrics, job: Job) -> AsyncGenerator[Indexed, None]:
    """All deltas of a job as they come; closing it, or an error in any part, aborts what still runs.

    Raises (while iterating):
        RequestFailedError: the engine gave one of the sub-requests up.
        Whatever ``EngineClient.generate`` raises.
    """
    streams = [_deltas(engine, metrics, sub, job) for sub in job.subs]
    return streams[0] if len(streams) == 1 else _merge(streams)


async def _deltas(
    engine: EngineClient, metrics: ServerMetrics, sub: SubRequest, job: Job
) -> AsyncGenerator[Indexed, None]:
    stream = engine.generate(sub.prompt.token_ids, sub.params, request_id=sub.request_id, client=job.client)
    last = None
    try:
        async for delta in stream:
            now = time.monotonic()
            if delta.token_ids:
                if last is None:
                    metrics.time_to_first_token.observe(now - job.arrival)
                else:
                    metrics.inter_token_latency.observe(now - last)
                last = now
            if delta.finish_reason is FinishReason.ERROR:
                raise RequestFailedError(delta.error or "the request failed in the engine")
            if delta.finish_reason is not None:
                metrics.e2e_request_latency.observe(now - job.arrival)
            yield sub.index, _prompt_only(delta) if sub.discard_output else delta
    finally:
        await _close(stream)


def _prompt_only(delta: RequestDelta) -> RequestDelta:
    return dataclasses.replace(
        delta,
        text="",
        token_ids=(),
        logprobs=(),
        num_output_tokens=0,
        finish_reason=delta.finish_reason and FinishReason.LENGTH,
        stop_reason=None,
    )


async def _close(stream: AsyncIterator[RequestDelta]) -> None:
    if isinstance(stream, AsyncGenerator):
        await stream.aclose()


async def _merge(streams: Sequence[AsyncGenerator[Indexed, None]]) -> AsyncGenerator[Indexed, None]:
    """Deltas of all streams in the order they come; bounded, so that a slow client holds the pumps back."""
    queue: asyncio.Queue[Indexed | Exception | None] = asyncio.Queue(MERGE_BUFFER)
    pumps = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    try:
        still_open = len(pumps)
        while still_open:
            item = await queue.get()
            if item is None:
                still_open -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(stream: AsyncGenerator[Indexed, None], queue: asyncio.Queue[Indexed | Exception | None]) -> None:
    try:
        async with aclosing(stream):
            async for item in stream:
                await queue.put(item)
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)
