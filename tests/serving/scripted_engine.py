"""A whole engine in memory whose behaviour each prompt scripts, so that tests share a server and no state.

A prompt that holds ``@endless`` generates until it is aborted, ``@say TEXT`` answers TEXT, and so on: see
``ScriptedEngine.generate``. Tokens are the bytes of UTF-8, so that many tokens end inside a character.
"""

from __future__ import annotations

import asyncio
import codecs
import dataclasses
import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from fly_jax.errors import (
    ClientQueueFullError,
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    LayoutError,
    QueueFullError,
)
from fly_jax.logprobs import PromptLogprobs, TokenLogprob
from fly_jax.outputs import EngineStats, FinishReason, RequestDelta, SwitchReport, SwitchStrategy
from fly_jax.sampling_params import SamplingDefaults, SamplingParams

BOS, EOS, VOCAB_SIZE = 256, 257, 258
REPLY = "Hello, wörld! 🌍"
LAYOUTS = ("1+1+1+1", "2+2", "4")
WIDEST = 4
HISTORY = 32
PAUSE_SECONDS = 0.002


class ByteStream:
    def __init__(self, tokenizer: ByteTokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return (
            self._decoder.decode(bytes([token_id]))
            if token_id < BOS
            else self._tokenizer.decode([token_id], self._skip)
        )


class ByteTokenizer:
    has_chat_template = True

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return ([BOS] if add_special_tokens else []) + list(text.encode("utf-8"))

    def fewest_tokens(self, characters: int) -> int:
        return characters

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        parts, pending = [], bytearray()
        for token in token_ids:
            if token < BOS:
                pending.append(token)
            elif not skip_special_tokens:
                parts += [pending.decode("utf-8", "replace"), "<s>" if token == BOS else "</s>"]
                pending.clear()
        return "".join([*parts, pending.decode("utf-8", "replace")])

    def stream(self, skip_special_tokens: bool, prompt_ids: Sequence[int] = ()) -> ByteStream:  # noqa: ARG002
        return ByteStream(self, skip_special_tokens)

    def decode_prompt(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.decode(token_ids, skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < BOS else self.token_text(token_id).encode()

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        if any("@refuse" in message["content"] for message in messages):
            raise InvalidRequestError("the chat template refused the messages: roles must alternate", param="messages")
        turns = [f"[{message['role']}] {message['content']}\n" for message in messages]
        switches = [f"[{name}={value}]\n" for name, value in kwargs.items()]
        return "".join([*switches, *turns, "[assistant] " if add_generation_prompt else ""])


def token_logprob(token_id: int) -> float:
    return -0.25 * (1 + token_id % 4)


def prompt_logprob(token_id: int) -> float:
    return -0.5 * (1 + token_id % 3)


class ScriptedEngine:
    """Satisfies ``serving.EngineClient``. ``aborted``, ``params`` and ``finished`` say what happened to it.

    ``can_adapt`` is False for an engine that has but one layout and so refuses the policy that needs several.
    """

    vocab_size = VOCAB_SIZE
    model_name = "scripted"

    def __init__(self, *, max_model_len: int = 512, max_num_queued_reqs: int = 64) -> None:
        self.tokenizer = ByteTokenizer()
        self.max_model_len = max_model_len
        self.max_num_queued_reqs = self.max_queued_per_client = max_num_queued_reqs
        self.sampling_defaults = SamplingDefaults()
        self.is_alive = True
        self.has_failed = False
        self.stuck_seconds: float | None = None
        self._failed = asyncio.Event()
        self.layout = LAYOUTS[0]
        self.policy = "load_adaptive"
        self.can_adapt = True
        self.decisions: dict[str, int] = {}
        self.running = 0
        self.aborted: list[str] = []
        self.params: dict[str, SamplingParams] = {}
        self.clients: dict[str, str | None] = {}
        self.finished: dict[str, int] = {}
        self.switch_reports: list[SwitchReport] = []
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.is_shut_down = False

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        client: str | None = None,
    ) -> AsyncIterator[RequestDelta]:
        request_id = request_id or "unnamed"
        prompt = self.tokenizer.decode(prompt_token_ids)
        self._admit(prompt, prompt_token_ids, params)
        self.params[request_id] = params
        self.clients[request_id] = client
        self.running += 1
        self.prompt_tokens += len(prompt_token_ids)
        is_finished = False
        try:
            if "@silent" in prompt:
                await asyncio.Event().wait()
            async for delta in self._deltas(request_id, prompt, prompt_token_ids, params):
                if delta.finish_reason is not None:
                    is_finished = True
                    self.finished[delta.finish_reason.value] = self.finished.get(delta.finish_reason.value, 0) + 1
                yield delta
        finally:
            self.running -= 1
            if not is_finished:
                self.aborted.append(request_id)

    def _admit(self, prompt: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        if not self.is_alive:
            raise EngineDeadError("the engine has stopped: the device was lost")
        if "@queue-full" in prompt:
            raise QueueFullError("64 requests are waiting, the most allowed: try again later")
        if "@client-full" in prompt:
            raise ClientQueueFullError("32 of your requests are waiting and at most 32 of one client may: try later")
        if "@crash-at-start" in prompt:
            raise RuntimeError("secret internals")
        if (params.tensor_parallel_size or 1) > WIDEST:
            reason = f"tensor_parallel_size {params.tensor_parallel_size} is wider than the widest group, {WIDEST}"
            raise InvalidRequestError(reason, param="tensor_parallel_size")
        if len(prompt_token_ids) >= self.max_model_len:
            reason = (
                f"This model's maximum context length is {self.max_model_len} tokens, but the prompt has "
                f"{len(prompt_token_ids)}"
            )
            raise ContextLengthError(reason, param="prompt")

    async def _deltas(
        self, request_id: str, prompt: str, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> AsyncIterator[RequestDelta]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        reply = self._reply(prompt, params)
        stop, text_left = _cut_at_stop(reply, params.stop)
        tokens = list(text_left.encode("utf-8"))
        limit = params.max_tokens or self.max_model_len - len(prompt_token_ids)
        is_endless = "@endless" in prompt
        for count in range(1, 10**9 if is_endless else min(len(tokens), limit) + 1):
            await asyncio.sleep(PAUSE_SECONDS if is_endless else 0)
            self._misbehave(prompt, count)
            if "@fail" in prompt and count == 3:
                yield RequestDelta(request_id, finish_reason=FinishReason.ERROR, error="the KV cache of this one broke")
                return
            token = tokens[(count - 1) % len(tokens)]
            self.generated_tokens += 1
            is_last = not is_endless and count == min(len(tokens), limit)
            reason = (FinishReason.LENGTH if count < len(tokens) else FinishReason.STOP) if is_last else None
            yield RequestDelta(
                request_id,
                text=decoder.decode(bytes([token]), final=is_last),
                token_ids=(token,),
                logprobs=() if params.logprobs is None else (_logprobs(token, params.logprobs),),
                prompt_logprobs=self._prompt_logprobs(prompt_token_ids, params) if count == 1 else None,
                finish_reason=reason,
                stop_reason=stop if reason is FinishReason.STOP else None,
                num_prompt_tokens=len(prompt_token_ids),
                num_output_tokens=count,
                num_cached_tokens=1,
            )

    def _reply(self, prompt: str, params: SamplingParams) -> str:
        if "@seed" in prompt:
            return f"seed={params.seed}"
        _, marker, text = prompt.partition("@say ")
        return text.partition("\n")[0] if marker else REPLY

    def _misbehave(self, prompt: str, count: int) -> None:
        if "@crash-midway" in prompt and count == 3:
            raise RuntimeError("secret internals")
        if "@die-midway" in prompt and count == 3:
            raise EngineDeadError("the engine has stopped: the device was lost")
        if "@fail-engine" in prompt and count == 3:
            self.fail()
            raise EngineDeadError("the engine has stopped: it failed, and its log says why")

    def _prompt_logprobs(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> PromptLogprobs | None:
        """The likeliest token of every place is ``!``, the token itself comes third, ``?`` between them."""
        if params.prompt_logprobs is None:
            return None
        ids = np.asarray(prompt_token_ids[1:], np.int32)
        top = np.tile(np.array([ord("!"), ord("?")], np.int32), (len(ids), 1))[:, : params.prompt_logprobs]
        values = np.tile(np.array([-0.125, -0.25], np.float32), (len(ids), 1))[:, : params.prompt_logprobs]
        own = np.array([prompt_logprob(int(token)) for token in ids], np.float32)
        return PromptLogprobs(ids, own, np.full(len(ids), 3, np.int32), top, values)

    async def abort(self, request_id: str) -> None:
        raise NotImplementedError("the server aborts by closing the stream")

    async def switch(self, layout: str, strategy: str | None = None, policy: str | None = None) -> SwitchReport:
        report = self.switch_now(layout, strategy)
        if policy is not None:
            try:
                await self.set_policy(policy)
            except ConfigError as error:
                raise ConfigError(f"the layout is {layout} now and stays: {error}") from error
        return report

    def switch_now(self, layout: str, strategy: str | None = None) -> SwitchReport:
        if layout not in LAYOUTS:
            raise LayoutError(f"layout {layout!r} does not fit 4 devices: choose one of {', '.join(LAYOUTS)}")
        report = SwitchReport(
            number=len(self.switch_reports) + 1,
            source=self.layout,
            target=layout,
            strategy=SwitchStrategy(strategy or SwitchStrategy.MIGRATE),
            drain_seconds=0.25,
            precopy_seconds=0.125,
            cutover_seconds=0.01,
            worst_gap_seconds=0.5,
            kv_bytes_moved=4096,
            tokens_recomputed=3,
            settled=True,
        )
        self.layout, self.policy = layout, "static"
        self.switch_reports.append(report)
        return report

    def outgrow_last_gap(self, seconds: float) -> None:
        """A stream that the last switch held up goes on only now."""
        self.switch_reports[-1] = dataclasses.replace(self.switch_reports[-1], worst_gap_seconds=seconds)

    async def set_policy(self, policy: str) -> str:
        if policy != "static" and not self.can_adapt:
            raise ConfigError("policy auto needs more than one layout: start again with more --layouts")
        self.policy = "static" if policy == "static" else "load_adaptive"
        return self.policy

    async def wait_failed(self) -> None:
        self._failed = asyncio.Event()  # an engine may be served by several loops, one after the other
        await self._failed.wait()

    def fail(self) -> None:
        """As if the engine's loop had failed; on the event loop."""
        self.is_alive, self.has_failed = False, True
        self._failed.set()

    async def stats(self) -> EngineStats:
        return self.latest_stats()

    def latest_stats(self) -> EngineStats:
        return EngineStats(
            layout=self.layout,
            target_layout=None,
            policy=self.policy,
            strategy=SwitchStrategy.MIGRATE,
            last_decision=next(reversed(self.decisions), None),
            decisions=dict(self.decisions),
            running=self.running,
            paused=2,
            waiting=0,
            kv_usage=0.125,
            free_blocks=(7, 7, 7, 7),
            num_blocks=8,
            steps=0,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generated_tokens,
            requests_finished=dict(self.finished),
            corrupted_requests=0,
            preemptions=0,
            switches=dict(Counter(str(report.strategy) for report in self.switch_reports)),
            switch_history=tuple(self.switch_reports[-HISTORY:]),
            switch_tokens_recomputed=sum(report.tokens_recomputed for report in self.switch_reports),
            switch_kv_bytes_moved=sum(report.kv_bytes_moved for report in self.switch_reports),
            executables=1,
            compile_seconds=0.0,
            compiles_after_warmup=0,
            weight_bytes=0,
            kv_bytes=0,
        )

    async def shutdown(self) -> None:
        self.is_shut_down = True


def _cut_at_stop(reply: str, stops: Sequence[str]) -> tuple[str | None, str]:
    found = [(reply.index(stop), stop) for stop in stops if stop in reply]
    if not found:
        return None, reply
    position, stop = min(found)
    return stop, reply[:position]


def _logprobs(token: int, count: int) -> TokenLogprob:
    """The token first; the last alternative is impossible, as after a mask."""
    own = token_logprob(token)
    others = [((token + i) % BOS, own - i) for i in range(1, count)]
    if count > 1:
        others[-1] = (others[-1][0], -math.inf)
    return TokenLogprob(token, own, tuple([(token, own), *others][:count]))
