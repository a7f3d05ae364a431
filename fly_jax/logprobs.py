"""Log-probabilities of prompt tokens, as arrays: a long prompt with alternatives would be millions of objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability and its most likely alternatives.

    Attributes:
        token_id: the sampled token, or the prompt's.
        logprob: natural log-probability of the token under the model's own distribution, before temperature,
            truncation and the mask of ``min_tokens``.
        top: (token id, log-probability), most likely first.
        rank: how many tokens are at least as likely; known of prompt tokens only.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """Teacher-forced log-probabilities of consecutive prompt tokens. Iterating gives :class:`TokenLogprob`.

    Attributes:
        token_ids: int32 ``[tokens]``.
        logprobs: float32 ``[tokens]``, natural, of the model's own distribution.
        ranks: int32 ``[tokens]``, how many tokens are at least as likely; 1 is the most likely one.
        top_ids, top_logprobs: int32 and float32 ``[tokens, k]``, the most likely tokens in order.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[PromptLogprobs]) -> PromptLogprobs:
        if not parts:
            ids, values = np.zeros(0, np.int32), np.zeros(0, np.float32)
            return cls(ids, values, ids, ids[:, None], values[:, None])
        names = ("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def after(self, count: int) -> PromptLogprobs:
        """All but the first ``count`` tokens."""
        return PromptLogprobs(
            self.token_ids[count:],
            self.logprobs[count:],
            self.ranks[count:],
            self.top_ids[count:],
            self.top_logprobs[count:],
        )

    def __len__(self) -> int:
        return len(self.token_ids)

    def __iter__(self) -> Iterator[TokenLogprob]:
        columns = (self.token_ids, self.logprobs, self.ranks, self.top_ids, self.top_logprobs)
        for token_id, logprob, rank, ids, values in zip(*(column.tolist() for column in columns), strict=True):
            yield TokenLogprob(token_id, logprob, tuple(zip(ids, values, strict=True)), rank)
