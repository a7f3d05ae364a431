"""Which bytes of KV go where when requests change their head split. Pure Python, no JAX.

Block bytes are equal at every degree, so a relayout moves **slabs**: the largest pieces that are whole in both head
splits. Going wider, a slab is one target rank's heads of one source block; going narrower, it is one target block's
tokens of one source block. Either way a block, on either side, is ``parts`` slabs.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from fly_jax.kv.blocks import BlockTable, KVCacheSpec
from fly_jax.layout import DeviceGroup

# Slabs that one launch moves between any two devices; a launch is padded to it.
CHUNK_SLABS = 16


@dataclass(frozen=True, slots=True, order=True)
class HeadSplits:
    """The TP degrees before and after: what a relayout program is compiled for besides its group."""

    source_tp: int
    target_tp: int

    def __str__(self) -> str:
        return f"{self.source_tp}->{self.target_tp}"


class SlabPlace(NamedTuple):
    """One slab of one block of one device."""

    device: int
    block: int
    part: int


class SlabMove(NamedTuple):
    """A long context has tens of thousands: as named tuples, planning takes a third of the time of dataclasses."""

    source: SlabPlace
    target: SlabPlace


@dataclass(frozen=True, slots=True)
class PackedRelayout:
    """Moves of KV inside one group's devices, ready to be launched.

    Attributes:
        group: its mesh carries the exchange.
        num_bytes: what moves, slabs that stay on their device included.
        uploads: the input of each launch, as whoever launches them has packed it.
    """

    group: DeviceGroup
    splits: HeadSplits
    num_bytes: int
    uploads: tuple[Any, ...]


class KVMover(Protocol):
    """What moves KV on the devices: the runner, or its stand-in.

    Attributes:
        chunk_slabs: slabs that one launch moves between any two devices.
    """

    chunk_slabs: int

    def pack_relayout(
        self, group: DeviceGroup, splits: HeadSplits, moves: Sequence[SlabMove], token_devices: Mapping[int, int]
    ) -> PackedRelayout:
        """Makes moves of slabs inside a group's devices ready.

        Args:
            token_devices: slot -> device that holds its latest token; every device of the group then has it.
        """

    def relayout(self, packed: PackedRelayout) -> None:
        """Starts the moves, without waiting."""


@dataclass(slots=True)
class MigrationTotals:
    """What happened to requests when their groups changed.

    Attributes:
        requests: moved to another group.
        paused: kept their KV in place and paused.
        bytes_moved, blocks_moved: KV; ``bytes_ahead`` of them while the old groups went on.
        launches: of relayout programs.
        tokens_recomputed: of requests that gave up their KV.
    """

    requests: int = 0
    paused: int = 0
    bytes_moved: int = 0
    bytes_ahead: int = 0
    blocks_moved: int = 0
    launches: int = 0
    tokens_recomputed: int = 0


def relayout_splits(group: DeviceGroup, base_tp: int) -> Iterator[HeadSplits]:
    """Every pair of degrees that a switch can ask of this group's mesh."""
    narrower = base_tp
    while narrower < group.tp:
        yield HeadSplits(narrower, group.tp)
        yield HeadSplits(group.tp, narrower)
        narrower *= 2


def slab_tokens(spec: KVCacheSpec, source: DeviceGroup, target: DeviceGroup) -> int:
    """Tokens of one slab between two groups' blocks."""
    return min(spec.block_tokens(source.tp), spec.block_tokens(target.tp))


def slab_moves(
    spec: KVCacheSpec, base_tp: int, source: BlockTable, target: BlockTable, tokens: range
) -> Iterator[SlabMove]:
    """The slabs that hold these tokens of a request; ``target`` has room for them.

    Where a KV head has copies on several source ranks, the target device's own is taken, so that it does not travel.

    Args:
        tokens: begins at a whole slab.
    """
    source_tp, target_tp = source.group.tp, target.group.tp
    heads = min(spec.local_kv_heads(source_tp), spec.local_kv_heads(target_tp))
    step = slab_tokens(spec, source.group, target.group)
    source_order = source.group.rank_order(base_tp)
    for target_rank, target_device in enumerate(target.group.rank_order(base_tp)):
        first = spec.first_kv_head(target_tp, target_rank)
        for head in range(first, first + spec.local_kv_heads(target_tp), heads):
            holders = [rank for rank in range(source_tp) if _holds(spec, source_tp, rank, head)]
            source_rank = next((rank for rank in holders if source_order[rank] == target_device), holders[0])
            source_head = (head - spec.first_kv_head(source_tp, source_rank)) // heads
            target_head = (head - first) // heads
            for start in range(tokens.start, tokens.stop, step):
                yield SlabMove(
                    _place(spec, source, source_rank, source_order[source_rank], source_head, start, step),
                    _place(spec, target, target_rank, target_device, target_head, start, step),
                )


def exchange_rounds(moves: Iterable[SlabMove], chunk: int) -> Iterator[list[SlabMove]]:
    """Groups moves into launches of at most ``chunk`` slabs for every pair of devices, keeping each pair's order."""
    queues: dict[tuple[int, int], deque[SlabMove]] = defaultdict(deque)
    for move in moves:
        queues[move.source.device, move.target.device].append(move)
    while any(queues.values()):
        yield [queue.popleft() for queue in queues.values() for _ in range(min(chunk, len(queue)))]


def _holds(spec: KVCacheSpec, tp: int, rank: int, head: int) -> bool:
    first = spec.first_kv_head(tp, rank)
    return first <= head < first + spec.local_kv_heads(tp)


def _place(
    spec: KVCacheSpec, table: BlockTable, rank: int, device: int, head_part: int, start: int, slab_tokens: int
) -> SlabPlace:
    """Where the slab of tokens ``start ..`` is in a table; of head part and token part at most one is not 0."""
    block_tokens = spec.block_tokens(table.group.tp)
    token_part = start % block_tokens // slab_tokens
    return SlabPlace(device, table.rows[rank][start // block_tokens], head_part + token_part)
