"""What a server's model allows of a workload's requests."""

from __future__ import annotations

from dataclasses import dataclass

from fly_jax.errors import ConfigError

# Tokenizers keep their special tokens among the first ids.
FIRST_RANDOM_ID = 10


@dataclass(frozen=True)
class PlanLimits:
    """Limits of a plan.

    Attributes:
        max_model_len: tokens that a request may have in all, prompt and output.
        num_prompts: at most this many requests; None: all that the workload has.
        vocab_size: random token ids are drawn from ``[FIRST_RANDOM_ID, vocab_size)``.

    Raises:
        ConfigError: a limit leaves no room for a request.
    """

    max_model_len: int
    num_prompts: int | None
    vocab_size: int

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
