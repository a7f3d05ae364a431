"""Tuning parameters of the attention kernel, by chip and shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from kernels_pallas.interface import KVLayout
from kernels_pallas.work import WorkSizes


@dataclass(frozen=True)
class Tuning:
    """How the attention kernel is shaped.

    Attributes:
        rows: most rows of a program's matrix product, which are queries by query heads of one KV head.
        tile_tokens: context positions of one iteration.
        num_warps: of Triton.
        num_stages: of Triton. One goes to the block table, from which the addresses of keys and values come: below 5,
            the next tile is not copied while this one is computed (``cp.async.wait_group 0``).
        programs: that work is cut for.
        min_item_tiles: fewest tiles worth a program of their own.
    """

    rows: int
    tile_tokens: int
    num_warps: int
    num_stages: int
    programs: int
    min_item_tiles: int

    def sizes(self, queries: int, group: int, heads: int) -> WorkSizes:
        """For runs of up to ``queries`` queries, ``group`` query heads a KV head and ``heads`` KV heads."""
        return WorkSizes(
            block_queries=1 if queries == 1 else max(1, self.rows // group),
            tile_tokens=self.tile_tokens,
            min_item_tiles=self.min_item_tiles,
            target_items=max(1, self.programs // heads),
        )


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
        chips: device kinds, as jax names them.
        head_dim, group, block_tokens: the shapes that it holds for; None: any.
        decode, prefill: for runs of one query, and of more.
        evidence: what was measured with them.
    """

    chips: tuple[str, ...]
    head_dim: int
    group: int | None
    block_tokens: int | None
    decode: Tuning
    prefill: Tuning
    evidence: str

    def fits(self, chip: str, layout: KVLayout, group: int) -> bool:
        return (
            chip in self.chips
            and layout.head_dim == self.head_dim
            and layout.dtype.itemsize == 2
            and self.group in (None, group)
            and self.block_tokens in (None, layout.block_tokens)
        )


_HOPPER = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL", "NVIDIA GH200 480GB")
_HOPPER_PROCESSORS = 132
_SAFE_PROCESSORS = 108
# The narrowest product of Triton; a decode has fewer, one for each query head of a KV head.
DECODE_ROWS = 16
_PREFETCHING_STAGES = 5
_PLAIN_STAGES = 3


def _hopper(head_dim: int, decode: tuple[int, int, int], prefill: tuple[int, int, int, int], evidence: str) -> Entry:
    """``decode``: tile tokens, warps, programs a processor; ``prefill``: rows, tile tokens, warps, programs."""
    tile, warps, programs = decode
    rows, prefill_tile, prefill_warps, prefill_programs = prefill
    return Entry(
        chips=_HOPPER,
        head_dim=head_dim,
        group=None,
        block_tokens=None,
        decode=Tuning(DECODE_ROWS, tile, warps, _PREFETCHING_STAGES, programs * _HOPPER_PROCESSORS, 256 // tile),
        prefill=Tuning(
            rows,
            prefill_tile,
            prefill_warps,
            _PREFETCHING_STAGES,
            prefill_programs * _HOPPER_PROCESSORS,
            256 // prefill_tile,
        ),
        evidence=evidence,
    )


# Chosen by what the compiler makes of them (make check-h200): no register spilled at any degree, group or option, and
# the programs a processor that registers and shared memory admit. Not one has been timed yet: that needs a GPU and
# `python -m fly_jax.bench kernels --tune`, whose figures belong beside these.
TABLE: tuple[Entry, ...] = (
    _hopper(64, (128, 4, 3), (128, 64, 8, 2), "at most 143 and 128 registers, 73 and 67 KB of shared memory"),
    _hopper(80, (64, 8, 1), (128, 64, 8, 1), "at most 204 and 166 registers, 45 and 83 KB of shared memory"),
    _hopper(96, (64, 4, 4), (128, 64, 8, 1), "at most 126 and 186 registers, 55 and 99 KB of shared memory"),
    _hopper(128, (64, 8, 3), (128, 64, 8, 1), "at most 80 and 238 registers, 72 and 132 KB of shared memory"),
    _hopper(256, (32, 8, 2), (64, 32, 8, 1), "at most 128 and 205 registers, 75 and 132 KB of shared memory"),
)


def tuning_for(chip: str, layout: KVLayout, group: int, queries: int, *, soft_cap: bool = False) -> Tuning:
    """The table's parameters, or safe ones for a chip or a shape that it does not list."""
    for entry in TABLE:
        if entry.fits(chip, layout, group):
            tuning = entry.decode if queries == 1 else entry.prefill
            break
    else:
        tuning = _safe(layout, queries)
    if soft_cap and queries > 1:
        # A tile of hyperbolic tangents beside the sums leaves no registers for copying the next tile meanwhile.
        return replace(tuning, num_stages=_PLAIN_STAGES)
    return tuning


def candidates(chip: str, layout: KVLayout, group: int, queries: int) -> Iterator[Tuning]:
    """What is worth timing on a new chip, the present choice first; some may not compile there."""
    present = tuning_for(chip, layout, group, queries)
    yield present
    widths = (DECODE_ROWS,) if queries == 1 else (64, 128)
    for stages, rows, tile, warps in product((_PREFETCHING_STAGES, 3, 7), widths, (32, 64, 128), (4, 8)):
        for programs in {present.programs, 2 * present.programs}:
            tuning = Tuning(rows, tile, warps, stages, programs, 256 // tile)
            if tuning != present:
                yield tuning


def table_row(head_dim: int, decode: Tuning, prefill: Tuning, evidence: str) -> str | None:
    """The line of the table that has these parameters; None where it cannot say them."""
    short = [(each.tile_tokens, each.num_warps, each.programs // _HOPPER_PROCESSORS) for each in (decode, prefill)]
    row = (head_dim, short[0], (prefill.rows, *short[1]), evidence)
    entry = _hopper(*row)
    if (entry.decode, entry.prefill) != (decode, prefill):
        return None
    return f"_hopper{row},".replace("'", '"')


def _safe(layout: KVLayout, queries: int) -> Tuning:
    """Fits the 99 KB of shared memory that every GPU since Ampere gives a program."""
    row_bytes = (1 << (layout.head_dim - 1).bit_length()) * layout.dtype.itemsize
    tile = max(16, min(64, 8192 // row_bytes))
    warps = 4 if layout.dtype.itemsize == 2 else 8  # float32 products do not run on tensor cores: more registers
    rows = DECODE_ROWS if queries == 1 else 64 if row_bytes <= 512 else 32
    programs = (4 if queries == 1 else 2) * _SAFE_PROCESSORS
    return Tuning(rows, tile, warps, num_stages=2, programs=programs, min_item_tiles=256 // tile)
