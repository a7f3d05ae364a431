"""The attention kernel: one item of work and one KV head a program, online softmax over tiles of paged context.

A query block's queries and the query heads of one KV head are the rows of one matrix product. Everything that
depends on the batch is read from memory, so that one program serves any batch of its bucket and any layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.interface import AttentionOptions, KVLayout
from kernels_pallas.work import Item

LOG2_E = math.log2(math.e)
# Below the running maximum's first value, so that the weight of a masked score is exactly 0.
FIRST_MAXIMUM = -1e30
_MASKED = -2e30
_KEY, _VALUE = 0, 1


@dataclass(frozen=True)
class RowShape:
    """The rows of a program's matrix product: queries by query heads of the KV head.

    Attributes:
        queries: most queries of a query block.
        group: query heads a KV head.
    """

    queries: int
    group: int

    @property
    def used(self) -> int:
        return self.queries * self.group

    @property
    def padded(self) -> int:
        """A power of two, and at least what a tensor core's product takes."""
        return max(16, pl.next_power_of_2(self.used))


def pieces(head_dim: int) -> tuple[slice, ...]:
    """A head cut into powers of two, longest first: Triton's tiles have no other sizes, and padding would be work."""
    found, start = [], 0
    while start < head_dim:
        size = 1 << ((head_dim - start).bit_length() - 1)
        found.append(slice(start, start + size))
        start += size
    return tuple(found)


def columns(piece: slice) -> Array:
    return piece.start + jnp.arange(piece.stop - piece.start, dtype=jnp.int32)


def attend_kernel(
    items: Any,
    layer_ref: Any,
    query: Any,
    pool: Any,
    tables: Any,
    sinks: Any,
    out: Any,
    partial_sum: Any,
    partial_max: Any,
    partial_mass: Any,
    *,
    layout: KVLayout,
    rows: RowShape,
    tile: int,
    options: AttentionOptions,
) -> None:
    """Grid ``(kv_heads, items)``.

    Args:
        items: int32 ``[items, len(Item)]``.
        layer_ref: int32 ``[1]``.
        query: ``[places, kv_heads, group, head_dim]``.
        pool: ``[num_blocks, layers, 2, kv_heads, block_tokens, head_dim]``.
        tables: int32 ``[requests, table_blocks]``.
        sinks: float32 ``[kv_heads, group]``, or None.
        out: like ``query``; only the places of uncut blocks are written.
        partial_sum: float32 ``[slots, kv_heads, queries * group, head_dim]``, not divided by the mass.
        partial_max, partial_mass: float32 ``[slots, kv_heads, queries * group]``; the maximum in units of log 2.
    """
    head, index = pl.program_id(0), pl.program_id(1)
    end = items[index, Item.END]

    @pl.when(end > 0)
    def _() -> None:
        program = _Program(index, head, layer_ref[0], items, pool, tables, layout, rows, tile, options)
        sums, best, mass = program.run(query)
        slot = items[index, Item.SLOT]

        @pl.when(slot < 0)
        def _() -> None:
            scaled, total = finish(sums, best, mass, None if sinks is None else program.of_row(sinks, 0.0))
            for piece, values in zip(pieces(layout.head_dim), scaled, strict=True):
                result = (values / total[:, None]).astype(out.dtype)
                plgpu.store(out.at[program.query_index(piece)], result, mask=program.live[:, None])

        @pl.when(slot >= 0)
        def _() -> None:
            row = program.row
            for piece, values in zip(pieces(layout.head_dim), sums, strict=True):
                where = (slot, head, row[:, None], columns(piece)[None, :])
                plgpu.store(partial_sum.at[where], values, mask=program.live[:, None])
            plgpu.store(partial_max.at[slot, head, row], best, mask=program.live)
            plgpu.store(partial_mass.at[slot, head, row], mass, mask=program.live)


def finish(sums: tuple[Array, ...], best: Array, mass: Array, sink: Array | None) -> tuple[tuple[Array, ...], Array]:
    """The sums and the mass that divides them, an attention sink's share included: a score without a value."""
    if sink is None:
        return sums, mass
    top = jnp.maximum(best, sink * LOG2_E)
    decay = jnp.exp2(best - top)
    total = mass * decay + jnp.exp2(sink * LOG2_E - top)
    return tuple(each * (decay[:, None] if each.ndim > 1 else decay) for each in sums), total


Carry = tuple[tuple[Array, ...], Array, Array]


class _Program:
    """What one program computes with; its arrays exist only while the kernel is traced."""

    def __init__(
        self,
        index: Array,
        head: Array,
        layer: Array,
        items: Any,
        pool: Any,
        tables: Any,
        layout: KVLayout,
        rows: RowShape,
        tile: int,
        options: AttentionOptions,
    ) -> None:
        self.head, self.layer, self.pool, self.tables = head, layer, pool, tables
        self.layout, self.rows, self.tile, self.options = layout, rows, tile, options
        self.table_row = items[index, Item.TABLE_ROW]
        self.place, self.position = items[index, Item.PLACE], items[index, Item.POSITION]
        self.begin, self.end = items[index, Item.BEGIN], items[index, Item.END]
        self.row = jnp.arange(rows.padded, dtype=jnp.int32)
        self.query, self.member = self.row // rows.group, self.row % rows.group
        self.live = self.query < items[index, Item.COUNT]

    def query_index(self, piece: slice) -> tuple[Array, ...]:
        place = self.place + self.query
        return (place[:, None], self.head, self.member[:, None], columns(piece)[None, :])

    def of_row(self, by_head: Any, other: float) -> Array:
        """``by_head [kv_heads, group]`` at each row: ``[rows]``."""
        values: Array = plgpu.load(by_head.at[self.head, self.member], mask=self.live, other=other)
        return values

    def run(self, query_ref: Any) -> Carry:
        """Sums ``[rows, piece]`` by piece, maximum ``[rows]`` in units of log 2 and mass ``[rows]`` over the item."""
        parts = pieces(self.layout.head_dim)
        query = tuple(
            plgpu.load(query_ref.at[self.query_index(piece)], mask=self.live[:, None], other=0.0).astype(
                self.layout.dtype
            )
            for piece in parts
        )
        count = self.rows.padded
        carry: Carry = (
            tuple(jnp.zeros((count, piece.stop - piece.start), jnp.float32) for piece in parts),
            jnp.full((count,), FIRST_MAXIMUM, jnp.float32),
            jnp.zeros((count,), jnp.float32),
        )
        first, stop = self.begin // self.tile, (self.end + self.tile - 1) // self.tile
        masked_from = first
        if self.options.window is None:
            # Tiles that every query of the block sees whole need no mask.
            masked_from = jnp.clip((self.position + 1) // self.tile, first, stop)
            carry = lax.fori_loop(first, masked_from, lambda t, c: self._step(t, c, query, masked=False), carry)
        return lax.fori_loop(masked_from, stop, lambda t, c: self._step(t, c, query, masked=True), carry)

    def _step(self, index: Array, carry: Carry, query: tuple[Array, ...], *, masked: bool) -> Carry:
        sums, best, mass = carry
        tokens = index * self.tile + jnp.arange(self.tile, dtype=jnp.int32)
        inside = tokens < self.end if masked else None
        blocks, offsets = self._where(index, tokens, inside)
        parts = pieces(self.layout.head_dim)
        products = [
            _dot(part, self._load(_KEY, blocks, offsets, piece, inside).T)
            for part, piece in zip(query, parts, strict=True)
        ]
        scores = self._log2_scores(sum(products[1:], start=products[0]))
        if masked:
            scores = jnp.where(self._seen(tokens), scores, _MASKED)
        top = jnp.maximum(best, jnp.max(scores, axis=1))
        weights, decay = jnp.exp2(scores - top[:, None]), jnp.exp2(best - top)
        mass = mass * decay + jnp.sum(weights, axis=1)
        weights = weights.astype(self.layout.dtype)
        sums = tuple(
            total * decay[:, None] + _dot(weights, self._load(_VALUE, blocks, offsets, piece, inside))
            for total, piece in zip(sums, parts, strict=True)
        )
        return sums, top, mass

    def _where(self, index: Array, tokens: Array, inside: Array | None) -> tuple[Array, Array]:
        """Block and offset of each of a tile's tokens; one block for all where tiles divide blocks."""
        size = self.layout.block_tokens
        if size % self.tile == 0:
            block = self.tables[self.table_row, index // (size // self.tile)]
            return block, index % (size // self.tile) * self.tile + jnp.arange(self.tile, dtype=jnp.int32)
        entry = self.tables.at[self.table_row, tokens // size]
        blocks = plgpu.load(entry) if inside is None else plgpu.load(entry, mask=inside, other=0)
        return blocks[:, None], tokens % size

    def _load(self, which: int, blocks: Array, offsets: Array, piece: slice, inside: Array | None) -> Array:
        """Keys or values of a tile, ``[tile, piece]``; 0 beyond the context, where a block may hold anything."""
        where = (blocks, self.layer, which, self.head, offsets[:, None], columns(piece)[None, :])
        if inside is None:
            loaded: Array = plgpu.load(self.pool.at[where])
        else:
            loaded = plgpu.load(self.pool.at[where], mask=inside[:, None], other=0.0)
        return loaded

    def _log2_scores(self, scores: Array) -> Array:
        scale, cap = self.options.scale, self.options.soft_cap
        if cap is None:
            return scores * (scale * LOG2_E)
        return jnp.tanh(scores * (scale / cap)) * (cap * LOG2_E)

    def _seen(self, tokens: Array) -> Array:
        """Which tokens each row's query sees, bool ``[rows, tile]``."""
        position = (self.position + self.query)[:, None]
        seen = (tokens[None, :] <= position) & (tokens < self.end)[None, :]
        if self.options.window is not None:
            seen &= tokens[None, :] > position - self.options.window
        return seen


def _dot(left: Array, right: Array) -> Array:
    """In float32; float32 operands are not rounded to TF32."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.dot(left, right, precision=precision, preferred_element_type=jnp.float32)
