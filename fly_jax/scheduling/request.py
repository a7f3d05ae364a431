"""One request's state while the engine works on it. Pure Python, no JAX."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from fly_jax.errors import InvalidRequestError
from fly_jax.kv.blocks import BlockTable
from fly_jax.logprobs import PromptLogprobs
from fly_jax.outputs import FinishReason
from fly_jax.sampling_params import SamplingParams

# Token ids that one request may mask; each costs a place in every row of every step's upload.
MAX_MASKED_TOKENS = 32


class RequestState(Enum):
    WAITING = auto()
    RUNNING = auto()
    PAUSED = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, what has been generated, and how far its KV has been computed.

    Steps are launched before the tokens of earlier ones are known on the host, so there are two clocks:
    ``num_computed`` and ``num_pending`` advance when a step is scheduled, ``output_ids`` when it is harvested.

    Attributes:
        limit: generated tokens that were asked for, or that the model's context leaves room for.
        max_tokens: those that it may generate where it is now: the limit, or less in a pool that is too small for it.
        min_width: TP degree that it asks for; 1 if it does not.
        priority: lower runs first.
        client: whose share of the waiting places it takes; None: nobody's.
        order: number of its arrival.
        seed: resolved sampling seed.
        end_tokens: the model's own and the request's stop tokens, none of which comes before ``min_tokens`` others.
        num_computed: positions whose KV is written by launched steps.
        num_pending: sampled tokens that are still on the device.
        slot: column of the devices' token tables while it has KV, -1 otherwise.
        preempted: waits again after it has run.
        held_up_since: scheduler pass since which it is paused, or waits as the first in line for a group.
        overdue: it waited longer than anybody should: it is not preempted for others again.
        table: where the KV lives, None when there is none.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    limit: int
    seed: int
    arrival: float
    min_width: int = 1
    priority: int = 0
    client: str | None = None
    order: int = 0
    end_tokens: tuple[int, ...] = ()
    max_tokens: int = field(init=False)
    output_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    state: RequestState = RequestState.WAITING
    num_computed: int = 0
    num_pending: int = 0
    slot: int = -1
    table: BlockTable | None = None
    finish_reason: FinishReason | None = None
    preempted: bool = False
    held_up_since: int | None = None
    overdue: bool = False

    def __post_init__(self) -> None:
        self.max_tokens = self.limit

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: the lower priority number, then the earlier arrival."""
        return self.priority, self.order

    @property
    def held_table(self) -> BlockTable:
        """The block table of a request that has KV."""
        assert self.table is not None
        return self.table

    @property
    def num_known(self) -> int:
        """Tokens whose ids the host knows."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens in all, those still on the device included."""
        return self.num_known + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def will_sample_no_more(self) -> bool:
        """All tokens that it may generate are launched: only results are awaited."""
        return len(self.output_ids) + self.num_pending >= self.max_tokens

    @property
    def num_held(self) -> int:
        """Tokens that its blocks must have room for while it changes its group."""
        return max(self.num_known, self.num_computed)

    @property
    def prefers_width(self) -> bool:
        """It goes to the widest group that takes it."""
        return self.min_width > 1 or self.priority < 0

    @property
    def num_needed(self) -> int:
        """Tokens that a group must hold for the request to go on."""
        return self.num_tokens + (not self.will_sample_no_more)

    @property
    def finished(self) -> bool:
        return self.state is RequestState.FINISHED

    def add_prompt_logprobs(self, scores: PromptLogprobs, start: int) -> None:
        """Takes those after position ``start``; a recomputed prompt is scored again, and only what is new counts."""
        known = sum(map(len, self.prompt_logprobs)) - start
        if known < len(scores):
            self.prompt_logprobs.append(scores.after(max(0, known)))

    def masked_tokens(self, number: int) -> tuple[int, ...]:
        """Token ids that may not be output token ``number``, counted from 0."""
        return self.end_tokens if number < self.params.min_tokens else ()

    def token_at(self, position: int) -> int:
        """Token id at a position, or -1 if it is still on the device."""
        if position < len(self.prompt_ids):
            return self.prompt_ids[position]
        index = position - len(self.prompt_ids)
        return self.output_ids[index] if index < len(self.output_ids) else -1


def end_tokens(params: SamplingParams, eos_token_ids: frozenset[int], vocab_size: int) -> tuple[int, ...]:
    """What ``min_tokens`` masks: as in vLLM the model's own end tokens too where ``ignore_eos`` is set.

    Raises:
        InvalidRequestError: they are more than a row of the upload holds.
    """
    if not params.min_tokens:
        return ()
    tokens = eos_token_ids.union(params.stop_token_ids)
    if len(tokens) > MAX_MASKED_TOKENS:
        reason = (
            f"min_tokens can mask {MAX_MASKED_TOKENS} end and stop tokens, got {len(tokens)}: "
            "give fewer stop_token_ids, or leave min_tokens out"
        )
        raise InvalidRequestError(reason, param="stop_token_ids")
    return tuple(token for token in sorted(tokens) if 0 <= token < vocab_size)
