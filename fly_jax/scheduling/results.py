"""What a step gives back: plain arrays as they come from a device, and what they say of its rows. No JAX."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fly_jax.logprobs import PromptLogprobs, TokenLogprob
from fly_jax.sampling_params import MAX_LOGPROBS
from fly_jax.scheduling.step import ScheduledRow, StepPlan

# A token, its log-probability, the ids of its alternatives and their log-probabilities.
RESULT_COLUMNS = 2 + 2 * MAX_LOGPROBS


@dataclass(frozen=True, slots=True, eq=False)
class StepResults:
    """Results on the host, as int32 bits.

    Attributes:
        tokens: ``[rows, RESULT_COLUMNS]``, in the order of the rows that sample; None if no row does.
        scores: log-probability and rank, ``[token places, 2]``; None if no row wants prompt log-probabilities.
        alternatives: ids and log-probabilities, ``[token places, 2 * MAX_LOGPROBS]``; None if no row wants them.
    """

    tokens: np.ndarray | None = None
    scores: np.ndarray | None = None
    alternatives: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class RowResult:
    """What one row of a step produced.

    Attributes:
        token: the sampled token, None if the row did not sample.
        scores: prompt log-probabilities of the tokens after the row's positions.
    """

    row: ScheduledRow
    token: TokenLogprob | None
    scores: PromptLogprobs | None = None

    @property
    def failed(self) -> bool:
        """The row's logits were no distribution; see :func:`fly_jax.device.sampling.log_probabilities`."""
        if self.token is not None and math.isnan(self.token.logprob):
            return True
        return self.scores is not None and bool(np.isnan(self.scores.logprobs).any())


def read_results(plan: StepPlan, results: StepResults) -> list[RowResult]:
    """The results of each row of the plan that was launched."""
    tokens = iter(()) if results.tokens is None else _tokens(plan, results.tokens)
    return [
        RowResult(row, next(tokens, None) if row.samples else None, _scores(row, place, results))
        for row, place in zip(plan.rows, plan.places, strict=True)
    ]


def _tokens(plan: StepPlan, results: np.ndarray) -> Iterator[TokenLogprob]:
    """The sampled tokens, in the order of the rows that sample."""
    ids, floats = results[:, 2 : 2 + MAX_LOGPROBS], results.view(np.float32)
    for index, row in enumerate(plan.sampled):
        count = row.request.params.logprobs or 0
        values = floats[index, 2 + MAX_LOGPROBS : 2 + MAX_LOGPROBS + count].tolist()
        top = tuple(zip(ids[index, :count].tolist(), values, strict=True))
        yield TokenLogprob(int(results[index, 0]), float(floats[index, 1]), top)


def _scores(row: ScheduledRow, place: int, results: StepResults) -> PromptLogprobs | None:
    """Of the prompt tokens that follow the row's positions."""
    if results.scores is None or not row.scores:
        return None
    prompt, top = row.request.prompt_ids, row.request.params.prompt_logprobs or 0
    follow = np.asarray(prompt[row.start + 1 : row.start + row.count + 1], np.int32)
    places = slice(place, place + len(follow))
    own = results.scores[places]
    others = (results.scores[:, :0] if results.alternatives is None else results.alternatives)[places]
    ids, values = others[:, :top], others.view(np.float32)[:, MAX_LOGPROBS : MAX_LOGPROBS + top]
    # Copies: a slice would keep the whole step's array.
    return PromptLogprobs(follow, own.view(np.float32)[:, 0].copy(), own[:, 1].copy(), ids.copy(), values.copy())
