"""How the work of one attention call is divided among the programs of a kernel, on the device and for any batch.

Queries of one request that lie next to each other are cut into *query blocks* that share a pass over the context.
The context of a block that is longer than a fair share of all the work is cut into *items*: each is one program a
KV head, so one request of 100K tokens fills a GPU as well as 256 of 500. Items of a cut block leave partial results
in *slots*, which a second kernel combines.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import jax.numpy as jnp
from jax import Array

from kernels_pallas.interface import QueryRuns


class Item(IntEnum):
    """Columns of ``Work.items``."""

    TABLE_ROW = 0
    PLACE = 1
    """Place of the first query."""
    POSITION = 2
    """Position of the first query."""
    COUNT = 3
    """Queries."""
    BEGIN = 4
    """First context position that is read."""
    END = 5
    """One beyond the last; 0 for an item that does not exist."""
    SLOT = 6
    """Where the partial result goes; -1: the block is not cut and the result is final."""


class Cut(IntEnum):
    """Columns of ``Work.cuts``."""

    PLACE = 0
    COUNT = 1
    FIRST_SLOT = 2
    SLOTS = 3
    """How many; 0 for a cut that does not exist."""


@dataclass(frozen=True)
class WorkSizes:
    """How finely work is divided.

    Attributes:
        block_queries: most queries of a query block.
        tile_tokens: context positions that one iteration of a program reads.
        min_item_tiles: fewest tiles worth an item of their own.
        target_items: items a KV head that fill the GPU.
    """

    block_queries: int
    tile_tokens: int
    min_item_tiles: int
    target_items: int

    def max_blocks(self, runs: int, queries: int) -> int:
        """Query blocks that ``runs`` runs of up to ``queries`` queries can have."""
        per_run = -(-queries // self.block_queries)
        return min(runs * per_run, runs * queries // self.block_queries + runs)

    def max_items(self, runs: int, queries: int) -> int:
        return self.max_blocks(runs, queries) + self.target_items

    @property
    def max_slots(self) -> int:
        """A block is cut if it has more than 1 / target_items of all tiles, into less than twice its share."""
        return 2 * self.target_items


@dataclass(frozen=True)
class Work:
    """What the kernels do.

    Attributes:
        items: int32 ``[max_items, len(Item)]``, those of the longest contexts of a prompt first.
        cuts: int32 ``[target_items, len(Cut)]``, the blocks that are cut.
    """

    items: Array
    cuts: Array


@dataclass(frozen=True)
class _Blocks:
    """Query blocks, int32 ``[max_blocks]`` each; those that do not exist have no queries."""

    row: Array
    place: Array
    position: Array
    count: Array


def divide(runs: QueryRuns, queries: int, sizes: WorkSizes, window: int | None) -> Work:
    """Divides a call's work.

    Args:
        queries: places of a run.
        window: latest positions that a query sees; None: all.
    """
    blocks = _query_blocks(runs, queries, sizes)
    tile = sizes.tile_tokens
    end = blocks.position + blocks.count
    begin = jnp.zeros_like(end) if window is None else jnp.maximum(0, blocks.position - window + 1)
    exists = blocks.count > 0
    first_tile = begin // tile
    tiles = jnp.where(exists, -(-end // tile) - first_tile, 0)
    item_tiles = jnp.maximum(sizes.min_item_tiles, -(-jnp.sum(tiles) // sizes.target_items))
    parts = -(-tiles // item_tiles)
    part_tiles = -(-tiles // jnp.maximum(parts, 1))  # even parts: the last is not a small remainder
    parts = -(-tiles // jnp.maximum(part_tiles, 1))
    cut = parts > 1
    ends = jnp.cumsum(parts)
    slot_ends = jnp.cumsum(jnp.where(cut, parts, 0))

    # The last items first: a prompt's last queries have the longest context, and long items should start early.
    index = ends[-1] - 1 - jnp.arange(sizes.max_items(runs.rows.shape[0], queries), dtype=jnp.int32)
    owner = _owner(ends, index)
    part = index - (ends - parts)[owner]
    item_begin = (first_tile[owner] + part * part_tiles[owner]) * tile
    item_end = jnp.minimum(item_begin + part_tiles[owner] * tile, end[owner])
    slot = jnp.where(cut[owner], (slot_ends - parts)[owner] + part, -1)
    columns = {
        Item.TABLE_ROW: blocks.row[owner],
        Item.PLACE: blocks.place[owner],
        Item.POSITION: blocks.position[owner],
        Item.COUNT: blocks.count[owner],
        Item.BEGIN: item_begin,
        Item.END: jnp.where(index >= 0, item_end, 0),
        Item.SLOT: slot,
    }
    items = jnp.stack([columns[field] for field in Item], axis=1)
    return Work(items, _cuts(blocks, cut, parts, slot_ends, sizes.target_items))


def _query_blocks(runs: QueryRuns, queries: int, sizes: WorkSizes) -> _Blocks:
    """Joins runs that continue one another into chains, and cuts chains into query blocks."""
    present = runs.lengths > 0
    follows = (
        present[1:]
        & (runs.rows[1:] == runs.rows[:-1])
        & (runs.lengths[:-1] == queries)
        & (runs.starts[1:] == runs.starts[:-1] + queries)
    )
    opens = present & ~jnp.concatenate([jnp.zeros(1, bool), follows])
    chain_of_run = jnp.cumsum(opens) - 1
    num_runs = runs.rows.shape[0]
    chains = jnp.arange(num_runs, dtype=jnp.int32)
    first_run = _owner(jnp.cumsum(opens), chains)
    in_chain = (chain_of_run[None, :] == chains[:, None]) & present[None, :]
    length = jnp.sum(jnp.where(in_chain, runs.lengths[None, :], 0), axis=1)

    parts = -(-length // sizes.block_queries)
    ends = jnp.cumsum(parts)
    index = jnp.arange(sizes.max_blocks(num_runs, queries), dtype=jnp.int32)
    chain = _owner(ends, index)
    offset = (index - (ends - parts)[chain]) * sizes.block_queries
    run = first_run[chain]
    count = jnp.where(index < ends[-1], jnp.minimum(sizes.block_queries, length[chain] - offset), 0)
    return _Blocks(runs.rows[run], run * queries + offset, runs.starts[run] + offset, count)


def _cuts(blocks: _Blocks, cut: Array, parts: Array, slot_ends: Array, bound: int) -> Array:
    number = jnp.cumsum(cut)
    index = jnp.arange(bound, dtype=jnp.int32)
    owner = _owner(number, index)
    columns = {
        Cut.PLACE: blocks.place[owner],
        Cut.COUNT: blocks.count[owner],
        Cut.FIRST_SLOT: (slot_ends - parts)[owner],
        Cut.SLOTS: jnp.where(index < number[-1], parts[owner], 0),
    }
    return jnp.stack([columns[field] for field in Cut], axis=1)


def _owner(ends: Array, index: Array) -> Array:
    """For each index the first place whose running total is beyond it, as int32; the last place if none is."""
    # All comparisons at once are one fused reduction; a binary search is a loop of launches.
    owner = jnp.searchsorted(ends, index, side="right", method="compare_all")
    return jnp.minimum(owner, ends.shape[0] - 1).astype(jnp.int32)
