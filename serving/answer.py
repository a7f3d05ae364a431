"""The way from a planned job to an HTTP answer, whole or streamed; the endpoints differ only in their formatter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from fastapi import Request
from starlette.responses import Response

from fly_jax.errors import ContextLengthError
from fly_jax.outputs import RequestDelta
from fly_jax.sampling_params import SamplingParams
from serving.clients import client_of
from serving.disconnect import ClientGoneError, client_gone, unless_disconnected
from serving.errors import to_api_error
from serving.generation import Indexed, Job, Outcome, UsageTally, plan, run
from serving.protocol import GenerationBody
from serving.reading import EncodedPrompt
from serving.responses import Answer, ChatCompletionChunk, Completion, Usage
from serving.state import ServerState, state_of
from serving.streaming import DONE, EventStream, Primed, error_event, event

Chunk = Completion | ChatCompletionChunk


class Formatter(Protocol):
    """Writes one job's answer in an endpoint's shape."""

    def opening(self) -> Sequence[Chunk]:
        """Chunks that come before any text."""
        ...

    def chunk(self, index: int, delta: RequestDelta) -> Chunk | None:
        """What a delta tells the client; None when it is nothing yet."""
        ...

    def usage_chunk(self, usage: Usage) -> Chunk: ...

    def whole(self, outcomes: Sequence[Outcome], usage: Usage) -> Answer: ...


def make_job(
    request: Request,
    body: GenerationBody,
    prompts: Sequence[EncodedPrompt],
    params: SamplingParams,
    *,
    prefix: str,
    discard_output: bool = False,
) -> Job:
    """The body's own request id wins over the header's, and both over a new one."""
    state = state_of(request)
    job_id = f"{prefix}-{body.request_id or request.state.request_id}"
    subs = plan(
        state.engine,
        prompts,
        params,
        choices_per_prompt=body.choices_per_prompt,
        request_id=job_id,
        discard_output=discard_output,
    )
    return Job(job_id, client_of(request), int(time.time()), request.state.arrival, state.model_name, body, subs)


async def answer(request: Request, job: Job, formatter: Formatter) -> Response:
    """Runs a job; a client that leaves at any point aborts it.

    A stream's first delta is awaited before its status line is sent, so that a full queue or a prompt that is too
    long is an HTTP error and not a stream that starts with one.
    """
    state = state_of(request)
    try:
        if not job.body.stream:
            whole = await unless_disconnected(request.receive, _collect(state, job, formatter))
            return Response(whole.json_text(), media_type="application/json")
        stream = run(state.engine, state.metrics, job)
        primed = await unless_disconnected(request.receive, Primed.start(stream))
        return EventStream(_events(job, formatter, primed), primed)
    except ContextLengthError as error:
        # The engine knows prompts only; the client is told the field it sent.
        raise ContextLengthError(str(error), param=job.body.prompt_field) from error
    except ClientGoneError:
        return client_gone()


async def _collect(state: ServerState, job: Job, formatter: Formatter) -> Answer:
    tally = UsageTally(job.subs)
    outcomes = [Outcome() for _ in job.subs]
    async with aclosing(run(state.engine, state.metrics, job)) as stream:
        async for index, delta in stream:
            outcomes[index].add(delta)
            tally.add(index, delta)
    if any(outcome.prompt_logprobs for outcome in outcomes):  # thousands of tokens' texts
        return await asyncio.to_thread(formatter.whole, outcomes, tally.usage())
    return formatter.whole(outcomes, tally.usage())


async def _events(job: Job, formatter: Formatter, stream: Primed[Indexed]) -> AsyncGenerator[bytes, None]:
    tally = UsageTally(job.subs)
    try:
        for chunk in formatter.opening():
            yield _chunk_event(job, chunk, tally)
        async for index, delta in stream:
            tally.add(index, delta)
            chunk_or_none = formatter.chunk(index, delta)
            if chunk_or_none is not None:
                yield _chunk_event(job, chunk_or_none, tally)
        if job.body.include_usage:
            yield event(formatter.usage_chunk(tally.usage()).json_text())
    except Exception as exc:
        yield error_event(to_api_error(exc))
    yield DONE


def _chunk_event(job: Job, chunk: Chunk, tally: UsageTally) -> bytes:
    """With ``include_usage`` every chunk has the field, null until the end unless the client wants it all along."""
    if job.body.include_usage:
        chunk.usage = tally.usage() if job.body.continuous_usage else None
    return event(chunk.json_text())
