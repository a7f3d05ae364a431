"""What a server's model allows of a workload's requests."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from fly_jax.errors import ConfigError

# Tokenizers keep their special tokens among the first ids.
FIRST_RANDOM_ID = 10
# Of servers that do not say how much their model holds.
UNKNOWN_LEN = sys.maxsize


@dataclass(frozen=True)
class PlanLimits:
    """Limits of a plan.

    Attributes:
        max_model_len: tokens that a request may have in all, prompt and output; ``UNKNOWN_LEN``: nobody said.
        num_prompts: this many requests, as far as the workload lasts; None: as many as it says.
        vocab_size: random token ids are drawn from ``[FIRST_RANDOM_ID, vocab_size)``.
        as_text: the endpoint takes no token ids, so random prompts are words.

    Raises:
        ConfigError: a limit leaves no room for a request.
    """

    max_model_len: int
    num_prompts: int | None
    vocab_size: int
    as_text: bool = False

    def __post_init__(self) -> None:
        if self.max_model_len < 2:
            raise ConfigError(
                f"max_model_len must be at least 2, a token of prompt and one of output, got {self.max_model_len}"
            )
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ConfigError(f"num_prompts must be at least 1, got {self.num_prompts}")
        if self.vocab_size <= FIRST_RANDOM_ID:
            raise ConfigError(
                f"vocab_size must be above {FIRST_RANDOM_ID}, the first id of random prompts, got {self.vocab_size}"
            )
