"""KV memory in blocks: what a block is at each TP degree, and who holds which. Pure Python, no JAX.

A block is a fixed number of bytes on one device. At degree t it holds the keys and values of ``kv_heads / t``
heads for t times as many tokens, so requests of every width share one pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fly_jax.layout import DeviceGroup


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """The arithmetic of blocks.

    Attributes:
        num_blocks: blocks a device.
        base_block_size: tokens a block holds at TP 1.
        kv_heads: KV heads kept at TP 1 (padded).
    """

    num_blocks: int
    base_block_size: int
    num_layers: int
    kv_heads: int
    head_dim: int
    bytes_per_element: int

    def local_kv_heads(self, tp: int) -> int:
        return max(1, self.kv_heads // tp)

    def first_kv_head(self, tp: int, rank: int) -> int:
        """First KV head that a rank keeps; beyond ``kv_heads`` ranks, neighbours keep copies of one."""
        return rank * self.kv_heads // tp

    def block_tokens(self, tp: int) -> int:
        """Tokens one block holds at degree ``tp``."""
        return self.base_block_size * self.kv_heads // self.local_kv_heads(tp)

    @property
    def block_elements(self) -> int:
        return self.num_layers * 2 * self.kv_heads * self.base_block_size * self.head_dim

    @property
    def block_bytes(self) -> int:
        return self.block_elements * self.bytes_per_element

    def block_shape(self, tp: int) -> tuple[int, int, int, int, int]:
        """``[layers, 2 (key, value), kv_heads / tp, block_tokens, head_dim]``."""
        return (self.num_layers, 2, self.local_kv_heads(tp), self.block_tokens(tp), self.head_dim)

    def slab_bytes(self, source_tp: int, target_tp: int) -> int:
        """Bytes of the largest piece of a block that is whole in both head splits."""
        fewest, most = sorted((self.local_kv_heads(source_tp), self.local_kv_heads(target_tp)))
        return self.block_bytes * fewest // most

    def blocks_for(self, tokens: int, tp: int) -> int:
        """Blocks that each device of a group needs for this many tokens."""
        return -(-tokens // self.block_tokens(tp))

    def capacity_tokens(self, tp: int) -> int:
        """Longest context that one group of degree ``tp`` holds when nothing else is in its pools."""
        return self.num_blocks * self.block_tokens(tp)


class BlockAllocator:
    """The blocks of one device, and how many hold each. Invariant: a block is free exactly if nobody holds it."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` free blocks; the caller has checked that there are that many."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """One more holds these blocks, and will free them too; they have to be held already."""
        self._check_held(blocks)
        for block in blocks:
            self._holders[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """One fewer holds these blocks; those that nobody holds any more are free.

        Raises:
            ValueError: a block is not held, or named twice; nothing has changed.
        """
        self._check_held(blocks)
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)

    def _check_held(self, blocks: Sequence[int]) -> None:
        if len(set(blocks)) != len(blocks) or not all(self._holders[block] for block in blocks):
            raise ValueError(f"blocks {list(blocks)} are not all held")


@dataclass(slots=True)
class BlockTable:
    """Where one request's KV lives: on which group's devices, in which head split, in which blocks.

    Attributes:
        group: the devices and the degree that its head split has.
        rows: one list of block ids a TP rank, in rank order; all have the same length.
    """

    group: DeviceGroup
    rows: list[list[int]] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        return len(self.rows[0]) if self.rows else 0


class KVCacheManager:
    """Allocates blocks on every device for requests of every width."""

    def __init__(self, spec: KVCacheSpec, num_devices: int, base_tp: int) -> None:
        self.spec = spec
        self.base_tp = base_tp
        self.allocators = [BlockAllocator(spec.num_blocks) for _ in range(num_devices)]

    def free_blocks(self, group: DeviceGroup) -> int:
        """Blocks that every device of the group still has."""
        return min(self.allocators[device].num_free for device in group.device_indices)

    def new_table(self, group: DeviceGroup) -> BlockTable:
        return BlockTable(group, [[] for _ in range(group.num_devices)])

    def missing_blocks(self, table: BlockTable, tokens: int) -> int:
        """Blocks a device that the table lacks to hold ``tokens`` tokens."""
        return max(0, self.spec.blocks_for(tokens, table.group.tp) - table.num_blocks)

    def grow(self, table: BlockTable, tokens: int) -> bool:
        """Makes room for ``tokens`` tokens in all; False, and nothing changed, if blocks are short."""
        missing = self.missing_blocks(table, tokens)
        if missing > self.free_blocks(table.group):
            return False
        if missing:
            for row, device in zip(table.rows, table.group.rank_order(self.base_tp), strict=True):
                row.extend(self.allocators[device].allocate(missing))
        return True

    def release(self, table: BlockTable) -> None:
        """Frees all of a table's blocks and empties it."""
        for row, device in zip(table.rows, table.group.rank_order(self.base_tp), strict=True):
            self.allocators[device].free(row)
            row.clear()

    def release_part(self, table: BlockTable, first: int, stop: int) -> None:
        """Frees some of a table's blocks on each device; whoever calls this does not use the table for them again."""
        for row, device in zip(table.rows, table.group.rank_order(self.base_tp), strict=True):
            self.allocators[device].free(row[first:stop])

    @property
    def usage(self) -> float:
        """Used fraction of all blocks, 0 to 1."""
        total = self.spec.num_blocks * len(self.allocators)
        return 1.0 - sum(allocator.num_free for allocator in self.allocators) / total
