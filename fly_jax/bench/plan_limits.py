"""What the served model allows a workload to ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """Bounds of a plan.

    Attributes:
        max_model_len: tokens a request may have in all, prompt and output.
        num_prompts: at most this many requests; None: all there are.
        vocab_size: token ids are drawn below it.
    """

    max_model_len: int
    num_prompts: int | None
    vocab_size: int
