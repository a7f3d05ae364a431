"""Tuning parameters of the attention kernel, by chip and shape."""

from __future__ import annotations

from dataclasses import dataclass

from kernels_pallas.interface import KVLayout
from kernels_pallas.work import WorkSizes


@dataclass(frozen=True)
class Tuning:
    """How the attention kernel is shaped.

    Attributes:
        rows: most rows of a program's matrix product, which are queries by query heads of one KV head.
        tile_tokens: context positions of one iteration.
        num_warps, num_stages: of Triton.
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


HOPPER = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB")
_HOPPER_PROCESSORS = 132

TABLE: tuple[Entry, ...] = ()


def tuning_for(chip: str, layout: KVLayout, group: int, queries: int) -> Tuning:
    """The table's parameters, or safe ones for a chip or a shape that it does not list."""
    for entry in TABLE:
        if entry.fits(chip, layout, group):
            return entry.decode if queries == 1 else entry.prefill
    return _safe(layout, queries)


def _safe(layout: KVLayout, queries: int) -> Tuning:
    """Fits the 99 KB of shared memory that every GPU since Ampere gives a program, and 255 registers a thread."""
    row_bytes = layout.head_dim * layout.dtype.itemsize
    tile = max(16, min(64, 8192 // row_bytes))
    if queries == 1:
        return Tuning(16, tile, num_warps=4, num_stages=2, programs=4 * 108, min_item_tiles=256 // tile)
    return Tuning(64, tile, num_warps=4, num_stages=2, programs=2 * 108, min_item_tiles=256 // tile)
