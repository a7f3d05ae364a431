"""Which bytes of KV go where when requests change their head split. Pure Python, no JAX.

Block bytes are equal at every degree, so a relayout moves **slabs**: the largest pieces that are whole in both head
splits. Going wider, a slab is one target rank's heads of one source block; going narrower, it is one target block's
tokens of one source block. Either way a block, on either side, is ``parts`` slabs.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fly_jax.kv_cache import BlockTable, KVCacheSpec
from fly_jax.layout import DeviceGroup, Layout


@dataclass(frozen=True, slots=True, order=True)
class HeadSplits:
    """The TP degrees before and after: what a relayout program is compiled for besides its group."""

    source_tp: int
    target_tp: int

    def __str__(self) -> str:
        return f"{self.source_tp}->{self.target_tp}"


@dataclass(frozen=True, slots=True)
class SlabPlace:
    """One slab of one block of one device."""

    device: int
    block: int
    part: int


@dataclass(frozen=True, slots=True)
class SlabMove:
    source: SlabPlace
    target: SlabPlace


@dataclass(frozen=True, slots=True)
class Region:
    """Devices whose groups change together: one group of the wider layout, several of the narrower.

    Attributes:
        group: the wider group; its mesh carries the exchange.
    """

    group: DeviceGroup
    sources: tuple[DeviceGroup, ...]
    targets: tuple[DeviceGroup, ...]

    @property
    def splits(self) -> tuple[HeadSplits, ...]:
        """Every pair of degrees between which requests of this region move."""
        pairs = {HeadSplits(source.size, target.size) for source in self.sources for target in self.targets}
        return tuple(sorted(pairs))


def regions(source: Layout, target: Layout) -> tuple[Region, ...]:
    """The parts of the device list where the layouts differ.

    Groups are aligned powers of two, so where two layouts overlap, one group holds the other.
    """
    found = []
    changed = [
        group for group in (*source.groups, *target.groups) if (group in source.groups) != (group in target.groups)
    ]
    for group in changed:
        if any(other.size > group.size and other.overlaps(group) for other in changed):
            continue
        found.append(
            Region(
                group,
                tuple(each for each in source.groups if each.overlaps(group)),
                tuple(each for each in target.groups if each.overlaps(group)),
            )
        )
    return tuple(sorted(found, key=lambda region: region.group.start))


def relayout_splits(group: DeviceGroup, base_tp: int) -> Iterator[HeadSplits]:
    """Every pair of degrees that a switch can ask of this group's mesh."""
    narrower = base_tp
    while narrower < group.size:
        yield HeadSplits(narrower, group.size)
        yield HeadSplits(group.size, narrower)
        narrower *= 2


def slab_moves(
    spec: KVCacheSpec, base_tp: int, source: BlockTable, target: BlockTable, num_tokens: int
) -> Iterator[SlabMove]:
    """The slabs that hold a request's first ``num_tokens`` tokens; ``target`` has room for them.

    Where a KV head has copies on several source ranks, the target device's own is taken, so that it does not travel.
    """
    source_tp, target_tp = source.group.size, target.group.size
    heads = min(spec.local_kv_heads(source_tp), spec.local_kv_heads(target_tp))
    tokens = min(spec.block_tokens(source_tp), spec.block_tokens(target_tp))
    source_order = source.group.rank_order(base_tp)
    for target_rank, target_device in enumerate(target.group.rank_order(base_tp)):
        first = spec.first_kv_head(target_tp, target_rank)
        for head in range(first, first + spec.local_kv_heads(target_tp), heads):
            holders = [rank for rank in range(source_tp) if _holds(spec, source_tp, rank, head)]
            source_rank = next((rank for rank in holders if source_order[rank] == target_device), holders[0])
            source_head = (head - spec.first_kv_head(source_tp, source_rank)) // heads
            target_head = (head - first) // heads
            for start in range(0, num_tokens, tokens):
                yield SlabMove(
                    _place(spec, source, source_rank, source_order[source_rank], source_head, start, tokens),
                    _place(spec, target, target_rank, target_device, target_head, start, tokens),
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
    block_tokens = spec.block_tokens(table.group.size)
    token_part = start % block_tokens // slab_tokens
    return SlabPlace(device, table.rows[rank][start // block_tokens], head_part + token_part)
