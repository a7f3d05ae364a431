"""Turns sampled tokens into text deltas and decides when a request ends. Pure Python, no JAX."""

from __future__ import annotations

from dataclasses import dataclass

from fly_jax.logprobs import PromptLogprobs, TokenLogprob
from fly_jax.outputs import FinishReason, RequestDelta
from fly_jax.scheduling.request import Request
from fly_jax.text.stop_strings import StopFinder
from fly_jax.text.text_stream import TextStream
from fly_jax.text.tokenizer import Tokenizer


@dataclass(slots=True)
class _Stream:
    text: TextStream
    stops: StopFinder
    sent_prompt_logprobs: bool = False


class OutputProcessor:
    """Text state of every live request.

    Args:
        eos_token_ids: the model's own end-of-sequence tokens.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self._streams: dict[str, _Stream] = {}

    def add(self, request: Request) -> None:
        params = request.params
        text = self.tokenizer.stream(params.skip_special_tokens, request.prompt_ids)
        hidden = self.tokenizer.special_in(params.stop) if params.skip_special_tokens else {}
        self._streams[request.request_id] = _Stream(text, StopFinder(params.stop, hidden))

    def discard(self, request: Request) -> None:
        self._streams.pop(request.request_id, None)

    def push(self, request: Request, sampled: TokenLogprob) -> RequestDelta:
        """Takes one sampled token (already in ``request.output_ids``) and says what it adds and whether it ends."""
        stream = self._streams[request.request_id]
        reason, stop_reason = self._stop_by_token(request, sampled.token_id)
        counts = len(request.output_ids) > request.params.min_tokens
        text, stop_string = "", None
        if reason is None:
            text, stop_string = stream.stops.push(sampled.token_id, stream.text.push(sampled.token_id), counts)
        if reason is None and len(request.output_ids) >= request.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None and stop_string is None:
            rest, stop_string = stream.stops.flush(stream.text.flush(), counts)
            text += rest
        if stop_string is not None:
            reason, stop_reason = FinishReason.STOP, stop_string
        return RequestDelta(
            request.request_id,
            text=text,
            token_ids=(sampled.token_id,),
            logprobs=() if request.params.logprobs is None else (sampled,),
            prompt_logprobs=self._prompt_logprobs(request, stream),
            finish_reason=reason,
            stop_reason=stop_reason,
            num_prompt_tokens=len(request.prompt_ids),
            num_output_tokens=len(request.output_ids),
        )

    def _stop_by_token(self, request: Request, token: int) -> tuple[FinishReason | None, str | int | None]:
        params = request.params
        if len(request.output_ids) <= params.min_tokens:
            return None, None
        if token in params.stop_token_ids:
            return FinishReason.STOP, token
        if token in self.eos_token_ids and not params.ignore_eos:
            return FinishReason.STOP, None
        return None, None

    @staticmethod
    def _prompt_logprobs(request: Request, stream: _Stream) -> PromptLogprobs | None:
        if request.params.prompt_logprobs is None or stream.sent_prompt_logprobs:
            return None
        stream.sent_prompt_logprobs = True
        return PromptLogprobs.join(request.prompt_logprobs)
