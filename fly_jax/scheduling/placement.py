"""Which of its possible new groups a moving request goes to. Pure Python, no JAX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fly_jax.kv.blocks import BlockTable, KVCacheManager
from fly_jax.layout import DeviceGroup
from fly_jax.scheduling.fit import Reach, fitting
from fly_jax.scheduling.group import GroupScheduler
from fly_jax.scheduling.request import Request


class Placement:
    """Spreads moving requests over the groups of a new layout.

    Args:
        targets: the new groups' schedulers.
        reach_tokens: the longest context that a request in a group may come to have, there or in wider ones.
    """

    def __init__(self, targets: Sequence[GroupScheduler], kv: KVCacheManager, reach_tokens: Reach) -> None:
        self.targets, self.kv, self.reach_tokens = targets, kv, reach_tokens
        self._homes: dict[Request, DeviceGroup] = {}

    def home(self, request: Request) -> DeviceGroup:
        """The group chosen for a request."""
        return self._homes[request]

    def forget(self, request: Request) -> None:
        """Takes a request's home away: when it comes back its KV may be elsewhere."""
        self._homes.pop(request, None)

    def eligible(self, request: Request) -> list[GroupScheduler]:
        """Targets that are as wide as asked for, or the widest, and hold the request as long as any of them does."""
        near = [target for target in self.targets if target.group.overlaps(request.held_table.group)]
        widest = max((target.group.tp for target in near), default=1)
        fits = fitting(request, near, self.reach_tokens, min(request.min_width, widest))
        # One that has outgrown them all stays until the cutover, which it refuses.
        return fits or [target for target in near if target.group.tp == widest]

    def choose(self, requests: Sequence[Request], reserved: Mapping[Request, BlockTable]) -> None:
        """Gives a home to those that have none: long ones first, so that short ones fill what these leave.

        Args:
            requests: all that move.
            reserved: blocks that some of them have in their new groups already.
        """
        fresh = [request for request in requests if request not in self._homes]
        if not fresh:
            return
        blocks, places = self._blocks_of_others(requests, reserved), Counter[DeviceGroup]()
        for request in requests:
            if (home := self._homes.get(request)) is not None:
                blocks[home] += self._blocks(request, home)
                places[home] += 1
        for request in sorted(fresh, key=lambda each: (-each.num_tokens, each.rank)):
            home = self._best_home(request, blocks, places)
            self._homes[request] = home
            blocks[home] += self._blocks(request, home)
            places[home] += 1

    def _best_home(
        self, request: Request, blocks: Mapping[DeviceGroup, int], places: Mapping[DeviceGroup, int]
    ) -> DeviceGroup:
        """The emptiest group with room, the widest if the request prefers that; the emptiest if none has."""

        def preference(target: GroupScheduler) -> tuple[bool, int, int, int]:
            group = target.group
            fits = blocks[group] + self._blocks(request, group) <= self.kv.spec.num_blocks
            full = not fits or len(target.running) + places[group] >= target.max_running
            return full, -group.tp if request.prefers_width else 0, blocks[group], places[group]

        return min(self.eligible(request), key=preference).group

    def _blocks(self, request: Request, group: DeviceGroup) -> int:
        return self.kv.spec.blocks_for(request.num_held, group.tp)

    def _blocks_of_others(
        self, requests: Sequence[Request], reserved: Mapping[Request, BlockTable]
    ) -> Counter[DeviceGroup]:
        """For each target, the blocks on its fullest device that nobody who moves holds."""
        moving: Counter[int] = Counter()
        for table in (*(request.held_table for request in requests), *reserved.values()):
            moving.update(dict.fromkeys(table.group.device_indices, table.num_blocks))
        held = [self.kv.spec.num_blocks - allocator.num_free for allocator in self.kv.allocators]
        return Counter(
            {
                target.group: max(held[device] - moving[device] for device in target.group.device_indices)
                for target in self.targets
            }
        )
