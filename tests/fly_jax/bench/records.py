"""Records made by hand."""

from __future__ import annotations

from fly_jax.bench.requests import PlannedRequest, RequestRecord


def planned(
    at: float = 0.0, *, tag: str = "", prompt: str | tuple[int, ...] = "a", max_tokens: int = 4
) -> PlannedRequest:
    return PlannedRequest(at=at, prompt=prompt, prompt_tokens=1, max_tokens=max_tokens, tag=tag)


def record(
    sent_at: float,
    *token_times: float,
    prompt_tokens: int = 10,
    output_tokens: int | None = None,
    error: str = "",
    tag: str = "",
    text: str = "",
) -> RequestRecord:
    """One token a time unless ``output_tokens`` says otherwise; the end is a second after the last."""
    return RequestRecord(
        planned=planned(sent_at, tag=tag),
        sent_at=sent_at,
        token_times=token_times,
        ended_at=(token_times[-1] if token_times else sent_at) + 1.0,
        prompt_tokens=prompt_tokens,
        output_tokens=len(token_times) if output_tokens is None else output_tokens,
        text=text,
        error=error,
    )
