"""Sizes that steps are compiled for: a step runs in the smallest bucket that holds it."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from fly_jax.scheduling.step import TILE_TOKENS

# Every bucket costs a compile on every group, 1 to 2 s each on one CPU core. Decode steps read all weights whatever
# the number of rows, so few rows cost no less; a single bf16 row even runs 13 times slower than two on CPU.
FIRST_ROWS = 8
FIRST_TOKENS = 8 * TILE_TOKENS
GROWTH = 4


@dataclass(frozen=True, slots=True)
class Buckets:
    """Ascending bucket sizes; the last one is the limit.

    Attributes:
        rows: requests, for decode steps and for the head.
        tokens: token places of mixed steps, whole tiles.
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, max_num_seqs: int, tile_budget: int) -> Buckets:
        rows = _geometric(FIRST_ROWS, max(2, max_num_seqs))
        tokens = _geometric(FIRST_TOKENS, tile_budget)
        return cls(rows, tokens)

    @staticmethod
    def pick(sizes: tuple[int, ...], needed: int) -> int:
        """The smallest size that holds ``needed``, which is at most the last."""
        return sizes[bisect_left(sizes, needed)]


def _geometric(first: int, last: int) -> tuple[int, ...]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= GROWTH
    return (*sizes, last)
