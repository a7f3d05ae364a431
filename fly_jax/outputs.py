"""What the engine hands back: frozen, plain Python values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fly_jax.logprobs import PromptLogprobs, TokenLogprob


class SwitchStrategy(StrEnum):
    """What becomes of requests in flight when the layout changes (Flying Serving section 5; MIGRATE is ours).

    ``MIGRATE``: their KV is moved and they go on at once; nothing is drained or recomputed.
    ``SEQUENTIAL``: they end in the old layout first, while idle groups wait for them.
    ``SOFT_PREEMPT``: the same, but idle groups run waiting requests meanwhile, which are recomputed after the switch.
    ``HARD_PREEMPT``: they pause with their KV in place and go on, without recompute, when their group is back
    or when the groups in its place have nothing else to do.
    """

    MIGRATE = "migrate"
    SEQUENTIAL = "sequential"
    SOFT_PREEMPT = "soft_preempt"
    HARD_PREEMPT = "hard_preempt"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


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
    prompt_logprobs: PromptLogprobs | None = None
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
    prompt_logprobs: PromptLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SwitchReport:
    """One change of layout.

    Attributes:
        number: 1 for the first switch since the engine started.
        source, target: canonical layout texts.
        strategy: how requests in flight were treated.
        reason: why: ``asked for``, or the policy's reason.
        drain_seconds: time spent waiting for old work.
        precopy_seconds: time during which KV was copied while the old groups went on.
        cutover_seconds: on the host, from the last old step launched to the first new one, relayout launches included.
        worst_gap_seconds: the longest that any stream in flight went without a token across the switch.
        requests_moved: requests whose KV was moved to another group.
        requests_paused: requests that kept their KV in place and paused.
        requests_adopted: of the paused, those whose KV was moved later, so that they could go on.
        kv_bytes_moved, kv_blocks_moved: what relayouts moved.
        kv_bytes_precopied, kv_bytes_adopted: of that, while the old groups went on, and later for paused requests.
        relayout_launches: programs launched for that, on all groups together.
        tokens_recomputed: of requests that had to give up their KV at the switch, or while they were paused.
        requests_waiting: requests that were queued when the switch completed.
        settled: every request that ran across the switch has gone on: only those of paused requests may still change
            a figure, the worst gap and what was adopted.
    """

    number: int
    source: str
    target: str
    strategy: SwitchStrategy
    reason: str = "asked for"
    drain_seconds: float = 0.0
    precopy_seconds: float = 0.0
    cutover_seconds: float = 0.0
    worst_gap_seconds: float = 0.0
    requests_moved: int = 0
    requests_paused: int = 0
    requests_adopted: int = 0
    kv_bytes_adopted: int = 0
    kv_bytes_moved: int = 0
    kv_bytes_precopied: int = 0
    kv_blocks_moved: int = 0
    relayout_launches: int = 0
    tokens_recomputed: int = 0
    requests_waiting: int = 0
    settled: bool = False


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine's counters; every field is JSON-serialisable.

    Attributes:
        policy: the layout policy in force; ``static`` while the layout is pinned.
        strategy: of switches that name none.
        last_decision: the policy's latest decision to change something, and its reason.
        decisions: how often the policy decided what.
        running, paused, waiting: requests.
        kv_usage: used fraction of all KV blocks, 0 to 1.
        corrupted_requests: that ended with an error because their logits were NaN or infinite.
        switches: by strategy.
        switch_history: the latest reports, oldest first.
        switch_tokens_recomputed, switch_kv_bytes_moved: of all switches.
        compiles_after_warmup: must stay 0.
    """

    layout: str
    target_layout: str | None
    policy: str
    strategy: str
    last_decision: str | None
    decisions: dict[str, int]
    running: int
    paused: int
    waiting: int
    kv_usage: float
    free_blocks: tuple[int, ...]
    num_blocks: int
    steps: int
    prompt_tokens: int
    generation_tokens: int
    requests_finished: dict[str, int]
    corrupted_requests: int
    preemptions: int
    switches: dict[str, int]
    switch_history: tuple[SwitchReport, ...]
    switch_tokens_recomputed: int
    switch_kv_bytes_moved: int
    executables: int
    compile_seconds: float
    compiles_after_warmup: int
    weight_bytes: int
    kv_bytes: int

    @property
    def last_switch(self) -> SwitchReport | None:
        return self.switch_history[-1] if self.switch_history else None
