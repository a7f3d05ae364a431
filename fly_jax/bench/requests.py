"""What a benchmark sends, and what it saw of each request: the values that its parts hand to each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of a workload.

    Attributes:
        at: when it is to be sent, in seconds from the start of the run.
        prompt: text, or token ids.
        prompt_tokens: how many tokens the prompt has, as far as the workload knows; a server's usage goes before it.
        max_tokens: output tokens asked for.
        priority: lower runs first.
        tensor_parallel_size: least width of the group that runs it; None: any.
        tag: names the part of a workload that it belongs to, such as a phase; metrics may be split by it.
    """

    at: float
    prompt: str | tuple[int, ...]
    prompt_tokens: int
    max_tokens: int
    priority: int = 0
    tensor_parallel_size: int | None = None
    tag: str = ""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What a client saw of one request. Times are seconds from the start of the run.

    Attributes:
        sent_at: when it really left.
        token_times: when each piece of output came; the first ends the time to first token.
        ended_at: when the last byte came, or the error.
        prompt_tokens, output_tokens: from the server's usage; where it gives none, the plan's and the pieces counted.
        text: what was generated.
        error: empty if the request was answered.
        has_usage: the token counts are the server's.
    """

    planned: PlannedRequest
    sent_at: float
    token_times: tuple[float, ...]
    ended_at: float
    prompt_tokens: int
    output_tokens: int
    text: str = ""
    error: str = ""
    has_usage: bool = True
