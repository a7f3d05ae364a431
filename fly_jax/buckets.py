"""Sizes that steps are compiled for: a step runs in the smallest bucket that holds it."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from fly_jax.group_scheduler import TILE_TOKENS

# bf16 products of a single row run 13 times slower than of two on CPU, so no bucket is smaller.
MIN_ROWS = 2
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
        rows = _geometric(MIN_ROWS, max(MIN_ROWS, max_num_seqs))
        tokens = _geometric(4 * TILE_TOKENS, max(tile_budget, TILE_TOKENS))
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
