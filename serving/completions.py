"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from fly_jax.outputs import RequestDelta
from serving.answer import answer, make_job
from serving.engine_client import TokenizerClient
from serving.generation import Job, Outcome, SubRequest
from serving.logprobs import CompletionLogprobWriter, TokenNames, prompt_logprob_maps
from serving.protocol import CompletionRequest
from serving.responses import Completion, CompletionChoice, Usage
from serving.routes import BodyRoute, result_of
from serving.state import state_of

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/completions", response_model=Completion)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    state = state_of(request)
    state.check_model(body.model)
    params = body.sampling_params(state.engine.sampling_defaults)
    prompts = await result_of(request, body)
    job = make_job(request, body, prompts, params, prefix="cmpl", discard_output=body.only_prompt)
    return await answer(request, job, CompletionFormatter(job, body, state.engine.tokenizer))


class ChoiceWriter:
    """One choice's text and log-probabilities, with the prompt in front when it is echoed."""

    def __init__(self, sub: SubRequest, body: CompletionRequest, tokenizer: TokenizerClient) -> None:
        self._sub = sub
        self._tokenizer = tokenizer
        self._owes_echo = bool(body.echo)
        self._logprobs = None if body.logprobs is None else self._logprob_writer(body)

    @property
    def owes_echo(self) -> bool:
        return self._owes_echo

    def choice(self, part: RequestDelta | Outcome) -> CompletionChoice:
        """A part of the choice, or all of it: deltas and outcomes have the same fields."""
        text = part.text
        if self._owes_echo:
            text = self._echo(part) + text
            self._owes_echo = False
        if self._logprobs is not None:
            self._logprobs.add(part.logprobs)
        return CompletionChoice(
            index=self._sub.index,
            text=text,
            logprobs=None if self._logprobs is None else self._logprobs.take(),
            finish_reason=part.finish_reason and part.finish_reason.value,
            stop_reason=part.stop_reason,
        )

    def _logprob_writer(self, body: CompletionRequest) -> CompletionLogprobWriter:
        names = TokenNames(self._tokenizer, as_ids=body.return_tokens_as_token_ids is True)
        skip = self._sub.params.skip_special_tokens
        return CompletionLogprobWriter(names, body.logprobs or 0, self._sub.prompt.token_ids, skip_special_tokens=skip)

    def _echo(self, part: RequestDelta | Outcome) -> str:
        text = self._prompt_text()
        if self._logprobs is not None:
            self._logprobs.start_at(len(text))
            if part.prompt_logprobs is not None:
                self._logprobs.add_prompt(part.prompt_logprobs, self._sub.prompt.text)
        return text

    def _prompt_text(self) -> str:
        prompt = self._sub.prompt
        if prompt.text is not None:
            return prompt.text
        # What the output completes of a last character comes with the output, if there is one.
        decode = self._tokenizer.decode if self._sub.discard_output else self._tokenizer.decode_prompt
        return decode(prompt.token_ids, skip_special_tokens=self._sub.params.skip_special_tokens)


class CompletionFormatter:
    def __init__(self, job: Job, body: CompletionRequest, tokenizer: TokenizerClient) -> None:
        self._job = job
        self._body = body
        self._tokenizer = tokenizer
        self._writers = [ChoiceWriter(sub, body, tokenizer) for sub in job.subs]

    def opening(self) -> Sequence[Completion]:
        return ()

    def chunk(self, index: int, delta: RequestDelta) -> Completion | None:
        writer = self._writers[index]
        has_logprobs = self._body.logprobs is not None and delta.logprobs
        if not (delta.text or has_logprobs or delta.finish_reason or writer.owes_echo):
            return None
        return self._completion([writer.choice(delta)])

    def usage_chunk(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def whole(self, outcomes: Sequence[Outcome], usage: Usage) -> Completion:
        choices = [writer.choice(outcome) for writer, outcome in zip(self._writers, outcomes, strict=True)]
        if self._body.prompt_logprobs is not None:
            names = TokenNames(self._tokenizer, as_ids=False)
            for choice, outcome in zip(choices, outcomes, strict=True):
                assert outcome.prompt_logprobs is not None
                choice.prompt_logprobs = prompt_logprob_maps(names, outcome.prompt_logprobs, self._body.prompt_logprobs)
        return self._completion(choices, usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        job = self._job
        completion = Completion(
            id=job.id, object="text_completion", created=job.created, model=job.model, choices=choices
        )
        if usage is not None:
            completion.usage = usage
        return completion
