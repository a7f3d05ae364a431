"""Moves every running request of a region into its new groups. Pure Python, no JAX.

Nothing waits and nothing is recomputed: the moves are launched behind the last old step and before the first new
one, and each device runs its launches in order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fly_jax.group_scheduler import GroupScheduler
from fly_jax.kv_cache import BlockTable, KVCacheManager
from fly_jax.layout import DeviceGroup
from fly_jax.relayout_plan import HeadSplits, Region, SlabMove, slab_moves
from fly_jax.request import Request


class LaunchMoves(Protocol):
    """Starts moving slabs inside a group's devices; returns the bytes moved."""

    def __call__(
        self, group: DeviceGroup, splits: HeadSplits, moves: Sequence[SlabMove], token_devices: dict[int, int]
    ) -> int: ...


@dataclass(slots=True)
class MigrationTotals:
    """What a migration did.

    Attributes:
        tokens_recomputed: of requests that no round of moves could place: they were preempted.
    """

    requests: int = 0
    bytes_moved: int = 0
    blocks_moved: int = 0
    tokens_recomputed: int = 0

    def __add__(self, other: MigrationTotals) -> MigrationTotals:
        return MigrationTotals(
            self.requests + other.requests,
            self.bytes_moved + other.bytes_moved,
            self.blocks_moved + other.blocks_moved,
            self.tokens_recomputed + other.tokens_recomputed,
        )


@dataclass(slots=True)
class _Launch:
    moves: list[SlabMove] = field(default_factory=list)
    token_devices: dict[int, int] = field(default_factory=dict)


class Migration:
    """Empties a region's source groups into its target groups.

    Args:
        targets: the new, empty groups' schedulers.
        preempt: takes a request's KV away for good.
    """

    def __init__(
        self,
        region: Region,
        targets: Sequence[GroupScheduler],
        kv: KVCacheManager,
        launch: LaunchMoves,
        preempt: Callable[[Request], None],
    ) -> None:
        self.region, self.targets, self.kv = region, targets, kv
        self.launch, self.preempt = launch, preempt
        self.totals = MigrationTotals()

    def run(self, requests: Sequence[Request]) -> MigrationTotals:
        """Moves the requests in rounds: a round uses only blocks that were free before it, and frees its sources.

        So no launch writes a block that another of the same round still reads. When not even one request can be
        placed, one gives up its KV.
        """
        left = sorted(requests, key=lambda request: request.arrival)
        while left:
            placed = [(request, table) for request in left if (table := self._reserve(request)) is not None]
            if placed:
                self._move(placed)
                moved = {request for request, _ in placed}
                left = [request for request in left if request not in moved]
            else:
                victim = self._victim(left)
                left.remove(victim)
                self.totals.tokens_recomputed += victim.num_computed
                self.preempt(victim)
        for target in self.targets:
            target.running.sort(key=lambda request: request.arrival)
        return self.totals

    def _victim(self, left: Sequence[Request]) -> Request:
        """The latest on the device that is shortest of blocks: those of requests elsewhere would not help."""
        short = min(self.region.group.device_indices, key=lambda device: self.kv.allocators[device].num_free)
        on_it = [request for request in left if short in request.held_table.group.device_indices]
        return (on_it or left)[-1]

    def _reserve(self, request: Request) -> BlockTable | None:
        """Room in the target group with most of it, and a place among its running requests; None if there is none."""
        needed = max(request.num_known, request.num_computed)
        for target in sorted(self._eligible(request), key=lambda t: (-self.kv.free_blocks(t.group), len(t.running))):
            table = self.kv.new_table(target.group)
            if len(target.running) < target.max_running and self.kv.grow(table, needed):
                target.running.append(request)
                return table
        return None

    def _eligible(self, request: Request) -> list[GroupScheduler]:
        """Targets that hold the request to its end, or for as long as any of them does: a move cuts no answer short."""
        spec = self.kv.spec
        capacities = {target.group: spec.capacity_tokens(target.group.size) for target in self.targets}
        end = min(len(request.prompt_ids) + request.max_tokens, max(capacities.values()))
        return [target for target in self.targets if capacities[target.group] >= end]

    def _move(self, placed: Sequence[tuple[Request, BlockTable]]) -> None:
        spec, base_tp = self.kv.spec, self.kv.base_tp
        launches: dict[HeadSplits, _Launch] = defaultdict(_Launch)
        for request, table in placed:
            source = request.held_table
            launch = launches[HeadSplits(source.group.size, table.group.size)]
            launch.moves.extend(slab_moves(spec, base_tp, source, table, request.num_computed))
            launch.token_devices[request.slot] = source.group.start
        for splits, each in launches.items():
            self.totals.bytes_moved += self.launch(self.region.group, splits, each.moves, each.token_devices)
        for request, table in placed:
            source = request.held_table
            self.totals.blocks_moved += source.num_blocks * source.group.size
            self.totals.requests += 1
            self.kv.release(source)
            request.table = table
            capacity = spec.capacity_tokens(table.group.size)
            request.max_tokens = min(request.max_tokens, capacity - len(request.prompt_ids))
