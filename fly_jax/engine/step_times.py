"""The step times that a layout policy plans with, from those measured at warm-up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from fly_jax.policy.observation import StepTimes
from fly_jax.scheduling.launch import ExecutableKey, StepKind


def step_times_of(step_seconds: Mapping[ExecutableKey, float]) -> StepTimes:
    """Seconds of whole steps by TP degree.

    Groups of one degree run the same programs, so the slowest of them counts: a policy should not promise more. A
    decode step runs the backbone and the head of its rows; a step with prompt chunks may sample for every row.
    """
    slowest: dict[StepKind, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for key, seconds in step_seconds.items():
        buckets = slowest[key.kind][key.group.tp]
        buckets[key.bucket] = max(seconds, buckets.get(key.bucket, 0.0))
    heads = slowest[StepKind.HEAD]
    return StepTimes(
        decode={
            degree: {rows: seconds + heads[degree].get(rows, 0.0) for rows, seconds in buckets.items()}
            for degree, buckets in slowest[StepKind.DECODE].items()
        },
        mixed={
            degree: {tokens: seconds + _of_largest(heads[degree]) for tokens, seconds in buckets.items()}
            for degree, buckets in slowest[StepKind.MIXED].items()
        },
        relayout={degree: max(buckets.values()) for degree, buckets in slowest[StepKind.RELAYOUT].items()},
    )


def _of_largest(buckets: Mapping[int, float]) -> float:
    return buckets[max(buckets)] if buckets else 0.0
