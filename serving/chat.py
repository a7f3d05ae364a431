"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from fly_jax.logprobs import TokenLogprob
from fly_jax.outputs import RequestDelta
from serving.answer import answer, make_job
from serving.engine_client import TokenizerClient
from serving.generation import Job, Outcome
from serving.logprobs import TokenNames, chat_logprobs, prompt_logprob_maps
from serving.protocol import ChatCompletionRequest
from serving.responses import (
    ChatAnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    Usage,
)
from serving.routes import BodyRoute, result_of
from serving.state import state_of

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    state = state_of(request)
    state.check_model(body.model)
    params = body.sampling_params(state.engine.sampling_defaults)
    prompts = await result_of(request, body)
    job = make_job(request, body, prompts, params, prefix="chatcmpl")
    return await answer(request, job, ChatFormatter(job, body, state.engine.tokenizer))


class ChatFormatter:
    def __init__(self, job: Job, body: ChatCompletionRequest, tokenizer: TokenizerClient) -> None:
        self._job = job
        self._body = body
        self._names = TokenNames(tokenizer, as_ids=body.return_tokens_as_token_ids is True)

    def opening(self) -> Sequence[ChatCompletionChunk]:
        """Who speaks, for each choice, before anything is said."""
        first = ChatDelta(role="assistant", content="")
        return [
            self._chunk([ChatChunkChoice(index=sub.index, delta=first, logprobs=None, finish_reason=None)])
            for sub in self._job.subs
        ]

    def chunk(self, index: int, delta: RequestDelta) -> ChatCompletionChunk | None:
        logprobs = self._logprobs(delta.logprobs) if delta.logprobs else None
        if not (delta.text or logprobs or delta.finish_reason):
            return None
        choice = ChatChunkChoice(
            index=index,
            delta=ChatDelta(content=delta.text) if delta.text or logprobs else ChatDelta(),
            logprobs=logprobs,
            finish_reason=delta.finish_reason and delta.finish_reason.value,
        )
        if delta.finish_reason is not None:
            choice.stop_reason = delta.stop_reason
        return self._chunk([choice])

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk:
        chunk = self._chunk([])
        chunk.usage = usage
        return chunk

    def whole(self, outcomes: Sequence[Outcome], usage: Usage) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=ChatAnswerMessage(role="assistant", content=outcome.text),
                logprobs=self._logprobs(outcome.logprobs),
                finish_reason=outcome.finish_reason and outcome.finish_reason.value,
                stop_reason=outcome.stop_reason,
            )
            for index, outcome in enumerate(outcomes)
        ]
        job = self._job
        completion = ChatCompletion(
            id=job.id, object="chat.completion", created=job.created, model=job.model, choices=choices, usage=usage
        )
        scores = outcomes[0].prompt_logprobs  # all choices have one prompt
        if scores is not None:
            completion.prompt_logprobs = prompt_logprob_maps(self._names, scores, self._body.prompt_logprobs or 0)
        return completion

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        job = self._job
        return ChatCompletionChunk(
            id=job.id, object="chat.completion.chunk", created=job.created, model=job.model, choices=choices
        )

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._names, entries, self._body.top_logprobs or 0)
