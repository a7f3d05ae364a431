"""How one request is sampled and when it stops."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fly_jax.errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling options, with vLLM's names and meanings.

    Attributes:
        max_tokens: at most this many tokens are generated; None: up to the context limit.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of most likely tokens whose mass reaches this.
        min_p: keep tokens at least this fraction as likely as the most likely one.
        seed: the same seed gives the same tokens whatever else runs; None draws one.
        stop: strings that end the generation; they are not part of the text.
        stop_token_ids: token ids that end the generation, besides the model's own.
        ignore_eos: go on after the model's own end-of-sequence tokens.
        min_tokens: no end-of-sequence or stop is honoured before this many tokens.
        logprobs: report this many most likely alternatives per token (0: only the sampled token's own).
        prompt_logprobs: report the teacher-forced log-probability of each prompt token.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        InvalidRequestError: a field is out of range; ``param`` names it.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name in ("temperature", "top_p", "min_p"):
            if not math.isfinite(getattr(self, name)):
                raise InvalidRequestError(f"{name} must be a finite number, got {getattr(self, name)}", param=name)
        self._require("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        self._require("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100")
        self._require("top_k", -1 <= self.top_k < 2**31, "-1 or 0 (all) or a positive count below 2^31")
        self._require("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]")
        self._require("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]")
        self._require("seed", self.seed is None or 0 <= self.seed <= MAX_SEED, f"between 0 and {MAX_SEED}")
        self._require("min_tokens", self.min_tokens >= 0, "at least 0")
        self._require(
            "min_tokens",
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"at most max_tokens {self.max_tokens}",
        )
        self._require(
            "logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"
        )
        self._require("stop", len(self.stop) <= MAX_STOP_STRINGS, f"at most {MAX_STOP_STRINGS} strings")
        self._require("stop", all(self.stop), "non-empty strings")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InvalidRequestError(f"{name} must be {expected}, got {getattr(self, name)!r}", param=name)

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5
