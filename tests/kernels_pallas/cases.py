"""Batches that every backend must get right, on CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from kernels_pallas import AttentionBackend, AttentionOptions
from kernels_pallas.tuning import Tuning
from tests.kernels_pallas.contexts import PagedContexts, Run, random_queries, relative_error

FLOAT32, BFLOAT16, FLOAT16 = (np.dtype(each) for each in (np.float32, ml_dtypes.bfloat16, np.float16))
# Relative errors against float64.
TOLERANCE = {FLOAT32: 1e-5, BFLOAT16: 5e-3, FLOAT16: 5e-3}
BASE_BLOCK = 4
TILE_QUERIES = 16
# Small tiles and many items: short contexts then have several of everything.
SMALL = Tuning(rows=32, tile_tokens=16, num_warps=4, num_stages=2, programs=64, min_item_tiles=1)


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        degree: TP degree; it scales the block and divides the heads.
        heads: KV heads at degree 1.
        decode: runs of one query, else of prompt tiles.
        tuning: for the kernels; None: the table's.
    """

    name: str
    decode: bool = True
    dtype: np.dtype[Any] = BFLOAT16
    degree: int = 1
    heads: int = 2
    group: int = 4
    head_dim: int = 64
    base_block: int = BASE_BLOCK
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    longest: int = 700
    tuning: Tuning | None = SMALL

    def __str__(self) -> str:
        return self.name

    @property
    def block_tokens(self) -> int:
        return self.base_block * self.degree

    @property
    def lengths(self) -> tuple[int, ...]:
        block = self.block_tokens
        return (self.longest, 1, block - 1 or 1, block, block + 1, 2 * block + 3, self.longest // 2)

    def contexts(self) -> PagedContexts:
        return PagedContexts(
            self.lengths,
            heads=self.heads // self.degree,
            head_dim=self.head_dim,
            block_tokens=self.block_tokens,
            dtype=self.dtype,
            shared_blocks=2,
        )

    @property
    def runs(self) -> tuple[Run, ...]:
        if self.decode:
            runs = [Run(row, length - 1, 1) for row, length in enumerate(self.lengths)]
            return (*runs[:3], Run(0, 0, 0), *runs[3:])
        return (
            *_tiles(0, self.longest - 53, 53),  # far into a context; a last tile that is not full
            *_tiles(6, 0, self.lengths[6]),  # a whole prompt
            Run(0, 0, 0),
            *_tiles(5, self.block_tokens, self.block_tokens + 3),  # across the end of a block
            Run(1, 0, 1),
        )

    @property
    def options(self) -> AttentionOptions:
        return AttentionOptions(self.head_dim**-0.5, self.window, self.soft_cap)

    def error(self, backend: AttentionBackend) -> float:
        """The backend's relative error; NaN if it read anything that is not the requests'."""
        contexts = self.contexts()
        query = random_queries(len(self.runs), 1 if self.decode else TILE_QUERIES, contexts, self.group)
        sinks = None
        if self.sinks:
            shape = (self.heads // self.degree, self.group)
            sinks = np.random.default_rng(3).normal(scale=2.0, size=shape).astype(np.float32)
        result = contexts.attend(backend, query, self.runs, self.options, sinks)
        return relative_error(result, contexts.expected(query, self.runs, self.options, sinks))


def _tiles(request: int, start: int, count: int) -> list[Run]:
    return [Run(request, start + first, min(TILE_QUERIES, count - first)) for first in range(0, count, TILE_QUERIES)]


def _both(name: str, **options: Any) -> list[Case]:
    return [
        Case(f"decode {name}", decode=True, **options),
        Case(f"prefill {name}", decode=False, **options),
    ]


CASES: Sequence[Case] = (
    *_both("float32", dtype=FLOAT32),
    *(case for tp in (1, 2, 4, 8) for case in _both(f"tp{tp}", degree=tp, heads=8, group=2)),
    *(case for dim in (64, 80, 96, 128, 256) for case in _both(f"head_dim {dim}", head_dim=dim, dtype=FLOAT16)),
    *_both("float32 head_dim 80 group 7", head_dim=80, group=7, dtype=FLOAT32),
    *_both("one query head a KV head", group=1, degree=2),
    *_both("window of one block", window=BASE_BLOCK, dtype=FLOAT32),
    *_both("window across tiles", window=37),
    *_both("soft cap", soft_cap=1.5, dtype=FLOAT32),
    *_both("sinks", sinks=True, dtype=FLOAT32),
    *_both("everything at once", sinks=True, soft_cap=2.0, window=50, head_dim=96, group=3, degree=2),
    *_both("blocks that are no power of two", base_block=12, dtype=FLOAT32),
    *_both("sizes of the table", tuning=None, base_block=16, group=8, head_dim=128),
)
# What a GPU gets besides: contexts of thousands, in every degree, in the table's sizes.
LONG_CASES: Sequence[Case] = tuple(
    case
    for tp in (1, 2, 4, 8)
    for dim in (64, 128)
    for case in _both(
        f"9000 tokens tp{tp} head_dim {dim}",
        degree=tp, heads=8, group=4, head_dim=dim, base_block=16, longest=9000, tuning=None,
    )
)  # fmt: skip
