"""What a policy sees of a scheduling state. Pure Python, no JAX."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest
from itertools import islice

from fly_jax.policy.observation import GroupLoad, Load, RequestLoad
from fly_jax.scheduling.fit import end
from fly_jax.scheduling.request import Request
from fly_jax.scheduling.state import SchedulingState
from fly_jax.scheduling.waiting import RequestQueue

# Waiting requests that a decision looks at: more are backlog enough for every layout, and would cost it milliseconds.
WAITING_SEEN = 256
WIDE_SEEN = 16


def load_of(state: SchedulingState, rates: tuple[float, float], now: float, last_switch: float | None) -> Load:
    """What a policy sees of a state.

    Args:
        rates: see :meth:`LoadEstimator.rates`.
        now, last_switch: seconds; None if the layout never changed.
    """
    groups = tuple(
        GroupLoad(group, _requests(each.running), state.kv.free_blocks(group)) for group, each in state.groups.items()
    )
    return Load(
        now=now,
        layout=state.layout,
        groups=groups,
        waiting=_requests(_waiting_seen(state.waiting)),
        paused=tuple(
            each._replace(holder=request.held_table.group)
            for each, request in zip(_requests(state.paused), state.paused, strict=True)
        ),
        prompt_rate=rates[0],
        output_rate=rates[1],
        last_switch=last_switch,
    )


def _waiting_seen(queue: RequestQueue) -> list[Request]:
    """The head of the queue; of those behind it the oldest, and those that only some layouts serve."""
    head = list(islice(queue, WAITING_SEEN))
    if len(queue) == len(head):
        return head
    behind = [request for request in islice(queue, WAITING_SEEN, None) if request.min_width > 1]
    return list(dict.fromkeys([*head, *queue.oldest(1), *nsmallest(WIDE_SEEN, behind, key=lambda each: each.order)]))


def _requests(requests: Sequence[Request]) -> tuple[RequestLoad, ...]:
    return tuple([_request(request) for request in requests])


def _request(request: Request) -> RequestLoad:
    return RequestLoad(request.num_tokens, request.num_uncomputed, end(request), request.min_width, request.priority)
