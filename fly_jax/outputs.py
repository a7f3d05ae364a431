"""What the engine hands back: frozen, plain Python values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class SwitchStrategy(StrEnum):
    """What becomes of requests in flight when the layout changes.

    ``MIGRATE``: their KV is moved and they go on at once. ``SEQUENTIAL``: they end in the old layout first.
    """

    MIGRATE = "migrate"
    SEQUENTIAL = "sequential"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token's log-probability and its most likely alternatives.

    Attributes:
        token_id: the sampled token.
        logprob: natural log-probability of the token under the model's untempered distribution.
        top: (token id, log-probability), most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestDelta:
    """What one step added to one request; a stream is a sequence of these.

    Attributes:
        text: new text, always whole UTF-8 characters, with nothing of a stop string in it. The deltas'
            texts concatenated are the request's text.
        token_ids: new tokens. Text may lag behind tokens (held back until it is certain).
        logprobs: one a token, when the request asked for them.
        prompt_logprobs: with the first delta, when asked for: one a prompt token after the first.
        finish_reason: set on the last delta.
        stop_reason: the stop string or stop token id that ended the request, if one did.
        error: one line, with finish reason ERROR.
        num_prompt_tokens, num_output_tokens: totals so far, for usage accounting.
        num_cached_tokens: prompt tokens whose KV was reused.
    """

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[float, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request, as ``LLM.generate`` returns it; ``error`` says why with finish reason ERROR."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[float, ...] | None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SwitchReport:
    """One change of layout.

    Attributes:
        source, target: canonical layout texts.
        strategy: how requests in flight were treated.
        drain_seconds: time spent waiting for old work.
        cutover_seconds: on the host, from the step boundary to new groups that can launch, relayouts launched.
        weight_bytes_moved: always 0: views are re-wrapped, never copied.
        requests_moved: requests that went on in another group.
        kv_bytes_moved, kv_blocks_moved: what their relayout moved.
        tokens_recomputed: of requests that had to give up their KV.
        requests_waiting: requests that were queued when the switch completed.
    """

    source: str
    target: str
    strategy: SwitchStrategy
    drain_seconds: float
    cutover_seconds: float
    weight_bytes_moved: int = 0
    requests_moved: int = 0
    kv_bytes_moved: int = 0
    kv_blocks_moved: int = 0
    tokens_recomputed: int = 0
    requests_waiting: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine's counters; every field is JSON-serialisable.

    Attributes:
        running, waiting: requests.
        kv_usage: used fraction of all KV blocks, 0 to 1.
        compiles_after_warmup: must stay 0.
    """

    layout: str
    target_layout: str | None
    running: int
    waiting: int
    kv_usage: float
    free_blocks: tuple[int, ...]
    num_blocks: int
    steps: int
    prompt_tokens: int
    generation_tokens: int
    requests_finished: dict[str, int]
    preemptions: int
    switches: int
    last_switch: SwitchReport | None
    executables: int
    compile_seconds: float
    compiles_after_warmup: int
    weight_bytes: int
    kv_bytes: int
