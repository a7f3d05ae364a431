"""How one request is sampled, when it stops, and how it is placed."""

from __future__ import annotations

import math
import operator
from dataclasses import asdict, dataclass
from typing import SupportsFloat, SupportsIndex

from fly_jax.errors import InvalidRequestError

MAX_LOGPROBS = 20
# vLLM has no such limit. Each costs a request 0.2 to 2 microseconds a token, on the thread that all requests share.
MAX_STOP_STRINGS = 64
MAX_SEED = 2**63 - 1
MAX_PRIORITY = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling options, with vLLM's names and meanings.

    Attributes:
        max_tokens: at most this many tokens are generated; None: up to the context limit.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens, of equal ones those of lowest id; 0 or -1 keeps all.
        top_p: keep the smallest set of most likely tokens whose mass reaches this.
        min_p: keep tokens at least this fraction as likely as the most likely one; 1 keeps one token.
        seed: the same seed gives the same tokens whatever else runs; None or -1 draws one.
        stop: strings that end the generation; they are not part of the text.
        stop_token_ids: token ids that end the generation, besides the model's own.
        ignore_eos: go on after the model's own end-of-sequence tokens.
        min_tokens: end-of-sequence tokens (``ignore_eos`` or not) and ``stop_token_ids`` are not sampled, and stop
            strings not honoured, until there are this many tokens.
        logprobs: report this many most likely alternatives per token (0: only the sampled token's own).
        prompt_logprobs: report the teacher-forced log-probability and rank of each prompt token, and this many most
            likely alternatives (0: none).
        skip_special_tokens: leave special tokens out of the text.
        priority: lower runs first; requests of equal priority run in order of arrival. Other than 0 it needs the
            scheduling policy ``priority``.
        tensor_parallel_size: run on a group at least this wide; None leaves the choice to the engine.

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
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    priority: int = 0
    tensor_parallel_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "min_tokens", "priority"):
            self._set(name, _as_integer(name, getattr(self, name)))
        for name in ("max_tokens", "seed", "logprobs", "prompt_logprobs", "tensor_parallel_size"):
            if getattr(self, name) is not None:
                self._set(name, _as_integer(name, getattr(self, name)))
        if self.seed == -1:
            self._set("seed", None)
        for name in ("temperature", "top_p", "min_p"):
            self._set(name, _as_number(name, getattr(self, name)))
        for name in ("ignore_eos", "skip_special_tokens"):
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        self._set("stop", stops)
        self._set("stop_token_ids", tuple(_as_integer("stop_token_ids", token) for token in self.stop_token_ids))
        self._check_ranges()

    def _check_ranges(self) -> None:
        def at_least(name: str, lowest: int) -> None:
            value = getattr(self, name)
            self._require(name, value is None or value >= lowest, f"at least {lowest}")

        at_least("max_tokens", 1)
        at_least("min_tokens", 0)
        self._require("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100")
        self._require("top_k", -1 <= self.top_k < 2**31, "-1 or 0 (all) or a positive count below 2^31")
        self._require("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]")
        self._require("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]")
        self._require("seed", self.seed is None or 0 <= self.seed <= MAX_SEED, f"between 0 and {MAX_SEED}")
        enough = self.max_tokens is None or self.min_tokens <= self.max_tokens
        self._require("min_tokens", enough, f"at most max_tokens {self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            self._require(name, count is None or 0 <= count <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
        self._require("stop", len(self.stop) <= MAX_STOP_STRINGS, f"at most {MAX_STOP_STRINGS} strings")
        self._require("stop", all(isinstance(stop, str) and stop for stop in self.stop), "non-empty strings")

        self._require("priority", abs(self.priority) <= MAX_PRIORITY, f"between -{MAX_PRIORITY} and {MAX_PRIORITY}")
        width = self.tensor_parallel_size
        power = width is None or (width >= 1 and width & (width - 1) == 0)
        self._require("tensor_parallel_size", power, "a power of two")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InvalidRequestError(f"{name} must be {expected}, got {getattr(self, name)!r}", param=name)

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling options of requests that set none.

    Attributes:
        max_tokens: the most that any request to the server may generate, whatever it asks for; None: no such limit.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int | None = None

    def params(self) -> SamplingParams:
        """Parameters of a request that says nothing at all."""
        return SamplingParams(**{name: value for name, value in asdict(self).items() if value is not None})

    def capped(self, max_tokens: int | None) -> int | None:
        """What is left of a wish for so many tokens; None: up to the context limit."""
        wishes = [each for each in (max_tokens, self.max_tokens) if each is not None]
        return min(wishes, default=None)


def _as_integer(name: str, value: object) -> int:
    """A plain int from any integer type."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise InvalidRequestError(f"{name} must be an integer, got {value!r}", param=name)
    return operator.index(value)


def _as_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, SupportsFloat) or not math.isfinite(float(value)):
        raise InvalidRequestError(f"{name} must be a finite number, got {value!r}", param=name)
    return float(value)
