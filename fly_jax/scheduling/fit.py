"""Whether a request fits somewhere: the one place that says so. Pure functions, no JAX.

A request fits a group *now* if the group's pools hold what it needs for its next token (``num_needed``), and *to its
end* if they, or those of wider groups that it can be moved to, hold all that it may become (``end``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from fly_jax.errors import LayoutError
from fly_jax.kv.blocks import KVCacheSpec
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.scheduling.group import GroupScheduler
from fly_jax.scheduling.request import Request

# Tokens of the longest context that a request which starts in a group may come to have, there or in wider ones.
Reach = Callable[[DeviceGroup], int]


def end(request: Request) -> int:
    """Tokens of a request that generates all that it may."""
    return len(request.prompt_ids) + request.limit


def fitting(request: Request, groups: Sequence[GroupScheduler], reach: Reach, width: int) -> list[GroupScheduler]:
    """Groups of at least some width that hold a request now, and as long as any of them ever does."""
    furthest = max((reach(each.group) for each in groups), default=0)
    until = min(end(request), furthest)
    return [
        each
        for each in groups
        if each.group.tp >= width and reach(each.group) >= until and each.capacity_tokens >= request.num_needed
    ]


def check_all_fit(spec: KVCacheSpec, requests: Iterable[Request], degree: int) -> None:
    """Refuses groups that are too small for requests with KV.

    Raises:
        LayoutError: naming the first such request.
    """
    capacity = spec.capacity_tokens(degree)
    for request in requests:
        if request.num_needed > capacity:
            raise LayoutError(
                f"request {request.request_id} holds {request.num_tokens} tokens but the widest group on "
                f"its devices would hold {capacity}: wait for it to end or keep a wider group there"
            )


def check_fits_near(spec: KVCacheSpec, requests: Iterable[Request], target: Layout) -> None:
    """Refuses a layout whose groups on a request's devices are all too small for it.

    Raises:
        LayoutError: naming the first such request.
    """
    for request in requests:
        near = [group.tp for group in target.groups if group.overlaps(request.held_table.group)]
        check_all_fit(spec, [request], max(near))


def check_waiting_fit(spec: KVCacheSpec, waiting: Iterable[Request], layout: Layout) -> None:
    """Refuses a layout in which a request that waits could not start.

    Raises:
        LayoutError: naming the first such request.
    """
    capacity = spec.capacity_tokens(layout.widest)
    for request in waiting:
        if request.num_tokens >= capacity and not request.will_sample_no_more:
            raise LayoutError(
                f"request {request.request_id} waits with {request.num_tokens} tokens but the widest group of "
                f"{layout} holds {capacity}: wait for it to end or keep a wider group"
            )
